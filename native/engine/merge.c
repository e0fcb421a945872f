/* merge.c - plans which kept token takes each evicted one; see core/core.h for the formulas */
#include "cache.h"

#include <math.h>

ra_merge * ra_merge_make(int32_t n_slots) {
    const size_t n = (size_t) n_slots;
    ra_merge *   m = ra_calloc(1, sizeof(*m));
    if (m == NULL) {
        return NULL;
    }
    m->bias     = ra_calloc(n, sizeof(float));
    m->can_take = ra_calloc(n, sizeof(uint8_t));
    m->target   = ra_calloc(n, sizeof(int32_t));
    m->share    = ra_calloc(n, sizeof(float));
    m->bias_out = ra_calloc(n, sizeof(float));
    if (m->bias == NULL || m->can_take == NULL || m->target == NULL || m->share == NULL ||
        m->bias_out == NULL) {
        ra_merge_free(m);
        return NULL;
    }
    return m;
}

size_t ra_merge_row_bytes(void) {
    return 3 * sizeof(float) + sizeof(int32_t) + sizeof(uint8_t);
}

void ra_merge_free(ra_merge * m) {
    if (m != NULL) {
        ra_free(m->bias);
        ra_free(m->can_take);
        ra_free(m->target);
        ra_free(m->share);
        ra_free(m->bias_out);
        ra_free(m);
    }
}

ra_status ra_merge_plan(ra_cache * c, const ra_cache_ops * ops, int32_t il, const float * score) {
    ra_layer * l = &c->layers[il];
    ra_merge * m = l->merge;
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        for (int32_t i = 0; i < l->used[ih]; ++i, ++score) {
            const int32_t row = l->offset[ih] + i;
            m->can_take[row]  = l->keep[row] && *score < INFINITY;
            m->target[row]    = -1;
        }
    }
    const float *   mass = c->mass;
    const ra_status st   = ops->find_targets(ops->user, il);
    for (int32_t ih = 0; ih < l->n_head_kv && st == RA_STATUS_OK; ++ih) {
        const int32_t at = l->offset[ih];
        ra_merge_shares(l->used[ih], m->target + at, mass, c->settings.cfg.bias_max, m->bias + at,
                        m->share + at, m->bias_out + at);
        mass += l->used[ih];
    }
    return st;
}

void ra_merge_commit(ra_layer * l) {
    l->merge->has_bias = false;
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        for (int32_t row = l->offset[ih]; row < l->offset[ih] + l->used[ih]; ++row) {
            l->merge->bias[row] = l->merge->bias_out[row];
            l->merge->has_bias =
                l->merge->has_bias || (l->keep[row] && l->merge->bias[row] != 0.0f);
        }
    }
}
