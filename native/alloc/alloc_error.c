/* error allocation over heads, at every compression: who loses least gives most
 *
 * Where a score is what leaving a token out costs (policy "mass": attention times the value's distance from
 * the mean), the cost of a head's budget is the sum of the scores that go. The split of least total cost
 * gives one token after another to the head whose best token left scores highest:
 *
 *   b_h = base + number of tokens of head h among the R best of the layer,  R = (B(l) - base) * H
 *
 * each at least mu * R / H and at most clip_hi * R / H above the base; ties go to the lower head. Scores
 * that are shares of a whole are taken times n_kv first, as "adaptive" does. After Ada-KV, arXiv:2407.11550
 * (whose floor is a fixed share of the budget, too). */
#include "alloc.h"

#include <math.h>
#include <stdlib.h>

typedef struct ra_bid {
    float   score;
    int32_t ih;
} ra_bid;

/* best first; of equals the lower head first */
static int ra_bid_compare(const void * pa, const void * pb) {
    const ra_bid * a = pa;
    const ra_bid * b = pb;
    if (a->score != b->score) {
        return a->score > b->score ? -1 : 1;
    }
    return a->ih < b->ih ? -1 : a->ih > b->ih;
}

/* bids [sum of n_kv] out, best first; returns how many tokens may go */
static size_t ra_list_bids(const ra_alloc_heads_in * in, ra_bid * bids) {
    const float * score = in->score;
    size_t        n     = 0;
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        const float factor = in->scores_are_shares ? (float) in->n_kv[ih] : 1.0f;
        for (int32_t i = 0; i < in->n_kv[ih]; ++i, ++score) {
            if (*score < INFINITY) {
                const float x = *score * factor;
                bids[n++]     = (ra_bid){ isfinite(x) ? x : *score, ih };
            }
        }
    }
    qsort(bids, n, sizeof(*bids), ra_bid_compare);
    return n;
}

ra_status ra_alloc_heads_error(const ra_config * cfg, const ra_alloc_heads_in * in,
                               int32_t * budgets) {
    const int32_t n_head = in->n_head_kv;
    int64_t       total  = 0;
    size_t        n_bids = 0;
    for (int32_t ih = 0; ih < n_head; ++ih) {
        total += in->initial[ih];
        n_bids += (size_t) in->n_kv[ih];
    }
    const int64_t rest = total - (int64_t) n_head * in->base;
    if (rest < n_head) {
        return ra_error(
            RA_STATUS_BUDGET,
            "a budget of %lld tokens on average cannot hold the %d that every head keeps "
            "(sinks or protected prompt, window) and 1 to choose: raise the budget or "
            "protect less",
            (long long) (total / n_head), in->base);
    }
    ra_bid * bids = ra_calloc(n_bids, sizeof(*bids));
    if (bids == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory pooling %zu scores", n_bids);
    }
    n_bids                = ra_list_bids(in, bids);
    const double  mean    = (double) rest / n_head;
    const int32_t floor_h = (int32_t) (cfg->mu * mean);
    const int32_t least   = floor_h > 1 ? floor_h : 1;
    const int32_t ceil_h  = (int32_t) ceil(mean);
    const int32_t by_clip = (int32_t) fmin(cfg->clip_hi * mean, (double) RA_MAX_TOKENS);
    const int32_t most    = by_clip > ceil_h ? by_clip : ceil_h;
    int64_t       left    = rest - (int64_t) n_head * least;
    for (int32_t ih = 0; ih < n_head; ++ih) {
        budgets[ih] = in->base;
    }
    /* the first `least` tokens of a head are its own */
    for (size_t i = 0; i < n_bids; ++i) {
        int32_t *  b      = &budgets[bids[i].ih];
        const bool is_own = *b < in->base + least;
        if (*b < in->base + most && (is_own || left > 0)) {
            ++*b;
            left -= is_own ? 0 : 1;
        }
    }
    /* what nobody bids for, since heads hold less than their budgets: evenly, the lower head first */
    int64_t given = 0;
    for (int32_t ih = 0; ih < n_head; ++ih) {
        budgets[ih] = budgets[ih] < in->base + least ? in->base + least : budgets[ih];
        given += budgets[ih];
    }
    for (; given < total; ++given) {
        int32_t lowest = 0;
        for (int32_t ih = 1; ih < n_head; ++ih) {
            lowest = budgets[ih] < budgets[lowest] ? ih : lowest;
        }
        ++budgets[lowest];
    }
    ra_free(bids);
    return RA_STATUS_OK;
}
