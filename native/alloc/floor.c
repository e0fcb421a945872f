/* floor.c - the budget below which a head could not choose anything */
#include "alloc.h"

int32_t ra_config_floor(const ra_config * cfg, int32_t n_protect) {
    const int32_t n_first = n_protect > cfg->n_sink ? n_protect : cfg->n_sink;
    return n_first + cfg->n_window + 1;
}
