// ra_score_pairs.cpp - see ra_score_pairs.h
#include "ra_score_pairs.h"

#include <cmath>

void ra_pairs_find_twins(const ra_layer & l, const ra_job & j, const float * rows, int32_t n_sink,
                         const float * mass, float * twin) {
    const int32_t * pos   = l.pos + l.offset[j.ih];
    const int32_t   first = int32_t(std::lower_bound(pos, pos + l.used[j.ih], n_sink) - pos);
    for (int32_t r = 0; r < j.n_rows; ++r) {
        ra_twin_compare(j.row0 + r, first, mass, rows + r * j.stride, twin);
    }
}

void ra_pairs_find_targets(const ra_layer & l, const ra_job & j, const float * rows,
                           float * closest) {
    const int32_t at = l.offset[j.ih];
    if (j.row0 == 0) {
        std::transform(l.keep + at, l.keep + at + l.used[j.ih], closest,
                       [](uint8_t stays) { return stays ? INFINITY : -INFINITY; });
    }
    for (int32_t r = 0; r < j.n_rows; ++r) {
        ra_merge_compare(j.row0 + r, l.merge->can_take + at, rows + r * j.stride, closest,
                         l.merge->target + at);
    }
}

void ra_pairs_find_targets_of(const ra_layer & l, const ra_job & j, const float * rows,
                              const int32_t * list) {
    const int32_t at = l.offset[j.ih];
    for (int32_t r = 0; r < j.n_rows; ++r) {
        l.merge->target[at + list[r]] =
            ra_merge_find_target(j.n_kv, l.merge->can_take + at, rows + r * j.stride);
    }
}

int32_t ra_pairs_list_going(const ra_layer & l, int32_t ih, int32_t * list) {
    int32_t n = 0;
    for (int32_t i = 0; i < l.used[ih]; ++i) {
        if (!l.keep[l.offset[ih] + i]) {
            list[n++] = i;
        }
    }
    return n;
}
