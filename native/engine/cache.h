/* cache.h - the bookkeeping of a budgeted cache: which row of which pool holds which token
 *
 * No tensors here: rows are moved and features computed by callbacks, so that all of this can be
 * tested without a model. Not thread-safe. */
#ifndef RA_CACHE_H
#define RA_CACHE_H

#include "config.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What merging keeps with the rows of a layer, and plans; all parallel to pos. */
typedef struct ra_merge {
    float *   bias;     /* [n_slots] added to the logits of each token's key */
    bool      has_bias; /* some bias is not 0 */
    uint8_t * can_take; /* [n_slots] plan: tokens that others may be merged into */
    int32_t * target;   /* [n_slots] plan: row within the head that takes this one; -1: none */
    float *   share;    /* [n_slots] plan: see ra_merge_shares() */
    float *   bias_out; /* [n_slots] plan */
} ra_merge;

typedef struct ra_layer {
    int32_t n_head_kv; /* 0: a layer without attention */
    int32_t n_swa; /* a query at position p sees positions above p - n_swa; 0: all. See windows.c */
    int32_t n_slots;   /* rows of its pool: sum over heads of (initial budget + buffer) */
    int32_t * initial; /* [n_head_kv] budgets that the head allocator starts from */
    int32_t * budget;  /* [n_head_kv] budgets in force; capacity = budget + buffer */
    int32_t * offset;  /* [n_head_kv] first row of the segment */
    int32_t * used;    /* [n_head_kv] rows in use, from offset on, in position order */
    int32_t * n_dead; /* [n_head_kv] rows before offset that a compression takes for gone; else 0 */
    int64_t * n_evicted; /* [n_head_kv] since the last clear */
    int32_t * pos;       /* [n_slots] position of the token in each row; stale beyond used */
    float *   state;     /* [n_slots, n_state] the policy's numbers for each token; NaN: none */
    uint8_t * keep;      /* [n_slots] plan of a compression, parallel to pos */
    float *   state_out; /* [n_slots, n_state] likewise: state after it */
    ra_merge * merge;    /* NULL: evicted tokens are dropped, as in all layers with a window */
    /* [n_slots] likewise: what comparisons of keys found, see core/alike.c; NULL if the policy needs
     * none. Of tokens from n_pos_scored on it means nothing. */
    ra_alike * alike;
    int32_t *  planned; /* [n_head_kv] budgets of a planned compression */
    bool       is_planned;
    bool       has_new_table; /* `initial` was replaced since its last compression */
    int32_t    n_pos_scored;  /* n_pos at its last compression */
} ra_layer;

typedef struct ra_cache {
    ra_settings settings;
    int32_t     seq_id; /* of the sequence in its context, for trace events */
    int32_t     n_layer;
    ra_layer *  layers; /* [n_layer] */
    int32_t n_splits;   /* times that another protected prefix changed n_slots: pools must follow */
    bool    has_own_tables; /* ra_cache_set_head_budgets() was called */
    int32_t n_pos;          /* last position + 1; 0 when empty */
    int32_t n_protect;
    int32_t peak_tokens;
    int32_t min_evicted; /* smallest position that counts as evicted; INT32_MAX: none */
    int64_t n_compressions;
    int64_t n_evicted;
    int64_t n_tokens_total;

    int32_t   n_ring; /* queries that are remembered: n_window, or what the policy asks for, or more
                           * for drafts */
    int32_t * window_pos; /* [n_ring] position whose query sits in slot pos % n_ring, or -1; a
                           * truncated tail leaves fewer, and scores use those */
    int32_t * obs_pos;    /* [n_ring] scratch: positions of the queries of this compression */

    /* scratch of a compression, sized for the largest layer */
    int32_t n_slots_max;
    float * score; /* [n_slots_max] head after head, as mass and twin */
    float * mass;  /* [n_slots_max] */
    float * twin;  /* [n_slots_max] */
    float * work;  /* [3 * n_slots_max] of policies */

    ra_trace_cb trace;
    void *      trace_user;
} ra_cache;

/* Makes the bookkeeping for a model. settings is taken over (also on failure).
 *   n_head_kv [n_layer]
 *   n_swa     [n_layer] windows, 0: none; NULL: no layer has one
 * RA_STATUS_INVALID, BUDGET or NO_MEMORY; *out is NULL then. */
ra_status ra_cache_init(ra_cache ** out, ra_settings * settings, int32_t n_layer,
                        const int32_t * n_head_kv, const int32_t * n_swa);
void      ra_cache_free(ra_cache * c); /* NULL ok */

/* *layers [n_layer] out: budgets split for a protected prefix of n_protect over the layers without a
 * window, budget_swa in each of the others; NULL on failure. */
ra_status ra_layers_make(const ra_settings * s, int32_t n_protect, int32_t n_layer,
                         const int32_t * n_head_kv, const int32_t * n_swa, ra_layer ** layers);
void      ra_layers_free(ra_layer * layers, int32_t n_layer); /* NULL ok */

/* Windows (windows.c). */

/* Tokens per KV head of a layer with a window of n_swa: all of it, if budget_swa is as large. */
int32_t ra_window_budget(const ra_config * cfg, int32_t n_swa);

/* First positions that layer l protects of the sequence's n_protect: none, if it has a window. */
int32_t ra_layer_protects(const ra_layer * l, int32_t n_protect);

/* Rows at the beginning of the segment of head ih that a query at position pos does not see. */
int32_t ra_head_dead(const ra_layer * l, int32_t ih, int32_t pos);

/* Whether every head can hold all tokens of the window: then no others are evicted. */
bool ra_layer_holds_window(const ra_layer * l);

/* Takes the rows that no query from position n_pos on sees out of the segments, for a compression:
 * offset and used are of the others, n_dead says how many there were. And puts them back. */
void ra_layer_hide_dead(ra_layer * l, int32_t n_pos);
void ra_layer_show_dead(ra_layer * l);

/* Reports a planned layer (trace.c); left out when memory is short. */
void ra_trace_layer(const ra_cache * c, int32_t il);

/* Puts `layers` in the place of the cache's, with scratch for the largest; frees them on failure. */
ra_status ra_cache_use_layers(ra_cache * c, ra_layer * layers);

/* Forgets all tokens and counters of the sequence; budgets go back to the initial ones. */
void ra_cache_clear(ra_cache * c);

/* Tokens that can be appended before some head is full. INT32_MAX without any head. */
int32_t ra_cache_room(const ra_cache * c);

/* Most rows that a head of layer il may ever have, free ones included: where the allocator moves
 * budgets between heads, up to clip_hi times their mean. 0 for a layer without heads. */
int32_t ra_cache_longest_head(const ra_cache * c, int32_t il);

/* Appends tokens at positions [pos0, pos0 + n) to every head: row of token t in head h of a layer
 * is offset[h] + used[h] + t (used: before the call). n <= ra_cache_room(), pos0 >= n_pos. */
void ra_cache_append(ra_cache * c, int32_t pos0, int32_t n);

/* Drops the tokens at positions >= pos from every head. Below pos nothing may have been evicted
 * (pos <= min_evicted), or nothing since pos was appended (pos >= ra_cache_compressed_at()). In the former
 * case nothing counts as evicted any more. */
void ra_cache_truncate(ra_cache * c, int32_t pos);

/* Length of the sequence at its last compression; 0: there was none. Tokens appended since can be dropped
 * again, exactly. */
int32_t ra_cache_compressed_at(const ra_cache * c);

/* `to`, of the same model and settings, holds what `from` does from now on, but for trace, n_tokens_total
 * and seq_id. RA_STATUS_UNSUPPORTED, nothing changed, if a layer has another number of rows. */
ra_status ra_cache_copy(ra_cache * to, const ra_cache * from);

/* Whether the policy weighs all queries since the last compression, more than the window's. */
bool ra_cache_wants_all_queries(const ra_cache * c);

/* First position p such that every head holds all of [p, n_pos); -1 when empty. */
int32_t ra_cache_contiguous_from(const ra_cache * c);

/* Fills obs_pos with the positions, ascending, of the queries that a compression of layer il may use:
 * of the newest n_window tokens, or for a policy that wants all queries those since its last
 * compression. Returns how many are at hand. */
int32_t ra_cache_list_queries(ra_cache * c, int32_t il);

/* Sets the protected prefix. While the cache is empty, an allocator splits the budget over the layers
 * anew, for the prefix is part of what every head keeps: n_slots of the layers may change (their sum
 * does not), and n_splits is raised. A cache that holds tokens, or has explicit tables, stays as it is.
 * RA_STATUS_BUDGET if a head could not hold the prefix, RA_STATUS_NO_MEMORY; nothing has changed then. */
ra_status ra_cache_set_protect(ra_cache * c, int32_t n_protect);

/* Replaces the initial budgets of a layer, from its next compression on. */
ra_status ra_cache_set_head_budgets(ra_cache * c, int32_t il, const int32_t * budgets, size_t n);

/* RA_FEATURE_* that compressions ask for: the policy's, the value guard's, and masses for
 * merging and twins. */
uint32_t ra_cache_needs(const ra_cache * c);

/* Callbacks of a compression. */
typedef struct ra_cache_ops {
    /* Once per layer, before its heads are scored: may compute what `needs` (not 0) asks for of the
     * whole layer. obs_pos [n_obs]: positions of the queries, valid until the next layer begins. */
    ra_status (*features_begin)(void * user, uint32_t needs, int32_t il, int32_t n_obs,
                                const int32_t * obs_pos);
    /* Once per head of that layer, or twice, to observe and to score: fills the feature arrays of f (il, ih, n_kv, pos, n_obs, obs_pos
     * are set) that `needs` asks for. They must stay valid until the next call. */
    ra_status (*features)(void * user, uint32_t needs, ra_features * f);
    /* Where policies ask for RA_FEATURE_TWIN, once all heads of a layer were observed: twin [sum of used]
     * out, as of ra_twin_compare().
     *   mass [sum of used]  head after head */
    ra_status (*find_twins)(void * user, int32_t il, const float * mass, float * twin);
    /* Merging only, when all heads of a layer are planned: for every token that goes, target of the
     * layer's plan <- ra_merge_find_target() with its cosines; others are -1 already. */
    ra_status (*find_targets)(void * user, int32_t il);
    /* Merging only, after move_begin and before the first move: ra_merge_rows() on the V rows of every
     * head, by target and share of the layer's plan. Cannot fail. */
    void (*merge_rows)(void * user, int32_t il);
    /* Moves n rows of layer il from row src to row dst; ranges may overlap (memmove). Called in an
     * order that never overwrites rows still to be moved. Cannot fail. */
    void (*move)(void * user, int32_t il, int32_t dst, int32_t src, int32_t n);
    /* Around the moves of one layer; begin may fail, then nothing of this layer has moved. If end
     * fails, the rows of the layer are lost. */
    ra_status (*move_begin)(void * user, int32_t il);
    ra_status (*move_end)(void * user, int32_t il);
    void * user;
} ra_cache_ops;

/* score [f->n_kv]: +INFINITY for the tokens that must stay (positions below n_protect or the sinks,
 * and the window); what a policy left infinite or NaN becomes the lowest finite score. */
void ra_score_protect(const ra_config * cfg, int32_t n_protect, const ra_features * f,
                      float * score);

/* What merging needs for a layer of n_slots rows; NULL: out of memory. */
ra_merge * ra_merge_make(int32_t n_slots);
void       ra_merge_free(ra_merge * m); /* NULL ok */

/* Bytes that merging takes per row of a pool, on the host. */
size_t ra_merge_row_bytes(void);

/* Puts the planned biases in force, before rows move. */
void ra_merge_commit(ra_layer * l);

/* Plans what becomes of the tokens of layer il that go (engine/merge.c): target, share, bias_out.
 *   score [sum of used]  +INFINITY = must stay: takes nothing
 * What find_targets() returns, else RA_STATUS_OK. */
ra_status ra_merge_plan(ra_cache * c, const ra_cache_ops * ops, int32_t il, const float * score);

/* Runs one compression: scores and plans every layer first, then packs. Layers in which no head
 * exceeds its budget are left alone. On failure while planning nothing has changed.
 * *n_layers_out (may be NULL): layers that were packed. */
ra_status ra_cache_compress(ra_cache * c, const ra_cache_ops * ops, int32_t * n_layers_out);

#ifdef __cplusplus
}
#endif

#endif
