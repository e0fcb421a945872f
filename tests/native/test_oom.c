/* Every allocation of the core made to fail in turn: a status comes back, nothing leaks (the
 * sanitizers look), and what existed before still works. */
#include "ra_pool.h"

static const int32_t n_head_kv[3] = { 2, 0, 3 };

/* Read by the address sanitizer, which else stops at a size that is too large for calloc(). */
RA_API const char * __asan_default_options(void);

RA_API const char * __asan_default_options(void) {
    return "allocator_may_return_null=1";
}

/* Whether a failure asked for at allocation n is still to come: then there were fewer than n. The
 * probe is the allocation that uses it up. */
static bool is_past_the_last(void) {
    void *     probe = ra_calloc(1, 1);
    const bool past  = probe == NULL;
    ra_free(probe);
    ra_calloc_fail_at(0);
    return past;
}

static ra_config config_with_tables(void) {
    static const int32_t layers[3]  = { 20, 20, 20 };
    static const int32_t heads[5]   = { 12, 30, 9, 11, 20 };
    static const float   centres[2] = { 1.0f, 2.0f };
    ra_config            cfg        = ra_pool_config("rkv", 20);
    cfg.layer_budgets               = layers;
    cfg.n_layer_budgets             = 3;
    cfg.head_budgets                = heads;
    cfg.n_head_budgets              = 5;
    cfg.centres                     = centres;
    cfg.n_centres                   = 2;
    return cfg;
}

static void test_hook(void) {
    ra_calloc_fail_at(2);
    void * first  = ra_calloc(4, 4);
    void * second = ra_calloc(4, 4);
    void * third  = ra_calloc(4, 4);
    CHECK(first != NULL && second == NULL && third != NULL);
    ra_free(first);
    ra_free(second);
    ra_free(third);
    /* hidden from the compiler, which warns of sizes that no object can have */
    volatile size_t huge = SIZE_MAX;
    CHECK(ra_calloc(huge, 2) == NULL);
    CHECK(ra_calloc(huge / 2 + 2, 2) == NULL);
    void * empty = ra_calloc(0, 0);
    CHECK(empty != NULL);
    ra_free(empty);
}

/* Settings and cache are made with allocation n failing, for n = 1, 2, ... until none fails. */
static int32_t fail_each_of_init(const ra_config * cfg) {
    int32_t n = 1;
    for (;; ++n) {
        ra_settings settings;
        ra_cache *  c = (ra_cache *) &settings; /* to be overwritten */
        ra_error_clear();
        ra_calloc_fail_at(n);
        ra_status st = ra_settings_init(&settings, cfg);
        if (st != RA_STATUS_OK) {
            const ra_settings empty = { 0 };
            CHECK_SAME(&settings, &empty, sizeof(empty));
            c = NULL;
        } else {
            st = ra_cache_init(&c, &settings, 3, n_head_kv, NULL);
        }
        if (is_past_the_last()) {
            CHECK_STATUS(st, RA_STATUS_OK);
            ra_cache_free(c);
            return n - 1;
        }
        CHECK_STATUS(st, RA_STATUS_NO_MEMORY);
        if (!CHECK(c == NULL) || n > 1000) {
            return n;
        }
    }
}

static void test_init(void) {
    const ra_config plain  = ra_pool_config("rkv", 20);
    const ra_config tables = config_with_tables();
    /* 1 cache, 2 + 2 arrays, 1 table, at least 8 per layer; tables: 3 copies more, 2 for
     * a split less */
    const int32_t n_plain = fail_each_of_init(&plain);
    CHECK(n_plain >= 1 + 4 + 1 + 3 * 8);
    CHECK_EQ(fail_each_of_init(&tables), n_plain + 1);
}

static void count_traces(void * user, const ra_trace_event * event) {
    int32_t n = 0;
    for (int32_t ih = 0; ih < event->n_head_kv; ++ih) {
        n += event->n_kv[ih];
        CHECK(event->budgets[ih] > 0);
    }
    CHECK(event->pos[n - 1] >= 0 && event->keep[n - 1] == 1);
    ++*(int32_t *) user;
}

/* A compression with allocation n failing: planned in full and packed, or left alone in full. A trace
 * that cannot be made is left out. */
static void test_compression(bool is_traced) {
    const ra_config cfg = config_with_tables();
    for (int32_t n = 1;; ++n) {
        int32_t n_traces = 0;
        int32_t n_layers = 0;
        ra_pool p;
        if (!ra_pool_make(&p, &cfg, 3, n_head_kv)) {
            return;
        }
        p.cache->trace         = is_traced ? count_traces : NULL;
        p.cache->trace_user    = &n_traces;
        const ra_cache_ops ops = ra_pool_ops(&p);
        ra_pool_append(&p, 17);
        ra_calloc_fail_at(n);
        const ra_status st      = ra_cache_compress(p.cache, &ops, &n_layers);
        const bool      is_last = is_past_the_last();
        CHECK(st == RA_STATUS_OK || st == RA_STATUS_NO_MEMORY);
        CHECK_EQ(p.cache->layers[0].used[0], st == RA_STATUS_OK ? 12 : 17);
        CHECK_EQ(p.cache->layers[2].used[0], st == RA_STATUS_OK ? 9 : 17);
        CHECK_EQ(p.cache->n_evicted, st == RA_STATUS_OK ? 5 + 8 + 6 : 0);
        ra_pool_check(&p);

        CHECK_STATUS(ra_cache_compress(p.cache, &ops, &n_layers), RA_STATUS_OK);
        CHECK_EQ(n_layers, st == RA_STATUS_OK ? 0 : 2);
        CHECK_EQ(p.cache->layers[0].used[0], 12);
        CHECK_EQ(p.cache->layers[2].used[0], 9);
        ra_pool_append(&p, 8);
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
        ra_pool_check(&p);
        ra_pool_free(&p);
        if (is_last) {
            CHECK_STATUS(st, RA_STATUS_OK);
            /* one ranking per head, and two copies per traced layer */
            CHECK(n - 1 >= (is_traced ? 5 + 4 : 5));
            CHECK_EQ(n_traces, is_traced ? 4 : 0);
            return;
        }
        if (!CHECK(n < 1000)) {
            return;
        }
    }
}

int main(void) {
    test_hook();
    test_init();
    test_compression(false);
    test_compression(true);
    return ra_test_result();
}
