/* wave allocation: the offline "Reasoning Wave" - ReasonAlloc, arXiv:2606.11164
 *
 *   B(l) = base + robustify(demand_l, n_layer * (B - base))
 *
 * base: what every head keeps in any case (sinks or protected prompt, window); the paper splits all of B.
 * demand_l = cfg->layer_demand[l]: tokens needed for rho of the attention mass of layer l, averaged over
 * heads and decode steps, measured by calibration (profiles/). */
#include "alloc.h"

ra_status ra_alloc_layers_wave(const ra_config * cfg, int32_t n_layer, int32_t * budgets) {
    if (cfg->layer_demand == NULL || cfg->n_layer_demand != (size_t) n_layer) {
        return ra_error(RA_STATUS_INVALID,
                        "layer allocator 'wave' needs a demand for each of the %d layers, got %zu: "
                        "calibrate a profile for this model",
                        n_layer, cfg->n_layer_demand);
    }
    const ra_robustify_params p = { cfg->gamma, cfg->clip_lo, cfg->clip_hi };
    return ra_split_over_base(&p, n_layer, cfg->layer_demand, (int64_t) n_layer * cfg->budget,
                              ra_config_base(cfg, cfg->n_protect), 1, budgets);
}
