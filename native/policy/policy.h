/* policy.h - the seam between the engine and a token-eviction policy
 *
 * A policy is one function: features of one head in, one score per token out. It declares which
 * features it needs; the engine computes just those, on the layer's device, and hands over plain
 * arrays. It never sees llama.cpp, budgets, or other heads.
 *
 * Adding one: write policy_<name>.c, add its row to native/engine/registry.c, its NumPy twin to
 * tests/python/reference.py, and a row to the README's table. */
#ifndef RA_POLICY_H
#define RA_POLICY_H

#include "core.h"

#include <math.h>

#ifdef __cplusplus
extern "C" {
#endif

/* numbers that a policy may keep with a token */
enum { RA_MAX_STATE = 4 };

/* features, as bits of ra_policy.needs */
enum {
    RA_FEATURE_ATTN_LOGITS = 1 << 0,
    RA_FEATURE_KEY_SIM     = 1 << 1,
    RA_FEATURE_KEY_COS     = 1 << 2,
    RA_FEATURE_ALL_QUERIES = 1 << 3, /* attention of every query since the last compression (at most
                                      * the newest `buffer`), not only of the window */
    RA_FEATURE_VALUE_NORM  = 1 << 4,
    RA_FEATURE_VALUE_DIST  = 1 << 5,
    RA_FEATURE_TWIN        = 1 << 6,
    RA_FEATURE_KEYS        = 1 << 7,
    RA_FEATURE_CENTRES     = 1 << 8, /* of the queries, and how keys are rotated */
    RA_FEATURE_ATTN_MASS   = 1 << 9,
    RA_FEATURE_SAMPLED     = 1 << 10, /* of all queries at most cfg->n_query will do */

    /* what is computed from queries, so that they are remembered */
    RA_FEATURES_OF_QUERIES = RA_FEATURE_ATTN_LOGITS | RA_FEATURE_ATTN_MASS,
};

/* what a policy gives, as bits of ra_policy.gives */
enum {
    RA_GIVES_SHARES =
        1 << 0, /* scores are parts of a whole that the tokens of the head share: they shrink
                               * where it holds more */
};

/* What a policy may read about the n_kv tokens of one head, in position order. Arrays of features
 * that it did not ask for are NULL. The newest n_window tokens are the observation window. */
typedef struct ra_features {
    int32_t         il;       /* layer */
    int32_t         ih;       /* KV head */
    int32_t         n_kv;     /* tokens, >= 1 */
    int32_t         n_window; /* of these the last ones, <= n_kv */
    int32_t         n_obs;    /* queries at hand; may be 0 */
    int32_t         n_group;  /* query heads per KV head, of all layers that read its rows */
    const int32_t * pos;      /* [n_kv] positions, ascending */
    const int32_t * obs_pos;  /* [n_obs] positions of the queries, ascending */

    const float * attn_logits; /* [n_obs, n_group, n_kv] as the model attends, with its soft cap and
                                * biases, not masked */
    const float *
        attn_mass;         /* [n_kv] what ra_attention_mass() makes of them, without a logit leaving
                                * the device: where that will do, ask for this and not for logits */
    const float * sinks;   /* [n_group] logits of attention sinks; NULL: the model has none */
    const float * key_sim; /* [n_kv] mean thinned cosine, see core/alike.c */
    const float * key_cos; /* [n_kv] mean cosine with all keys of the head, itself included */
    const float * value_norm; /* [n_kv] Euclidean norms of the V rows */
    const float * value_dist; /* [n_kv] their distances from the mean V row of the head */

    const float *   keys;     /* [n_kv, head_dim] as the model attends to them, rotated */
    int32_t         head_dim; /* with keys */
    const ra_rope * rope;     /* of the layer */
    const float *   centres;  /* [n_group, ra_centre_values(head_dim)] see ra_config.centres */

    const float *
        twin; /* [n_kv] cosine of the most alike key that receives more attention, sinks excepted;
                         * -1: there is none. In score() only: it hangs on the masses */

    /* numbers per token that the policy keeps from compression to compression: ra_policy.n_state */
    const float *
        state; /* [n_kv, n_state] as left by the last one; NaN for a token that it did not see */
    float * state_out; /* [n_kv, n_state] to write; is a copy of state. In force if nothing fails */

    float *
        mass; /* [n_kv] attention that tokens receive, >= 0: observe() writes it, score() may read it */

    float * work; /* [3 * n_kv] scratch, contents undefined */
} ra_features;

/* score: [n_kv] out, finite, higher = keep. Scores of the window, sinks and protected tokens are
 * ignored: the engine keeps those in any case. */
typedef void (*ra_policy_score_fn)(const ra_config * cfg, const ra_features * f, float * score);

typedef void (*ra_policy_observe_fn)(const ra_config * cfg, const ra_features * f);

typedef struct ra_policy {
    const char *       name;
    const char *       summary; /* one line: what it keeps, and its source */
    uint32_t           needs;   /* RA_FEATURE_* */
    ra_policy_score_fn score;
    /* Before any score of the layer: writes f->mass and f->state_out. NULL: masses, where merging or twins
     * ask for them, are f->attn_mass */
    ra_policy_observe_fn observe;
    int32_t              n_state; /* numbers kept with a token, 1 to RA_MAX_STATE */
    uint32_t             gives;   /* RA_GIVES_* */
} ra_policy;

/* Attention importance of R-KV and SnapKV, shared (importance.c).
 * out [n_cand], n_cand = n_kv - n_window: softmax over the tokens outside the window of the
 * group-maximum of attn_logits (and of the sinks), mean over the n_obs queries, max-pooled
 * (cfg->pool_kernel). Zeros
 * when n_obs == 0. Uses f->work[0 .. 2*n_kv). */
void ra_importance(const ra_config * cfg, const ra_features * f, float * out);

/* Attention that tokens receive: out [n_kv], mean over the queries that can see a token and over the
 * query heads of the group of the softmax over what the query sees. Zeros for a token that no query
 * sees. Of f->attn_logits; uses f->work[0 .. 2*n_kv). */
void ra_attention_mass(const ra_features * f, float * out);

/* Queries that can see each token: out [n_kv]. */
void ra_queries_seen(const ra_features * f, float * out);

/* Logit of the sink of query head g of the group; -INFINITY: there is none. */
static inline float ra_sink_of(const ra_features * f, int32_t g) {
    return f->sinks != NULL ? f->sinks[g] : -INFINITY;
}

/* Numbers that ra_config.centres has per query head. */
static inline int32_t ra_centre_values(int32_t head_dim) {
    return head_dim + head_dim / 2;
}

void ra_policy_rkv_score(const ra_config * cfg, const ra_features * f, float * score);
void ra_policy_snapkv_score(const ra_config * cfg, const ra_features * f, float * score);
void ra_policy_streaming_score(const ra_config * cfg, const ra_features * f, float * score);
void ra_policy_h2o_score(const ra_config * cfg, const ra_features * f, float * score);
void ra_policy_keydiff_score(const ra_config * cfg, const ra_features * f, float * score);
void ra_policy_rkv_ema_score(const ra_config * cfg, const ra_features * f, float * score);
/* Attention with a memory, into f->mass; the state of a token is two sums (memory.c). */
void ra_policy_observe_memory(const ra_config * cfg, const ra_features * f);

void ra_policy_loss_score(const ra_config * cfg, const ra_features * f, float * score);
void ra_policy_mass_score(const ra_config * cfg, const ra_features * f, float * score);
void ra_policy_random_score(const ra_config * cfg, const ra_features * f, float * score);
void ra_policy_triattention_score(const ra_config * cfg, const ra_features * f, float * score);

#ifdef __cplusplus
}
#endif

#endif
