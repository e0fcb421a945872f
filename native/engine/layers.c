/* layers.c - the layers of a cache: made, split anew for another prefix, given other budgets */
#include "cache.h"

#include <string.h>

static ra_status ra_layer_init(ra_layer * l, const ra_settings * s, int32_t n_head_kv,
                               const int32_t * budgets) {
    const bool   needs_alike = (s->policy->needs & RA_FEATURE_KEY_SIM) != 0;
    const size_t n_state     = (size_t) s->policy->n_state;
    int64_t      n_slots     = 0;
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        n_slots += (int64_t) budgets[ih] + s->cfg.buffer;
    }
    if (n_slots > INT32_MAX / 4) {
        return ra_error(RA_STATUS_INVALID, "a layer of %lld rows is too large: lower the budget",
                        (long long) n_slots);
    }
    const size_t n = (size_t) n_head_kv;
    l->n_head_kv   = n_head_kv;
    l->n_slots     = (int32_t) n_slots;
    l->initial     = ra_calloc(n, sizeof(int32_t));
    l->budget      = ra_calloc(n, sizeof(int32_t));
    l->offset      = ra_calloc(n, sizeof(int32_t));
    l->used        = ra_calloc(n, sizeof(int32_t));
    l->planned     = ra_calloc(n, sizeof(int32_t));
    l->n_evicted   = ra_calloc(n, sizeof(int64_t));
    l->pos         = ra_calloc((size_t) n_slots, sizeof(int32_t));
    l->keep        = ra_calloc((size_t) n_slots, sizeof(uint8_t));
    l->state       = ra_calloc((size_t) n_slots, n_state * sizeof(float));
    l->state_out   = ra_calloc((size_t) n_slots, n_state * sizeof(float));
    l->merge       = s->cfg.merge ? ra_merge_make((int32_t) n_slots) : NULL;
    l->alike       = needs_alike ? ra_calloc((size_t) n_slots, sizeof(ra_alike)) : NULL;
    if (l->initial == NULL || l->budget == NULL || l->offset == NULL || l->used == NULL ||
        l->planned == NULL || l->n_evicted == NULL || l->pos == NULL || l->keep == NULL ||
        l->state == NULL || l->state_out == NULL || (needs_alike && l->alike == NULL) ||
        (s->cfg.merge && l->merge == NULL)) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for the bookkeeping of the cache");
    }
    memcpy(l->initial, budgets, n * sizeof(int32_t));
    return RA_STATUS_OK;
}

static void ra_layer_free(ra_layer * l) {
    ra_free(l->initial);
    ra_free(l->budget);
    ra_free(l->offset);
    ra_free(l->used);
    ra_free(l->planned);
    ra_free(l->n_evicted);
    ra_free(l->pos);
    ra_free(l->keep);
    ra_free(l->state);
    ra_free(l->state_out);
    ra_free(l->alike);
    ra_merge_free(l->merge);
}

void ra_layers_free(ra_layer * layers, int32_t n_layer) {
    for (int32_t il = 0; layers != NULL && il < n_layer; ++il) {
        ra_layer_free(&layers[il]);
    }
    ra_free(layers);
}

ra_status ra_layers_make(const ra_settings * s, int32_t n_protect, int32_t n_layer,
                         const int32_t * n_head_kv, ra_layer ** layers) {
    size_t n_entries = 0;
    for (int32_t il = 0; il < n_layer; ++il) {
        n_entries += (size_t) n_head_kv[il];
    }
    int32_t * budgets = ra_calloc(n_entries, sizeof(*budgets));
    *layers           = ra_calloc((size_t) n_layer, sizeof(**layers));
    if (budgets == NULL || *layers == NULL) {
        ra_free(budgets);
        ra_free(*layers);
        *layers = NULL;
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for the budgets of %zu heads",
                        n_entries);
    }
    ra_status       st   = ra_settings_budgets(s, n_protect, n_layer, n_head_kv, budgets);
    const int32_t * next = budgets;
    for (int32_t il = 0; il < n_layer && st == RA_STATUS_OK; ++il) {
        st = ra_layer_init(&(*layers)[il], s, n_head_kv[il], next);
        next += n_head_kv[il];
    }
    ra_free(budgets);
    if (st != RA_STATUS_OK) {
        ra_layers_free(*layers, n_layer);
        *layers = NULL;
    }
    return st;
}

ra_status ra_cache_use_layers(ra_cache * c, ra_layer * layers) {
    int32_t n_slots_max = 0;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        n_slots_max = layers[il].n_slots > n_slots_max ? layers[il].n_slots : n_slots_max;
    }
    float * score = ra_calloc((size_t) n_slots_max, sizeof(float));
    float * mass  = ra_calloc((size_t) n_slots_max, sizeof(float));
    float * twin  = ra_calloc((size_t) n_slots_max, sizeof(float));
    float * work  = ra_calloc((size_t) n_slots_max, 3 * sizeof(float));
    if (score == NULL || mass == NULL || twin == NULL || work == NULL) {
        ra_free(score);
        ra_free(mass);
        ra_free(twin);
        ra_free(work);
        ra_layers_free(layers, c->n_layer);
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for the scores of %d tokens",
                        n_slots_max);
    }
    ra_layers_free(c->layers, c->n_layer);
    ra_free(c->score);
    ra_free(c->mass);
    ra_free(c->twin);
    ra_free(c->work);
    c->layers      = layers;
    c->n_slots_max = n_slots_max;
    c->score       = score;
    c->mass        = mass;
    c->twin        = twin;
    c->work        = work;
    return RA_STATUS_OK;
}

/* Splits the budget over the layers of an empty cache anew. */
static ra_status ra_cache_split(ra_cache * c, int32_t n_protect) {
    int32_t * n_head_kv = ra_calloc((size_t) c->n_layer, sizeof(*n_head_kv));
    if (n_head_kv == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for %d layers", c->n_layer);
    }
    for (int32_t il = 0; il < c->n_layer; ++il) {
        n_head_kv[il] = c->layers[il].n_head_kv;
    }
    ra_layer * layers = NULL;
    ra_status  st     = ra_layers_make(&c->settings, n_protect, c->n_layer, n_head_kv, &layers);
    bool       is_new = false;
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
    const int32_t floor = ra_config_floor(&c->settings.cfg, n_protect);
    for (int32_t il = 0; il < c->n_layer; ++il) {
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
    const int32_t floor  = ra_config_floor(&c->settings.cfg, c->n_protect);
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
