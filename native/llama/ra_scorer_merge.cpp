// ra_scorer_merge.cpp - what twins and merging ask of the scorer: keys compared with one another
//
// Targets are found among the cosines that twins were found by, where one graph had room for those of the whole
// layer: they lie in the scratch until the next graph is made. Otherwise evicted keys are compared anew.
#include "ra_scorer.h"

#include <cmath>

ra_status ra_scorer::find_twins(int32_t il, const float * masses, float * twins) {
    const ra_layer & l = cache().layers[il];
    mass               = masses;
    twin               = twins;
    place_heads(il);
    jobs.clear();
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        ra_list_jobs_all(jobs, ih, l.used[ih]);
    }
    const ra_status st = run_jobs(il);
    twins_of           = st == RA_STATUS_OK && is_whole ? il : -1;
    return st;
}

// of the cosines at hand
void ra_scorer::find_targets_again(int32_t il) {
    const ra_layer & l = cache().layers[il];
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        const uint8_t * keep = l.keep + l.offset[ih];
        std::transform(keep, keep + l.used[ih], closest.begin() + (ptrdiff_t) tokens_at[ih],
                       [](uint8_t stays) { return stays ? INFINITY : -INFINITY; });
    }
    for (const ra_job & j : jobs) {
        const float *    rows = fetch(j.out, j.skip, (j.n_rows - 1) * j.stride + j.n_kv);
        const ra_merge * m    = l.merge;
        const int32_t    at   = l.offset[j.ih];
        for (int32_t r = 0; r < j.n_rows; ++r) {
            ra_merge_compare(j.row0 + r, m->can_take + at, rows + r * j.stride,
                             closest.data() + tokens_at[j.ih], m->target + at);
        }
    }
}

ra_status ra_scorer::find_targets(int32_t il) {
    const ra_layer & l = cache().layers[il];
    place_heads(il);
    if (twins_of == il) {
        find_targets_again(il);
        return RA_STATUS_OK;
    }
    jobs.clear();
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        int32_t * list    = going.data() + tokens_at[ih];
        int32_t   n_going = 0;
        for (int32_t i = 0; i < l.used[ih]; ++i) {
            if (!l.keep[l.offset[ih] + i]) {
                list[n_going++] = i;
            }
        }
        ra_list_jobs_going(jobs, ih, l.used[ih], n_going);
    }
    return run_jobs(il);
}

// the list of tokens that a job has as an input
const int32_t * ra_scorer::index_of(const ra_job & j) const {
    const std::vector<int32_t> & list = j.kind == RA_JOB_COSINES_GOING ? going : again;
    return list.data() + tokens_at[j.ih] + size_t(j.row0);
}

void ra_scorer::read_twins(int32_t il, const ra_job & j) {
    const float *    rows  = fetch(j.out, j.skip, (j.n_rows - 1) * j.stride + j.n_kv);
    const ra_layer & l     = cache().layers[il];
    const size_t     at    = tokens_at[j.ih];
    const int32_t *  pos   = l.pos + l.offset[j.ih];
    const int32_t *  end   = pos + l.used[j.ih];
    const int32_t    first = int32_t(std::lower_bound(pos, end, cache().settings.cfg.n_sink) - pos);
    for (int32_t r = 0; r < j.n_rows; ++r) {
        ra_twin_compare(j.row0 + r, first, mass + at, rows + r * j.stride, twin + at);
    }
}

void ra_scorer::read_going(int32_t il, const ra_job & j) {
    const float *    rows = fetch(j.out, j.skip, (j.n_rows - 1) * j.stride + j.n_kv);
    const ra_merge * m    = cache().layers[il].merge;
    const int32_t    at   = cache().layers[il].offset[j.ih];
    const int32_t *  list = index_of(j);
    for (int32_t r = 0; r < j.n_rows; ++r) {
        m->target[at + list[r]] =
            ra_merge_find_target(j.n_kv, m->can_take + at, rows + r * j.stride);
    }
}
