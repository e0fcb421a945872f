/* engine/windows.c: layers with a sliding window in a cache */
#include "ra_pool.h"

enum { N_LAYER = 3, WINDOW = 24 };

static const int32_t n_head_kv[N_LAYER] = { 2, 1, 2 };
static const int32_t n_swa[N_LAYER]     = { 0, 0, WINDOW };

static bool make(ra_pool * p, int32_t budget, int32_t budget_swa) {
    ra_config cfg  = ra_pool_config("streaming", budget);
    cfg.budget_swa = budget_swa;
    return CHECK(ra_pool_make_windows(p, &cfg, N_LAYER, n_head_kv, n_swa));
}

/* budgets: split over the layers that grow; a window has its own, of which no more than the window is used */
static void test_budgets(void) {
    ra_config cfg           = ra_pool_config("streaming", 40);
    cfg.layer_alloc         = "pyramid";
    cfg.pyramid_beta        = 2.0;
    const int32_t wanted[3] = { 10, WINDOW, 1000 };
    for (int32_t i = 0; i < 3; ++i) {
        ra_pool p;
        cfg.budget_swa = wanted[i];
        if (!CHECK(ra_pool_make_windows(&p, &cfg, N_LAYER, n_head_kv, n_swa))) {
            return;
        }
        const ra_layer * l = p.cache->layers;
        CHECK_EQ(l[0].initial[0] + l[1].initial[0], 2 * 40);
        CHECK(l[0].initial[0] > l[1].initial[0]);
        CHECK_EQ(l[2].initial[0], i == 0 ? 10 : WINDOW);
        CHECK_EQ(l[2].initial[1], l[2].initial[0]);
        CHECK_EQ(l[2].n_slots, 2 * (l[2].initial[0] + cfg.buffer));
        CHECK_EQ(ra_layer_holds_window(&l[2]), i > 0);
        CHECK(!ra_layer_holds_window(&l[0]));
        ra_pool_free(&p);
    }
    /* no window is so short that what must stay does not fit */
    CHECK_EQ(ra_window_budget(&cfg, 1), ra_config_floor(&cfg, 0));
}

static void test_config(void) {
    ra_config cfg  = ra_pool_config("streaming", 40);
    cfg.n_protect  = 20; /* no part of a window's budget */
    cfg.budget_swa = ra_config_floor(&cfg, 0);
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_OK);
    --cfg.budget_swa;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_BUDGET);
    cfg.budget_swa = -1;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
    cfg.budget_swa = RA_MAX_TOKENS + 1;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
}

/* what a query sees: positions above pos - window */
static void test_dead(void) {
    ra_pool p;
    if (!make(&p, 60, 60)) {
        return;
    }
    for (int32_t i = 0; i < 4; ++i) {
        ra_pool_append(&p, 8);
    }
    const ra_layer * l = &p.cache->layers[2];
    for (int32_t pos = 0; pos < 60; ++pos) {
        const int32_t n = pos - WINDOW + 1;
        CHECK_EQ(ra_head_dead(l, 1, pos), n < 0 ? 0 : n > 32 ? 32 : n);
        CHECK_EQ(ra_head_dead(&p.cache->layers[0], 1, pos), 0);
    }
    ra_pool_free(&p);
}

/* a budget of the whole window: nobody is asked for features of the layer, and nothing in the window goes */
static void test_whole_window(void) {
    ra_pool p;
    if (!make(&p, 200, WINDOW)) {
        return;
    }
    const ra_cache_ops ops = ra_pool_ops(&p);
    for (int32_t i = 0; i < 12; ++i) {
        if (ra_cache_room(p.cache) < 5) {
            int32_t n_layers = 0;
            CHECK_STATUS(ra_cache_compress(p.cache, &ops, &n_layers), RA_STATUS_OK);
            CHECK_EQ(n_layers, 1); /* the others have room */
        }
        ra_pool_append(&p, 5);
        ra_pool_check(&p);
        for (int32_t ih = 0; ih < 2; ++ih) {
            const ra_layer * l = &p.cache->layers[2];
            const int32_t    n = p.cache->n_pos < WINDOW ? p.cache->n_pos : WINDOW;
            CHECK(l->used[ih] >= n);
            for (int32_t k = 0; k < n; ++k) {
                CHECK_EQ(l->pos[l->offset[ih] + l->used[ih] - 1 - k], p.cache->n_pos - 1 - k);
            }
        }
    }
    CHECK_EQ(p.n_features, 0);
    CHECK(p.cache->n_compressions >= 4);
    CHECK_EQ(p.cache->min_evicted, 0);
    ra_pool_free(&p);
}

/* the prompt is protected where it does not slide out, sinks as long as they are in the window */
static void test_protection(void) {
    ra_pool p;
    if (!make(&p, 40, 12)) {
        return;
    }
    const ra_cache_ops ops = ra_pool_ops(&p);
    CHECK_STATUS(ra_cache_set_protect(p.cache, 30), RA_STATUS_OK);
    bool had_sinks = false;
    for (int32_t i = 0; i < 20; ++i) {
        const ra_layer * l = &p.cache->layers[2];
        if (ra_cache_room(p.cache) < 5) {
            CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
            const bool is_in = p.cache->n_pos <= WINDOW;
            had_sinks        = had_sinks || is_in;
            CHECK_EQ(l->pos[l->offset[0]] == 0, is_in);
            CHECK(l->pos[l->offset[0]] > p.cache->n_pos - WINDOW);
            CHECK(l->used[0] <= 12);
        }
        ra_pool_append(&p, 5);
        ra_pool_check(&p);
    }
    CHECK(had_sinks);
    for (int32_t pos = 0; pos < 30; ++pos) {
        CHECK_EQ(p.cache->layers[0].pos[pos], pos);
    }
    ra_pool_free(&p);
}

/* merging is for the layers without a window */
static void test_no_merging(void) {
    ra_config cfg  = ra_pool_config("loss", 20);
    cfg.merge      = 1;
    cfg.budget_swa = 12;
    ra_pool p;
    if (CHECK(ra_pool_make_windows(&p, &cfg, N_LAYER, n_head_kv, n_swa))) {
        CHECK(p.cache->layers[0].merge != NULL && p.cache->layers[2].merge == NULL);
        ra_pool_free(&p);
    }
}

/* a compression that fails leaves dead tokens where they were */
static void test_failure(void) {
    for (int32_t call = 1; call <= 3; ++call) {
        ra_pool   p;
        ra_config cfg  = ra_pool_config("snapkv", 20);
        cfg.budget_swa = 20;
        if (!CHECK(ra_pool_make_windows(&p, &cfg, N_LAYER, n_head_kv, n_swa))) {
            return;
        }
        const ra_cache_ops ops = ra_pool_ops(&p);
        for (int32_t i = 0; i < 9; ++i) {
            if (ra_cache_room(p.cache) < 5) {
                CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
            }
            ra_pool_append(&p, 5);
        }
        CHECK(ra_head_dead(&p.cache->layers[2], 0, p.cache->n_pos) > 0);
        ra_pool_snapshot before = ra_pool_snapshot_take(&p, 2);
        p.n_layers_begun = p.n_begins = 0;
        p.fail_features_begin         = call == 3 ? 3 : 0;
        p.fail_begin                  = call < 3 ? call : 0;
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_COMPUTE);
        ra_pool_check(&p);
        before.n_evicted = p.cache->n_evicted;
        ra_pool_snapshot_check(&before, &p, 2);
        ra_pool_free(&p);
    }
}

int main(void) {
    test_budgets();
    test_config();
    test_dead();
    test_whole_window();
    test_protection();
    test_no_merging();
    test_failure();
    return ra_test_result();
}
