/* engine/cache.c: make, append, truncate, clear, and the two ways to change what is kept */
#include "ra_pool.h"

static const int32_t two_layers[2] = { 2, 1 };

static void check_kept(const ra_pool * p, int32_t il, int32_t ih, const int32_t * pos, int32_t n) {
    const ra_layer * l = &p->cache->layers[il];
    if (CHECK_EQ(l->used[ih], n)) {
        CHECK_ARRAY(l->pos + l->offset[ih], pos, n);
    }
}

static void test_layout(void) {
    const int32_t n_head_kv[3] = { 3, 0, 2 };
    const int32_t heads[5]     = { 7, 20, 9, 11, 12 };
    ra_config     cfg          = ra_pool_config("streaming", 12);
    ra_pool       p;
    cfg.head_budgets   = heads;
    cfg.n_head_budgets = 5;
    if (!ra_pool_make(&p, &cfg, 3, n_head_kv)) {
        return;
    }
    const ra_layer * layers = p.cache->layers;
    CHECK_EQ(layers[0].n_slots, 7 + 20 + 9 + 3 * 8);
    CHECK_EQ(layers[1].n_slots, 0);
    CHECK_EQ(layers[2].n_slots, 11 + 12 + 2 * 8);
    CHECK_EQ(p.cache->n_slots_max, 60);
    CHECK_ARRAY(layers[0].offset, ((int32_t[3]){ 0, 15, 43 }), 3);
    CHECK_ARRAY(layers[0].budget, ((int32_t[3]){ 7, 20, 9 }), 3);
    CHECK_ARRAY(layers[2].budget, ((int32_t[2]){ 11, 12 }), 2);
    CHECK_EQ(ra_cache_room(p.cache), 15);
    CHECK_EQ(ra_cache_contiguous_from(p.cache), -1);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 0);
    ra_pool_append(&p, 15);
    CHECK_EQ(ra_cache_room(p.cache), 0);
    CHECK_EQ(p.cache->peak_tokens, 15);
    ra_pool_check(&p);
    ra_pool_free(&p);
}

static void test_append_and_window(void) {
    const ra_config cfg = ra_pool_config("streaming", 12);
    ra_pool         p;
    if (!ra_pool_make(&p, &cfg, 2, two_layers)) {
        return;
    }
    ra_pool_append(&p, 3);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 3);
    CHECK_EQ(p.cache->n_pos, 3);
    ra_pool_append(&p, 6); /* more than the window at once */
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 4);
    CHECK_ARRAY(p.cache->window_pos, ((int32_t[4]){ 8, 5, 6, 7 }), 4);
    CHECK_EQ(ra_cache_room(p.cache), 11);
    CHECK_EQ(ra_cache_contiguous_from(p.cache), 0);
    CHECK_EQ(p.cache->n_tokens_total, 9);
    ra_pool_check(&p);

    /* a gap in the positions: the window ends at the newest, so only its two queries are at hand */
    ra_cache_append(p.cache, 12, 2);
    CHECK_EQ(p.cache->n_pos, 14);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 2);
    CHECK_EQ(ra_cache_contiguous_from(p.cache), 12);
    ra_pool_free(&p);
}

/* Queries of dropped tokens are gone, and those that they had displaced do not come back. */
static void test_truncate(void) {
    const ra_config cfg = ra_pool_config("streaming", 12);
    ra_pool         p;
    if (!ra_pool_make(&p, &cfg, 2, two_layers)) {
        return;
    }
    ra_pool_append(&p, 10);
    ra_cache_truncate(p.cache, 20);
    CHECK_EQ(p.cache->n_pos, 10);
    ra_cache_truncate(p.cache, 8);
    CHECK_EQ(p.cache->n_pos, 8);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 2);
    check_kept(&p, 0, 1, ((int32_t[8]){ 0, 1, 2, 3, 4, 5, 6, 7 }), 8);
    ra_pool_append(&p, 1);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 3);
    CHECK_EQ(ra_cache_room(p.cache), 11);
    ra_pool_check(&p);
    ra_cache_truncate(p.cache, 0);
    CHECK_EQ(p.cache->n_pos, 0);
    CHECK_EQ(ra_cache_room(p.cache), 20);
    CHECK_EQ(ra_cache_contiguous_from(p.cache), -1);
    ra_pool_append(&p, 5);
    ra_cache_truncate(p.cache, -7);
    CHECK_EQ(p.cache->n_pos, 0);
    ra_pool_check(&p);
    ra_pool_free(&p);
}

/* A policy that wants all queries gets those since the last compression, at most `buffer`, also when
 * the sequence goes back to before it. */
static void test_all_queries(void) {
    const ra_policy all = { .name = "all", .summary = "", .needs = RA_FEATURE_ALL_QUERIES };
    ra_config       cfg = ra_pool_config("h2o", 20);
    ra_pool         p;
    cfg.n_protect = 10;
    if (!ra_pool_make(&p, &cfg, 2, two_layers)) {
        return;
    }
    CHECK((p.cache->settings.policy->needs & all.needs) != 0);
    const ra_cache_ops ops = ra_pool_ops(&p);
    ra_pool_append(&p, 25);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 8);
    CHECK_ARRAY(p.cache->obs_pos, ((int32_t[8]){ 17, 18, 19, 20, 21, 22, 23, 24 }), 8);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 0);
    ra_pool_append(&p, 3);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 3);
    CHECK_ARRAY(p.cache->obs_pos, ((int32_t[3]){ 25, 26, 27 }), 3);
    CHECK(p.cache->min_evicted >= 10);
    CHECK(p.cache->n_evicted > 0);
    ra_cache_truncate(p.cache, 10); /* all that was evicted was in the tail */
    CHECK_EQ(p.cache->n_evicted, 0);
    CHECK_EQ(p.cache->layers[0].n_evicted[0], 0);
    CHECK_EQ(p.cache->min_evicted, INT32_MAX);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 0);
    ra_pool_append(&p, 4);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 4);
    CHECK_ARRAY(p.cache->obs_pos, ((int32_t[4]){ 10, 11, 12, 13 }), 4);
    ra_pool_check(&p);
    ra_pool_free(&p);
}

/* of the queries since the last compression a part, at even distances, the newest among them */
static void test_some_queries(void) {
    const struct {
        const char * policy;
        int32_t      n_query, n;
        int32_t      pos[8];
    } cases[] = {
        { "loss", 64, 8, { 17, 18, 19, 20, 21, 22, 23, 24 } },
        { "loss", 0, 8, { 17, 18, 19, 20, 21, 22, 23, 24 } },
        { "loss", 4, 4, { 18, 20, 22, 24 } },
        { "loss", 3, 3, { 19, 22, 24 } },
        { "loss", 1, 1, { 24 } },
        { "h2o", 4, 8, { 17, 18, 19, 20, 21, 22, 23, 24 } }, /* a sum over all of them */
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); ++i) {
        ra_config cfg = ra_pool_config(cases[i].policy, 20);
        cfg.n_query   = cases[i].n_query;
        ra_pool p;
        if (ra_pool_make(&p, &cfg, 2, two_layers)) {
            ra_pool_append(&p, 25);
            CHECK_EQ(ra_cache_list_queries(p.cache, 0), cases[i].n);
            CHECK_ARRAY(p.cache->obs_pos, cases[i].pos, cases[i].n);
            ra_pool_free(&p);
        }
    }
}

static void test_after_a_compression(void) {
    const ra_config    cfg = ra_pool_config("streaming", 7);
    ra_pool            p;
    int32_t            n_layers = -1;
    const ra_cache_ops ops      = ra_pool_ops(&p);
    if (!ra_pool_make(&p, &cfg, 2, two_layers)) {
        return;
    }
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, &n_layers), RA_STATUS_OK);
    CHECK_EQ(n_layers, 0);
    ra_pool_append(&p, 7);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, &n_layers), RA_STATUS_OK);
    CHECK_EQ(n_layers, 0);
    CHECK_EQ(p.cache->n_compressions, 0);
    ra_pool_append(&p, 8);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, &n_layers), RA_STATUS_OK);
    CHECK_EQ(n_layers, 2);
    for (int32_t head = 0; head < 3; ++head) {
        check_kept(&p, head / 2, head % 2, ((int32_t[7]){ 0, 1, 10, 11, 12, 13, 14 }), 7);
    }
    CHECK_EQ(p.cache->n_compressions, 1);
    CHECK_EQ(p.cache->n_evicted, 3 * 8);
    CHECK_EQ(p.cache->layers[0].n_evicted[1], 8);
    CHECK_EQ(p.cache->min_evicted, 2);
    CHECK_EQ(p.cache->peak_tokens, 15);
    CHECK_EQ(ra_cache_contiguous_from(p.cache), 10);
    CHECK_EQ(ra_cache_room(p.cache), 8);

    ra_cache_clear(p.cache);
    CHECK_EQ(p.cache->n_pos, 0);
    CHECK_EQ(p.cache->n_compressions, 0);
    CHECK_EQ(p.cache->n_evicted, 0);
    CHECK_EQ(p.cache->layers[0].n_evicted[1], 0);
    CHECK_EQ(p.cache->min_evicted, INT32_MAX);
    CHECK_EQ(p.cache->peak_tokens, 0);
    CHECK_EQ(p.cache->n_tokens_total, 15);
    CHECK_EQ(ra_cache_list_queries(p.cache, 0), 0);
    CHECK_EQ(ra_cache_room(p.cache), 15);
    ra_pool_check(&p);
    ra_pool_free(&p);
}

static void test_set_protect(void) {
    const int32_t      heads[3] = { 20, 12, 20 };
    ra_config          cfg      = ra_pool_config("streaming", 20);
    ra_pool            p;
    const ra_cache_ops ops = ra_pool_ops(&p);
    cfg.head_budgets       = heads;
    cfg.n_head_budgets     = 3;
    if (!ra_pool_make(&p, &cfg, 2, two_layers)) {
        return;
    }
    /* the smallest head, 12 tokens, holds 7 + window 4 + 1 */
    CHECK_STATUS(ra_cache_set_protect(p.cache, 8), RA_STATUS_BUDGET);
    CHECK(strstr(ra_last_error(), "layer 0, head 1") != NULL);
    CHECK_STATUS(ra_cache_set_protect(p.cache, -1), RA_STATUS_INVALID);
    CHECK_STATUS(ra_cache_set_protect(p.cache, RA_MAX_TOKENS + 1), RA_STATUS_INVALID);
    CHECK_EQ(p.cache->n_protect, 0);
    CHECK_STATUS(ra_cache_set_protect(p.cache, 7), RA_STATUS_OK);
    ra_pool_append(&p, 20);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
    check_kept(&p, 0, 1, ((int32_t[12]){ 0, 1, 2, 3, 4, 5, 6, 15, 16, 17, 18, 19 }), 12);

    /* what is gone cannot be protected any more, and less protection frees tokens */
    CHECK_STATUS(ra_cache_set_protect(p.cache, 0), RA_STATUS_OK);
    ra_pool_append(&p, 8);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
    check_kept(&p, 0, 1, ((int32_t[12]){ 0, 1, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27 }), 12);
    ra_pool_check(&p);
    ra_pool_free(&p);
}

/* The prefix is a base that every layer gets; what remains is split 3 to 1, and 12 rows to 4. */
static void test_set_protect_splits_anew(void) {
    const double  demand[2] = { 9, 1 };
    const int32_t one[2]    = { 1, 1 };
    ra_config     cfg       = ra_pool_config("streaming", 20); /* 2 sinks, window 4 */
    ra_pool       p;
    cfg.layer_alloc    = "wave";
    cfg.layer_demand   = demand;
    cfg.n_layer_demand = 2;
    if (!ra_pool_make(&p, &cfg, 2, one)) {
        return;
    }
    ra_cache * c = p.cache;
    CHECK_EQ(c->layers[0].initial[0], 6 + 21);
    CHECK_EQ(c->layers[1].initial[0], 6 + 7);
    CHECK_STATUS(ra_cache_set_protect(c, 2), RA_STATUS_OK); /* the sinks: no change */
    CHECK_EQ(c->n_splits, 0);
    CHECK_STATUS(ra_cache_set_protect(c, 8), RA_STATUS_OK);
    CHECK_EQ(c->n_splits, 1);
    CHECK_EQ(c->layers[0].initial[0], 12 + 12);
    CHECK_EQ(c->layers[1].initial[0], 12 + 4);
    CHECK_EQ(c->layers[0].n_slots + c->layers[1].n_slots, 2 * (20 + cfg.buffer));
    CHECK_EQ(c->n_slots_max, 24 + cfg.buffer);
    CHECK_EQ(ra_cache_room(c), 16 + cfg.buffer);
    CHECK_STATUS(ra_cache_set_protect(c, 16), RA_STATUS_BUDGET); /* 16 + 4, and none to choose */
    CHECK(strstr(ra_last_error(), "cannot hold the 20") != NULL);
    CHECK_EQ(c->n_protect, 8);
    CHECK_EQ(c->layers[0].initial[0], 24);

    /* a cache that holds tokens stays as it is */
    ra_cache_append(c, 0, 3);
    CHECK_STATUS(ra_cache_set_protect(c, 11), RA_STATUS_OK);
    CHECK_EQ(c->layers[0].initial[0], 24);
    CHECK_STATUS(ra_cache_set_protect(c, 12), RA_STATUS_BUDGET);
    ra_cache_clear(c);
    CHECK_STATUS(ra_cache_set_protect(c, 0), RA_STATUS_OK);
    CHECK_EQ(c->layers[0].initial[0], 27);

    /* tables of the caller's own are not split anew */
    const int32_t own[1] = { 14 };
    CHECK_STATUS(ra_cache_set_head_budgets(c, 0, own, 1), RA_STATUS_OK);
    CHECK_STATUS(ra_cache_set_protect(c, 5), RA_STATUS_OK);
    CHECK_EQ(c->layers[0].initial[0], 14);
    CHECK_EQ(c->n_splits, 2);
    ra_pool_free(&p);
}

static void test_set_head_budgets(void) {
    const ra_config    cfg = ra_pool_config("streaming", 12);
    ra_pool            p;
    const ra_cache_ops ops = ra_pool_ops(&p);
    if (!ra_pool_make(&p, &cfg, 2, two_layers)) {
        return;
    }
    const int32_t skewed[2] = { 7, 17 };
    const int32_t more[2]   = { 7, 18 };
    const int32_t small[2]  = { 6, 12 };
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, -1, skewed, 2), RA_STATUS_INVALID);
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 2, skewed, 2), RA_STATUS_INVALID);
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 1, skewed, 2), RA_STATUS_INVALID);
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 0, skewed, SIZE_MAX), RA_STATUS_INVALID);
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 0, NULL, 2), RA_STATUS_INVALID);
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 0, more, 2), RA_STATUS_BUDGET);
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 0, small, 2), RA_STATUS_BUDGET);
    CHECK_ARRAY(p.cache->layers[0].initial, ((int32_t[2]){ 12, 12 }), 2);

    /* with tokens: from the next compression on */
    ra_pool_append(&p, 20);
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 0, skewed, 2), RA_STATUS_OK);
    CHECK_ARRAY(p.cache->layers[0].budget, ((int32_t[2]){ 12, 12 }), 2);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
    CHECK_ARRAY(p.cache->layers[0].budget, skewed, 2);
    CHECK_ARRAY(p.cache->layers[0].offset, ((int32_t[2]){ 0, 15 }), 2);
    CHECK_ARRAY(p.cache->layers[0].used, skewed, 2);
    ra_pool_check(&p);

    /* the pool was made for 24: a smaller sum does not shrink what may be asked for later */
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 0, ((int32_t[2]){ 8, 7 }), 2), RA_STATUS_OK);
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
    CHECK_ARRAY(p.cache->layers[0].used, ((int32_t[2]){ 7, 7 }), 2);
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 0, ((int32_t[2]){ 17, 7 }), 2), RA_STATUS_OK);
    ra_pool_check(&p);

    /* without tokens: at once */
    ra_cache_clear(p.cache);
    CHECK_ARRAY(p.cache->layers[0].budget, ((int32_t[2]){ 17, 7 }), 2);
    CHECK_STATUS(ra_cache_set_head_budgets(p.cache, 0, skewed, 2), RA_STATUS_OK);
    CHECK_ARRAY(p.cache->layers[0].budget, skewed, 2);
    CHECK_EQ(ra_cache_room(p.cache), 15);
    ra_pool_free(&p);
}

static void test_odd_models(void) {
    const int32_t none[2] = { 0, 0 };
    ra_config     cfg     = ra_pool_config("streaming", 12);
    ra_pool       p;
    if (ra_pool_make(&p, &cfg, 2, none)) {
        CHECK_EQ(ra_cache_room(p.cache), INT32_MAX);
        ra_pool_append(&p, 100);
        CHECK_EQ(ra_cache_contiguous_from(p.cache), -1);
        ra_pool_free(&p);
    }
    /* a pool that no 32-bit row index can address */
    const int32_t many[1] = { 40 };
    ra_settings   settings;
    ra_cache *    c = NULL;
    cfg.budget      = RA_MAX_TOKENS;
    CHECK_STATUS(ra_settings_init(&settings, &cfg), RA_STATUS_OK);
    CHECK_STATUS(ra_cache_init(&c, &settings, 1, many, NULL), RA_STATUS_INVALID);
    CHECK(c == NULL);
    ra_cache_free(NULL);
}

int main(void) {
    test_layout();
    test_append_and_window();
    test_truncate();
    test_all_queries();
    test_some_queries();
    test_after_a_compression();
    test_set_protect();
    test_set_protect_splits_anew();
    test_set_head_budgets();
    test_odd_models();
    return ra_test_result();
}
