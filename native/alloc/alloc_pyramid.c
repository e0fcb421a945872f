/* pyramid allocation: fixed, decreasing with depth, same total - PyramidKV, arXiv:2406.02069, sec. 4
 *
 *   b_(L-1) = B / beta        b_0 = 2B - B / beta        b_l on the line between
 *
 * beta = cfg->pyramid_beta (20 in the authors' code; 1: uniform). The last layers are raised to what
 * must stay (sinks, protected tokens, window, 1), the rest shrinks in proportion. */
#include "alloc.h"

ra_status ra_alloc_layers_pyramid(const ra_config * cfg, int32_t n_layer, int32_t * budgets) {
    double * line = ra_calloc((size_t) n_layer, sizeof(*line));
    if (line == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for %d layers", n_layer);
    }
    const double last = cfg->budget / (double) cfg->pyramid_beta;
    for (int32_t il = 0; il < n_layer; ++il) {
        const double depth = n_layer > 1 ? il / (double) (n_layer - 1) : 0.5;
        line[il]           = 2.0 * cfg->budget - last - depth * 2.0 * (cfg->budget - last);
    }
    const ra_robustify_params straight = { .gamma = 1.0, .lo = 0.0, .hi = 2.0 };
    const ra_status st = ra_robustify(&straight, n_layer, line, (int64_t) n_layer * cfg->budget,
                                      ra_config_floor(cfg, cfg->n_protect), budgets);
    ra_free(line);
    return st;
}
