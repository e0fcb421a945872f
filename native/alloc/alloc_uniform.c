/* uniform allocation: every layer the configured budget, every head what its layer was made with */
#include "alloc.h"

ra_status ra_alloc_layers_uniform(const ra_config * cfg, int32_t n_layer, int32_t * budgets) {
    for (int32_t il = 0; il < n_layer; ++il) {
        budgets[il] = cfg->budget;
    }
    return RA_STATUS_OK;
}

ra_status ra_alloc_heads_uniform(const ra_config * cfg, const ra_alloc_heads_in * in,
                                 int32_t * budgets) {
    (void) cfg;
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        budgets[ih] = in->initial[ih];
    }
    return RA_STATUS_OK;
}
