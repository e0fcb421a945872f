/* budgets.c - other budgets for a cache: split anew for a protected prefix, or given by the caller */
#include "cache.h"

#include <string.h>

/* Splits the budget over the layers of an empty cache anew. */
static ra_status ra_cache_split(ra_cache * c, int32_t n_protect) {
    int32_t * n_head_kv = ra_calloc(2 * (size_t) c->n_layer, sizeof(*n_head_kv));
    int32_t * n_swa     = n_head_kv + c->n_layer;
    if (n_head_kv == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for %d layers", c->n_layer);
    }
    for (int32_t il = 0; il < c->n_layer; ++il) {
        n_head_kv[il] = c->layers[il].n_head_kv;
        n_swa[il]     = c->layers[il].n_swa;
    }
    ra_layer * layers = NULL;
    bool       is_new = false;
    ra_status  st = ra_layers_make(&c->settings, n_protect, c->n_layer, n_head_kv, n_swa, &layers);
    for (int32_t il = 0; il < c->n_layer && st == RA_STATUS_OK; ++il) {
        is_new = is_new || memcmp(layers[il].initial, c->layers[il].initial,
                                  (size_t) n_head_kv[il] * sizeof(int32_t)) != 0;
    }
    ra_free(n_head_kv);
    if (st != RA_STATUS_OK || !is_new) {
        ra_layers_free(layers, c->n_layer);
        return st;
    }
    st = ra_cache_use_layers(c, layers);
    if (st == RA_STATUS_OK) {
        ra_cache_clear(c);
        ++c->n_splits;
    }
    return st;
}

ra_status ra_cache_set_protect(ra_cache * c, int32_t n_protect) {
    if (n_protect < 0 || n_protect > RA_MAX_TOKENS) {
        return ra_error(RA_STATUS_INVALID, "n_protect = %d is out of range: must be 0 to %d",
                        n_protect, RA_MAX_TOKENS);
    }
    const ra_settings * s          = &c->settings;
    const bool          has_tables = c->has_own_tables || s->layer_budgets || s->head_budgets;
    if (c->n_pos == 0 && !has_tables) {
        const ra_status st = ra_cache_split(c, n_protect);
        if (st != RA_STATUS_OK) {
            return st;
        }
    }
    for (int32_t il = 0; il < c->n_layer; ++il) {
        const int32_t floor =
            ra_config_floor(&c->settings.cfg, ra_layer_protects(&c->layers[il], n_protect));
        for (int32_t ih = 0; ih < c->layers[il].n_head_kv; ++ih) {
            const int32_t initial = c->layers[il].initial[ih];
            if (initial < floor) {
                return ra_error(RA_STATUS_BUDGET,
                                "the budget of layer %d, head %d (%d tokens) cannot hold the %d "
                                "protected prompt tokens and the window (%d): raise the budget to "
                                "at least %d or protect less",
                                il, ih, initial, n_protect, c->settings.cfg.n_window, floor);
            }
        }
    }
    c->n_protect = n_protect;
    return RA_STATUS_OK;
}

ra_status ra_cache_set_head_budgets(ra_cache * c, int32_t il, const int32_t * budgets, size_t n) {
    if (il < 0 || il >= c->n_layer || budgets == NULL || n == 0 ||
        n != (size_t) c->layers[il].n_head_kv) {
        return ra_error(RA_STATUS_INVALID,
                        "layer %d with %zu head budgets: the model has no such "
                        "layer or another number of heads",
                        il, n);
    }
    ra_layer *    l      = &c->layers[il];
    const int32_t floor  = ra_config_floor(&c->settings.cfg, ra_layer_protects(l, c->n_protect));
    const int64_t limit  = (int64_t) l->n_slots - (int64_t) n * c->settings.cfg.buffer;
    int64_t       wanted = 0;
    for (size_t ih = 0; ih < n; ++ih) {
        if (budgets[ih] < floor || budgets[ih] > RA_MAX_TOKENS) {
            return ra_error(RA_STATUS_BUDGET,
                            "budget %d of layer %d, head %zu is out of range: must be %d to %d",
                            budgets[ih], il, ih, floor, RA_MAX_TOKENS);
        }
        wanted += budgets[ih];
    }
    if (wanted > limit) {
        return ra_error(RA_STATUS_BUDGET,
                        "head budgets of layer %d sum to %lld, its pool was made for %lld", il,
                        (long long) wanted, (long long) limit);
    }
    memcpy(l->initial, budgets, n * sizeof(*budgets));
    l->has_new_table  = true;
    c->has_own_tables = true;
    if (c->n_pos == 0) {
        ra_cache_clear(c);
    }
    return RA_STATUS_OK;
}
