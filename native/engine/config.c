/* config.c - defaults, range checks, resolution of the budget tables */
#include "config.h"

#include <math.h>
#include <string.h>

ra_config ra_config_default_params(void) {
    const ra_config cfg = {
        .size          = sizeof(ra_config),
        .budget        = 256,
        .buffer        = 128,
        .n_sink        = 4,
        .n_window      = 8,
        .n_draft       = 0,
        .n_protect     = 0,
        .policy        = "rkv",
        .lambda        = 0.1f,
        .sim_threshold = 0.5f,
        .pool_kernel   = 7,
        .ema           = 0.5f,
        .decay         = 0.5f,
        .n_query       = 0,
        .bias_max      = 8.0f,
        .n_guard       = 4,
        .layer_alloc   = "uniform",
        .head_alloc    = "uniform",
        .gamma         = 0.5,
        .clip_lo       = 0.25,
        .clip_hi       = 2.0,
        .mu            = 0.25,
        .pyramid_beta  = 20.0,
        .error_least   = 0.4,
        .attention     = "auto",
    };
    return cfg;
}

static ra_status ra_check_range(const char * name, int64_t value, int64_t lo, int64_t hi) {
    if (value < lo || value > hi) {
        return ra_error(RA_STATUS_INVALID, "%s = %lld is out of range: must be %lld to %lld", name,
                        (long long) value, (long long) lo, (long long) hi);
    }
    return RA_STATUS_OK;
}

static ra_status ra_check_real(const char * name, double value, double lo, double hi) {
    if (!(value >= lo && value <= hi)) {
        return ra_error(RA_STATUS_INVALID, "%s = %g is out of range: must be %g to %g", name, value,
                        lo, hi);
    }
    return RA_STATUS_OK;
}

static ra_status ra_check_table(const char * name, const int32_t * table, size_t n, int32_t floor) {
    if ((table == NULL) != (n == 0) || n > RA_MAX_TOKENS) {
        return ra_error(RA_STATUS_INVALID, "%s: pointer and length %zu do not go together", name,
                        n);
    }
    for (size_t i = 0; i < n; ++i) {
        if (table[i] < floor || table[i] > RA_MAX_TOKENS) {
            return ra_error(RA_STATUS_BUDGET,
                            "%s[%zu] = %d is out of range: must be %d (sinks or protected tokens, "
                            "plus window, plus 1) to %d",
                            name, i, table[i], floor, RA_MAX_TOKENS);
        }
    }
    return RA_STATUS_OK;
}

static ra_status ra_check_name(const char * kind, const char * name, bool found) {
    if (!found) {
        return ra_error(RA_STATUS_NOT_FOUND, "unknown %s '%.64s'", kind,
                        name != NULL ? name : "(null)");
    }
    return RA_STATUS_OK;
}

/* Numbers of the largest table of query centres: 256 layers of 256 heads of 512 values. */
#define RA_MAX_CENTRES (256 * 256 * 768)

#define RA_TRY(expr)                  \
    do {                              \
        const ra_status st_ = (expr); \
        if (st_ != RA_STATUS_OK) {    \
            return st_;               \
        }                             \
    } while (0)

static const char * ra_name_or_uniform(const char * name) {
    return name != NULL ? name : "uniform";
}

/* entries in the order of ra_attention */
static const char * const ra_attention_names[] = { "auto", "head", "layer" };

/* Index of cfg's way to attend in ra_attention_names, or -1. */
static int ra_attention_find(const ra_config * cfg) {
    const char * name = cfg->attention != NULL ? cfg->attention : "auto";
    for (int i = 0; i < (int) (sizeof(ra_attention_names) / sizeof(*ra_attention_names)); ++i) {
        if (strcmp(ra_attention_names[i], name) == 0) {
            return i;
        }
    }
    return -1;
}

static ra_status ra_check_curves(const ra_config * cfg) {
    if ((cfg->head_error == NULL) != (cfg->n_head_error == 0) ||
        (cfg->error_grid == NULL) != (cfg->n_error_grid == 0) || cfg->n_error_grid > 4096 ||
        cfg->n_head_error > (size_t) RA_MAX_TOKENS) {
        return ra_error(RA_STATUS_INVALID,
                        "head_error, error_grid: pointers and lengths %zu, %zu do not go together",
                        cfg->n_head_error, cfg->n_error_grid);
    }
    RA_TRY(ra_check_range("error_base", cfg->error_base, 0, RA_MAX_TOKENS));
    RA_TRY(ra_check_real("error_least", cfg->error_least, 0.0, 1.0));
    for (size_t i = 0; i < cfg->n_error_grid; ++i) {
        if (cfg->error_grid[i] < 1 || cfg->error_grid[i] > RA_MAX_TOKENS ||
            (i > 0 && cfg->error_grid[i] <= cfg->error_grid[i - 1])) {
            return ra_error(RA_STATUS_INVALID, "error_grid[%zu] = %d must ascend, from 1 to %d", i,
                            cfg->error_grid[i], RA_MAX_TOKENS);
        }
    }
    for (size_t i = 0; i < cfg->n_head_error; ++i) {
        if (!isfinite(cfg->head_error[i]) || cfg->head_error[i] < 0.0) {
            return ra_error(RA_STATUS_INVALID,
                            "head_error[%zu] = %g must be finite and not negative", i,
                            cfg->head_error[i]);
        }
    }
    return RA_STATUS_OK;
}

static ra_status ra_check_centres(const ra_config * cfg) {
    if ((cfg->centres == NULL) != (cfg->n_centres == 0) || cfg->n_centres > RA_MAX_CENTRES) {
        return ra_error(RA_STATUS_INVALID, "centres: pointer and length %zu do not go together",
                        cfg->n_centres);
    }
    for (size_t i = 0; i < cfg->n_centres; ++i) {
        if (!isfinite(cfg->centres[i])) {
            return ra_error(RA_STATUS_INVALID, "centres[%zu] = %g must be finite", i,
                            (double) cfg->centres[i]);
        }
    }
    return RA_STATUS_OK;
}

ra_status ra_config_check(const ra_config * cfg) {
    if (cfg == NULL || cfg->size != sizeof(ra_config)) {
        return ra_error(RA_STATUS_INVALID,
                        "ra_config has size %zu, this library expects %zu: use "
                        "ra_config_default_params() of the same version",
                        cfg != NULL ? cfg->size : 0, sizeof(ra_config));
    }
    RA_TRY(ra_check_range("budget", cfg->budget, 1, RA_MAX_TOKENS));
    RA_TRY(ra_check_range("buffer", cfg->buffer, 1, RA_MAX_TOKENS));
    RA_TRY(ra_check_range("n_sink", cfg->n_sink, 0, RA_MAX_TOKENS));
    RA_TRY(ra_check_range("n_window", cfg->n_window, 1, RA_MAX_WINDOW));
    RA_TRY(ra_check_range("n_draft", cfg->n_draft, 0, RA_MAX_WINDOW));
    RA_TRY(ra_check_range("n_protect", cfg->n_protect, 0, RA_MAX_TOKENS));
    RA_TRY(ra_check_range("n_query", cfg->n_query, 0, RA_MAX_TOKENS));
    RA_TRY(ra_check_range("budget_swa", cfg->budget_swa, 0, RA_MAX_TOKENS));
    RA_TRY(ra_check_range("pool_kernel", cfg->pool_kernel, 1, 255));
    if (cfg->pool_kernel % 2 == 0) {
        return ra_error(RA_STATUS_INVALID, "pool_kernel = %d must be odd", cfg->pool_kernel);
    }
    RA_TRY(ra_check_real("lambda", (double) cfg->lambda, 0.0, 1.0));
    RA_TRY(ra_check_real("sim_threshold", (double) cfg->sim_threshold, -1.0, 1.0));
    RA_TRY(ra_check_real("ema", (double) cfg->ema, 0.0, 0.999999));
    RA_TRY(ra_check_real("decay", (double) cfg->decay, 0.0, 0.999999));
    RA_TRY(ra_check_range("merge", cfg->merge, 0, 1));
    RA_TRY(ra_check_real("bias_max", (double) cfg->bias_max, 0.0, 10.0));
    RA_TRY(ra_check_real("value_guard", (double) cfg->value_guard, 0.0, 1e6));
    RA_TRY(ra_check_range("n_guard", cfg->n_guard, 0, 1024));
    RA_TRY(ra_check_real("gamma", cfg->gamma, 0.0, 16.0));
    RA_TRY(ra_check_real("clip_lo", cfg->clip_lo, 0.0, 1.0));
    RA_TRY(ra_check_real("clip_hi", cfg->clip_hi, 1.0, 1e6));
    RA_TRY(ra_check_real("mu", cfg->mu, 0.0, 1.0));
    RA_TRY(ra_check_real("pyramid_beta", cfg->pyramid_beta, 1.0, 1e6));
    RA_TRY(ra_check_name("policy", cfg->policy, ra_policy_find(cfg->policy) != NULL));
    const char * layers = ra_name_or_uniform(cfg->layer_alloc);
    const char * heads  = ra_name_or_uniform(cfg->head_alloc);
    RA_TRY(ra_check_name("layer allocator", layers, ra_alloc_layers_find(layers) != NULL));
    RA_TRY(ra_check_name("head allocator", heads, ra_alloc_heads_find(heads) != NULL));
    if (ra_attention_find(cfg) < 0) {
        return ra_error(RA_STATUS_NOT_FOUND, "unknown attention '%.64s': use auto, head or layer",
                        cfg->attention);
    }

    const int32_t floor = ra_config_floor(cfg, cfg->n_protect);
    if (cfg->budget < floor) {
        return ra_error(RA_STATUS_BUDGET,
                        "budget %d is too small: the %s (%d) and the window (%d) leave no token to "
                        "choose; use a budget of at least %d",
                        cfg->budget, cfg->n_protect > cfg->n_sink ? "protected prompt" : "sinks",
                        floor - cfg->n_window - 1, cfg->n_window, floor);
    }
    const int32_t floor_swa = ra_config_floor(cfg, 0);
    if (cfg->budget_swa != 0 && cfg->budget_swa < floor_swa) {
        return ra_error(
            RA_STATUS_BUDGET,
            "budget_swa %d is too small: the sinks (%d) and the window (%d) leave no token "
            "to choose; use at least %d, or 0 for llama.cpp's own cache of windows",
            cfg->budget_swa, cfg->n_sink, cfg->n_window, floor_swa);
    }
    RA_TRY(ra_check_table("layer_budgets", cfg->layer_budgets, cfg->n_layer_budgets, floor));
    RA_TRY(ra_check_table("head_budgets", cfg->head_budgets, cfg->n_head_budgets, floor));
    if ((cfg->layer_demand == NULL) != (cfg->n_layer_demand == 0) ||
        cfg->n_layer_demand > RA_MAX_TOKENS) {
        return ra_error(RA_STATUS_INVALID,
                        "layer_demand: pointer and length %zu do not go together",
                        cfg->n_layer_demand);
    }
    for (size_t i = 0; i < cfg->n_layer_demand; ++i) {
        if (!isfinite(cfg->layer_demand[i]) || cfg->layer_demand[i] < 0.0) {
            return ra_error(RA_STATUS_INVALID,
                            "layer_demand[%zu] = %g must be finite and not negative", i,
                            cfg->layer_demand[i]);
        }
    }
    RA_TRY(ra_check_centres(cfg));
    return ra_check_curves(cfg);
}

/* *copy <- the n entries of `table`, or NULL when n == 0 */
static bool ra_copy_table(void ** copy, const void * table, size_t n, size_t size) {
    *copy = n > 0 ? ra_calloc(n, size) : NULL;
    if (*copy != NULL) {
        memcpy(*copy, table, n * size);
    }
    return n == 0 || *copy != NULL;
}

ra_status ra_settings_init(ra_settings * out, const ra_config * cfg) {
    memset(out, 0, sizeof(*out));
    RA_TRY(ra_config_check(cfg));
    ra_settings s = {
        .cfg         = *cfg,
        .policy      = ra_policy_find(cfg->policy),
        .layer_alloc = ra_alloc_layers_find(ra_name_or_uniform(cfg->layer_alloc)),
        .head_alloc  = ra_alloc_heads_find(ra_name_or_uniform(cfg->head_alloc)),
        .attention   = (ra_attention) ra_attention_find(cfg),
    };
    if (!ra_copy_table((void **) &s.layer_budgets, cfg->layer_budgets, cfg->n_layer_budgets,
                       sizeof(int32_t)) ||
        !ra_copy_table((void **) &s.head_budgets, cfg->head_budgets, cfg->n_head_budgets,
                       sizeof(int32_t)) ||
        !ra_copy_table((void **) &s.layer_demand, cfg->layer_demand, cfg->n_layer_demand,
                       sizeof(double)) ||
        !ra_copy_table((void **) &s.head_error, cfg->head_error, cfg->n_head_error,
                       sizeof(double)) ||
        !ra_copy_table((void **) &s.error_grid, cfg->error_grid, cfg->n_error_grid,
                       sizeof(int32_t)) ||
        !ra_copy_table((void **) &s.centres, cfg->centres, cfg->n_centres, sizeof(float))) {
        ra_settings_free(&s);
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory copying the tables");
    }
    s.cfg.layer_budgets = s.layer_budgets;
    s.cfg.head_budgets  = s.head_budgets;
    s.cfg.layer_demand  = s.layer_demand;
    s.cfg.head_error    = s.head_error;
    s.cfg.error_grid    = s.error_grid;
    s.cfg.centres       = s.centres;
    s.cfg.policy        = s.policy->name;
    s.cfg.layer_alloc   = s.layer_alloc->name;
    s.cfg.head_alloc    = s.head_alloc->name;
    s.cfg.attention     = ra_attention_names[s.attention];
    *out                = s;
    return RA_STATUS_OK;
}

void ra_settings_free(ra_settings * s) {
    if (s != NULL) {
        ra_free(s->layer_budgets);
        ra_free(s->head_budgets);
        ra_free(s->layer_demand);
        ra_free(s->head_error);
        ra_free(s->error_grid);
        ra_free(s->centres);
        memset(s, 0, sizeof(*s));
    }
}

/* per_layer [n_layer] by the layer allocator, of the layers that have heads: the others are no part of
 * the split, nor is their demand. */
static ra_status ra_split_layers(const ra_settings * s, const ra_config * cfg, int32_t n_layer,
                                 const int32_t * n_head_kv, int32_t * per_layer) {
    ra_config own    = *cfg;
    double *  demand = ra_calloc((size_t) n_layer, sizeof(*demand));
    int32_t   n_own  = 0;
    if (demand == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory splitting the budget over %d layers",
                        n_layer);
    }
    for (int32_t il = 0; il < n_layer; ++il) {
        if (n_head_kv[il] > 0) {
            demand[n_own++] = cfg->n_layer_demand == (size_t) n_layer ? cfg->layer_demand[il] : 0.0;
        }
    }
    if (cfg->n_layer_demand == (size_t) n_layer) {
        own.layer_demand   = demand;
        own.n_layer_demand = (size_t) n_own;
    }
    const ra_status st = n_own > 0 ? s->layer_alloc->run(&own, n_own, per_layer) : RA_STATUS_OK;
    for (int32_t il = n_layer - 1, i = n_own - 1; il >= 0 && st == RA_STATUS_OK; --il) {
        per_layer[il] = n_head_kv[il] > 0 ? per_layer[i--] : 0;
    }
    ra_free(demand);
    return st;
}

ra_status ra_settings_budgets(const ra_settings * s, int32_t n_protect, int32_t n_layer,
                              const int32_t * n_head_kv, int32_t * budgets) {
    size_t n_entries = 0;
    for (int32_t il = 0; il < n_layer; ++il) {
        n_entries += (size_t) n_head_kv[il];
    }
    if (s->layer_budgets != NULL && s->cfg.n_layer_budgets != (size_t) n_layer) {
        return ra_error(RA_STATUS_INVALID, "layer_budgets has %zu entries, the model has %d layers",
                        s->cfg.n_layer_budgets, n_layer);
    }
    if (s->head_budgets != NULL) {
        if (s->cfg.n_head_budgets != n_entries) {
            return ra_error(RA_STATUS_INVALID,
                            "head_budgets has %zu entries, the model has %zu KV heads in all "
                            "layers",
                            s->cfg.n_head_budgets, n_entries);
        }
        memcpy(budgets, s->head_budgets, n_entries * sizeof(*budgets));
        return RA_STATUS_OK;
    }
    ra_config cfg = s->cfg;
    cfg.n_protect = n_protect;
    if (s->layer_budgets == NULL && s->layer_alloc->run_heads != NULL) {
        return s->layer_alloc->run_heads(&cfg, (int32_t) n_entries, budgets);
    }
    int32_t * per_layer = ra_calloc((size_t) n_layer, sizeof(*per_layer));
    if (per_layer == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory splitting the budget over %d layers",
                        n_layer);
    }
    ra_status st = RA_STATUS_OK;
    if (s->layer_budgets != NULL) {
        memcpy(per_layer, s->layer_budgets, (size_t) n_layer * sizeof(*per_layer));
    } else {
        st = ra_split_layers(s, &cfg, n_layer, n_head_kv, per_layer);
    }
    for (int32_t il = 0; il < n_layer && st == RA_STATUS_OK; ++il) {
        for (int32_t ih = 0; ih < n_head_kv[il]; ++ih) {
            *budgets++ = per_layer[il];
        }
    }
    ra_free(per_layer);
    return st;
}
