/* layers.c - the layers of a cache: made and freed */
#include "cache.h"

#include <string.h>

static ra_status ra_layer_init(ra_layer * l, const ra_settings * s, int32_t n_head_kv,
                               int32_t n_swa, const int32_t * budgets) {
    const bool   needs_alike = (s->policy->needs & RA_FEATURE_KEY_SIM) != 0;
    const bool   merges  = s->cfg.merge && n_swa == 0; /* what is merged would outlive its window */
    const size_t n_state = (size_t) s->policy->n_state;
    int64_t      n_slots = 0;
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        n_slots += (int64_t) budgets[ih] + s->cfg.buffer;
    }
    if (n_slots > INT32_MAX / 4) {
        return ra_error(RA_STATUS_INVALID, "a layer of %lld rows is too large: lower the budget",
                        (long long) n_slots);
    }
    const size_t n = (size_t) n_head_kv;
    l->n_head_kv   = n_head_kv;
    l->n_swa       = n_swa;
    l->n_slots     = (int32_t) n_slots;
    l->initial     = ra_calloc(n, sizeof(int32_t));
    l->budget      = ra_calloc(n, sizeof(int32_t));
    l->offset      = ra_calloc(n, sizeof(int32_t));
    l->used        = ra_calloc(n, sizeof(int32_t));
    l->planned     = ra_calloc(n, sizeof(int32_t));
    l->n_dead      = ra_calloc(n, sizeof(int32_t));
    l->n_evicted   = ra_calloc(n, sizeof(int64_t));
    l->pos         = ra_calloc((size_t) n_slots, sizeof(int32_t));
    l->keep        = ra_calloc((size_t) n_slots, sizeof(uint8_t));
    l->state       = ra_calloc((size_t) n_slots, n_state * sizeof(float));
    l->state_out   = ra_calloc((size_t) n_slots, n_state * sizeof(float));
    l->merge       = merges ? ra_merge_make((int32_t) n_slots) : NULL;
    l->alike       = needs_alike ? ra_calloc((size_t) n_slots, sizeof(ra_alike)) : NULL;
    if (l->initial == NULL || l->budget == NULL || l->offset == NULL || l->used == NULL ||
        l->planned == NULL || l->n_dead == NULL || l->n_evicted == NULL || l->pos == NULL ||
        l->keep == NULL || l->state == NULL || l->state_out == NULL ||
        (needs_alike && l->alike == NULL) || (merges && l->merge == NULL)) {
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
    ra_free(l->n_dead);
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

/* budgets [sum of n_head_kv] out; growing [n_layer] scratch */
static ra_status ra_layers_budgets(const ra_settings * s, int32_t n_protect, int32_t n_layer,
                                   const int32_t * n_head_kv, const int32_t * n_swa,
                                   int32_t * growing, int32_t * budgets) {
    size_t n_all  = 0;
    size_t n_grow = 0;
    for (int32_t il = 0; il < n_layer; ++il) {
        growing[il] = n_swa != NULL && n_swa[il] > 0 ? 0 : n_head_kv[il];
        n_all += (size_t) n_head_kv[il];
        n_grow += (size_t) growing[il];
    }
    const ra_status st = ra_settings_budgets(s, n_protect, n_layer, growing, budgets);
    /* those of the layers that grow move to their places, the last ones first */
    for (int32_t il = n_layer - 1; il >= 0 && st == RA_STATUS_OK; --il) {
        for (int32_t ih = n_head_kv[il] - 1; ih >= 0; --ih) {
            budgets[--n_all] =
                growing[il] > 0 ? budgets[--n_grow] : ra_window_budget(&s->cfg, n_swa[il]);
        }
    }
    return st;
}

ra_status ra_layers_make(const ra_settings * s, int32_t n_protect, int32_t n_layer,
                         const int32_t * n_head_kv, const int32_t * n_swa, ra_layer ** layers) {
    size_t n_entries = 0;
    for (int32_t il = 0; il < n_layer; ++il) {
        n_entries += (size_t) n_head_kv[il];
    }
    int32_t * budgets = ra_calloc(n_entries + (size_t) n_layer, sizeof(*budgets));
    *layers           = ra_calloc((size_t) n_layer, sizeof(**layers));
    if (budgets == NULL || *layers == NULL) {
        ra_free(budgets);
        ra_free(*layers);
        *layers = NULL;
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for the budgets of %zu heads",
                        n_entries);
    }
    ra_status st =
        ra_layers_budgets(s, n_protect, n_layer, n_head_kv, n_swa, budgets + n_entries, budgets);
    const int32_t * next = budgets;
    for (int32_t il = 0; il < n_layer && st == RA_STATUS_OK; ++il) {
        st = ra_layer_init(&(*layers)[il], s, n_head_kv[il], n_swa != NULL ? n_swa[il] : 0, next);
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
