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

/* What every head keeps in any case: sinks or protected tokens, the window, guarded values. Allocators
 * give it to every layer and head and split only what remains. */
int32_t ra_config_base(const ra_config * cfg, int32_t n_protect);

/* Least budget of a head: the base, and one token to choose. */
int32_t ra_config_floor(const ra_config * cfg, int32_t n_protect);

/* budgets [n] out: base + ra_robustify() of what remains of `total` once each of n shares has its base;
 * each share of the rest is at least `least` (>= 1) tokens. RA_STATUS_INVALID, BUDGET, NO_MEMORY. */
ra_status ra_split_over_base(const ra_robustify_params * p, int32_t n, const double * demand,
                             int64_t total, int32_t base, int32_t least, int32_t * budgets);

/* budgets [n_layer] out: B(l), tokens per KV head; sum == n_layer * cfg->budget, each at least
 * ra_config_floor(). */
typedef ra_status (*ra_alloc_layers_fn)(const ra_config * cfg, int32_t n_layer, int32_t * budgets);

/* What a head allocator sees of one layer at a compression. */
typedef struct ra_alloc_heads_in {
    int32_t         n_head_kv;
    int32_t         base;  /* tokens that every head keeps in any case, ra_config_base() */
    const int32_t * n_kv;  /* [n_head_kv] tokens held now */
    const float *   score; /* [sum of n_kv] head after head; +INFINITY = must stay */
    bool
        scores_are_shares; /* scores of a head are parts of a whole that all its tokens share, so that
                             * they shrink where it holds more: RA_GIVES_SHARES of the policy */
    const int32_t * initial; /* [n_head_kv] budgets that the layer was made with */
} ra_alloc_heads_in;

/* budgets [n_head_kv] out; sum <= sum of in->initial, each > in->base. */
typedef ra_status (*ra_alloc_heads_fn)(const ra_config * cfg, const ra_alloc_heads_in * in,
                                       int32_t * budgets);

/* budgets [n_heads] out: of every KV head of every layer; sum == n_heads * cfg->budget. */
typedef ra_status (*ra_alloc_every_head_fn)(const ra_config * cfg, int32_t n_heads,
                                            int32_t * budgets);

/* One of the two. */
typedef struct ra_alloc_layers {
    const char *           name;
    ra_alloc_layers_fn     run;
    ra_alloc_every_head_fn run_heads;
} ra_alloc_layers;

typedef struct ra_alloc_heads {
    const char *      name;
    ra_alloc_heads_fn run;
    bool              moves_budgets; /* false: `run` always returns in->initial */
} ra_alloc_heads;

ra_status ra_alloc_layers_uniform(const ra_config * cfg, int32_t n_layer, int32_t * budgets);
ra_status ra_alloc_layers_pyramid(const ra_config * cfg, int32_t n_layer, int32_t * budgets);
ra_status ra_alloc_layers_wave(const ra_config * cfg, int32_t n_layer, int32_t * budgets);

ra_status ra_alloc_every_head_error(const ra_config * cfg, int32_t n_heads, int32_t * budgets);

ra_status ra_alloc_heads_uniform(const ra_config * cfg, const ra_alloc_heads_in * in,
                                 int32_t * budgets);
ra_status ra_alloc_heads_adaptive(const ra_config * cfg, const ra_alloc_heads_in * in,
                                  int32_t * budgets);
ra_status ra_alloc_heads_adaptive_literal(const ra_config * cfg, const ra_alloc_heads_in * in,
                                          int32_t * budgets);
ra_status ra_alloc_heads_error(const ra_config * cfg, const ra_alloc_heads_in * in,
                               int32_t * budgets);

#ifdef __cplusplus
}
#endif

#endif
