/* windows.c - layers with a sliding window: which of their tokens no query sees any more
 *
 * A query at position p sees the tokens above p - n_swa. Those of a segment that are out of the window are
 * its first rows, for it is in position order. Between two compressions they are masked, so that a tail can
 * be dropped again; a compression takes them for gone before any policy looks, whatever protects them. */
#include "cache.h"

int32_t ra_window_budget(const ra_config * cfg, int32_t n_swa) {
    const int32_t floor = ra_config_floor(cfg, 0);
    const int32_t most  = n_swa > floor ? n_swa : floor;
    return cfg->budget_swa < most ? cfg->budget_swa : most;
}

int32_t ra_layer_protects(const ra_layer * l, int32_t n_protect) {
    return l->n_swa > 0 ? 0 : n_protect;
}

int32_t ra_head_dead(const ra_layer * l, int32_t ih, int32_t pos) {
    const int32_t * own   = l->pos + l->offset[ih];
    int32_t         begin = 0;
    int32_t         end   = l->n_swa > 0 ? l->used[ih] : 0;
    while (begin < end) {
        const int32_t mid = begin + (end - begin) / 2;
        if (own[mid] <= pos - l->n_swa) {
            begin = mid + 1;
        } else {
            end = mid;
        }
    }
    return begin;
}

bool ra_layer_holds_window(const ra_layer * l) {
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        if (l->initial[ih] < l->n_swa) {
            return false;
        }
    }
    return l->n_swa > 0;
}

void ra_layer_hide_dead(ra_layer * l, int32_t n_pos) {
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        l->n_dead[ih] = ra_head_dead(l, ih, n_pos);
        l->offset[ih] += l->n_dead[ih];
        l->used[ih] -= l->n_dead[ih];
    }
}

void ra_layer_show_dead(ra_layer * l) {
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        l->offset[ih] -= l->n_dead[ih];
        l->used[ih] += l->n_dead[ih];
        l->n_dead[ih] = 0;
    }
}
