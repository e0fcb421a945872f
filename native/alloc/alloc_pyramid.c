/* pyramid allocation: fixed, decreasing with depth, same total - PyramidKV, arXiv:2406.02069, sec. 4
 *
 *   b_(L-1) = R / beta        b_0 = 2R - R / beta        b_l on the line between,   B(l) = base + b_l
 *
 * beta = cfg->pyramid_beta (20 in the authors' code; 1: uniform). R = B - base, where base is what every
 * head keeps in any case (sinks or protected prompt, window): the authors split B without their window,
 * too. Every layer gets one token to choose at least. */
#include "alloc.h"

ra_status ra_alloc_layers_pyramid(const ra_config * cfg, int32_t n_layer, int32_t * budgets) {
    double * line = ra_calloc((size_t) n_layer, sizeof(*line));
    if (line == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for %d layers", n_layer);
    }
    const int32_t base = ra_config_base(cfg, cfg->n_protect);
    const double  rest = cfg->budget > base ? (double) (cfg->budget - base) : 0.0;
    const double  last = rest / cfg->pyramid_beta;
    for (int32_t il = 0; il < n_layer; ++il) {
        const double depth = n_layer > 1 ? il / (double) (n_layer - 1) : 0.5;
        line[il]           = 2.0 * rest - last - depth * 2.0 * (rest - last);
    }
    const ra_robustify_params straight = { .gamma = 1.0, .lo = 0.0, .hi = 2.0 };
    const ra_status           st       = ra_split_over_base(&straight, n_layer, line,
                                                            (int64_t) n_layer * cfg->budget, base, 1, budgets);
    ra_free(line);
    return st;
}
