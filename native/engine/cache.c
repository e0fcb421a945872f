/* cache.c - segments of rows per head: make, append, truncate */
#include "cache.h"

#include <math.h>
#include <string.h>

bool ra_cache_wants_all_queries(const ra_cache * c) {
    return (c->settings.policy->needs & RA_FEATURE_ALL_QUERIES) != 0 &&
           c->settings.cfg.buffer > c->settings.cfg.n_window;
}

/* newest queries that a compression may use */
static int32_t ra_cache_most_queries(const ra_cache * c) {
    return ra_cache_wants_all_queries(c) ? c->settings.cfg.buffer : c->settings.cfg.n_window;
}

/* A dropped draft has overwritten the oldest queries of the ring: that many more are kept. Those since the
 * last compression are at hand in any case, for no draft is longer than the room for it. */
static int32_t ra_ring_size(const ra_cache * c) {
    const int32_t most  = ra_cache_most_queries(c);
    const int32_t draft = c->settings.cfg.n_window + c->settings.cfg.n_draft;
    return draft > most ? draft : most;
}

ra_status ra_cache_init(ra_cache ** out, ra_settings * settings, int32_t n_layer,
                        const int32_t * n_head_kv, const int32_t * n_swa) {
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
    c->n_ring     = ra_ring_size(c);
    c->window_pos = ra_calloc((size_t) c->n_ring, sizeof(int32_t));
    c->obs_pos    = ra_calloc((size_t) c->n_ring, sizeof(int32_t));

    ra_layer * layers = NULL;
    ra_status  st     = RA_STATUS_OK;
    if (c->window_pos == NULL || c->obs_pos == NULL) {
        st = ra_error(RA_STATUS_NO_MEMORY, "out of memory for the cache of %d layers", n_layer);
    }
    if (st == RA_STATUS_OK) {
        st = ra_layers_make(&c->settings, c->n_protect, n_layer, n_head_kv, n_swa, &layers);
    }
    if (st == RA_STATUS_OK) {
        st = ra_cache_use_layers(c, layers);
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
    ra_layers_free(c->layers, c->n_layer);
    ra_settings_free(&c->settings);
    ra_free(c->window_pos);
    ra_free(c->obs_pos);
    ra_free(c->score);
    ra_free(c->mass);
    ra_free(c->twin);
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
        if (l->merge != NULL) {
            l->merge->has_bias = false;
        }
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
    if (c->settings.head_alloc->moves_budgets) {
        const double most = cfg->clip_hi * (double) total / l->n_head_kv;
        const double cut  = most < (double) l->n_slots ? most : (double) l->n_slots;
        longest           = (int64_t) cut > longest ? (int64_t) cut : longest;
    }
    longest += cfg->buffer;
    return longest < l->n_slots ? (int32_t) longest : l->n_slots;
}

void ra_cache_append(ra_cache * c, int32_t pos0, int32_t n) {
    const int32_t n_state = c->settings.policy->n_state;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        ra_layer * l = &c->layers[il];
        for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
            const int32_t row = l->offset[ih] + l->used[ih];
            for (int32_t t = 0; t < n; ++t) {
                l->pos[row + t] = pos0 + t;
            }
            for (int32_t t = n_state * row; t < n_state * (row + n); ++t) {
                l->state[t] = NAN;
            }
            for (int32_t t = row; l->merge != NULL && t < row + n; ++t) {
                l->merge->bias[t] = 0.0f;
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

static void ra_layer_copy(ra_layer * to, const ra_layer * from, size_t n_state) {
    const size_t n_heads = (size_t) from->n_head_kv;
    const size_t n_slots = (size_t) from->n_slots;
    if (n_heads == 0) {
        return;
    }
    memcpy(to->initial, from->initial, n_heads * sizeof(*to->initial));
    memcpy(to->budget, from->budget, n_heads * sizeof(*to->budget));
    memcpy(to->offset, from->offset, n_heads * sizeof(*to->offset));
    memcpy(to->used, from->used, n_heads * sizeof(*to->used));
    memcpy(to->n_evicted, from->n_evicted, n_heads * sizeof(*to->n_evicted));
    memcpy(to->pos, from->pos, n_slots * sizeof(*to->pos));
    memcpy(to->state, from->state, n_slots * n_state * sizeof(*to->state));
    if (from->merge != NULL) {
        memcpy(to->merge->bias, from->merge->bias, n_slots * sizeof(*to->merge->bias));
        to->merge->has_bias = from->merge->has_bias;
    }
    if (from->alike != NULL) {
        memcpy(to->alike, from->alike, n_slots * sizeof(*to->alike));
    }
    to->is_planned    = false;
    to->has_new_table = from->has_new_table;
    to->n_pos_scored  = from->n_pos_scored;
}

ra_status ra_cache_copy(ra_cache * to, const ra_cache * from) {
    for (int32_t il = 0; il < from->n_layer; ++il) {
        if (to->layers[il].n_slots != from->layers[il].n_slots) {
            return ra_error(RA_STATUS_UNSUPPORTED,
                            "a sequence whose budgets were set by hand cannot be copied: layer %d "
                            "has other budgets there",
                            il);
        }
    }
    for (int32_t il = 0; il < from->n_layer; ++il) {
        ra_layer_copy(&to->layers[il], &from->layers[il], (size_t) from->settings.policy->n_state);
    }
    to->has_own_tables = from->has_own_tables;
    to->n_pos          = from->n_pos;
    to->n_protect      = from->n_protect;
    to->peak_tokens    = from->peak_tokens;
    to->min_evicted    = from->min_evicted;
    to->n_compressions = from->n_compressions;
    to->n_evicted      = from->n_evicted;
    memcpy(to->window_pos, from->window_pos, (size_t) from->n_ring * sizeof(*to->window_pos));
    return RA_STATUS_OK;
}

int32_t ra_cache_compressed_at(const ra_cache * c) {
    int32_t pos = 0;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        pos = c->layers[il].n_pos_scored > pos ? c->layers[il].n_pos_scored : pos;
    }
    return pos;
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
    const bool     guards = c->settings.cfg.value_guard > 0.0f;
    const uint32_t needs =
        c->settings.policy->needs | (guards ? (uint32_t) RA_FEATURE_VALUE_NORM : 0);
    const bool weighs = c->settings.cfg.merge || (needs & RA_FEATURE_TWIN) != 0;
    return needs | (weighs ? (uint32_t) RA_FEATURE_ATTN_MASS : 0);
}

int32_t ra_cache_list_queries(ra_cache * c, int32_t il) {
    const bool wants_all = (c->settings.policy->needs & RA_FEATURE_ALL_QUERIES) != 0;
    int32_t    first     = c->n_pos - ra_cache_most_queries(c);
    if (wants_all && first < c->layers[il].n_pos_scored) {
        first = c->layers[il].n_pos_scored;
    }
    int32_t n_obs = 0;
    for (int32_t pos = first > 0 ? first : 0; pos < c->n_pos; ++pos) {
        if (c->window_pos[pos % c->n_ring] == pos) {
            c->obs_pos[n_obs++] = pos;
        }
    }
    const int32_t n_most = c->settings.cfg.n_query;
    if ((c->settings.policy->needs & RA_FEATURE_SAMPLED) == 0 || n_most == 0 || n_obs <= n_most) {
        return n_obs;
    }
    for (int32_t i = 0; i < n_most; ++i) { /* at even distances, the newest among them */
        c->obs_pos[i] = c->obs_pos[n_obs - 1 - (int64_t) (n_most - 1 - i) * n_obs / n_most];
    }
    return n_most;
}
