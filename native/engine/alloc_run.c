/* alloc_run.c - an allocator's budgets from plain arrays: the same code path as a cache's. For tests and
 * for writing allocators. */
#include "registry.h"

ra_status ra_alloc_layers_run(const ra_config * cfg, int32_t n_layer, int32_t * budgets) {
    const ra_status st = ra_config_check(cfg);
    if (st != RA_STATUS_OK) {
        return st;
    }
    if (n_layer < 1 || n_layer > 4096 || budgets == NULL) {
        return ra_error(RA_STATUS_INVALID, "n_layer = %d is out of range: must be 1 to 4096",
                        n_layer);
    }
    const ra_alloc_layers * alloc =
        ra_alloc_layers_find(cfg->layer_alloc != NULL ? cfg->layer_alloc : "uniform");
    return alloc->run_heads != NULL ? alloc->run_heads(cfg, n_layer, budgets)
                                    : alloc->run(cfg, n_layer, budgets);
}

ra_status ra_alloc_heads_run(const ra_config * cfg, int32_t n_head_kv, const int32_t * n_kv,
                             const float * score, const int32_t * initial, int32_t * budgets) {
    const ra_status st = ra_config_check(cfg);
    if (st != RA_STATUS_OK) {
        return st;
    }
    if (n_head_kv < 1 || n_head_kv > 4096 || n_kv == NULL || score == NULL || initial == NULL ||
        budgets == NULL) {
        return ra_error(RA_STATUS_INVALID, "n_head_kv = %d is out of range: must be 1 to 4096",
                        n_head_kv);
    }
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        if (n_kv[ih] < 0 || n_kv[ih] > RA_MAX_TOKENS || initial[ih] < 0 ||
            initial[ih] > RA_MAX_TOKENS) {
            return ra_error(RA_STATUS_INVALID, "head %d: n_kv = %d, initial = %d", ih, n_kv[ih],
                            initial[ih]);
        }
    }
    const ra_alloc_heads_in in = {
        .n_head_kv = n_head_kv,
        .base      = ra_config_base(cfg, cfg->n_protect),
        .n_kv      = n_kv,
        .score     = score,
        .initial   = initial,

        .scores_are_shares = (ra_policy_find(cfg->policy)->gives & RA_GIVES_SHARES) != 0,
    };
    return ra_alloc_heads_find(cfg->head_alloc != NULL ? cfg->head_alloc : "uniform")
        ->run(cfg, &in, budgets);
}
