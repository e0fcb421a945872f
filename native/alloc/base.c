/* base.c - what every head keeps in any case, and the split of what remains */
#include "alloc.h"

int32_t ra_config_base(const ra_config * cfg, int32_t n_protect) {
    const int32_t n_first = n_protect > cfg->n_sink ? n_protect : cfg->n_sink;
    const int32_t n_guard = cfg->value_guard > 0.0f ? cfg->n_guard : 0;
    return n_first + cfg->n_window + n_guard;
}

int32_t ra_config_floor(const ra_config * cfg, int32_t n_protect) {
    return ra_config_base(cfg, n_protect) + 1;
}

ra_status ra_split_over_base(const ra_robustify_params * p, int32_t n, const double * demand,
                             int64_t total, int32_t base, int32_t least, int32_t * budgets) {
    const int64_t rest = total - (int64_t) n * base;
    if (n < 1 || least < 1 || rest < (int64_t) n * least) {
        return ra_error(
            RA_STATUS_BUDGET,
            "a budget of %lld tokens on average cannot hold the %d that every head keeps "
            "(sinks or protected prompt, window) and %d to choose: raise the budget or "
            "protect less",
            n < 1 ? 0LL : (long long) (total / n), base, least);
    }
    const ra_status st = ra_robustify(p, n, demand, rest, least, budgets);
    for (int32_t i = 0; i < n && st == RA_STATUS_OK; ++i) {
        budgets[i] += base;
    }
    return st;
}
