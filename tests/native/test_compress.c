/* engine/compress.c by hand: who stays, where the segments go, what a policy is given. Failures:
 * test_compress_failure.c; long random runs: test_compress_random.c. */
#include "ra_pool.h"

static const int32_t three_heads[1] = { 3 };

static void check_segments(const ra_pool * p, const int32_t * budget, const int32_t * offset) {
    const ra_layer * l = &p->cache->layers[0];
    CHECK_ARRAY(l->budget, budget, l->n_head_kv);
    CHECK_ARRAY(l->offset, offset, l->n_head_kv);
    CHECK_ARRAY(l->used, budget, l->n_head_kv);
    ra_pool_check(p);
}

/* Budgets wander between the heads, so segments go down, up, and both in one compression. */
static void test_segments_move_both_ways(void) {
    static const int32_t budgets[][3] = { { 22, 7, 7 },   { 7, 7, 22 }, { 7, 22, 7 },
                                          { 12, 12, 12 }, { 22, 7, 7 }, { 7, 22, 7 },
                                          { 8, 7, 21 },   { 7, 21, 8 }, { 12, 12, 12 } };
    const ra_config      cfg          = ra_pool_config("random", 12);
    ra_pool              p;
    const ra_cache_ops   ops = ra_pool_ops(&p);
    if (!ra_pool_make(&p, &cfg, 1, three_heads)) {
        return;
    }
    ra_pool_append(&p, 20);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
    for (size_t i = 0; i < sizeof(budgets) / sizeof(budgets[0]); ++i) {
        CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 0, budgets[i], 3), RA_STATUS_OK);
        while (p.cache->layers[0].used[0] < budgets[i][0] + 1 ||
               p.cache->layers[0].used[1] < budgets[i][1] + 1 ||
               p.cache->layers[0].used[2] < budgets[i][2] + 1) {
            /* a head that grows needs several compressions until it can fill its budget */
            ra_pool_append(&p, ra_cache_room(p.cache));
            CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
            ra_pool_append(&p, 1);
        }
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
        check_segments(&p, budgets[i],
                       ((int32_t[3]){ 0, budgets[i][0] + 8, budgets[i][0] + budgets[i][1] + 16 }));
    }
    ra_pool_free(&p);
}

/* Equal scores: the newer tokens stay, beside the sinks. NaN and infinite scores are the lowest. */
static void score_equal(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j] = 0.25f;
    }
}

static void score_not_finite(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j] = f->pos[j] == 5 ? -1e30f : j % 3 == 0 ? NAN : j % 3 == 1 ? INFINITY : -INFINITY;
    }
}

static void test_ties_and_numbers_that_are_none(void) {
    const ra_policy equal      = { "equal", "", 0, score_equal, NULL, 1, 0 };
    const ra_policy not_finite = { "not finite", "", 0, score_not_finite, NULL, 1, 0 };
    const ra_config cfg        = ra_pool_config("random", 9);
    const int32_t   newer[9]   = { 0, 1, 13, 14, 15, 16, 17, 18, 19 };
    const int32_t   finite[9]  = { 0, 1, 5, 18, 19, 20, 21, 22, 23 };
    ra_pool         p;
    if (!ra_pool_make(&p, &cfg, 1, three_heads)) {
        return;
    }
    const ra_cache_ops ops = ra_pool_ops(&p);
    ra_pool_append(&p, 17);
    p.cache->settings.policy = &equal;
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
    ra_pool_append(&p, 3);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
    CHECK_ARRAY(p.cache->layers[0].pos, newer, 9);

    ra_cache_clear(p.cache);
    ra_pool_append(&p, 17);
    p.cache->settings.policy = &not_finite;
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
    ra_pool_append(&p, 7);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
    CHECK_ARRAY(p.cache->layers[0].pos, finite, 9);
    ra_pool_check(&p);
    ra_pool_free(&p);
}

/* The callback is asked for what the policy declared, with the queries that are at hand. */
typedef struct asked {
    ra_pool * pool;
    uint32_t  needs;
    int32_t   n_obs;
    int32_t   n_calls;
} asked;

static ra_status record_features(void * user, uint32_t needs, ra_features * f) {
    asked *          a = user;
    const ra_layer * l = &a->pool->cache->layers[f->il];
    a->needs           = needs;
    a->n_obs           = f->n_obs;
    ++a->n_calls;
    CHECK_EQ(f->n_kv, l->used[f->ih]);
    CHECK(f->pos == l->pos + l->offset[f->ih]);
    CHECK_EQ(f->n_window, 4);
    CHECK(f->attn_logits == NULL && f->key_sim == NULL && f->work != NULL);
    for (int32_t o = 0; o < f->n_obs; ++o) {
        CHECK_EQ(f->obs_pos[o], 15 - f->n_obs + o);
    }
    return ra_pool_features(a->pool, needs, f);
}

static ra_status record_layer(void * user, uint32_t needs, int32_t il, int32_t n_obs,
                              const int32_t * obs_pos) {
    asked * a = user;
    CHECK_EQ(a->n_calls, 0);
    return ra_pool_features_begin(a->pool, needs, il, n_obs, obs_pos);
}

static ra_status nothing_to_begin(void * user, int32_t il) {
    (void) user;
    (void) il;
    return RA_STATUS_OK;
}

static ra_status no_twins(void * user, int32_t il, const float * mass, float * twin) {
    (void) user;
    (void) il;
    for (int32_t i = 0; i < 3 * 15; ++i) {
        twin[i] = isfinite(mass[i]) ? -1.0f : 0.0f;
    }
    return RA_STATUS_OK;
}

static void nothing_to_move(void * user, int32_t il, int32_t dst, int32_t src, int32_t n) {
    (void) user;
    (void) il;
    (void) dst;
    (void) src;
    (void) n;
}

static void test_features_asked_for(void) {
    for (int32_t i = 0; i < ra_policy_count(); ++i) {
        const ra_config cfg = ra_pool_config(ra_policy_name(i), 12);
        ra_pool         p;
        asked           a = { .pool = &p };
        if (!ra_pool_make(&p, &cfg, 1, three_heads)) {
            return;
        }
        const ra_cache_ops ops = { .features_begin = record_layer,
                                   .features       = record_features,
                                   .find_twins     = no_twins,
                                   .move           = nothing_to_move,
                                   .move_begin     = nothing_to_begin,
                                   .move_end       = nothing_to_begin,
                                   .user           = &a };
        ra_pool_append(&p, 17);
        ra_cache_truncate(p.cache, 15); /* the newest two queries are gone */
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
        const ra_policy * policy = ra_policy_find(ra_policy_name(i));
        const uint32_t    needs  = policy->needs;
        CHECK_EQ(a.n_calls, needs == 0 ? 0 : policy->observe != NULL ? 6 : 3);
        CHECK_EQ(p.n_layers_begun, needs != 0 ? 1 : 0);
        CHECK_EQ(a.needs, needs);
        const bool wants_all = (needs & RA_FEATURE_ALL_QUERIES) != 0;
        CHECK_EQ(a.n_obs, needs == 0 ? 0 : wants_all ? 6 : 2);
        ra_pool_free(&p);
    }
}

/* A policy's number stays with its token, through moves of rows; a failed compression leaves it. */
static void score_and_remember(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        const float own = (float) (f->pos[j] * 4 + f->ih);
        CHECK(isnan(f->state[j]) || f->state[j] == own);
        CHECK(isnan(f->state[j]) == isnan(f->state_out[j]));
        f->state_out[j] = own;
        score[j]        = (float) ((f->pos[j] * 37 + f->ih) % 101);
    }
}

static void check_state(const ra_pool * p, int32_t n_seen) {
    const ra_layer * l = &p->cache->layers[0];
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        for (int32_t row = l->offset[ih]; row < l->offset[ih] + l->used[ih]; ++row) {
            if (l->pos[row] < n_seen) {
                CHECK_NEAR(l->state[row], l->pos[row] * 4 + ih, 0.0);
            } else {
                CHECK(isnan(l->state[row]));
            }
        }
    }
}

static void test_state_follows_its_token(void) {
    const ra_policy policy = {
        .name = "remember", .summary = "", .score = score_and_remember, .n_state = 1
    };
    const ra_config cfg           = ra_pool_config("random", 12);
    const int32_t   budgets[4][3] = { { 22, 7, 7 }, { 7, 7, 22 }, { 8, 20, 8 }, { 7, 10, 19 } };
    ra_pool         p;
    if (!ra_pool_make(&p, &cfg, 1, three_heads)) {
        return;
    }
    const ra_cache_ops ops   = ra_pool_ops(&p);
    p.cache->settings.policy = &policy;
    for (int32_t round = 0; round < 40; ++round) {
        const int32_t n_seen = p.cache->n_pos;
        ra_pool_append(&p, ra_cache_room(p.cache));
        check_state(&p, n_seen);
        p.fail_begin = round % 5 == 4 ? p.n_begins + 1 : 0;
        if (p.fail_begin > 0) {
            CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_COMPUTE);
            check_state(&p, n_seen);
        }
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
        check_state(&p, p.cache->n_pos);
        CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 0, budgets[round % 4], 3), RA_STATUS_OK);
    }
    ra_cache_clear(p.cache);
    ra_pool_append(&p, 3);
    check_state(&p, 0);
    ra_pool_free(&p);
}

/* Outlying value norms: at most n_guard tokens of a head stay because of them, the largest first. */
static ra_status features_with_outliers(void * user, uint32_t needs, ra_features * f) {
    const ra_status st = ra_pool_features(user, needs, f);
    CHECK((needs & RA_FEATURE_VALUE_NORM) != 0);
    for (int32_t i = 0; i < f->n_kv; ++i) {
        const int32_t pos                 = f->pos[i];
        ((ra_pool *) user)->value_norm[i] = pos == 3   ? 50.0f
                                            : pos == 5 ? 40.0f
                                            : pos == 7 ? 60.0f
                                                       : 1.0f;
    }
    return st;
}

static void test_value_guard(void) {
    /* the outliers lie 3.2, 2.6 and 2.0 standard deviations above the mean */
    const float   guards[3]   = { 0.0f, 1.5f, 3.0f };
    const int32_t kept[3][10] = { { 0, 1, 16, 17, 18, 19, 20, 21, 22, 23 },
                                  { 0, 1, 3, 7, 18, 19, 20, 21, 22, 23 },
                                  { 0, 1, 7, 17, 18, 19, 20, 21, 22, 23 } };
    for (int32_t i = 0; i < 3; ++i) {
        ra_config cfg = ra_pool_config("streaming", 10);
        ra_pool   p;
        cfg.buffer      = 14;
        cfg.n_guard     = 2;
        cfg.value_guard = guards[i];
        if (!ra_pool_make(&p, &cfg, 1, three_heads)) {
            return;
        }
        ra_cache_ops ops = ra_pool_ops(&p);
        ops.features     = features_with_outliers;
        ra_pool_append(&p, 24);
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
        CHECK_EQ(p.n_features, i == 0 ? 0 : 3);
        CHECK_ARRAY(p.cache->layers[0].pos, kept[i], 10);
        ra_pool_check(&p);
        ra_pool_free(&p);
    }
}

/* A compression with no head over the budget in force does nothing, whatever the allocator has made
 * of the initial budgets. */
static void score_by_head(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j] = f->ih == 0 ? 10.0f + (float) j : 0.001f * (float) j;
    }
}

static void test_nothing_over_budget(void) {
    const ra_policy policy = { .name = "by head", .summary = "", .score = score_by_head };
    ra_config       cfg    = ra_pool_config("random", 20);
    ra_pool         p;
    cfg.head_alloc = "adaptive";
    if (!ra_pool_make(&p, &cfg, 1, three_heads)) {
        return;
    }
    const ra_cache_ops ops   = ra_pool_ops(&p);
    int32_t            n     = -1;
    p.cache->settings.policy = &policy;
    ra_pool_append(&p, 28);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, &n), RA_STATUS_OK);
    CHECK_EQ(n, 1);
    CHECK(p.cache->layers[0].budget[0] > 20);
    ra_pool_snapshot before = ra_pool_snapshot_take(&p, 0);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, &n), RA_STATUS_OK);
    CHECK_EQ(n, 0);
    CHECK_EQ(p.cache->n_compressions, 1);
    ra_pool_snapshot_check(&before, &p, 0);
    ra_pool_free(&p);
}

int main(void) {
    test_segments_move_both_ways();
    test_ties_and_numbers_that_are_none();
    test_features_asked_for();
    test_state_follows_its_token();
    test_value_guard();
    test_nothing_over_budget();
    return ra_test_result();
}
