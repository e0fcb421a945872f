/* alloc.h - the seam between the engine and a budget allocator
 *
 * Allocators split tokens, nothing else: over layers once, when the cache is made; over the heads of
 * a layer at every compression. They never see llama.cpp or a policy, only scores.
 *
 * Adding one: write alloc_<name>.c and add its row to native/engine/registry.c; over heads it says there
 * whether it ever moves budgets. */
#ifndef RA_ALLOC_H
#define RA_ALLOC_H

#include "core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Least budget of a head: what must stay (sinks or protected tokens, the window, guarded values), and
 * one token to choose. */
int32_t ra_config_floor(const ra_config * cfg, int32_t n_protect);

/* budgets [n_layer] out: B(l), tokens per KV head; sum == n_layer * cfg->budget, each at least
 * ra_config_floor(). */
typedef ra_status (*ra_alloc_layers_fn)(const ra_config * cfg, int32_t n_layer, int32_t * budgets);

/* What a head allocator sees of one layer at a compression. */
typedef struct ra_alloc_heads_in {
    int32_t         n_head_kv;
    int32_t         floor;   /* least tokens that every head must get (protected + window + 1) */
    const int32_t * n_kv;    /* [n_head_kv] tokens held now */
    const float *   score;   /* [sum of n_kv] head after head; +INFINITY = must stay */
    const int32_t * initial; /* [n_head_kv] budgets that the layer was made with */
} ra_alloc_heads_in;

/* budgets [n_head_kv] out; sum <= sum of in->initial, each >= in->floor. */
typedef ra_status (*ra_alloc_heads_fn)(const ra_config * cfg, const ra_alloc_heads_in * in,
                                       int32_t * budgets);

typedef struct ra_alloc_layers {
    const char *       name;
    ra_alloc_layers_fn run;
} ra_alloc_layers;

typedef struct ra_alloc_heads {
    const char *      name;
    ra_alloc_heads_fn run;
    bool              moves_budgets; /* false: `run` always returns in->initial */
} ra_alloc_heads;

ra_status ra_alloc_layers_uniform(const ra_config * cfg, int32_t n_layer, int32_t * budgets);
ra_status ra_alloc_layers_pyramid(const ra_config * cfg, int32_t n_layer, int32_t * budgets);
ra_status ra_alloc_layers_wave(const ra_config * cfg, int32_t n_layer, int32_t * budgets);

ra_status ra_alloc_heads_uniform(const ra_config * cfg, const ra_alloc_heads_in * in,
                                 int32_t * budgets);
ra_status ra_alloc_heads_adaptive(const ra_config * cfg, const ra_alloc_heads_in * in,
                                  int32_t * budgets);

#ifdef __cplusplus
}
#endif

#endif
