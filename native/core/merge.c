/* merge.c - what becomes of evicted tokens when they are merged into kept ones; see core.h */
#include "core.h"

#include <math.h>

int32_t ra_merge_find_target(int32_t n_kv, const uint8_t * can_take, const float * cos) {
    int32_t best = -1;
    for (int32_t i = 0; i < n_kv; ++i) {
        if (can_take[i] && (best < 0 || cos[i] > cos[best])) {
            best = i;
        }
    }
    return best;
}

void ra_merge_compare(int32_t j, const uint8_t * can_take, const float * cos, float * closest,
                      int32_t * target) {
    if (closest[j] < INFINITY) {
        const int32_t best = ra_merge_find_target(j, can_take, cos);
        if (best >= 0) {
            target[j]  = best;
            closest[j] = cos[best];
        }
        return;
    }
    for (int32_t i = 0; i < j && can_take[j]; ++i) {
        target[i]  = cos[i] > closest[i] ? j : target[i];
        closest[i] = cos[i] > closest[i] ? cos[i] : closest[i];
    }
}

/* largest cosine with a token of [first, n) of more mass than `own`; -1: there is none */
static float ra_most_alike(int32_t n, int32_t first, float own, const float * mass,
                           const float * cos) {
    float   lane[8] = { -1.0f, -1.0f, -1.0f, -1.0f, -1.0f, -1.0f, -1.0f, -1.0f };
    int32_t i       = first;
    for (; i + 8 <= n; i += 8) {
        for (int32_t k = 0; k < 8; ++k) {
            const float c = mass[i + k] > own ? cos[i + k] : -1.0f;
            lane[k]       = c > lane[k] ? c : lane[k];
        }
    }
    for (; i < n; ++i) {
        lane[0] = mass[i] > own && cos[i] > lane[0] ? cos[i] : lane[0];
    }
    for (int32_t k = 1; k < 8; ++k) {
        lane[0] = lane[k] > lane[0] ? lane[k] : lane[0];
    }
    return lane[0] < 1.0f ? lane[0] : 1.0f;
}

void ra_twin_compare(int32_t j, int32_t first, const float * mass, const float * cos,
                     float * twin) {
    const float own = mass[j];
    twin[j]         = ra_most_alike(j, first, own, mass, cos);
    for (int32_t i = 0; i < j && j >= first; ++i) {
        const float c     = cos[i] < 1.0f ? cos[i] : 1.0f;
        const float other = own > mass[i] ? c : -1.0f;
        twin[i]           = other > twin[i] ? other : twin[i];
    }
}

void ra_merge_shares(int32_t n_kv, const int32_t * target, const float * mass, float bias_max,
                     const float * bias, float * share, float * bias_out) {
    /* bias_out holds the mass that a token takes over, until it becomes the bias */
    for (int32_t i = 0; i < n_kv; ++i) {
        bias_out[i] = 0.0f;
    }
    for (int32_t j = 0; j < n_kv; ++j) {
        if (target[j] >= 0) {
            bias_out[target[j]] += mass[j];
        }
    }
    for (int32_t i = 0; i < n_kv; ++i) {
        if (target[i] < 0) {
            const float whole = mass[i] + bias_out[i];
            share[i]          = bias_out[i] > 0.0f ? mass[i] / whole : 1.0f;
        }
    }
    for (int32_t j = 0; j < n_kv; ++j) {
        if (target[j] >= 0) {
            const float whole = mass[target[j]] + bias_out[target[j]];
            share[j]          = whole > 0.0f ? mass[j] / whole : 0.0f;
        }
    }
    for (int32_t i = 0; i < n_kv; ++i) {
        float grown = bias[i];
        if (target[i] < 0 && bias_out[i] > 0.0f) {
            grown = mass[i] > 0.0f ? bias[i] + logf((mass[i] + bias_out[i]) / mass[i]) : bias_max;
        }
        bias_out[i] = grown < bias_max ? grown : bias_max;
    }
}

void ra_merge_rows(int32_t n_kv, int32_t dim, const int32_t * target, const float * share,
                   float * rows) {
    for (int32_t i = 0; i < n_kv; ++i) {
        float * row = rows + (size_t) i * (size_t) dim;
        for (int32_t d = 0; target[i] < 0 && share[i] < 1.0f && d < dim; ++d) {
            row[d] *= share[i];
        }
    }
    for (int32_t j = 0; j < n_kv; ++j) {
        if (target[j] >= 0) {
            const float * from = rows + (size_t) j * (size_t) dim;
            float *       to   = rows + (size_t) target[j] * (size_t) dim;
            for (int32_t d = 0; d < dim; ++d) {
                to[d] += share[j] * from[d];
            }
        }
    }
}
