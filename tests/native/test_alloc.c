/* alloc/: from a demand to whole tokens, over layers and over heads */
#include "ra_test.h"
#include "registry.h"

enum { N_MAX = 40 };

static const ra_robustify_params paper = { .gamma = 0.5, .lo = 0.25, .hi = 2.0 };

static int64_t sum_of(int32_t n, const int32_t * budgets) {
    int64_t sum = 0;
    for (int32_t i = 0; i < n; ++i) {
        sum += budgets[i];
    }
    return sum;
}

static void test_robustify_by_hand(void) {
    int32_t budgets[4];
    /* roots 1 2 3 4, nothing clipped (mean 2.5): tenths of the total */
    CHECK_STATUS(ra_robustify(&paper, 4, ((double[4]){ 1, 4, 9, 16 }), 1000, 0, budgets),
                 RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[4]){ 100, 200, 300, 400 }), 4);
    /* only ratios of demands count */
    CHECK_STATUS(
        ra_robustify(&paper, 4, ((double[4]){ 1e-9, 4e-9, 9e-9, 16e-9 }), 1000, 0, budgets),
        RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[4]){ 100, 200, 300, 400 }), 4);
    /* the lowest is lifted to its floor, the others keep their ratios */
    CHECK_STATUS(ra_robustify(&paper, 4, ((double[4]){ 1, 4, 9, 16 }), 1000, 190, budgets),
                 RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[4]){ 190, 190, 266, 354 }), 4);
    /* one takes all: twice the mean at most */
    CHECK_STATUS(ra_robustify(&paper, 4, ((double[4]){ 0, 0, 0, 5 }), 400, 0, budgets),
                 RA_STATUS_OK);
    CHECK_EQ(budgets[3], 200);
    /* equal demands, no demand: equal shares, what is left over goes to the first */
    CHECK_STATUS(ra_robustify(&paper, 4, ((double[4]){ 3, 3, 3, 3 }), 42, 0, budgets),
                 RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[4]){ 11, 11, 10, 10 }), 4);
    CHECK_STATUS(ra_robustify(&paper, 4, ((double[4]){ 0, 0, 0, 0 }), 43, 0, budgets),
                 RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[4]){ 11, 11, 11, 10 }), 4);
}

/* Shares far from the mean: 9 weights of 1 and 11 of 0 have the mean 0.45, so they become 0.9 and
 * 0.1125, which sum to 9.3375. */
static void test_robustify_clips(void) {
    double  demand[20] = { 0 };
    int32_t budgets[20];
    for (int32_t i = 0; i < 9; ++i) {
        demand[i] = 77.0;
    }
    CHECK_STATUS(ra_robustify(&paper, 20, demand, 20000, 0, budgets), RA_STATUS_OK);
    CHECK_EQ(sum_of(20, budgets), 20000);
    for (int32_t i = 0; i < 20; ++i) {
        CHECK_NEAR(budgets[i], (i < 9 ? 0.9 : 0.1125) / 9.3375 * 20000, 1.0);
    }
}

static void test_robustify_errors(void) {
    const double demand[2]  = { 1, 2 };
    int32_t      budgets[2] = { 7, 7 };
    CHECK_STATUS(ra_robustify(&paper, 0, demand, 10, 0, budgets), RA_STATUS_INVALID);
    CHECK_STATUS(ra_robustify(&paper, 2, NULL, 10, 0, budgets), RA_STATUS_INVALID);
    CHECK_STATUS(ra_robustify(&paper, 2, demand, -1, 0, budgets), RA_STATUS_INVALID);
    CHECK_STATUS(ra_robustify(&paper, 2, demand, INT64_MAX, 0, budgets), RA_STATUS_INVALID);
    CHECK_STATUS(ra_robustify(&paper, 2, demand, 10, -1, budgets), RA_STATUS_INVALID);
    CHECK_STATUS(ra_robustify(&paper, 2, demand, 10, 6, budgets), RA_STATUS_BUDGET);
    const double bad[3] = { NAN, INFINITY, -1.0 };
    for (int32_t i = 0; i < 3; ++i) {
        CHECK_STATUS(ra_robustify(&paper, 2, ((double[2]){ 1, bad[i] }), 10, 0, budgets),
                     RA_STATUS_INVALID);
        const ra_robustify_params p[3] = { { bad[i], 0.25, 2.0 },
                                           { 0.5, bad[i], 2.0 },
                                           { 0.5, 0.25, bad[i] } };
        for (int32_t j = 0; j < 3; ++j) {
            CHECK_STATUS(ra_robustify(&p[j], 2, demand, 10, 0, budgets), RA_STATUS_INVALID);
        }
    }
    ra_calloc_fail_at(1);
    CHECK_STATUS(ra_robustify(&paper, 2, demand, 10, 0, budgets), RA_STATUS_NO_MEMORY);
    CHECK_ARRAY(budgets, ((int32_t[2]){ 7, 7 }), 2);
}

/* Exact sum, floor and cap; who asks for more never gets less, but for the one token by which
 * shares differ that flattening and clipping have made equal. */
static void test_robustify_random(void) {
    for (int32_t round = 0; round < 2000; ++round) {
        const int32_t             n            = ra_test_int(1, N_MAX + 1);
        const ra_robustify_params p            = { .gamma = ra_test_int(0, 5) / 2.0,
                                                   .lo    = ra_test_int(0, 5) / 4.0,
                                                   .hi    = 1.0 + ra_test_int(0, 12) / 4.0 };
        const int32_t             floor_tokens = ra_test_int(0, 20);
        const int64_t             total = (int64_t) n * floor_tokens + ra_test_int(0, n * 60 + 1);
        double                    demand[N_MAX];
        int32_t                   budgets[N_MAX];
        for (int32_t i = 0; i < n; ++i) {
            demand[i] = ra_test_int(0, 3) == 0 ? 0.0 : ra_test_int(0, 30) * (double) (round + 1);
        }
        if (!CHECK_STATUS(ra_robustify(&p, n, demand, total, floor_tokens, budgets),
                          RA_STATUS_OK)) {
            return;
        }
        CHECK_EQ(sum_of(n, budgets), total);
        const double mean = (double) total / n;
        const double cap  = fmax(fmax(floor(p.hi * mean + 1e-9), ceil(mean)), floor_tokens);
        for (int32_t i = 0; i < n; ++i) {
            CHECK(budgets[i] >= floor_tokens && budgets[i] <= cap);
            for (int32_t j = 0; j < n; ++j) {
                CHECK(demand[i] <= demand[j] || budgets[i] >= budgets[j] - 1);
                CHECK(demand[i] != demand[j] || i > j || budgets[i] - budgets[j] == 0 ||
                      budgets[i] - budgets[j] == 1);
            }
        }
    }
}

/* Every allocator over layers: exact total, and each layer can hold what must stay. */
static void test_every_layer_allocator(void) {
    for (int32_t i = 0; i < ra_alloc_count(0); ++i) {
        const ra_alloc_layers * alloc = ra_alloc_layers_find(ra_alloc_name(0, i));
        for (int32_t n_layer = 1; n_layer <= N_MAX; ++n_layer) {
            double    demand[N_MAX];
            int32_t   budgets[N_MAX];
            ra_config cfg      = ra_config_default_params();
            cfg.budget         = ra_test_int(13, 300);
            cfg.n_protect      = cfg.budget > 60 ? ra_test_int(0, 40) : 0;
            cfg.pyramid_beta   = ra_test_int(1, 40);
            cfg.layer_demand   = demand;
            cfg.n_layer_demand = (size_t) n_layer;
            for (int32_t il = 0; il < n_layer; ++il) {
                demand[il] = ra_test_int(0, 1000);
            }
            double        curves[N_MAX * 3];
            const int32_t grid[3] = { 12, 50, 200 };
            for (int32_t j = 0; j < 3 * n_layer; ++j) {
                curves[j] = ra_test_int(0, 4) == 0 ? 0.0 : exp(-3.0 * (j % 3) * ra_test_int(0, 3));
            }
            cfg.head_error   = curves;
            cfg.n_head_error = 3 * (size_t) n_layer;
            cfg.error_grid   = grid;
            cfg.n_error_grid = 3;
            cfg.error_base   = 12;
            CHECK((alloc->run == NULL) != (alloc->run_heads == NULL));
            CHECK_STATUS(alloc->run != NULL ? alloc->run(&cfg, n_layer, budgets)
                                            : alloc->run_heads(&cfg, n_layer, budgets),
                         RA_STATUS_OK);
            CHECK_EQ(sum_of(n_layer, budgets), (int64_t) n_layer * cfg.budget);
            for (int32_t il = 0; il < n_layer; ++il) {
                CHECK(budgets[il] >= ra_config_floor(&cfg, cfg.n_protect));
            }
        }
    }
}

static void test_layer_allocators_by_hand(void) {
    int32_t   budgets[5];
    ra_config cfg    = ra_config_default_params();
    cfg.budget       = 100;
    cfg.pyramid_beta = 4.0; /* 12 stay anyway; of the other 88, 154 down to 22 in equal steps */
    CHECK_STATUS(ra_alloc_layers_pyramid(&cfg, 5, budgets), RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[5]){ 166, 133, 100, 67, 34 }), 5);
    cfg.pyramid_beta = 1.0;
    CHECK_STATUS(ra_alloc_layers_pyramid(&cfg, 5, budgets), RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[5]){ 100, 100, 100, 100, 100 }), 5);

    const double demand[5] = { 16, 1, 1, 4, 9 }; /* roots 4 1 1 2 3 of 11 */
    cfg.layer_demand       = demand;
    cfg.n_layer_demand     = 5;
    CHECK_STATUS(ra_alloc_layers_wave(&cfg, 5, budgets), RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[5]){ 172, 52, 52, 92, 132 }), 5);
    CHECK_STATUS(ra_alloc_layers_wave(&cfg, 4, budgets), RA_STATUS_INVALID);
    cfg.layer_demand   = NULL;
    cfg.n_layer_demand = 0;
    CHECK_STATUS(ra_alloc_layers_wave(&cfg, 5, budgets), RA_STATUS_INVALID);
}

/* 2 heads, budget 4 each, of which one stays anyway: tau is the 6th of the other scores: 5. Head 0 has
 * 5 tokens at or above it, head 1 has 1; the roots are 2.24 and 1. */
/* Heads whose error halves with 10, 20 and no tokens, from 12 that stay anyway: budget 20, so 24 to split, of
 * which 3 each are their own. Then 10 stay more. */
static void test_curves_by_hand(void) {
    const int32_t grid[2]  = { 12, 32 };
    const double  error[6] = { 4, 1, 4, 2, 4, 4 };
    int32_t       out[3];
    ra_config     cfg = ra_config_default_params();
    cfg.budget        = 20;
    cfg.head_error    = error;
    cfg.n_head_error  = 6;
    cfg.error_grid    = grid;
    cfg.n_error_grid  = 2;
    cfg.error_base    = 12;
    cfg.error_least   = 0.4;
    CHECK_STATUS(ra_alloc_every_head_error(&cfg, 3, out), RA_STATUS_OK);
    CHECK_EQ(out[0] + out[1] + out[2], 60);
    CHECK_EQ(out[2], 12 + 3);
    CHECK(out[0] > out[1] && out[1] > out[2]);
    /* no exchange of a token would lower the sum: the last gains are as equal as whole tokens allow */
    const double gain0 = 4 * pow(0.25, (out[0] - 12) / 20.0) * (1 - pow(0.25, 0.05));
    const double gain1 = 4 * pow(0.5, (out[1] - 13) / 20.0) * (1 - pow(0.5, 0.05));
    CHECK(gain0 < gain1 + 1e-9);
    const int32_t before = out[0];
    cfg.budget           = 30;
    cfg.n_protect        = 14; /* 10 more than the sinks */
    CHECK_STATUS(ra_alloc_every_head_error(&cfg, 3, out), RA_STATUS_OK);
    CHECK_EQ(out[0], before + 10);
    /* beyond the grid nothing is gained, and what is left goes to the lowest */
    cfg.n_protect = 0;
    cfg.budget    = 100;
    CHECK_STATUS(ra_alloc_every_head_error(&cfg, 3, out), RA_STATUS_OK);
    CHECK_ARRAY(out, ((int32_t[3]){ 100, 100, 100 }), 3);
    CHECK_STATUS(ra_alloc_every_head_error(&cfg, 4, out), RA_STATUS_INVALID);
    cfg.budget = 12;
    CHECK_STATUS(ra_alloc_every_head_error(&cfg, 3, out), RA_STATUS_BUDGET);
    cfg.budget = 20;
    ra_calloc_fail_at(1);
    CHECK_STATUS(ra_alloc_every_head_error(&cfg, 3, out), RA_STATUS_NO_MEMORY);
}

static void test_adaptive_by_hand(void) {
    const int32_t           n_kv[2]    = { 7, 5 };
    const int32_t           initial[2] = { 4, 4 };
    const float             score[12]  = { INFINITY, 9, 8, 7, 6, 5, 1, INFINITY, 5.5f, 2, 3, 4 };
    const ra_alloc_heads_in in         = {
                .n_head_kv = 2, .base = 1, .n_kv = n_kv, .score = score, .initial = initial
    };
    int32_t   budgets[2];
    ra_config cfg = ra_config_default_params();
    CHECK_STATUS(ra_alloc_heads_adaptive(&cfg, &in, budgets), RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[2]){ 5, 3 }), 2);
    cfg.gamma = 1.0;
    CHECK_STATUS(ra_alloc_heads_adaptive(&cfg, &in, budgets), RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[2]){ 6, 2 }), 2);
    /* all scores equal tau: every token counts */
    const float             ones[12] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    const ra_alloc_heads_in tied     = {
            .n_head_kv = 2, .base = 1, .n_kv = n_kv, .score = ones, .initial = initial
    };
    CHECK_STATUS(ra_alloc_heads_adaptive(&cfg, &tied, budgets), RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[2]){ 5, 3 }), 2);
    cfg.mu = 1.0; /* nobody gets less than the mean */
    CHECK_STATUS(ra_alloc_heads_adaptive(&cfg, &in, budgets), RA_STATUS_OK);
    CHECK_ARRAY(budgets, initial, 2);
}

/* Every allocator over heads, with ties, forced tokens and heads that hold little. */
static void test_every_head_allocator(void) {
    enum { N_HEADS = 6, N_KV = 50 };
    for (int32_t i = 0; i < ra_alloc_count(1); ++i) {
        const ra_alloc_heads * alloc = ra_alloc_heads_find(ra_alloc_name(1, i));
        bool                   moved = false;
        for (int32_t round = 0; round < 300; ++round) {
            const ra_config cfg  = ra_config_default_params();
            const int32_t   n    = ra_test_int(1, N_HEADS + 1);
            int32_t         used = 0;
            int32_t         n_kv[N_HEADS];
            int32_t         initial[N_HEADS];
            int32_t         budgets[N_HEADS];
            float           score[N_HEADS * N_KV];
            const int32_t   n_values = round % 3 == 0 ? 1 : 60;
            for (int32_t ih = 0; ih < n; ++ih) {
                n_kv[ih]    = ra_test_int(1, N_KV + 1);
                initial[ih] = ra_test_int(13, 40);
                for (int32_t j = 0; j < n_kv[ih]; ++j) {
                    score[used++] = j < 4 ? INFINITY : (float) ra_test_int(0, n_values);
                }
            }
            const ra_alloc_heads_in in = {
                .n_head_kv = n, .base = 12, .n_kv = n_kv, .score = score, .initial = initial
            };
            CHECK_STATUS(alloc->run(&cfg, &in, budgets), RA_STATUS_OK);
            CHECK_EQ(sum_of(n, budgets), sum_of(n, initial));
            moved = moved || memcmp(budgets, initial, (size_t) n * sizeof(*budgets)) != 0;
            for (int32_t ih = 0; ih < n; ++ih) {
                CHECK(budgets[ih] > in.base);
            }
        }
        CHECK_EQ(moved, alloc->moves_budgets);
    }
}

int main(void) {
    test_robustify_by_hand();
    test_robustify_clips();
    test_robustify_errors();
    test_robustify_random();
    test_every_layer_allocator();
    test_layer_allocators_by_hand();
    test_curves_by_hand();
    test_adaptive_by_hand();
    test_every_head_allocator();
    return ra_test_result();
}
