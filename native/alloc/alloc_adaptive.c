/* adaptive allocation over heads, at every compression - ReasonAlloc, arXiv:2606.11164
 *
 *   R     = (B(l) - base) * H              what remains once every head has what must stay
 *   tau   = the R-th largest score of all heads of the layer, pooled, of tokens that may go
 *   d_h   = number of tokens of head h with score >= tau, of those that may go
 *   b_h   = base + robustify(d, R), each at least mu * R / H above the base
 *
 * Differs from the paper, which pools and splits all B(l) * H: tokens that must stay (sinks or protected
 * prompt, window; score +INFINITY) are the same in every head, so they say nothing about a head's demand
 * and cannot be taken from it. The least share keeps a starved head from losing the history that it
 * would need ever to score well again.
 *
 * "adaptive" also makes scores of different heads comparable before it pools them. R-KV's are made of
 * softmaxes over a head's own tokens, so they come to about -0.9 / n_kv where nothing stands out: a head
 * that holds more scores higher for that alone, gets more at the next compression, and heads that do not
 * differ run away from each other. Such scores are taken times n_kv. "adaptive-literal" pools them as they
 * are, as the paper does. */
#include "alloc.h"

#include <math.h>
#include <stdlib.h>

static int ra_descending(const void * pa, const void * pb) {
    const float a = *(const float *) pa;
    const float b = *(const float *) pb;
    return a < b ? 1 : (a > b ? -1 : 0);
}

/* pooled [sum of n_kv] <- scores of tokens that may go, times n_kv of their head with `by_count`; others
 * +INFINITY */
static void ra_comparable_scores(const ra_alloc_heads_in * in, bool by_count, float * pooled) {
    const float * score = in->score;
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        const float factor = by_count ? (float) in->n_kv[ih] : 1.0f;
        for (int32_t i = 0; i < in->n_kv[ih]; ++i, ++score) {
            const float x = *score * factor;
            *pooled++     = isfinite(*score) && !isfinite(x) ? *score : x;
        }
    }
}

/* demand [n_head_kv] out: tokens of each head among the n_best that may go */
static ra_status ra_head_demand(const ra_alloc_heads_in * in, bool by_count, int64_t n_best,
                                double * demand) {
    size_t n = 0;
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        n += (size_t) in->n_kv[ih];
    }
    float * all  = ra_calloc(n, sizeof(*all));
    float * free = ra_calloc(n, sizeof(*free));
    if (all == NULL || free == NULL) {
        ra_free(all);
        ra_free(free);
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory pooling %zu scores", n);
    }
    ra_comparable_scores(in, by_count, all);
    size_t n_free = 0;
    for (size_t i = 0; i < n; ++i) {
        if (all[i] < INFINITY) {
            free[n_free++] = all[i];
        }
    }
    qsort(free, n_free, sizeof(*free), ra_descending);
    const size_t  rank  = n_best > 0 && (size_t) n_best < n_free ? (size_t) n_best : n_free;
    const float   tau   = rank == 0 ? 0.0f : free[rank - 1];
    const float * score = all;
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        int32_t count = 0;
        for (int32_t i = 0; i < in->n_kv[ih]; ++i, ++score) {
            count += *score >= tau && *score < INFINITY;
        }
        demand[ih] = count;
    }
    ra_free(all);
    ra_free(free);
    return RA_STATUS_OK;
}

static ra_status ra_adaptive(const ra_config * cfg, const ra_alloc_heads_in * in, bool by_count,
                             int32_t * budgets) {
    int64_t total = 0;
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        total += in->initial[ih];
    }
    double * demand = ra_calloc((size_t) in->n_head_kv, sizeof(*demand));
    if (demand == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for %d heads", in->n_head_kv);
    }
    const int64_t rest = total - (int64_t) in->n_head_kv * in->base;
    ra_status     st   = ra_head_demand(in, by_count, rest, demand);
    if (st == RA_STATUS_OK) {
        const ra_robustify_params p     = { cfg->gamma, cfg->clip_lo, cfg->clip_hi };
        const int32_t             least = (int32_t) (cfg->mu * (double) rest / in->n_head_kv);
        st = ra_split_over_base(&p, in->n_head_kv, demand, total, in->base, least > 1 ? least : 1,
                                budgets);
    }
    ra_free(demand);
    return st;
}

ra_status ra_alloc_heads_adaptive(const ra_config * cfg, const ra_alloc_heads_in * in,
                                  int32_t * budgets) {
    return ra_adaptive(cfg, in, in->scores_are_shares, budgets);
}

ra_status ra_alloc_heads_adaptive_literal(const ra_config * cfg, const ra_alloc_heads_in * in,
                                          int32_t * budgets) {
    return ra_adaptive(cfg, in, false, budgets);
}
