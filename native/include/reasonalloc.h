/* reasonalloc.h - the public C interface of ReasonAlloc for llama.cpp
 *
 * A llama.cpp context made after ra_configure_next() keeps its key-value cache inside a fixed token
 * budget: per layer one pool of rows, per KV head one contiguous segment of it.
 *
 *     pool of layer il (K and V alike; one row = one token of one head, head_dim values)
 *     +--------------- head 0 ---------------+------- head 1 -------+---- ... ----+
 *     | kept tokens (position order) | free  | kept tokens   | free |             |
 *     +--------------------------------------+----------------------+-------------+
 *     <--------- budget[0] + buffer ---------> <- budget[1]+buffer ->
 *
 * Tokens are appended to every segment. When a segment is full, a compression runs: the policy
 * scores the tokens of every head, the best `budget` of them stay, the rest is evicted and the
 * segments are packed again. So a segment holds at most budget + buffer tokens, however long the
 * sequence grows, and the bytes of the cache are
 *
 *     sum over layers and heads of (budget + buffer) * (row bytes of K + row bytes of V)
 *
 * for each sequence of the context. Of llama_memory_*: seq_rm drops a sequence, or a tail of which nothing
 * was evicted or that came after the last compression; seq_cp copies a whole sequence, bit for bit;
 * seq_keep; positions are neither shifted nor divided. A batch may mix tokens of any sequences; each token
 * belongs to one, and those of a sequence are read in the same pieces whatever comes with them.
 *
 * Method: ReasonAlloc, arXiv:2606.11164; default policy R-KV, arXiv:2505.24133.
 *
 * Conventions
 *   - il is a layer index in [0, n_layer), ih a KV head index in [0, n_head_kv).
 *   - seq_id is a sequence in [0, n_seq_max) of llama_context_params; -1, where stated, all of them. Each
 *     has a cache of its own, of equal bytes, made with the context: budgets in force, protected prompt,
 *     compressions and statistics are its own. With kv_unified each may be n_ctx tokens long, else
 *     n_ctx / n_seq_max.
 *   - Sizes are in tokens unless the name ends in _bytes or _us (microseconds). Intervals are
 *     half-open. Scores: higher = keep.
 *   - Functions that can fail return ra_status; on failure nothing was changed unless stated, and
 *     ra_last_error() holds one line saying what is wrong and what to do.
 *   - No function prints, aborts, or keeps a pointer that it was given.
 *   - A context and its cache belong to one thread at a time, as in llama.h.
 *
 * Quick start (C):
 *     ra_config cfg = ra_config_default_params();
 *     cfg.budget    = 256;
 *     if (ra_configure_next(&cfg) != RA_STATUS_OK) { puts(ra_last_error()); ... }
 *     struct llama_context * ctx = llama_init_from_model(model, cparams);  // NULL: ra_last_error()
 *     ... llama_decode() as ever ...
 *     ra_stats st = { .size = sizeof(st) };
 *     ra_stats_get(ctx, &st);
 */
#ifndef REASONALLOC_H
#define REASONALLOC_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    define RA_API __declspec(dllexport)
#else
#    define RA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_tensor;
struct llama_context;
struct llama_model;

/* ------------------------------------------------------------------------------------------- */
/* status and version                                                                           */
/* ------------------------------------------------------------------------------------------- */

/* Raised whenever a struct or a function of this header changes incompatibly. */
#define RA_ABI_VERSION 5

typedef enum ra_status {
    RA_STATUS_OK          = 0,
    RA_STATUS_INVALID     = 1, /* an argument is out of its range */
    RA_STATUS_UNSUPPORTED = 2, /* the model, type or operation is not supported with a budget */
    RA_STATUS_NO_MEMORY   = 3, /* an allocation failed */
    RA_STATUS_BUDGET      = 4, /* the budget cannot hold what must be kept */
    RA_STATUS_NOT_FOUND   = 5, /* the context has no ReasonAlloc cache / no such name */
    RA_STATUS_COMPUTE     = 6, /* a backend computation failed or was aborted */
} ra_status;

/* RA_ABI_VERSION that the library was built with. */
RA_API int32_t ra_abi_version(void);

/* Version of ReasonAlloc as Python writes it (PEP 440), "major.minor.patch..."; static string. A build
 * by pip in a git repository names the number of commits and the commit, and the day if files differed
 * from it: "0.2.0.dev84+gabc1234d5.d20261128". */
RA_API const char * ra_version(void);

/* Sizes of the structs below as the library sees them, for bindings to check (bytes). */
RA_API size_t ra_sizeof_config(void);
RA_API size_t ra_sizeof_stats(void);
RA_API size_t ra_sizeof_head_stats(void);
RA_API size_t ra_sizeof_head_arrays(void);
RA_API size_t ra_sizeof_trace_event(void);

/* Name of a status, "RA_STATUS_..."; static string, never NULL. */
RA_API const char * ra_status_name(ra_status status);

/* The last error of the calling thread: one line, "" if there was none since the last
 * ra_configure_next(). Valid until the next failing call in this thread. Also set when llama_init_from_model() returned NULL, or
 * llama_decode() failed, because of the budget. */
RA_API const char * ra_last_error(void);

/* ------------------------------------------------------------------------------------------- */
/* configuration                                                                                */
/* ------------------------------------------------------------------------------------------- */

/* Limits of every count that crosses this interface (inclusive). */
#define RA_MAX_TOKENS (1 << 24) /* budget, buffer, sinks, window, protected tokens */
#define RA_MAX_WINDOW 1024      /* observation window: its queries are kept in memory */

typedef struct ra_config {
    size_t size; /* sizeof(ra_config), set by ra_config_default_params() */

    int32_t budget;   /* B: tokens kept per (layer, KV head) after a compression; mean when the
                        * tables below differ. > 0. Default 256. */
    int32_t buffer;   /* Delta: decode steps between compressions; >= 1. Default 128 (paper).
                        * Also the longest piece of a prompt read at once. */
    int32_t n_sink;   /* first tokens of the sequence that are never evicted; >= 0. Default 4. */
    int32_t n_window; /* alpha: observation window, the newest tokens; never evicted, and their
                        * queries score the others; 1..RA_MAX_WINDOW. Default 8 (paper). */
    int32_t
        n_draft; /* a tail of up to n_draft tokens may be dropped again (a rejected draft) without
                        * losing queries of the window: so many more are kept; 0..RA_MAX_WINDOW.
                        * Default 0. */
    int32_t n_protect; /* positions [0, n_protect) are never evicted; >= 0. Default 0. See
                        * ra_set_protect() for a prompt whose length is known only later. */

    /* Layers with a sliding window. 0: they stay in llama.cpp's own cache of windows, as long as it makes it.
     * Else they have pools as well, of min(budget_swa, window) + buffer rows per KV head: a token out of the
     * window is not attended, goes at the next compression whatever protects it, and where the window fits,
     * nothing else does. Sinks stay while they are in the window; n_protect and merging are for the other
     * layers only. At least n_sink + n_window + 1. Default 0. */
    int32_t budget_swa;

    const char * policy; /* name of a registered policy (ra_policy_name()). Default "rkv". */

    /* parameters of the policies; each header in native/policy says which it reads */
    float    lambda;        /* weight of importance against redundancy, [0, 1]. Default 0.1. */
    float    sim_threshold; /* cosine above which two keys count as alike, [-1, 1]. Default 0.5. */
    int32_t  pool_kernel;   /* width of the max-pool over importance, odd, 1..255. Default 7. */
    float    ema;           /* "rkv-ema": weight of a token's score before, [0, 1). Default 0.5. */
    float    decay;   /* "mass", "loss": weight of the attention before, per compression, [0, 1).
                             * Default 0.5. */
    int32_t  n_query; /* "loss": of the queries since the last compression at most so many are
                             * weighed, at even distances; 0: all. Default 0. */
    uint64_t seed;    /* of the random policy. Default 0. */

    /* Merging, with any policy: an evicted token's value is averaged, weighted by attention, into the
     * token of its head that stays and has the most similar key (sinks, protected tokens and the window
     * excepted), and that key's logits get a bias for the attention that it takes over. Keys stay. */
    int32_t merge;    /* 0: evicted tokens are dropped; 1: merged. Default 0. */
    float   bias_max; /* largest bias, in logits, 0..10. Default 8. */

    /* value guard, with any policy: up to n_guard tokens of a head whose value norm lies more than
     * value_guard standard deviations above the head's mean are never evicted. */
    float   value_guard; /* >= 0; 0: off. Default 0. */
    int32_t n_guard;     /* 0..1024. Default 4. */

    /* Optional tables; the caller keeps them, they are copied. NULL: uniform.
     * Every entry must hold n_sink + n_window + 1 tokens. */
    const int32_t *
           layer_budgets;   /* [n_layer_budgets]: B(l), tokens per KV head of layer l; what it says
                                      * of layers without a budget, or with a window, is not read */
    size_t n_layer_budgets; /* 0 or n_layer of the model */
    const int32_t * head_budgets;   /* [n_head_budgets]: tokens of head ih of layer il, packed
                                      * layer after layer; overrides layer_budgets */
    size_t          n_head_budgets; /* 0 or the sum of n_head_kv over the layers that grow */

    /* Names of registered allocators (native/engine/registry.c). NULL: "uniform". */
    const char *
        layer_alloc;         /* splits n_layer * budget over the layers, once: "uniform", "pyramid",
                               * "wave", "error" */
    const char * head_alloc; /* splits a layer's budget over its heads, at every compression:
                               * "uniform", "adaptive" */

    /* parameters of the allocators (ReasonAlloc, arXiv:2606.11164; its values are the defaults) */
    double         gamma;   /* exponent that flattens a demand, >= 0. Default 0.5. */
    double         clip_lo; /* least share, times the mean, 0..1. Default 0.25. */
    double         clip_hi; /* largest share, times the mean, >= 1. Default 2. */
    double         mu;      /* "adaptive": least share of a head, times B(l), 0..1. Default 0.25. */
    double         pyramid_beta; /* "pyramid": B over the last layer's budget, >= 1. Default 20. */
    const double * layer_demand; /* [n_layer_demand] "wave": demand of each layer, >= 0 */
    size_t n_layer_demand;       /* n_layer of the model for "wave", else 0; layers without a budget
                                    * are left out of the split */

    /* "error" over layers: measured curves, [n_heads, n_error_grid] with n_heads the sum of n_head_kv over
     * the layers, packed layer after layer: error of a head's output, >= 0, with error_grid[i] tokens, of
     * which error_base stayed in any case. It gives every head its own budget. */
    const double *  head_error;
    size_t          n_head_error; /* n_heads * n_error_grid, or 0 */
    const int32_t * error_grid;   /* [n_error_grid] ascending, >= 1 */
    size_t          n_error_grid;
    int32_t         error_base; /* >= 0 */
    double error_least; /* least share of a head, times the mean, of what can be split, 0..1.
                                  * Default 0.4. */

    /* "triattention": where the queries of the model lie (reasonalloc-profile measures it). For every
     * query head of every layer with KV heads, head_dim_k + head_dim_k / 2 numbers: the mean query, in the
     * order of its values, without its rotation by its position; then per rotated pair the mean modulus
     * (0 beyond n_rot / 2). Checked against the model when the context is made. */
    const float * centres;   /* [n_centres] finite; NULL: none */
    size_t        n_centres; /* 0 or the sum over these layers of n_head * (head_dim_k +
                            * head_dim_k / 2) */

    /* How a decoded token attends to the heads of a layer that hold different numbers of tokens,
     * with flash attention: "head", one operation per KV head; "layer", one masked operation over the
     * layer's pool (fewer launches on a GPU, more work); "auto" or NULL, what is the faster one on
     * the layer's device as far as it was measured: "head" so far, everywhere. Prompts, and layers
     * with attention sinks of the model's own or without flash attention, always go by "head"; a
     * layer whose heads are equally long takes one operation in any case. Default "auto". */
    const char * attention;
} ra_config;

/* The defaults named above. */
RA_API ra_config ra_config_default_params(void);

/* Checks cfg by itself (ranges, budget >= n_sink + n_window + 1, names).
 * Returns RA_STATUS_OK, INVALID, BUDGET or NOT_FOUND. */
RA_API ra_status ra_config_check(const ra_config * cfg);

/* The next context that the calling thread makes with llama_init_from_model() gets a budgeted cache
 * with this configuration (copied); used up by that call whether it succeeds or not. cfg == NULL
 * cancels. A model that is not supported makes llama_init_from_model() return NULL, with the reason
 * in ra_last_error(). Contexts made without it are stock llama.cpp.
 * Returns what ra_config_check() returns. */
RA_API ra_status ra_configure_next(const ra_config * cfg);

/* Whether a budgeted cache can serve this model with these cache types (enum ggml_type values).
 * Returns RA_STATUS_OK or RA_STATUS_UNSUPPORTED, with the reason in ra_last_error(). Works on a model
 * loaded without weights (vocab_only or no_alloc is not needed, but enough is read from metadata). */
RA_API ra_status ra_model_supported(const struct llama_model * model, int32_t type_k,
                                    int32_t type_v);

/* ------------------------------------------------------------------------------------------- */
/* a context with a budget                                                                      */
/* ------------------------------------------------------------------------------------------- */

/* 1 if the context has a budgeted cache, else 0. ctx == NULL: 0. */
RA_API int32_t ra_is_attached(const struct llama_context * ctx);

/* Sequences that the context holds, n_seq_max; 0 without a budgeted cache. */
RA_API int32_t ra_n_seq(const struct llama_context * ctx);

/* From now on positions [0, n_protect) of a sequence are never evicted. n_protect >= 0. seq_id -1: of all;
 * the first that fails ends it.
 * RA_STATUS_BUDGET if the smallest head budget cannot hold max(n_protect, n_sink) + n_window + 1
 * tokens. Tokens that were evicted before stay evicted. */
RA_API ra_status ra_set_protect(struct llama_context * ctx, int32_t seq_id, int32_t n_protect);

/* Gives layer il of a sequence (-1: of all) other head budgets, from its next compression on. budgets: [n], n == n_head_kv of
 * the layer; their sum must not exceed the sum that the layer was made with (its pool is never
 * resized), each at least max(n_protect, n_sink) + n_window + 1. */
RA_API ra_status ra_set_head_budgets(struct llama_context * ctx, int32_t seq_id, int32_t il,
                                     const int32_t * budgets, size_t n);

/* Runs a compression of a sequence (-1: of each) now, if any head holds more than its budget; else does nothing.
 * RA_STATUS_NO_MEMORY or RA_STATUS_COMPUTE when a backend failed: nothing was changed, unless it failed
 * while a device moved rows; then the sequence was emptied, and ra_last_error() says so. */
RA_API ra_status ra_compress(struct llama_context * ctx, int32_t seq_id);

/* Tokens that can be appended to a sequence before its next compression; -1 without such a sequence. A
 * draft of fewer tokens can be dropped again exactly. */
RA_API int32_t ra_room(const struct llama_context * ctx, int32_t seq_id);

/* ------------------------------------------------------------------------------------------- */
/* statistics, read from the engine                                                             */
/* ------------------------------------------------------------------------------------------- */

typedef struct ra_stats {
    size_t size; /* in: sizeof(ra_stats) */

    int32_t n_layer;       /* layers with a pool */
    int32_t n_head_kv_max; /* largest n_head_kv of a layer */
    int32_t budget;        /* as configured */
    int32_t buffer;        /* as configured */
    int32_t n_seq;         /* sequences that these numbers are of */
    int32_t n_pos;         /* length of the sequence (of all: of the longest): last position + 1 */
    int32_t peak_tokens;   /* most tokens that any head ever held (<= budget + buffer) */

    int64_t kv_bytes;     /* allocated tensors of K and V of all layers */
    int64_t window_bytes; /* allocated tensors of the observation window's queries */
    int64_t
        scratch_bytes; /* buffers reserved for compressions (device and host) of all sequences, complete from
                             * the first decode on; they grow only for a head that
                             * ra_set_head_budgets() makes longer than any before */
    int64_t
        kv_bytes_full; /* what the stock cache's rows for n_pos tokens take; of layers with a window that
                             * have pools, for as many as the window holds */
    int64_t n_evicted;      /* (token, head) entries evicted since the last clear; those of a tail
                             * that was dropped since do not count */
    int64_t n_entries;      /* (token, head) entries held now */
    int64_t n_compressions; /* since the last clear */
    int64_t compress_us;    /* time spent in them */
    int64_t n_tokens_total; /* tokens decoded since the context was made */

    int64_t
        stock_bytes; /* of the whole context: caches of sliding windows and recurrent states, which
                          * have no budget */
} ra_stats;

/* Fills *st with the numbers of a sequence, or (seq_id -1) the sums over all. st->size must be
 * sizeof(ra_stats). RA_STATUS_NOT_FOUND without a budgeted cache, RA_STATUS_INVALID without the sequence. */
RA_API ra_status ra_stats_get(const struct llama_context * ctx, int32_t seq_id, ra_stats * st);

typedef struct ra_head_stats {
    size_t  size;      /* in: sizeof(ra_head_stats) */
    int32_t budget;    /* tokens kept at a compression */
    int32_t capacity;  /* tokens that its segment can hold: budget + buffer */
    int32_t used;      /* tokens held now */
    int32_t offset;    /* first row of its segment in the layer's pool */
    int64_t n_evicted; /* as in ra_stats */
    int64_t row_bytes; /* of K and V of one token */
} ra_head_stats;

/* Fills *st for head ih of layer il of a sequence. */
RA_API ra_status ra_head_stats_get(const struct llama_context * ctx, int32_t seq_id, int32_t il,
                                   int32_t ih, ra_head_stats * st);

/* n_head_kv of layer il (0 for a layer without a budget), or -1 without a budgeted cache. */
RA_API int32_t ra_n_head_kv(const struct llama_context * ctx, int32_t il);

/* Copies the positions that head ih of layer il of a sequence holds, ascending, to pos [n_max].
 * Returns how many it holds (may exceed n_max; then n_max were copied), or -1 on error. */
RA_API int32_t ra_kept_positions(const struct llama_context * ctx, int32_t seq_id, int32_t il,
                                 int32_t ih, int32_t * pos, int32_t n_max);

/* Bytes of K and V rows that one token takes in all heads of all layers that grow: the stock cache holds
 * n_tokens times this. -1 without a budgeted cache. */
RA_API int64_t ra_row_bytes(const struct llama_context * ctx);

/* Bytes of a context, stock or budgeted, summed over its devices: weights (in the form that the
 * backends use), cache (and window), and reserved compute buffers. With llama_model_params.no_alloc nothing is allocated and these are what
 * it would take. Returns an ra_status. */
RA_API int32_t ra_memory_breakdown(const struct llama_context * ctx, int64_t * model_bytes,
                                   int64_t * context_bytes, int64_t * compute_bytes);

/* ra_stats.scratch_bytes as it will be from the first decode on, also with no_alloc. -1 on error. */
RA_API int64_t ra_planned_scratch_bytes(const struct llama_context * ctx);

/* One layer of a compression, after the policy scored and before anything moves. Arrays run head after
 * head and are valid during the call only. */
typedef struct ra_trace_event {
    int32_t         seq_id;
    int64_t         i_compression; /* its number since the last clear, from 0 */
    int32_t         n_pos;         /* length of the sequence */
    int32_t         il;
    int32_t         n_head_kv;
    const int32_t * n_kv; /* [n_head_kv]   tokens of each head before the compression */
    const int32_t * pos;  /* [sum of n_kv] their positions */
    const float *
        score; /* [sum of n_kv] the policy's scores; +INFINITY where the token must stay, -INFINITY
                * where it is out of the layer's window */
    const uint8_t * keep;    /* [sum of n_kv] 1 = stays, 0 = evicted */
    const int32_t * budgets; /* [n_head_kv]   head budgets of this compression */
    /* merging; NULL without it */
    const int32_t *
        target; /* [sum of n_kv] token, within the head, that takes an evicted one; -1: none */
    const float * share; /* [sum of n_kv] part of the merged value that is a token's own */
    const float * bias;  /* [sum of n_kv] added to the logits of a key from now on */
} ra_trace_event;

/* Called once per layer during a compression; must not call into this context. */
typedef void (*ra_trace_cb)(void * user, const ra_trace_event * event);

/* Sets (or with NULL removes) the trace callback of a context, for all of its sequences. */
RA_API ra_status ra_set_trace(struct llama_context * ctx, ra_trace_cb cb, void * user);

/* ------------------------------------------------------------------------------------------- */
/* sizes without a context                                                                      */
/* ------------------------------------------------------------------------------------------- */

typedef struct ra_shape {
    int32_t n_layer;
    int32_t n_head_kv;  /* per layer, the same for all */
    int32_t head_dim_k; /* values of a K row */
    int32_t head_dim_v; /* values of a V row */
    int32_t type_k;     /* enum ggml_type */
    int32_t type_v;     /* enum ggml_type */
} ra_shape;

/* Bytes of K and V that a budgeted cache of this shape allocates (the same code as the engine),
 * or -1 with ra_last_error(). */
RA_API int64_t ra_plan_kv_bytes(const ra_shape * shape, const ra_config * cfg);

/* Bytes of K and V that n_tokens take in the stock cache, or -1 with ra_last_error(). */
RA_API int64_t ra_plan_kv_bytes_full(const ra_shape * shape, int64_t n_tokens);

#ifdef __cplusplus
}
#endif

#include "reasonalloc_tools.h"

#endif /* REASONALLOC_H */
