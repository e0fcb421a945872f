/* ra_pool.h - a cache over pools of tags instead of tensors
 *
 * A row's tag names the token and head that it belongs to, so a row that was moved wrongly, not
 * moved, or overwritten is seen at once. */
#ifndef RA_POOL_H
#define RA_POOL_H

#include "cache.h"
#include "ra_test.h"

#include <math.h>
#include <stdlib.h>

#define RA_POOL_GROUP 2 /* query heads per KV head */
#define RA_POOL_DIM   6 /* values of a key, of which four are rotated */

typedef struct ra_pool {
    ra_cache * cache;
    int32_t ** tags;   /* [n_layer][n_slots] */
    float *    logits; /* what the features callback hands out */
    float *    key_sim;
    float *    key_cos;
    float *    keys;
    float *    value_norm;
    float *    value_dist;
    float *    attn_mass;
    int32_t    open_layer;     /* between move_begin and move_end; else -1 */
    int32_t    features_layer; /* whose features were begun; -1: none */
    int32_t    n_layers_begun; /* calls of features_begin so far */
    int32_t    n_features;     /* calls so far */
    int32_t    n_begins;
    int32_t    fail_features_begin; /* this call fails; 0: none */
    int32_t    fail_features;
    int32_t    fail_begin;
} ra_pool;

static inline int32_t ra_pool_tag(int32_t ih, int32_t pos) {
    return pos * 16 + ih;
}

/* logits and similarities with outliers, ties and numbers that are none */
static inline float ra_pool_odd_float(void) {
    switch (ra_test_int(0, 12)) {
        case 0: return NAN;
        case 1: return INFINITY;
        case 2: return -INFINITY;
        case 3: return 3e38f;
        case 4:
        case 5: return 0.0f;
        default: return ra_test_float();
    }
}

static inline ra_status ra_pool_features_begin(void * user, uint32_t needs, int32_t il,
                                               int32_t n_obs, const int32_t * obs_pos) {
    ra_pool * p = user;
    CHECK_EQ(needs, ra_cache_needs(p->cache));
    CHECK(needs != 0 && p->open_layer == -1);
    CHECK(n_obs >= 0 && obs_pos == p->cache->obs_pos);
    if (++p->n_layers_begun == p->fail_features_begin) {
        return ra_error(RA_STATUS_COMPUTE, "features of a layer failed on purpose");
    }
    p->features_layer = il;
    return RA_STATUS_OK;
}

static inline ra_status ra_pool_features(void * user, uint32_t needs, ra_features * f) {
    ra_pool * p = user;
    CHECK_EQ(f->il, p->features_layer);
    if (++p->n_features == p->fail_features) {
        return ra_error(RA_STATUS_COMPUTE, "features failed on purpose");
    }
    const bool    is_odd = ra_test_int(0, 4) == 0;
    const int32_t n      = f->n_obs * RA_POOL_GROUP * f->n_kv;
    for (int32_t i = 0; i < n; ++i) {
        p->logits[i] = is_odd ? ra_pool_odd_float() : 4.0f * ra_test_float();
    }
    for (int32_t i = 0; i < f->n_kv; ++i) {
        p->key_sim[i]    = is_odd ? ra_pool_odd_float() : ra_test_float();
        p->key_cos[i]    = is_odd ? ra_pool_odd_float() : ra_test_float();
        p->value_norm[i] = ra_test_int(0, 20) == 0 ? 100.0f : 1.0f + ra_test_float();
        p->value_dist[i] = is_odd ? ra_pool_odd_float() : 1.0f + ra_test_float();
        p->attn_mass[i]  = is_odd && ra_test_int(0, 2) == 0 ? NAN : fabsf(ra_test_float());
    }
    static const float   freq[2]                    = { 1.0f, 0.01f };
    static const ra_rope rope                       = { .n_rot = 4, .offset = 1, .freq = freq };
    static const float   centres[RA_POOL_GROUP * 9] = { 1, 2, 3, 4, 5, 6, 7, 8 };
    for (int32_t i = 0; i < f->n_kv * RA_POOL_DIM; ++i) {
        p->keys[i] = is_odd ? ra_pool_odd_float() : ra_test_float();
    }
    f->keys        = needs & RA_FEATURE_KEYS ? p->keys : NULL;
    f->head_dim    = RA_POOL_DIM;
    f->rope        = needs & RA_FEATURE_CENTRES ? &rope : NULL;
    f->centres     = needs & RA_FEATURE_CENTRES ? centres : NULL;
    f->n_group     = RA_POOL_GROUP;
    f->attn_logits = needs & RA_FEATURE_ATTN_LOGITS ? p->logits : NULL;
    f->attn_mass   = needs & RA_FEATURE_ATTN_MASS ? p->attn_mass : NULL;
    f->key_sim     = needs & RA_FEATURE_KEY_SIM ? p->key_sim : NULL;
    f->key_cos     = needs & RA_FEATURE_KEY_COS ? p->key_cos : NULL;
    f->value_norm  = needs & RA_FEATURE_VALUE_NORM ? p->value_norm : NULL;
    f->value_dist  = needs & RA_FEATURE_VALUE_DIST ? p->value_dist : NULL;
    return RA_STATUS_OK;
}

static inline ra_status ra_pool_find_twins(void * user, int32_t il, const float * mass,
                                           float * twin) {
    ra_pool *        p = user;
    const ra_layer * l = &p->cache->layers[il];
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        for (int32_t i = 0; i < l->used[ih]; ++i) {
            CHECK(mass[i] >= 0.0f || isnan(mass[i]));
            twin[i] = 2.0f * ra_test_float() - 1.0f;
        }
        mass += l->used[ih];
        twin += l->used[ih];
    }
    return RA_STATUS_OK;
}

static inline ra_status ra_pool_move_begin(void * user, int32_t il) {
    ra_pool * p = user;
    if (++p->n_begins == p->fail_begin) {
        return ra_error(RA_STATUS_COMPUTE, "begin failed on purpose");
    }
    CHECK_EQ(p->open_layer, -1);
    p->open_layer     = il;
    p->features_layer = -1;
    return RA_STATUS_OK;
}

static inline ra_status ra_pool_move_end(void * user, int32_t il) {
    ra_pool * p = user;
    CHECK_EQ(p->open_layer, il);
    p->open_layer = -1;
    return RA_STATUS_OK;
}

static inline void ra_pool_move(void * user, int32_t il, int32_t dst, int32_t src, int32_t n) {
    ra_pool *     p       = user;
    const int32_t n_slots = p->cache->layers[il].n_slots;
    CHECK_EQ(p->open_layer, il);
    CHECK(n > 0 && dst != src);
    if (CHECK(dst >= 0 && src >= 0 && dst <= n_slots - n && src <= n_slots - n)) {
        memmove(p->tags[il] + dst, p->tags[il] + src, (size_t) n * sizeof(int32_t));
    }
}

static inline ra_cache_ops ra_pool_ops(ra_pool * p) {
    return (ra_cache_ops){ .features_begin = ra_pool_features_begin,
                           .features       = ra_pool_features,
                           .find_twins     = ra_pool_find_twins,
                           .move           = ra_pool_move,
                           .move_begin     = ra_pool_move_begin,
                           .move_end       = ra_pool_move_end,
                           .user           = p };
}

/* Takes the cache over. */
static inline void ra_pool_init(ra_pool * p, ra_cache * c) {
    const size_t n = (size_t) c->n_slots_max;
    *p             = (ra_pool){ .cache = c, .open_layer = -1, .features_layer = -1 };
    p->tags        = calloc((size_t) c->n_layer, sizeof(*p->tags));
    p->logits      = calloc((size_t) c->n_ring * RA_POOL_GROUP * n, sizeof(float));
    p->key_sim     = calloc(n, sizeof(float));
    p->key_cos     = calloc(n, sizeof(float));
    p->keys        = calloc(n * RA_POOL_DIM, sizeof(float));
    p->value_norm  = calloc(n, sizeof(float));
    p->value_dist  = calloc(n, sizeof(float));
    p->attn_mass   = calloc(n, sizeof(float));
    for (int32_t il = 0; il < c->n_layer; ++il) {
        p->tags[il] = calloc((size_t) c->layers[il].n_slots, sizeof(int32_t));
    }
}

static inline void ra_pool_free(ra_pool * p) {
    for (int32_t il = 0; il < p->cache->n_layer; ++il) {
        free(p->tags[il]);
    }
    free(p->tags);
    free(p->logits);
    free(p->key_sim);
    free(p->key_cos);
    free(p->keys);
    free(p->value_norm);
    free(p->value_dist);
    free(p->attn_mass);
    ra_cache_free(p->cache);
}

/* Makes a cache with pools, of layers with windows n_swa [n_layer]; fails the test when it cannot. */
static inline bool ra_pool_make_windows(ra_pool * p, const ra_config * cfg, int32_t n_layer,
                                        const int32_t * n_head_kv, const int32_t * n_swa) {
    ra_settings settings;
    ra_cache *  c = NULL;
    if (!CHECK_STATUS(ra_settings_init(&settings, cfg), RA_STATUS_OK) ||
        !CHECK_STATUS(ra_cache_init(&c, &settings, n_layer, n_head_kv, n_swa), RA_STATUS_OK)) {
        return false;
    }
    ra_pool_init(p, c);
    return true;
}

/* The same without windows. */
static inline bool ra_pool_make(ra_pool * p, const ra_config * cfg, int32_t n_layer,
                                const int32_t * n_head_kv) {
    return ra_pool_make_windows(p, cfg, n_layer, n_head_kv, NULL);
}

/* Appends n tokens behind the last one and writes their rows. */
static inline void ra_pool_append(ra_pool * p, int32_t n) {
    ra_cache *    c    = p->cache;
    const int32_t pos0 = c->n_pos;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        const ra_layer * l = &c->layers[il];
        for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
            for (int32_t t = 0; t < n; ++t) {
                p->tags[il][l->offset[ih] + l->used[ih] + t] = ra_pool_tag(ih, pos0 + t);
            }
        }
    }
    ra_cache_append(c, pos0, n);
}

/* What must hold at all times: segments in order, disjoint and inside the pool; rows in use fit them,
 * are in position order, and hold the token that the bookkeeping names. */
static inline void ra_pool_check(const ra_pool * p) {
    const ra_cache * c = p->cache;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        const ra_layer * l   = &c->layers[il];
        int32_t          end = 0;
        for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
            const int32_t * pos = l->pos + l->offset[ih];
            CHECK(l->offset[ih] >= end);
            end = l->offset[ih] + l->budget[ih] + c->settings.cfg.buffer;
            CHECK(l->used[ih] >= 0 && l->offset[ih] + l->used[ih] <= end);
            for (int32_t i = 0; i < l->used[ih]; ++i) {
                CHECK(pos[i] > (i > 0 ? pos[i - 1] : -1) && pos[i] < c->n_pos);
                CHECK_EQ(p->tags[il][l->offset[ih] + i], ra_pool_tag(ih, pos[i]));
            }
        }
        CHECK(end <= l->n_slots);
    }
    CHECK_EQ(p->open_layer, -1);
}

/* everything of a layer that a failed compression must not change */
typedef struct ra_pool_snapshot {
    int32_t * ints; /* budget, offset, used, initial, pos, tags */
    int64_t   n_evicted;
} ra_pool_snapshot;

static inline ra_pool_snapshot ra_pool_snapshot_take(const ra_pool * p, int32_t il) {
    const ra_layer * l    = &p->cache->layers[il];
    const size_t     n    = (size_t) l->n_head_kv;
    const size_t     rows = (size_t) l->n_slots;
    ra_pool_snapshot s    = { .ints      = malloc((4 * n + 2 * rows) * sizeof(int32_t)),
                              .n_evicted = p->cache->n_evicted };
    memcpy(s.ints, l->budget, n * sizeof(int32_t));
    memcpy(s.ints + n, l->offset, n * sizeof(int32_t));
    memcpy(s.ints + 2 * n, l->used, n * sizeof(int32_t));
    memcpy(s.ints + 3 * n, l->initial, n * sizeof(int32_t));
    memcpy(s.ints + 4 * n, l->pos, rows * sizeof(int32_t));
    memcpy(s.ints + 4 * n + rows, p->tags[il], rows * sizeof(int32_t));
    return s;
}

/* frees the snapshot */
static inline void ra_pool_snapshot_check(ra_pool_snapshot * s, const ra_pool * p, int32_t il) {
    const ra_layer * l   = &p->cache->layers[il];
    ra_pool_snapshot now = ra_pool_snapshot_take(p, il);
    CHECK_ARRAY(now.ints, s->ints, 4 * l->n_head_kv + 2 * l->n_slots);
    CHECK_EQ(now.n_evicted, s->n_evicted);
    free(now.ints);
    free(s->ints);
}

/* Small budgets for tests: 2 sinks, a window of 4, a buffer of 8. */
static inline ra_config ra_pool_config(const char * policy, int32_t budget) {
    ra_config cfg = ra_config_default_params();
    cfg.policy    = policy;
    cfg.budget    = budget;
    cfg.buffer    = 8;
    cfg.n_sink    = 2;
    cfg.n_window  = 4;
    return cfg;
}

#endif
