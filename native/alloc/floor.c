/* floor.c - the budget below which a head could not choose anything */
#include "alloc.h"

int32_t ra_config_floor(const ra_config * cfg, int32_t n_protect) {
    const int32_t n_first = n_protect > cfg->n_sink ? n_protect : cfg->n_sink;
    const int32_t n_guard = cfg->value_guard > 0.0f ? cfg->n_guard : 0;
    return n_first + cfg->n_window + n_guard + 1;
}
