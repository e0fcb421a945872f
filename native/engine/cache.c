/* cache.c - segments of rows per head: make, append, truncate */
#include "cache.h"

#include <math.h>
#include <string.h>

static ra_status ra_layer_init(ra_layer * l, int32_t n_head_kv, const int32_t * budgets,
                               int32_t buffer, bool needs_alike) {
    int64_t n_slots = 0;
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        n_slots += (int64_t) budgets[ih] + buffer;
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
    l->state       = ra_calloc((size_t) n_slots, sizeof(float));
    l->state_out   = ra_calloc((size_t) n_slots, sizeof(float));
    l->alike       = needs_alike ? ra_calloc((size_t) n_slots, sizeof(ra_alike)) : NULL;
    if (l->initial == NULL || l->budget == NULL || l->offset == NULL || l->used == NULL ||
        l->planned == NULL || l->n_evicted == NULL || l->pos == NULL || l->keep == NULL ||
        l->state == NULL || l->state_out == NULL || (needs_alike && l->alike == NULL)) {
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
}

static ra_status ra_cache_init_layers(ra_cache * c, const int32_t * n_head_kv) {
    size_t n_entries = 0;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        n_entries += (size_t) n_head_kv[il];
    }
    int32_t * budgets = ra_calloc(n_entries, sizeof(*budgets));
    if (budgets == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for the budgets of %zu heads",
                        n_entries);
    }
    ra_status       st   = ra_settings_budgets(&c->settings, c->n_layer, n_head_kv, budgets);
    const int32_t * next = budgets;
    for (int32_t il = 0; il < c->n_layer && st == RA_STATUS_OK; ++il) {
        ra_layer * l = &c->layers[il];
        st           = ra_layer_init(l, n_head_kv[il], next, c->settings.cfg.buffer,
                                     (c->settings.policy->needs & RA_FEATURE_KEY_SIM) != 0);
        next += n_head_kv[il];
        c->n_slots_max = l->n_slots > c->n_slots_max ? l->n_slots : c->n_slots_max;
    }
    ra_free(budgets);
    return st;
}

static int32_t ra_ring_size(const ra_settings * s) {
    const bool wants_all = (s->policy->needs & RA_FEATURE_ALL_QUERIES) != 0;
    return wants_all && s->cfg.buffer > s->cfg.n_window ? s->cfg.buffer : s->cfg.n_window;
}

ra_status ra_cache_init(ra_cache ** out, ra_settings * settings, int32_t n_layer,
                        const int32_t * n_head_kv) {
    *out         = NULL;
    ra_cache * c = ra_calloc(1, sizeof(*c));
    if (c == NULL) {
        ra_settings_free(settings);
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory for the cache");
    }
    c->settings = *settings;
    memset(settings, 0, sizeof(*settings));
    c->n_layer    = n_layer;
    c->n_protect  = c->settings.cfg.n_protect;
    c->layers     = ra_calloc((size_t) n_layer, sizeof(*c->layers));
    c->n_ring     = ra_ring_size(&c->settings);
    c->window_pos = ra_calloc((size_t) c->n_ring, sizeof(int32_t));
    c->obs_pos    = ra_calloc((size_t) c->n_ring, sizeof(int32_t));

    ra_status st = RA_STATUS_NO_MEMORY;
    if (c->layers != NULL && c->window_pos != NULL && c->obs_pos != NULL) {
        st = ra_cache_init_layers(c, n_head_kv);
    } else {
        c->n_layer = 0;
        ra_error(st, "out of memory for the cache of %d layers", n_layer);
    }
    if (st == RA_STATUS_OK) {
        c->score = ra_calloc((size_t) c->n_slots_max, sizeof(float));
        c->work  = ra_calloc((size_t) c->n_slots_max, 3 * sizeof(float));
        if (c->score == NULL || c->work == NULL) {
            st = ra_error(RA_STATUS_NO_MEMORY, "out of memory for the scores of %d tokens",
                          c->n_slots_max);
        }
    }
    if (st != RA_STATUS_OK) {
        ra_cache_free(c);
        return st;
    }
    ra_cache_clear(c);
    *out = c;
    return RA_STATUS_OK;
}

void ra_cache_free(ra_cache * c) {
    if (c == NULL) {
        return;
    }
    for (int32_t il = 0; il < c->n_layer; ++il) {
        ra_layer_free(&c->layers[il]);
    }
    ra_settings_free(&c->settings);
    ra_free(c->layers);
    ra_free(c->window_pos);
    ra_free(c->obs_pos);
    ra_free(c->score);
    ra_free(c->work);
    ra_free(c);
}

static void ra_cache_forget_window(ra_cache * c, int32_t pos) {
    for (int32_t i = 0; i < c->n_ring; ++i) {
        if (c->window_pos[i] >= pos) {
            c->window_pos[i] = -1;
        }
    }
}

static void ra_cache_forget_evicted(ra_cache * c) {
    for (int32_t il = 0; il < c->n_layer; ++il) {
        for (int32_t ih = 0; ih < c->layers[il].n_head_kv; ++ih) {
            c->layers[il].n_evicted[ih] = 0;
        }
    }
    c->n_evicted   = 0;
    c->min_evicted = INT32_MAX;
}

void ra_cache_clear(ra_cache * c) {
    for (int32_t il = 0; il < c->n_layer; ++il) {
        ra_layer * l      = &c->layers[il];
        int32_t    offset = 0;
        for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
            l->budget[ih] = l->initial[ih];
            l->offset[ih] = offset;
            l->used[ih]   = 0;
            offset += l->budget[ih] + c->settings.cfg.buffer;
        }
        l->is_planned   = false;
        l->n_pos_scored = 0;
    }
    c->n_pos          = 0;
    c->peak_tokens    = 0;
    c->n_compressions = 0;
    ra_cache_forget_evicted(c);
    for (int32_t i = 0; i < c->n_ring; ++i) {
        c->window_pos[i] = -1;
    }
}

int32_t ra_cache_room(const ra_cache * c) {
    int32_t room = INT32_MAX;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        const ra_layer * l = &c->layers[il];
        for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
            const int32_t head_room = l->budget[ih] + c->settings.cfg.buffer - l->used[ih];
            room                    = head_room < room ? head_room : room;
        }
    }
    return room;
}

int32_t ra_cache_longest_head(const ra_cache * c, int32_t il) {
    const ra_layer *  l       = &c->layers[il];
    const ra_config * cfg     = &c->settings.cfg;
    int64_t           total   = 0;
    int64_t           longest = 0;
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        total += l->initial[ih];
        longest = l->initial[ih] > longest ? l->initial[ih] : longest;
        longest = l->budget[ih] > longest ? l->budget[ih] : longest;
    }
    if (l->n_head_kv == 0) {
        return 0;
    }
    if (strcmp(c->settings.head_alloc->name, "uniform") != 0) {
        const double most = cfg->clip_hi * (double) total / l->n_head_kv;
        const double cut  = most < (double) l->n_slots ? most : (double) l->n_slots;
        longest           = (int64_t) cut > longest ? (int64_t) cut : longest;
    }
    longest += cfg->buffer;
    return longest < l->n_slots ? (int32_t) longest : l->n_slots;
}

void ra_cache_append(ra_cache * c, int32_t pos0, int32_t n) {
    for (int32_t il = 0; il < c->n_layer; ++il) {
        ra_layer * l = &c->layers[il];
        for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
            const int32_t row = l->offset[ih] + l->used[ih];
            for (int32_t t = 0; t < n; ++t) {
                l->pos[row + t]   = pos0 + t;
                l->state[row + t] = NAN;
            }
            l->used[ih] += n;
            c->peak_tokens = l->used[ih] > c->peak_tokens ? l->used[ih] : c->peak_tokens;
        }
    }
    for (int32_t t = n > c->n_ring ? n - c->n_ring : 0; t < n; ++t) {
        c->window_pos[(pos0 + t) % c->n_ring] = pos0 + t;
    }
    c->n_pos = pos0 + n;
    c->n_tokens_total += n;
}

void ra_cache_truncate(ra_cache * c, int32_t pos) {
    pos           = pos > 0 ? pos : 0;
    bool is_empty = true;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        ra_layer * l = &c->layers[il];
        for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
            while (l->used[ih] > 0 && l->pos[l->offset[ih] + l->used[ih] - 1] >= pos) {
                --l->used[ih];
            }
            is_empty = is_empty && l->used[ih] == 0;
        }
        l->n_pos_scored = pos < l->n_pos_scored ? pos : l->n_pos_scored;
    }
    if (pos <= c->min_evicted) {
        ra_cache_forget_evicted(c); // all of it was in the tail
    }
    ra_cache_forget_window(c, pos);
    c->n_pos = is_empty ? 0 : (pos < c->n_pos ? pos : c->n_pos);
}

int32_t ra_cache_contiguous_from(const ra_cache * c) {
    int32_t from = -1;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        const ra_layer * l = &c->layers[il];
        for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
            const int32_t * pos = l->pos + l->offset[ih];
            int32_t         i   = l->used[ih] - 1;
            while (i > 0 && pos[i - 1] == pos[i] - 1) {
                --i;
            }
            if (i >= 0 && pos[i] > from) {
                from = pos[i];
            }
        }
    }
    return from;
}

uint32_t ra_cache_needs(const ra_cache * c) {
    const bool guards = c->settings.cfg.value_guard > 0.0f;
    return c->settings.policy->needs | (guards ? (uint32_t) RA_FEATURE_VALUE_NORM : 0);
}

int32_t ra_cache_list_queries(ra_cache * c, int32_t il) {
    const bool wants_all = (c->settings.policy->needs & RA_FEATURE_ALL_QUERIES) != 0;
    int32_t    first     = c->n_pos - (wants_all ? c->n_ring : c->settings.cfg.n_window);
    if (wants_all && first < c->layers[il].n_pos_scored) {
        first = c->layers[il].n_pos_scored;
    }
    int32_t n_obs = 0;
    for (int32_t pos = first > 0 ? first : 0; pos < c->n_pos; ++pos) {
        if (c->window_pos[pos % c->n_ring] == pos) {
            c->obs_pos[n_obs++] = pos;
        }
    }
    return n_obs;
}

ra_status ra_cache_set_protect(ra_cache * c, int32_t n_protect) {
    if (n_protect < 0 || n_protect > RA_MAX_TOKENS) {
        return ra_error(RA_STATUS_INVALID, "n_protect = %d is out of range: must be 0 to %d",
                        n_protect, RA_MAX_TOKENS);
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
    l->has_new_table = true;
    if (c->n_pos == 0) {
        ra_cache_clear(c);
    }
    return RA_STATUS_OK;
}
