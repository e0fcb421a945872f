/* engine/compress.c by hand: who stays, where the segments go, and what a failure leaves behind.
 * Long random runs: test_compress_random.c. */
#include "ra_pool.h"

static const int32_t three_heads[1] = { 3 };

/* everything of a layer that a failed compression must not change */
typedef struct snapshot {
    int32_t * ints; /* budget, offset, used, initial, pos, tags */
    int64_t   n_evicted;
} snapshot;

static snapshot snapshot_take(const ra_pool * p, int32_t il) {
    const ra_layer * l    = &p->cache->layers[il];
    const size_t     n    = (size_t) l->n_head_kv;
    const size_t     rows = (size_t) l->n_slots;
    snapshot         s    = { .ints      = malloc((4 * n + 2 * rows) * sizeof(int32_t)),
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
static void snapshot_check(snapshot * s, const ra_pool * p, int32_t il) {
    const ra_layer * l   = &p->cache->layers[il];
    snapshot         now = snapshot_take(p, il);
    CHECK_ARRAY(now.ints, s->ints, 4 * l->n_head_kv + 2 * l->n_slots);
    CHECK_EQ(now.n_evicted, s->n_evicted);
    free(now.ints);
    free(s->ints);
}

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
    const ra_policy equal      = { "equal", "", 0, score_equal };
    const ra_policy not_finite = { "not finite", "", 0, score_not_finite };
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
    return ra_pool_features(a->pool, needs, f);
}

static ra_status nothing_to_begin(void * user, int32_t il) {
    (void) user;
    (void) il;
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
        const ra_cache_ops ops = { .features   = record_features,
                                   .move       = nothing_to_move,
                                   .move_begin = nothing_to_begin,
                                   .move_end   = nothing_to_begin,
                                   .user       = &a };
        ra_pool_append(&p, 17);
        ra_cache_truncate(p.cache, 15); /* two queries of the window are gone */
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
        const uint32_t needs = ra_policy_find(ra_policy_name(i))->needs;
        CHECK_EQ(a.n_calls, needs != 0 ? 3 : 0);
        CHECK_EQ(a.needs, needs);
        CHECK_EQ(a.n_obs, needs != 0 ? 2 : 0);
        ra_pool_free(&p);
    }
}

/* Whichever call for features fails, in the first or a later layer, nothing has changed. */
static void test_failed_features(void) {
    const int32_t   n_head_kv[3] = { 2, 0, 3 };
    const ra_config cfg          = ra_pool_config("rkv", 12);
    for (int32_t fail = 1; fail <= 5; ++fail) {
        ra_pool p;
        int32_t n_layers = -1;
        if (!ra_pool_make(&p, &cfg, 3, n_head_kv)) {
            return;
        }
        const ra_cache_ops ops = ra_pool_ops(&p);
        ra_pool_append(&p, 20);
        snapshot before[3] = { snapshot_take(&p, 0), snapshot_take(&p, 1), snapshot_take(&p, 2) };
        p.fail_features    = fail;
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, &n_layers), RA_STATUS_COMPUTE);
        CHECK_EQ(p.n_features, fail);
        CHECK_EQ(p.n_begins, 0);
        CHECK_EQ(p.cache->n_compressions, 0);
        CHECK_EQ(p.cache->min_evicted, INT32_MAX);
        for (int32_t il = 0; il < 3; ++il) {
            snapshot_check(&before[il], &p, il);
        }
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, &n_layers), RA_STATUS_OK);
        CHECK_EQ(n_layers, 2);
        CHECK_EQ(p.cache->n_compressions, 1);
        CHECK_EQ(p.cache->n_evicted, 5 * 8);
        ra_pool_check(&p);
        ra_pool_free(&p);
    }
}

/* A layer whose moves cannot begin stays as it was; the cache goes on afterwards. */
static void test_failed_begin(void) {
    const int32_t   n_head_kv[2] = { 2, 3 };
    const ra_config cfg          = ra_pool_config("snapkv", 12);
    for (int32_t fail = 1; fail <= 2; ++fail) {
        ra_pool p;
        if (!ra_pool_make(&p, &cfg, 2, n_head_kv)) {
            return;
        }
        const ra_cache_ops ops = ra_pool_ops(&p);
        ra_pool_append(&p, 20);
        snapshot before = snapshot_take(&p, 1);
        p.fail_begin    = fail;
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_COMPUTE);
        CHECK_EQ(p.cache->layers[0].used[0], fail == 1 ? 20 : 12);
        before.n_evicted = fail == 1 ? 0 : 2 * 8;
        snapshot_check(&before, &p, 1);
        ra_pool_check(&p);
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
        CHECK_EQ(p.cache->n_evicted, 5 * 8);
        CHECK_EQ(ra_cache_room(p.cache), 8);
        ra_pool_check(&p);
        ra_pool_free(&p);
    }
}

/* An allocator that fails, or gives a head less than what must stay. */
static ra_status alloc_too_small(const ra_config * cfg, const ra_alloc_heads_in * in,
                                 int32_t * budgets) {
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        budgets[ih] = ih == 1 ? in->floor - 2 : in->initial[ih];
    }
    CHECK_EQ(in->floor, ra_config_floor(cfg, 0));
    return RA_STATUS_OK;
}

static ra_status alloc_fails(const ra_config * cfg, const ra_alloc_heads_in * in,
                             int32_t * budgets) {
    (void) cfg;
    (void) in;
    (void) budgets;
    return ra_error(RA_STATUS_NO_MEMORY, "allocator failed on purpose");
}

static void test_failed_allocator(void) {
    const ra_alloc_heads small = { "small", alloc_too_small };
    const ra_alloc_heads fails = { "fails", alloc_fails };
    const ra_config      cfg   = ra_pool_config("random", 12);
    ra_pool              p;
    if (!ra_pool_make(&p, &cfg, 1, three_heads)) {
        return;
    }
    const ra_cache_ops ops = ra_pool_ops(&p);
    ra_pool_append(&p, 20);
    snapshot before              = snapshot_take(&p, 0);
    p.cache->settings.head_alloc = &small;
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_BUDGET);
    p.cache->settings.head_alloc = &fails;
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_NO_MEMORY);
    snapshot_check(&before, &p, 0);
    CHECK_EQ(p.n_begins, 0);
    ra_pool_free(&p);
}

int main(void) {
    test_segments_move_both_ways();
    test_ties_and_numbers_that_are_none();
    test_features_asked_for();
    test_failed_features();
    test_failed_begin();
    test_failed_allocator();
    return ra_test_result();
}
