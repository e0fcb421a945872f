/* engine/config.c: defaults, every range check, resolution of the budget tables; core/status.c */
#include "config.h"
#include "ra_test.h"

/* One field changed from the defaults, and what the check says to it. */
#define CHECK_FIELD(field, value, want)                     \
    do {                                                    \
        ra_config cfg_ = ra_config_default_params();        \
        cfg_.field     = (value);                           \
        ra_error_clear();                                   \
        CHECK_STATUS(ra_config_check(&cfg_), want);         \
        if ((want) == RA_STATUS_INVALID) {                  \
            CHECK(strstr(ra_last_error(), #field) != NULL); \
        }                                                   \
    } while (0)

static void test_defaults(void) {
    const ra_config cfg = ra_config_default_params();
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_OK);
    CHECK_EQ((int64_t) cfg.size, (int64_t) sizeof(ra_config));
    CHECK_EQ(cfg.budget, 256);
    CHECK_EQ(cfg.buffer, 128);
    CHECK_EQ(cfg.n_sink, 4);
    CHECK_EQ(cfg.n_window, 8);
    CHECK_EQ(cfg.n_protect, 0);
    CHECK_EQ(cfg.pool_kernel, 7);
    CHECK_NEAR(cfg.lambda, 0.1, 1e-7);
    CHECK_NEAR(cfg.sim_threshold, 0.5, 0.0);
    CHECK_STR(cfg.policy, "rkv");
    CHECK_STR(cfg.attention, "auto");
    CHECK(cfg.seed == 0 && cfg.layer_budgets == NULL && cfg.head_budgets == NULL);
}

static void test_every_range(void) {
    CHECK_STATUS(ra_config_check(NULL), RA_STATUS_INVALID);
    CHECK_FIELD(size, sizeof(ra_config) - 1, RA_STATUS_INVALID);
    CHECK_FIELD(size, 0, RA_STATUS_INVALID);

    CHECK_FIELD(budget, 0, RA_STATUS_INVALID);
    CHECK_FIELD(budget, INT32_MIN, RA_STATUS_INVALID);
    CHECK_FIELD(budget, RA_MAX_TOKENS, RA_STATUS_OK);
    CHECK_FIELD(budget, RA_MAX_TOKENS + 1, RA_STATUS_INVALID);
    CHECK_FIELD(buffer, 0, RA_STATUS_INVALID);
    CHECK_FIELD(buffer, 1, RA_STATUS_OK);
    CHECK_FIELD(buffer, RA_MAX_TOKENS, RA_STATUS_OK);
    CHECK_FIELD(buffer, INT32_MAX, RA_STATUS_INVALID);
    CHECK_FIELD(n_sink, -1, RA_STATUS_INVALID);
    CHECK_FIELD(n_sink, 0, RA_STATUS_OK);
    CHECK_FIELD(n_sink, RA_MAX_TOKENS + 1, RA_STATUS_INVALID);
    CHECK_FIELD(n_window, 0, RA_STATUS_INVALID);
    CHECK_FIELD(n_window, 1, RA_STATUS_OK);
    CHECK_FIELD(n_window, RA_MAX_WINDOW + 1, RA_STATUS_INVALID);
    CHECK_FIELD(n_protect, -1, RA_STATUS_INVALID);
    CHECK_FIELD(n_protect, INT32_MAX, RA_STATUS_INVALID);

    CHECK_FIELD(pool_kernel, 0, RA_STATUS_INVALID);
    CHECK_FIELD(pool_kernel, -7, RA_STATUS_INVALID);
    CHECK_FIELD(pool_kernel, 1, RA_STATUS_OK);
    CHECK_FIELD(pool_kernel, 8, RA_STATUS_INVALID);
    CHECK_FIELD(pool_kernel, 255, RA_STATUS_OK);
    CHECK_FIELD(pool_kernel, 257, RA_STATUS_INVALID);
    CHECK_FIELD(lambda, -0.01f, RA_STATUS_INVALID);
    CHECK_FIELD(lambda, 0.0f, RA_STATUS_OK);
    CHECK_FIELD(lambda, 1.0f, RA_STATUS_OK);
    CHECK_FIELD(lambda, 1.01f, RA_STATUS_INVALID);
    CHECK_FIELD(lambda, NAN, RA_STATUS_INVALID);
    CHECK_FIELD(lambda, INFINITY, RA_STATUS_INVALID);
    CHECK_FIELD(sim_threshold, -1.01f, RA_STATUS_INVALID);
    CHECK_FIELD(sim_threshold, -1.0f, RA_STATUS_OK);
    CHECK_FIELD(sim_threshold, 1.0f, RA_STATUS_OK);
    CHECK_FIELD(sim_threshold, 1.01f, RA_STATUS_INVALID);
    CHECK_FIELD(sim_threshold, NAN, RA_STATUS_INVALID);

    CHECK_FIELD(ema, -0.01f, RA_STATUS_INVALID);
    CHECK_FIELD(ema, 0.0f, RA_STATUS_OK);
    CHECK_FIELD(ema, 1.0f, RA_STATUS_INVALID);
    CHECK_FIELD(ema, NAN, RA_STATUS_INVALID);
    CHECK_FIELD(value_guard, -0.01f, RA_STATUS_INVALID);
    CHECK_FIELD(value_guard, 3.0f, RA_STATUS_OK);
    CHECK_FIELD(value_guard, NAN, RA_STATUS_INVALID);
    CHECK_FIELD(value_guard, INFINITY, RA_STATUS_INVALID);
    CHECK_FIELD(n_guard, -1, RA_STATUS_INVALID);
    CHECK_FIELD(n_guard, 0, RA_STATUS_OK);
    CHECK_FIELD(n_guard, 1024, RA_STATUS_OK);
    CHECK_FIELD(n_guard, 1025, RA_STATUS_INVALID);
    CHECK_FIELD(gamma, -0.01, RA_STATUS_INVALID);
    CHECK_FIELD(gamma, 0.0, RA_STATUS_OK);
    CHECK_FIELD(gamma, NAN, RA_STATUS_INVALID);
    CHECK_FIELD(gamma, (double) INFINITY, RA_STATUS_INVALID);
    CHECK_FIELD(clip_lo, -0.01, RA_STATUS_INVALID);
    CHECK_FIELD(clip_lo, 1.0, RA_STATUS_OK);
    CHECK_FIELD(clip_lo, 1.01, RA_STATUS_INVALID);
    CHECK_FIELD(clip_lo, NAN, RA_STATUS_INVALID);
    CHECK_FIELD(clip_hi, 0.99, RA_STATUS_INVALID);
    CHECK_FIELD(clip_hi, 1.0, RA_STATUS_OK);
    CHECK_FIELD(clip_hi, (double) INFINITY, RA_STATUS_INVALID);
    CHECK_FIELD(clip_hi, NAN, RA_STATUS_INVALID);
    CHECK_FIELD(mu, -0.01, RA_STATUS_INVALID);
    CHECK_FIELD(mu, 0.0, RA_STATUS_OK);
    CHECK_FIELD(mu, 1.01, RA_STATUS_INVALID);
    CHECK_FIELD(mu, NAN, RA_STATUS_INVALID);
    CHECK_FIELD(pyramid_beta, 0.99, RA_STATUS_INVALID);
    CHECK_FIELD(pyramid_beta, 1.0, RA_STATUS_OK);
    CHECK_FIELD(pyramid_beta, NAN, RA_STATUS_INVALID);

    CHECK_FIELD(policy, NULL, RA_STATUS_NOT_FOUND);
    CHECK_FIELD(policy, "", RA_STATUS_NOT_FOUND);
    CHECK_FIELD(policy, "no such policy", RA_STATUS_NOT_FOUND);
    CHECK(strstr(ra_last_error(), "no such policy") != NULL);
    CHECK_FIELD(layer_alloc, "nonsense", RA_STATUS_NOT_FOUND);
    CHECK_FIELD(head_alloc, "nonsense", RA_STATUS_NOT_FOUND);
    CHECK_FIELD(layer_alloc, NULL, RA_STATUS_OK);
    CHECK_FIELD(head_alloc, NULL, RA_STATUS_OK);
    CHECK_FIELD(attention, NULL, RA_STATUS_OK);
    CHECK_FIELD(attention, "head", RA_STATUS_OK);
    CHECK_FIELD(attention, "layer", RA_STATUS_OK);
    CHECK_FIELD(attention, "", RA_STATUS_NOT_FOUND);
    CHECK_FIELD(attention, "layers", RA_STATUS_NOT_FOUND);
    CHECK_STR(ra_last_error(), "unknown attention 'layers': use auto, head or layer");
}

/* sinks 4 or the protected prompt, window 8, and one token to choose */
static void test_budget_must_hold_what_stays(void) {
    CHECK_FIELD(budget, 12, RA_STATUS_BUDGET);
    CHECK(strstr(ra_last_error(), "at least 13") != NULL);
    CHECK_FIELD(budget, 13, RA_STATUS_OK);
    CHECK_FIELD(n_sink, 247, RA_STATUS_OK);
    CHECK_FIELD(n_sink, 248, RA_STATUS_BUDGET);
    CHECK_FIELD(n_window, 251, RA_STATUS_OK);
    CHECK_FIELD(n_window, 252, RA_STATUS_BUDGET);
    CHECK_FIELD(n_protect, 247, RA_STATUS_OK);
    CHECK_FIELD(n_protect, 248, RA_STATUS_BUDGET);
    CHECK_FIELD(n_protect, RA_MAX_TOKENS, RA_STATUS_BUDGET);

    const ra_config cfg = ra_config_default_params();
    CHECK_EQ(ra_config_floor(&cfg, 0), 13);
    CHECK_EQ(ra_config_floor(&cfg, 3), 13);
    CHECK_EQ(ra_config_floor(&cfg, 100), 109);

    /* guarded tokens count where the guard is on */
    ra_config guarded   = cfg;
    guarded.value_guard = 3.0f;
    guarded.budget      = 16;
    CHECK_EQ(ra_config_floor(&guarded, 0), 17);
    CHECK_STATUS(ra_config_check(&guarded), RA_STATUS_BUDGET);
    guarded.budget = 17;
    CHECK_STATUS(ra_config_check(&guarded), RA_STATUS_OK);
}

static void test_tables(void) {
    const int32_t good[3]  = { 13, 40, RA_MAX_TOKENS };
    const int32_t small[3] = { 13, 12, 40 };
    const int32_t large[3] = { 13, 40, RA_MAX_TOKENS + 1 };
    ra_config     cfg      = ra_config_default_params();

    cfg.layer_budgets   = good;
    cfg.n_layer_budgets = 3;
    cfg.head_budgets    = good;
    cfg.n_head_budgets  = 3;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_OK);
    cfg.layer_budgets = small;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_BUDGET);
    CHECK(strstr(ra_last_error(), "layer_budgets[1] = 12") != NULL);
    cfg.layer_budgets = good;
    cfg.head_budgets  = large;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_BUDGET);
    CHECK(strstr(ra_last_error(), "head_budgets[2]") != NULL);

    cfg.head_budgets = NULL;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
    cfg.head_budgets   = good;
    cfg.n_head_budgets = 0;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
    cfg.n_head_budgets = SIZE_MAX;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
}

static void test_demand(void) {
    const double good[3] = { 0.0, 1.5, 1e30 };
    const double bad[3]  = { -1.0, NAN, INFINITY };
    ra_config    cfg     = ra_config_default_params();
    cfg.layer_demand     = good;
    cfg.n_layer_demand   = 3;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_OK);
    for (int32_t i = 0; i < 3; ++i) {
        cfg.layer_demand   = bad + i;
        cfg.n_layer_demand = 1;
        CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
        CHECK(strstr(ra_last_error(), "layer_demand[0]") != NULL);
    }
    cfg.n_layer_demand = 0;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
    cfg.layer_demand   = NULL;
    cfg.n_layer_demand = 1;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
}

static void test_centres(void) {
    float     table[2] = { -1.5f, 0.0f };
    ra_config cfg      = ra_config_default_params();
    cfg.policy         = "triattention"; /* without a model none are needed yet */
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_OK);
    cfg.centres   = table;
    cfg.n_centres = 2;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_OK);
    ra_settings s;
    CHECK_STATUS(ra_settings_init(&s, &cfg), RA_STATUS_OK);
    table[1] = NAN;
    CHECK(s.cfg.centres != table && s.cfg.centres[0] == -1.5f && s.cfg.centres[1] == 0.0f);
    ra_settings_free(&s);
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
    CHECK(strstr(ra_last_error(), "centres[1]") != NULL);
    cfg.n_centres = 0;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
    cfg.n_centres = SIZE_MAX;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
    cfg.centres   = NULL;
    cfg.n_centres = 1;
    CHECK_STATUS(ra_config_check(&cfg), RA_STATUS_INVALID);
}

/* The settings own their tables and names: the caller's may go. */
static void test_settings_own_their_tables(void) {
    int32_t   layers[2] = { 20, 30 };
    int32_t   heads[3]  = { 21, 22, 23 };
    double    demand[2] = { 0.5, 7.0 };
    char      policy[]  = "snapkv";
    char      way[]     = "layer";
    ra_config cfg       = ra_config_default_params();
    cfg.policy          = policy;
    cfg.attention       = way;
    cfg.layer_budgets   = layers;
    cfg.n_layer_budgets = 2;
    cfg.head_budgets    = heads;
    cfg.n_head_budgets  = 3;
    cfg.layer_demand    = demand;
    cfg.n_layer_demand  = 2;
    ra_settings s;
    CHECK_STATUS(ra_settings_init(&s, &cfg), RA_STATUS_OK);
    memset(demand, 0, sizeof(demand));
    memset(layers, 0, sizeof(layers));
    memset(heads, 0, sizeof(heads));
    memset(policy, 'x', sizeof(policy) - 1);
    memset(way, 'x', sizeof(way) - 1);
    CHECK_STR(s.cfg.policy, "snapkv");
    CHECK_STR(s.cfg.attention, "layer");
    CHECK_EQ(s.attention, RA_ATTENTION_LAYER);
    CHECK_STR(s.policy->name, "snapkv");
    CHECK_ARRAY(s.cfg.layer_budgets, ((int32_t[2]){ 20, 30 }), 2);
    CHECK_ARRAY(s.cfg.head_budgets, ((int32_t[3]){ 21, 22, 23 }), 3);
    CHECK_NEAR(s.cfg.layer_demand[0], 0.5, 0.0);
    CHECK_NEAR(s.cfg.layer_demand[1], 7.0, 0.0);
    CHECK_STATUS(ra_config_check(&s.cfg), RA_STATUS_OK);
    ra_settings_free(&s);
    ra_settings_free(&s); /* empty by now */
    ra_settings_free(NULL);

    cfg           = ra_config_default_params();
    cfg.attention = NULL;
    CHECK_STATUS(ra_settings_init(&s, &cfg), RA_STATUS_OK);
    CHECK_STR(s.cfg.attention, "auto");
    CHECK_EQ(s.attention, RA_ATTENTION_AUTO);
    ra_settings_free(&s);

    cfg.policy = "no such policy";
    CHECK_STATUS(ra_settings_init(&s, &cfg), RA_STATUS_NOT_FOUND);
    const ra_settings empty = { 0 };
    CHECK_SAME(&s, &empty, sizeof(s));
}

static void test_budgets_of_a_model(void) {
    const int32_t n_head_kv[4] = { 2, 0, 1, 3 };
    const int32_t layers[4]    = { 20, 21, 22, 23 };
    const int32_t heads[6]     = { 30, 31, 32, 33, 34, 35 };
    int32_t       budgets[6];
    ra_config     cfg = ra_config_default_params();
    cfg.budget        = 50;
    ra_settings s;

    CHECK_STATUS(ra_settings_init(&s, &cfg), RA_STATUS_OK);
    CHECK_STATUS(ra_settings_budgets(&s, 0, 4, n_head_kv, budgets), RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[6]){ 50, 50, 50, 50, 50, 50 }), 6);
    ra_settings_free(&s);

    cfg.layer_budgets   = layers;
    cfg.n_layer_budgets = 4;
    CHECK_STATUS(ra_settings_init(&s, &cfg), RA_STATUS_OK);
    CHECK_STATUS(ra_settings_budgets(&s, 0, 4, n_head_kv, budgets), RA_STATUS_OK);
    CHECK_ARRAY(budgets, ((int32_t[6]){ 20, 20, 22, 23, 23, 23 }), 6);
    CHECK_STATUS(ra_settings_budgets(&s, 0, 3, n_head_kv, budgets), RA_STATUS_INVALID);
    ra_settings_free(&s);

    cfg.head_budgets   = heads;
    cfg.n_head_budgets = 6;
    CHECK_STATUS(ra_settings_init(&s, &cfg), RA_STATUS_OK);
    CHECK_STATUS(ra_settings_budgets(&s, 0, 4, n_head_kv, budgets), RA_STATUS_OK);
    CHECK_ARRAY(budgets, heads, 6);
    CHECK_STATUS(ra_settings_budgets(&s, 0, 3, n_head_kv, budgets), RA_STATUS_INVALID);
    CHECK(strstr(ra_last_error(), "4 entries") != NULL); /* the table that is not used counts too */
    ra_settings_free(&s);

    cfg.layer_budgets   = NULL;
    cfg.n_layer_budgets = 0;
    CHECK_STATUS(ra_settings_init(&s, &cfg), RA_STATUS_OK);
    CHECK_STATUS(ra_settings_budgets(&s, 0, 3, n_head_kv, budgets), RA_STATUS_INVALID);
    CHECK(strstr(ra_last_error(), "6 entries") != NULL);
    ra_settings_free(&s);
}

static void test_status(void) {
    for (int32_t st = RA_STATUS_OK; st <= RA_STATUS_COMPUTE; ++st) {
        CHECK(strncmp(ra_status_name((ra_status) st), "RA_STATUS_", 10) == 0);
        for (int32_t other = RA_STATUS_OK; other < st; ++other) {
            CHECK(strcmp(ra_status_name((ra_status) st), ra_status_name((ra_status) other)) != 0);
        }
    }
    CHECK_STR(ra_status_name((ra_status) 99), "RA_STATUS_UNKNOWN");
    CHECK_EQ(ra_abi_version(), RA_ABI_VERSION);
    int major, minor, patch;
    CHECK_EQ(sscanf(ra_version(), "%d.%d.%d", &major, &minor, &patch), 3);
    CHECK_EQ((int64_t) ra_sizeof_config(), (int64_t) sizeof(ra_config));
    CHECK_EQ((int64_t) ra_sizeof_stats(), (int64_t) sizeof(ra_stats));
    CHECK_EQ((int64_t) ra_sizeof_head_stats(), (int64_t) sizeof(ra_head_stats));
    CHECK_EQ((int64_t) ra_sizeof_trace_event(), (int64_t) sizeof(ra_trace_event));
    CHECK_EQ((int64_t) ra_sizeof_head_arrays(), (int64_t) sizeof(ra_head_arrays));

    CHECK_EQ(ra_error(RA_STATUS_COMPUTE, "%0600d", 1), RA_STATUS_COMPUTE);
    CHECK_EQ((int64_t) strlen(ra_last_error()), 511);
    ra_error_clear();
    CHECK_STR(ra_last_error(), "");
}

int main(void) {
    test_defaults();
    test_every_range();
    test_budget_must_hold_what_stays();
    test_tables();
    test_demand();
    test_centres();
    test_settings_own_their_tables();
    test_budgets_of_a_model();
    test_status();
    return ra_test_result();
}
