/* trace.c - tells a callback what a compression has planned */
#include "cache.h"

#include <math.h>
#include <string.h>

/* dst [sum of used and n_dead] <- rows of src [n_slots], of values of `size` bytes: those in use, with the
 * dead ones before them */
static void * ra_gather_rows(const ra_layer * l, const void * src, size_t size) {
    char * dst = ra_calloc((size_t) l->n_slots, size);
    size_t n   = 0;
    for (int32_t ih = 0; ih < l->n_head_kv && dst != NULL; ++ih) {
        const size_t n_rows = (size_t) l->n_dead[ih] + (size_t) l->used[ih];
        memcpy(dst + n * size, (const char *) src + (size_t) (l->offset[ih] - l->n_dead[ih]) * size,
               n_rows * size);
        n += n_rows;
    }
    return dst;
}

/* what the trace says of dead rows: score -INFINITY, not kept */
static void ra_trace_dead(const ra_cache * c, const ra_layer * l, float * score, uint8_t * keep,
                          int32_t * n_kv) {
    const float * live = c->score;
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        for (int32_t i = 0; i < l->n_dead[ih]; ++i) {
            *score++ = -INFINITY;
            *keep++  = 0;
        }
        memcpy(score, live, (size_t) l->used[ih] * sizeof(*score));
        score += l->used[ih];
        live += l->used[ih];
        keep += l->used[ih];
        n_kv[ih] = l->n_dead[ih] + l->used[ih];
    }
}

void ra_trace_layer(const ra_cache * c, int32_t il) {
    const ra_layer * l      = &c->layers[il];
    const ra_merge * m      = l->merge;
    int32_t *        pos    = ra_gather_rows(l, l->pos, sizeof(*pos));
    uint8_t *        keep   = ra_gather_rows(l, l->keep, sizeof(*keep));
    float *          score  = ra_calloc((size_t) l->n_slots, sizeof(*score));
    int32_t *        n_kv   = ra_calloc((size_t) l->n_head_kv, sizeof(*n_kv));
    int32_t *        target = m != NULL ? ra_gather_rows(l, m->target, sizeof(*target)) : NULL;
    float *          share  = m != NULL ? ra_gather_rows(l, m->share, sizeof(*share)) : NULL;
    float *          bias   = m != NULL ? ra_gather_rows(l, m->bias_out, sizeof(*bias)) : NULL;
    if (pos != NULL && keep != NULL && score != NULL && n_kv != NULL &&
        (m == NULL || (target != NULL && share != NULL && bias != NULL))) {
        ra_trace_dead(c, l, score, keep, n_kv);
        const ra_trace_event event = {
            .seq_id        = c->seq_id,
            .i_compression = c->n_compressions,
            .n_pos         = c->n_pos,
            .il            = il,
            .n_head_kv     = l->n_head_kv,
            .n_kv          = n_kv,
            .pos           = pos,
            .score         = score,
            .keep          = keep,
            .budgets       = l->planned,
            .target        = target,
            .share         = share,
            .bias          = bias,
        };
        c->trace(c->trace_user, &event);
    }
    ra_free(pos);
    ra_free(keep);
    ra_free(score);
    ra_free(n_kv);
    ra_free(target);
    ra_free(share);
    ra_free(bias);
}
