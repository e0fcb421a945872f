/* reasonalloc_tools.h - policies, allocators and merging on plain arrays: the code of a compression, for
 * tests and tools. Part of reasonalloc.h, which includes it; conventions are those of that file. */
#ifndef REASONALLOC_TOOLS_H
#define REASONALLOC_TOOLS_H

#ifndef REASONALLOC_H
#    error "include reasonalloc.h"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------- */
/* policies, for tests and tools                                                                */
/* ------------------------------------------------------------------------------------------- */

/* Number of registered policies, and the name of number i (NULL if out of range). */
RA_API int32_t      ra_policy_count(void);
RA_API const char * ra_policy_name(int32_t i);
/* One line about policy i: what it keeps and where it is from (NULL if out of range). */
RA_API const char * ra_policy_summary(int32_t i);

/* 1 if policy i needs ra_config.centres, else 0. */
RA_API int32_t ra_policy_needs_centres(int32_t i);

/* The same for allocators; kind 0: over layers, 1: over the heads of a layer. */
RA_API int32_t      ra_alloc_count(int32_t kind);
RA_API const char * ra_alloc_name(int32_t kind, int32_t i);

/* How RoPE rotates a row of Q or K at position p: values a and b, taken as the complex number a + i b, by
 * the angle p * freq[f]. */
typedef struct ra_rope {
    int32_t n_rot;   /* values that are rotated, even; 0: none */
    int32_t offset;  /* the first of them */
    int32_t is_neox; /* pair f, from offset on: 0: values 2f and 2f + 1; 1: f and f + n_rot / 2 */
    const float * freq; /* [n_rot / 2] radians per position, with all scaling that the model has */
} ra_rope;

/* Reads the queries of an attention product while the model's graph runs: for calibration, inside
 * llama_context_params.cb_eval of a stock context without flash attention, whose K is not quantised.
 *   kq     node "kq-<layer>", computed
 *   rope   out; rope->freq is freq
 *   freq   [n_freq] out, n_freq >= n_rot / 2
 *   q      [n_q] out: [n_tokens, n_head, head_dim] as they are attended with, rotated
 * RA_STATUS_UNSUPPORTED if they are not rotated by a plain RoPE last of all (or nothing at all), or are not f32;
 * RA_STATUS_INVALID if n_freq or n_q is too small. */
RA_API ra_status ra_read_queries(const struct ggml_tensor * kq, ra_rope * rope, float * freq,
                                 int32_t n_freq, float * q, int64_t n_q);

/* One head at a compression, as plain arrays. */
typedef struct ra_head_arrays {
    size_t          size;       /* sizeof(ra_head_arrays) */
    int32_t         il, ih;     /* layer and KV head (the random policy draws by them) */
    int32_t         n_kv;       /* tokens, 1..2^20 */
    int32_t         n_group;    /* query heads of the KV head, 1..1024 */
    int32_t         n_obs;      /* queries, 0..min(n_kv, 4096) */
    int32_t         head_dim_k; /* 1..4096 */
    int32_t         head_dim_v; /* 1..4096 with v, else any */
    float           kq_scale;   /* factor on q.k, usually 1/sqrt(head_dim_k) */
    const float *   k;          /* [n_kv, head_dim_k] keys in position order */
    const float *   v; /* [n_kv, head_dim_v] values; NULL: a policy that asks for them sees none
                                 * that differ */
    const float *   q; /* [n_obs, n_group, head_dim_k] queries of the newest n_obs tokens: for most
                                 * policies those of the window */
    const int32_t * pos;  /* [n_kv] positions, strictly ascending, >= 0 */
    const float *   bias; /* [n_kv] added to the logits of each key by merging; NULL: none */
    const float *
        state; /* [n_kv, n_state] as the last compression left it, NaN for new tokens; NULL:
                                 * all new */
    const ra_rope * rope; /* how k is rotated; NULL: not at all */
    const float *
           centres;   /* [n_centres] of the query heads, as in ra_config.centres; NULL: a policy
                                 * that needs them is refused */
    size_t n_centres; /* 0 or n_group * (head_dim_k + head_dim_k / 2) */
} ra_head_arrays;

/* Numbers that policy i keeps with a token from compression to compression (n_state); 0 if out of range. */
RA_API int32_t ra_policy_n_state(int32_t i);

/* Scores the tokens of one head exactly as a compression does.
 *   cfg       policy and its parameters; n_window newest tokens are the window
 *   score     [n_kv] out           +INFINITY for tokens that must stay (sinks, window, protected), else
 *                                  finite, higher = keep. The value guard is not applied.
 *   state_out [n_kv, n_state] out  what is kept with the tokens; NULL: not wanted
 *   mass      [n_kv] out           attention that they receive, as merging weighs them; NULL: not wanted
 * RA_STATUS_INVALID for sizes out of range, RA_STATUS_NO_MEMORY; the arrays are then untouched. */
RA_API ra_status ra_policy_score(const ra_config * cfg, const ra_head_arrays * head, float * score,
                                 float * state_out, float * mass);

/* Merges what goes of one head into what stays, exactly as a compression does.
 *   keep     [n_kv]             1 = stays
 *   can_take [n_kv]             1 = stays, and others may be merged into it
 *   mass     [n_kv]             attention received, >= 0
 *   target   [n_kv] out         token that takes token j; -1: j stays, or nothing could take it
 *   bias_out [n_kv] out         biases after; of no meaning for what goes
 *   v_out    [n_kv, head_dim_v] out  values after; of no meaning for what goes
 * head->v must be there; q and state are not read. Errors as above. */
RA_API ra_status ra_merge_head(const ra_config * cfg, const ra_head_arrays * head,
                               const uint8_t * keep, const uint8_t * can_take, const float * mass,
                               int32_t * target, float * bias_out, float * v_out);

/* keep[i] = 1 for the `budget` highest scores (ties: the newer token), else 0.
 * n_kv >= 1; budget >= 0. Tokens scored +INFINITY must not outnumber the budget:
 * RA_STATUS_BUDGET. */
RA_API ra_status ra_select_keep(int32_t n_kv, const float * score, int32_t budget, uint8_t * keep);

/* ------------------------------------------------------------------------------------------- */
/* allocators, for tests and tools                                                              */
/* ------------------------------------------------------------------------------------------- */

/* How a demand becomes budgets; the paper's values as defaults. */
typedef struct ra_robustify_params {
    double gamma; /* exponent that flattens the demand, >= 0. 0.5 */
    double lo;    /* least share, times the mean; 0..1. 0.25 */
    double hi;    /* largest share, times the mean; >= 1. 2.0 */
} ra_robustify_params;

/* budgets [n] out, from demand [n] >= 0: sum == total exactly, each >= floor_tokens and at most
 * max(floor(hi * total / n), ceil(total / n), floor_tokens). Deterministic; equal demands differ by
 * at most one token, the lower index first. RA_STATUS_INVALID, BUDGET (n * floor_tokens > total) or
 * NO_MEMORY; budgets are then untouched. Source: arXiv:2606.11164. */
RA_API ra_status ra_robustify(const ra_robustify_params * p, int32_t n, const double * demand,
                              int64_t total, int32_t floor_tokens, int32_t * budgets);

/* Runs cfg's layer allocator: budgets [n_layer] out, tokens per KV head; of "error", which gives every
 * head its own, budgets of n_layer heads. */
RA_API ra_status ra_alloc_layers_run(const ra_config * cfg, int32_t n_layer, int32_t * budgets);

/* Runs cfg's head allocator on one layer, as a compression does.
 *   n_kv    [n_head_kv]    tokens of each head
 *   score   [sum of n_kv]  head after head; +INFINITY = must stay
 *   initial [n_head_kv]    budgets that the layer was made with; their sum is split anew
 *   budgets [n_head_kv]    out */
RA_API ra_status ra_alloc_heads_run(const ra_config * cfg, int32_t n_head_kv, const int32_t * n_kv,
                                    const float * score, const int32_t * initial,
                                    int32_t * budgets);

/* An architecture of the llama.cpp in this library. */
typedef struct ra_arch {
    size_t       size;    /* in: sizeof(ra_arch) */
    const char * name;    /* as in general.architecture of a GGUF file; static, as the others */
    const char * layers;  /* which layers can have a budget; NULL: the architecture is refused */
    const char * why_not; /* then the reason, as "it ..."; else NULL */
} ra_arch;

RA_API int32_t ra_arch_count(void);

/* Fills *arch, 0 <= i < ra_arch_count(). RA_STATUS_INVALID otherwise. A model of an accepted architecture can
 * still be refused, by its shape: ra_model_supported() says so. */
RA_API ra_status ra_arch_get(int32_t i, ra_arch * arch);

#ifdef __cplusplus
}
#endif

#endif /* REASONALLOC_TOOLS_H */
