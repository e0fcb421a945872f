/* select.c - which tokens of a head stay */
#include "core.h"

#include <math.h>
#include <stdlib.h>

typedef struct ra_ranked {
    float   score;
    int32_t i;
} ra_ranked;

/* higher score first; among equals the newer token first */
static int ra_ranked_compare(const void * pa, const void * pb) {
    const ra_ranked * a = pa;
    const ra_ranked * b = pb;
    if (a->score != b->score) {
        return a->score > b->score ? -1 : 1;
    }
    return a->i > b->i ? -1 : 1;
}

ra_status ra_select_keep(int32_t n_kv, const float * score, int32_t budget, uint8_t * keep) {
    if (n_kv < 1 || n_kv > RA_MAX_TOKENS || budget < 0 || score == NULL || keep == NULL) {
        return ra_error(RA_STATUS_INVALID, "ra_select_keep: n_kv = %d, budget = %d", n_kv, budget);
    }
    int32_t n_must = 0;
    for (int32_t i = 0; i < n_kv; ++i) {
        n_must += score[i] == INFINITY;
    }
    if (n_must > budget) {
        return ra_error(RA_STATUS_BUDGET,
                        "budget %d cannot hold the %d tokens that must stay (sinks, protected "
                        "prompt, window): raise the budget or protect less",
                        budget, n_must);
    }
    ra_ranked * ranked = ra_calloc((size_t) n_kv, sizeof(*ranked));
    if (ranked == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory ranking %d tokens", n_kv);
    }
    for (int32_t i = 0; i < n_kv; ++i) {
        ranked[i].score = isnan(score[i]) ? -INFINITY : score[i];
        ranked[i].i     = i;
        keep[i]         = 0;
    }
    qsort(ranked, (size_t) n_kv, sizeof(*ranked), ra_ranked_compare);
    for (int32_t r = 0; r < n_kv && r < budget; ++r) {
        keep[ranked[r].i] = 1;
    }
    ra_free(ranked);
    return RA_STATUS_OK;
}
