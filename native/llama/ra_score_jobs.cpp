// ra_score_jobs.cpp - see ra_score_graph.h: what a compression has to compute for a layer
#include "ra_score_graph.h"

#include <algorithm>

// logits and masses of all heads first: they want the keys as they are
void ra_list_jobs(std::vector<ra_job> & jobs, const int32_t * n_kv, const int32_t * n_old,
                  int32_t n_head_kv, int32_t n_obs, uint32_t needs) {
    jobs.clear();
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        const bool is_seen = n_kv[ih] > 0 && n_obs > 0;
        if (is_seen && (needs & RA_FEATURE_ATTN_LOGITS)) {
            jobs.push_back({ RA_JOB_LOGITS, ih, n_kv[ih], 0, n_obs });
        }
        if (is_seen && (needs & RA_FEATURE_ATTN_MASS)) {
            jobs.push_back({ RA_JOB_MASS, ih, n_kv[ih], 0, n_obs });
        }
    }
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        if (n_kv[ih] == 0) {
            continue;
        }
        // newest rows first, as ra_alike_compare_new() wants them
        const int32_t n_block = (int32_t) ra_score_block_rows(n_kv[ih]);
        for (int32_t end = n_kv[ih]; end > n_old[ih] && (needs & RA_FEATURE_KEY_SIM);) {
            const int32_t n_rows = std::min(n_block, end - n_old[ih]);
            jobs.push_back({ RA_JOB_COSINES, ih, end, end - n_rows, n_rows });
            end -= n_rows;
        }
        if (needs & (RA_FEATURE_KEY_SIM | RA_FEATURE_KEY_COS)) {
            jobs.push_back({ RA_JOB_COS_SUMS, ih, n_kv[ih], 0, 0 });
        }
        if (needs & RA_FEATURE_VALUE_NORM) {
            jobs.push_back({ RA_JOB_VALUE_NORMS, ih, n_kv[ih], 0, 0 });
        }
        if (needs & RA_FEATURE_VALUE_DIST) {
            jobs.push_back({ RA_JOB_VALUES, ih, n_kv[ih], 0, 0 });
        }
        if (needs & RA_FEATURE_KEYS) {
            jobs.push_back({ RA_JOB_KEYS, ih, n_kv[ih], 0, 0 });
        }
    }
}

void ra_list_jobs_all(std::vector<ra_job> & jobs, int32_t ih, int32_t n_kv) {
    const int32_t n_block = (int32_t) ra_score_block_rows(n_kv);
    for (int32_t i = 0; i < n_kv; i += n_block) {
        const int32_t end = std::min(i + n_block, n_kv);
        jobs.push_back({ RA_JOB_COSINES_ALL, ih, end, i, end - i });
    }
}

void ra_list_jobs_going(std::vector<ra_job> & jobs, int32_t ih, int32_t n_kv, int32_t n_going) {
    const int32_t n_block = (int32_t) ra_score_block_rows(n_kv);
    for (int32_t i = 0; i < n_going; i += n_block) {
        jobs.push_back({ RA_JOB_COSINES_GOING, ih, n_kv, i, std::min(n_block, n_going - i) });
    }
}
