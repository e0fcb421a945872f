/* engine/compress.c when a callback or an allocator fails: what is left behind can be used */
#include "ra_pool.h"

static const int32_t three_heads[1] = { 3 };

/* Whichever call for features fails, of a layer (1 to 2) or of a head (3 to 7), nothing has changed. */
static void test_failed_features(void) {
    const int32_t   n_head_kv[3] = { 2, 0, 3 };
    const ra_config cfg          = ra_pool_config("rkv", 12);
    for (int32_t i = 1; i <= 7; ++i) {
        ra_pool p;
        int32_t n_layers = -1;
        if (!ra_pool_make(&p, &cfg, 3, n_head_kv)) {
            return;
        }
        const ra_cache_ops ops = ra_pool_ops(&p);
        ra_pool_append(&p, 20);
        ra_pool_snapshot before[3] = { ra_pool_snapshot_take(&p, 0), ra_pool_snapshot_take(&p, 1),
                                       ra_pool_snapshot_take(&p, 2) };
        p.fail_features_begin      = i <= 2 ? i : 0;
        p.fail_features            = i <= 2 ? 0 : i - 2;
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, &n_layers), RA_STATUS_COMPUTE);
        CHECK_EQ(p.n_features, i <= 2 ? 2 * (i - 1) : i - 2); /* two heads in the first layer */
        CHECK_EQ(p.n_layers_begun, i == 1 || i == 3 || i == 4 ? 1 : 2);
        CHECK_EQ(p.n_begins, 0);
        CHECK_EQ(p.cache->n_compressions, 0);
        CHECK_EQ(p.cache->min_evicted, INT32_MAX);
        for (int32_t il = 0; il < 3; ++il) {
            ra_pool_snapshot_check(&before[il], &p, il);
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
        ra_pool_snapshot before = ra_pool_snapshot_take(&p, 1);
        p.fail_begin            = fail;
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_COMPUTE);
        CHECK_EQ(p.cache->layers[0].used[0], fail == 1 ? 20 : 12);
        before.n_evicted = fail == 1 ? 0 : 2 * 8;
        ra_pool_snapshot_check(&before, &p, 1);
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
        budgets[ih] = ih == 1 ? in->base - 1 : in->initial[ih];
    }
    CHECK_EQ(in->base, ra_config_base(cfg, 0));
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
    const ra_alloc_heads small = { "small", alloc_too_small, true };
    const ra_alloc_heads fails = { "fails", alloc_fails, true };
    const ra_config      cfg   = ra_pool_config("random", 12);
    ra_pool              p;
    if (!ra_pool_make(&p, &cfg, 1, three_heads)) {
        return;
    }
    const ra_cache_ops ops = ra_pool_ops(&p);
    ra_pool_append(&p, 20);
    ra_pool_snapshot before      = ra_pool_snapshot_take(&p, 0);
    p.cache->settings.head_alloc = &small;
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_BUDGET);
    p.cache->settings.head_alloc = &fails;
    CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_NO_MEMORY);
    ra_pool_snapshot_check(&before, &p, 0);
    CHECK_EQ(p.n_begins, 0);
    ra_pool_free(&p);
}

int main(void) {
    test_failed_features();
    test_failed_begin();
    test_failed_allocator();
    return ra_test_result();
}
