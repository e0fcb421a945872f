/* config.h - a checked copy of the public configuration */
#ifndef RA_CONFIG_H
#define RA_CONFIG_H

#include "registry.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ra_config.attention */
typedef enum ra_attention { RA_ATTENTION_AUTO, RA_ATTENTION_HEAD, RA_ATTENTION_LAYER } ra_attention;

/* ra_config with its names resolved and its tables owned. */
typedef struct ra_settings {
    ra_config               cfg; /* pointers inside point to the members below */
    const ra_policy *       policy;
    const ra_alloc_layers * layer_alloc;
    const ra_alloc_heads *  head_alloc;
    ra_attention            attention;
    int32_t *               layer_budgets; /* [cfg.n_layer_budgets] or NULL */
    int32_t *               head_budgets;  /* [cfg.n_head_budgets] or NULL */
    double *                layer_demand;  /* [cfg.n_layer_demand] or NULL */
    double *                head_error;
    int32_t *               error_grid;
    float *                 centres;
} ra_settings;

/* Checks cfg and copies it. On failure *out is empty and needs no free. */
ra_status ra_settings_init(ra_settings * out, const ra_config * cfg);
void      ra_settings_free(ra_settings * s);

/* Resolves the tables for a model: budgets [sum of n_head_kv] out, packed layer after layer.
 *   n_protect  first positions that every head keeps: allocators split what remains
 *   n_head_kv  [n_layer]; a layer may have 0.
 * RA_STATUS_INVALID when a table does not fit the model, RA_STATUS_BUDGET when an entry is too
 * small. */
ra_status ra_settings_budgets(const ra_settings * s, int32_t n_protect, int32_t n_layer,
                              const int32_t * n_head_kv, int32_t * budgets);

#ifdef __cplusplus
}
#endif

#endif
