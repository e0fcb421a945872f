/* adaptive allocation over heads, at every compression - ReasonAlloc, arXiv:2606.11164
 *
 *   tau   = the (B(l) * H)-th largest score of all heads of the layer, pooled
 *   d_h   = number of tokens of head h with score >= tau
 *   b_h   = robustify(d, B(l) * H), each at least mu * B(l)
 *
 * Tokens that must stay (score +INFINITY) are in every head and count. The floor keeps a starved head
 * from losing the history that it would need ever to score well again. */
#include "alloc.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int ra_descending(const void * pa, const void * pb) {
    const float a = *(const float *) pa;
    const float b = *(const float *) pb;
    return a < b ? 1 : (a > b ? -1 : 0);
}

/* demand [n_head_kv] out */
static ra_status ra_head_demand(const ra_alloc_heads_in * in, int64_t total, double * demand) {
    size_t n = 0;
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        n += (size_t) in->n_kv[ih];
    }
    float * pooled = ra_calloc(n, sizeof(*pooled));
    if (pooled == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory pooling %zu scores", n);
    }
    memcpy(pooled, in->score, n * sizeof(*pooled));
    qsort(pooled, n, sizeof(*pooled), ra_descending);
    const float tau = n == 0 ? 0.0f : pooled[(size_t) total <= n ? (size_t) total - 1 : n - 1];
    ra_free(pooled);

    const float * score = in->score;
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        int32_t count = 0;
        for (int32_t i = 0; i < in->n_kv[ih]; ++i) {
            count += *score++ >= tau;
        }
        demand[ih] = count;
    }
    return RA_STATUS_OK;
}

ra_status ra_alloc_heads_adaptive(const ra_config * cfg, const ra_alloc_heads_in * in,
                                  int32_t * budgets) {
    int64_t total = 0;
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        total += in->initial[ih];
    }
    double * demand = ra_calloc((size_t) in->n_head_kv, sizeof(*demand));
    if (demand == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for %d heads", in->n_head_kv);
    }
    ra_status st = ra_head_demand(in, total, demand);
    if (st == RA_STATUS_OK) {
        const ra_robustify_params p     = { cfg->gamma, cfg->clip_lo, cfg->clip_hi };
        const int64_t             least = (int64_t) (cfg->mu * (double) total / in->n_head_kv);
        const int32_t             floor = least > in->floor ? (int32_t) least : in->floor;
        st = ra_robustify(&p, in->n_head_kv, demand, total, floor, budgets);
    }
    ra_free(demand);
    return st;
}
