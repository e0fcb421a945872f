/* score.c - a policy's scores from plain arrays: the same code path as a compression, with the
 * products done by loops instead of a backend. For tests and for writing policies. */
#include "cache.h"

#include <math.h>

static float ra_dot_exact(int32_t n, const float * a, const float * b) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; ++i) {
        sum += (double) a[i] * (double) b[i];
    }
    return (float) sum;
}

/* key_sim and key_cos [n_kv] from raw keys; scratch: row [n_kv], unit [n_kv, head_dim],
 * sum [head_dim], alike [2 * n_kv] */
static void ra_key_sim_from_keys(int32_t n_kv, int32_t head_dim, const float * k,
                                 const int32_t * pos, float threshold, float * row, float * unit,
                                 float * sum, int32_t * alike, float * key_sim, float * key_cos) {
    const size_t n = (size_t) head_dim;
    for (int32_t i = 0; i < n_kv; ++i) {
        const float * ki   = k + (size_t) i * n;
        const float   norm = sqrtf(ra_dot_exact(head_dim, ki, ki));
        for (size_t d = 0; d < n; ++d) {
            unit[(size_t) i * n + d] = ki[d] / (norm > 1e-8f ? norm : 1e-8f);
        }
    }
    ra_key_cos_sums(n_kv, head_dim, unit, sum, key_sim);
    for (int32_t i = 0; i < n_kv; ++i) {
        key_cos[i] = key_sim[i] / (float) n_kv;
    }
    int32_t *     newer = alike;
    int32_t *     older = alike + n_kv;
    const int32_t n_old = ra_alike_begin(n_kv, pos, 0, NULL, newer, older);
    for (int32_t j = n_kv - 1; j >= 0; --j) {
        for (int32_t i = 0; i < j; ++i) {
            row[i] = ra_dot_exact(head_dim, unit + (size_t) j * n, unit + (size_t) i * n);
        }
        ra_alike_compare_new(n_old, j, 1, row, n_kv, threshold, newer, older);
    }
    ra_alike_finish(n_kv, head_dim, unit, pos, newer, older, key_sim, NULL);
}

static bool ra_score_args_ok(int32_t il, int32_t ih, int32_t n_kv, int32_t head_dim,
                             int32_t n_group, int32_t n_obs, const float * k, const float * q,
                             const int32_t * pos, const float * score) {
    if (il < 0 || ih < 0 || n_kv < 1 || n_kv > (1 << 20) || head_dim < 1 || head_dim > 4096 ||
        n_group < 1 || n_group > 1024 || n_obs < 0 || n_obs > n_kv || n_obs > 4096 || k == NULL ||
        (q == NULL && n_obs > 0) || pos == NULL || score == NULL || pos[0] < 0) {
        return false;
    }
    for (int32_t i = 1; i < n_kv; ++i) {
        if (pos[i] <= pos[i - 1]) {
            return false;
        }
    }
    return true;
}

ra_status ra_policy_score(const ra_config * cfg, int32_t il, int32_t ih, int32_t n_kv,
                          int32_t head_dim, int32_t n_group, int32_t n_obs, const float * k,
                          const float * q, float kq_scale, const int32_t * pos, float * score) {
    return ra_policy_score_state(cfg, il, ih, n_kv, head_dim, n_group, n_obs, k, q, kq_scale, pos,
                                 NULL, NULL, score);
}

ra_status ra_policy_score_state(const ra_config * cfg, int32_t il, int32_t ih, int32_t n_kv,
                                int32_t head_dim, int32_t n_group, int32_t n_obs, const float * k,
                                const float * q, float kq_scale, const int32_t * pos,
                                const float * state, float * state_out, float * score) {
    const ra_status st = ra_config_check(cfg);
    if (st != RA_STATUS_OK) {
        return st;
    }
    if (!ra_score_args_ok(il, ih, n_kv, head_dim, n_group, n_obs, k, q, pos, score)) {
        return ra_error(RA_STATUS_INVALID,
                        "ra_policy_score: n_kv = %d, head_dim = %d, n_group = %d, n_obs = %d, or "
                        "positions that do not ascend",
                        n_kv, head_dim, n_group, n_obs);
    }
    const size_t n_rows = (size_t) n_obs * (size_t) n_group;
    const size_t n_keys = (size_t) (n_kv + 1) * (size_t) head_dim;
    float *      buf    = ra_calloc((size_t) n_kv * (n_rows + 7) + n_keys, sizeof(*buf));
    int32_t *    alike  = ra_calloc((size_t) n_kv, 2 * sizeof(*alike));
    if (buf == NULL || alike == NULL) {
        ra_free(buf);
        ra_free(alike);
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory scoring %d tokens", n_kv);
    }
    float * key_sim = buf;
    float * work    = buf + (size_t) n_kv;
    float * key_cos = buf + 4 * (size_t) n_kv;
    float * before  = buf + 5 * (size_t) n_kv;
    float * after   = buf + 6 * (size_t) n_kv;
    float * logits  = buf + 7 * (size_t) n_kv;
    float * unit    = logits + n_rows * (size_t) n_kv;
    float * sum     = unit + (size_t) n_kv * (size_t) head_dim;
    for (size_t r = 0; r < n_rows; ++r) {
        for (int32_t j = 0; j < n_kv; ++j) {
            logits[r * (size_t) n_kv + (size_t) j] =
                kq_scale * ra_dot_exact(head_dim, q + r * (size_t) head_dim,
                                        k + (size_t) j * (size_t) head_dim);
        }
    }
    ra_key_sim_from_keys(n_kv, head_dim, k, pos, cfg->sim_threshold, work, unit, sum, alike,
                         key_sim, key_cos);
    for (int32_t i = 0; i < n_kv; ++i) {
        before[i] = after[i] = state != NULL ? state[i] : NAN;
    }

    const ra_policy * policy = ra_policy_find(cfg->policy);
    const ra_features f      = {
             .il          = il,
             .ih          = ih,
             .n_kv        = n_kv,
             .n_window    = cfg->n_window < n_kv ? cfg->n_window : n_kv,
             .n_obs       = n_obs,
             .n_group     = n_group,
             .pos         = pos,
             .obs_pos     = pos + (n_kv - n_obs),
             .attn_logits = logits,
             .key_sim     = key_sim,
             .key_cos     = key_cos,
             .state       = before,
             .state_out   = after,
             .work        = work,
    };
    policy->score(cfg, &f, score);
    ra_score_protect(cfg, cfg->n_protect, &f, score);
    for (int32_t i = 0; i < n_kv && state_out != NULL; ++i) {
        state_out[i] = after[i];
    }
    ra_free(buf);
    ra_free(alike);
    return RA_STATUS_OK;
}
