/* compress.c - decides which tokens a compression keeps; ra_cache_ops moves their rows
 *
 * features -> policy -> allocator -> selection -> packing. In a context the callbacks, and with them
 * all work on tensors, are those of native/llama/ra_compress.cpp. */
#include "cache.h"

#include <float.h>
#include <math.h>
#include <string.h>

void ra_score_protect(const ra_config * cfg, int32_t n_protect, const ra_features * f,
                      float * score) {
    const int32_t n_first = n_protect > cfg->n_sink ? n_protect : cfg->n_sink;
    for (int32_t i = 0; i < f->n_kv; ++i) {
        if (f->pos[i] < n_first || i >= f->n_kv - f->n_window) {
            score[i] = INFINITY;
        } else if (!isfinite(score[i])) {
            score[i] = -FLT_MAX;
        }
    }
}

/* Among the tokens of a head that may go, up to cfg->n_guard with outlying value norms are made to
 * stay: those more than cfg->value_guard standard deviations above the mean, largest first. */
static void ra_score_guard(const ra_config * cfg, const ra_features * f, float * score) {
    double sum = 0.0;
    double sq  = 0.0;
    for (int32_t i = 0; i < f->n_kv; ++i) {
        sum += (double) f->value_norm[i];
        sq += (double) f->value_norm[i] * (double) f->value_norm[i];
    }
    const double mean     = sum / f->n_kv;
    const double variance = sq / f->n_kv - mean * mean;
    const double limit = mean + (double) cfg->value_guard * sqrt(variance > 0.0 ? variance : 0.0);
    for (int32_t n = 0; n < cfg->n_guard; ++n) {
        int32_t best = -1;
        for (int32_t i = 0; i < f->n_kv; ++i) {
            if (score[i] < INFINITY && (double) f->value_norm[i] > limit &&
                (best < 0 || f->value_norm[i] > f->value_norm[best])) {
                best = i;
            }
        }
        if (best < 0) {
            return;
        }
        score[best] = INFINITY;
    }
}

/* What the policy may read of head ih, whose first token is number `at` of the layer's. */
static ra_status ra_head_features(ra_cache * c, const ra_cache_ops * ops, uint32_t needs,
                                  int32_t il, int32_t ih, int32_t n_obs, int32_t at,
                                  ra_features * f) {
    ra_layer *    l       = &c->layers[il];
    const int32_t offset  = l->offset[ih];
    const int32_t n_state = c->settings.policy->n_state;
    const int32_t n_win   = c->settings.cfg.n_window;
    *f                    = (ra_features){
                           .il        = il,
                           .ih        = ih,
                           .n_kv      = l->used[ih],
                           .n_window  = n_win < l->used[ih] ? n_win : l->used[ih],
                           .n_obs     = n_obs,
                           .pos       = l->pos + offset,
                           .obs_pos   = c->obs_pos,
                           .twin      = c->twin + at,
                           .state     = l->state + (size_t) n_state * (size_t) offset,
                           .state_out = l->state_out + (size_t) n_state * (size_t) offset,
                           .mass      = c->mass + at,
                           .work      = c->work,
    };
    return needs != 0 ? ops->features(ops->user, needs, f) : RA_STATUS_OK;
}

/* The policy looks at all heads of a layer: their states afterwards, and masses where somebody asks. */
static ra_status ra_observe_layer(ra_cache * c, const ra_cache_ops * ops, uint32_t needs,
                                  int32_t il, int32_t n_obs) {
    const ra_layer *  l      = &c->layers[il];
    const ra_policy * policy = c->settings.policy;
    const bool        asks   = l->merge != NULL || (needs & RA_FEATURE_TWIN) != 0;
    ra_status         st     = RA_STATUS_OK;
    int32_t           at     = 0;
    for (int32_t ih = 0; ih < l->n_head_kv && st == RA_STATUS_OK; ++ih) {
        const size_t begin = (size_t) policy->n_state * (size_t) l->offset[ih];
        memcpy(l->state_out + begin, l->state + begin,
               (size_t) policy->n_state * (size_t) l->used[ih] * sizeof(*l->state));
        if (asks || policy->observe != NULL) {
            ra_features f;
            st = ra_head_features(c, ops, needs, il, ih, n_obs, at, &f);
            if (st == RA_STATUS_OK && policy->observe != NULL) {
                policy->observe(&c->settings.cfg, &f);
            } else if (st == RA_STATUS_OK) {
                memcpy(f.mass, f.attn_mass, (size_t) f.n_kv * sizeof(*f.mass));
            }
        }
        at += l->used[ih];
    }
    if (st == RA_STATUS_OK && (needs & RA_FEATURE_TWIN) != 0) {
        st = ops->find_twins(ops->user, il, c->mass, c->twin);
    }
    return st;
}

/* Scores of a layer into c->score: the policy's, and +INFINITY for tokens that must stay. */
static ra_status ra_score_layer(ra_cache * c, const ra_cache_ops * ops, uint32_t needs, int32_t il,
                                int32_t n_obs) {
    const ra_layer *  l   = &c->layers[il];
    const ra_config * cfg = &c->settings.cfg;
    ra_status         st  = ra_observe_layer(c, ops, needs, il, n_obs);
    int32_t           at  = 0;
    for (int32_t ih = 0; ih < l->n_head_kv && st == RA_STATUS_OK; ++ih) {
        ra_features f;
        float *     score = c->score + at;
        st                = ra_head_features(c, ops, needs, il, ih, n_obs, at, &f);
        if (st == RA_STATUS_OK) {
            c->settings.policy->score(cfg, &f, score);
            ra_score_protect(cfg, ra_layer_protects(l, c->n_protect), &f, score);
        }
        if (st == RA_STATUS_OK && cfg->value_guard > 0.0f) {
            ra_score_guard(cfg, &f, score);
        }
        at += l->used[ih];
    }
    return st;
}

/* An allocator's result must fit the pool: rows would be written outside it otherwise. */
static ra_status ra_check_planned(const ra_layer * l, int32_t il, int32_t buffer, int32_t floor) {
    int64_t n_slots = 0;
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        if (l->planned[ih] < floor || l->planned[ih] > RA_MAX_TOKENS) {
            return ra_error(RA_STATUS_BUDGET,
                            "the head allocator gave layer %d, head %d a budget of %d: must be at "
                            "least %d",
                            il, ih, l->planned[ih], floor);
        }
        n_slots += (int64_t) l->planned[ih] + buffer;
    }
    if (n_slots > l->n_slots) {
        return ra_error(RA_STATUS_BUDGET,
                        "the head allocator gave layer %d %lld rows, its pool has %d", il,
                        (long long) n_slots, l->n_slots);
    }
    return RA_STATUS_OK;
}

/* All tokens of a layer stay. */
static void ra_plan_all(ra_cache * c, ra_layer * l) {
    const size_t n_state = (size_t) c->settings.policy->n_state;
    float *      score   = c->score;
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        const size_t begin = n_state * (size_t) l->offset[ih];
        memcpy(l->state_out + begin, l->state + begin,
               n_state * (size_t) l->used[ih] * sizeof(*l->state));
        memset(l->keep + l->offset[ih], 1, (size_t) l->used[ih]);
        for (int32_t i = 0; i < l->used[ih]; ++i) {
            *score++ = INFINITY;
            if (l->alike != NULL) { /* not compared */
                l->alike[l->offset[ih] + i] = (ra_alike){ RA_ALIKE_UNKNOWN, RA_ALIKE_UNKNOWN };
            }
        }
        l->planned[ih] = l->initial[ih];
    }
}

/* Plans one layer: l->keep and l->planned. */
static ra_status ra_plan_layer(ra_cache * c, const ra_cache_ops * ops, int32_t il) {
    ra_layer * l = &c->layers[il];
    if (ra_layer_holds_window(l)) {
        ra_plan_all(c, l);
        return RA_STATUS_OK;
    }
    const int32_t  n_obs = ra_cache_list_queries(c, il);
    const uint32_t needs = ra_cache_needs(c);
    ra_status      st    = RA_STATUS_OK;
    if (needs != 0) {
        st = ops->features_begin(ops->user, needs, il, n_obs, c->obs_pos);
    }
    if (st == RA_STATUS_OK) {
        st = ra_score_layer(c, ops, needs, il, n_obs);
    }
    if (st != RA_STATUS_OK) {
        return st;
    }
    const ra_alloc_heads_in in = {
        .n_head_kv = l->n_head_kv,
        .base      = ra_config_base(&c->settings.cfg, ra_layer_protects(l, c->n_protect)),
        .n_kv      = l->used,
        .score     = c->score,
        .initial   = l->initial,

        .scores_are_shares = (c->settings.policy->gives & RA_GIVES_SHARES) != 0,
    };
    st = c->settings.head_alloc->run(&c->settings.cfg, &in, l->planned);
    if (st == RA_STATUS_OK) {
        st = ra_check_planned(l, il, c->settings.cfg.buffer, in.base + 1);
    }
    const float * score = c->score;
    for (int32_t ih = 0; ih < l->n_head_kv && st == RA_STATUS_OK; ++ih) {
        st = ra_select_keep(l->used[ih], score, l->planned[ih], l->keep + l->offset[ih]);
        score += l->used[ih];
    }
    if (st == RA_STATUS_OK && l->merge != NULL) {
        st = ra_merge_plan(c, ops, il, c->score);
    }
    return st;
}

/* What is kept of the token in row src is, from now on, of row dst. The row itself is moved apart. */
static void ra_row_copy(ra_layer * l, int32_t n_state, int32_t dst, int32_t src) {
    l->pos[dst] = l->pos[src];
    for (int32_t s = 0; s < n_state; ++s) {
        l->state[n_state * dst + s] = l->state[n_state * src + s];
    }
    if (l->alike != NULL) {
        l->alike[dst] = l->alike[src];
    }
    if (l->merge != NULL) {
        l->merge->bias[dst] = l->merge->bias[src];
    }
}

/* Packs the kept rows of head ih to the front of its segment, over those that are dead. */
static void ra_pack_head(ra_cache * c, const ra_cache_ops * ops, int32_t il, int32_t ih) {
    ra_layer *      l       = &c->layers[il];
    const int32_t   offset  = l->offset[ih];
    const int32_t   front   = offset - l->n_dead[ih];
    const int32_t   n_state = c->settings.policy->n_state;
    const size_t    n_begin = (size_t) n_state * (size_t) offset;
    const uint8_t * keep    = l->keep + offset;
    int32_t         n_kept  = 0;
    memcpy(l->state + n_begin, l->state_out + n_begin,
           (size_t) n_state * (size_t) l->used[ih] * sizeof(*l->state));
    if (front < offset && l->pos[front] < c->min_evicted) {
        c->min_evicted = l->pos[front];
    }
    for (int32_t i = 0; i < l->used[ih];) {
        if (!keep[i]) {
            const int32_t pos = l->pos[offset + i];
            c->min_evicted    = pos < c->min_evicted ? pos : c->min_evicted;
            ++i;
            continue;
        }
        int32_t end = i;
        for (; end < l->used[ih] && keep[end]; ++end) {
            ra_row_copy(l, n_state, front + n_kept + end - i, offset + end);
        }
        if (front + n_kept != offset + i) {
            ops->move(ops->user, il, front + n_kept, offset + i, end - i);
        }
        n_kept += end - i;
        i = end;
    }
    const int32_t n_gone = l->n_dead[ih] + l->used[ih] - n_kept;
    l->n_evicted[ih] += n_gone;
    c->n_evicted += n_gone;
    l->offset[ih] = front;
    l->used[ih]   = n_kept;
    l->n_dead[ih] = 0;
}

/* Moves the packed segment of head ih to row `offset` of the pool. */
static void ra_shift_head(ra_cache * c, const ra_cache_ops * ops, int32_t il, int32_t ih,
                          int32_t offset) {
    ra_layer *    l   = &c->layers[il];
    const int32_t src = l->offset[ih];
    const int32_t n   = l->used[ih];
    if (offset == src) {
        return;
    }
    for (int32_t i = 0; i < n; ++i) {
        const int32_t k = offset < src ? i : n - 1 - i;
        ra_row_copy(l, c->settings.policy->n_state, offset + k, src + k);
    }
    if (n > 0) {
        ops->move(ops->user, il, offset, src, n);
    }
    l->offset[ih] = offset;
}

static ra_status ra_commit_layer(ra_cache * c, const ra_cache_ops * ops, int32_t il) {
    ra_layer * l  = &c->layers[il];
    ra_status  st = ops->move_begin(ops->user, il);
    if (st != RA_STATUS_OK) {
        return st;
    }
    if (l->merge != NULL) {
        ops->merge_rows(ops->user, il);
        ra_merge_commit(l);
    }
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        ra_pack_head(c, ops, il, ih);
    }
    /* Segments going down first, in ascending order; then those going up, in descending order: a
     * segment is only ever moved onto rows that no other segment needs any more. */
    int32_t offset = 0;
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        if (offset < l->offset[ih]) {
            ra_shift_head(c, ops, il, ih, offset);
        }
        offset += l->planned[ih] + c->settings.cfg.buffer;
    }
    for (int32_t ih = l->n_head_kv - 1; ih >= 0; --ih) {
        offset -= l->planned[ih] + c->settings.cfg.buffer;
        ra_shift_head(c, ops, il, ih, offset);
        l->budget[ih] = l->planned[ih];
    }
    l->n_pos_scored  = c->n_pos;
    l->has_new_table = false;
    return ops->move_end(ops->user, il);
}

static bool ra_layer_is_over(const ra_layer * l) {
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        if (l->used[ih] > l->budget[ih] || (l->has_new_table && l->used[ih] > l->initial[ih])) {
            return true;
        }
    }
    return false;
}

ra_status ra_cache_compress(ra_cache * c, const ra_cache_ops * ops, int32_t * n_layers_out) {
    int32_t   n_packed = 0;
    ra_status st       = RA_STATUS_OK;
    for (int32_t il = 0; il < c->n_layer && st == RA_STATUS_OK; ++il) {
        ra_layer * l  = &c->layers[il];
        l->is_planned = ra_layer_is_over(l);
        if (!l->is_planned) {
            continue;
        }
        ra_layer_hide_dead(l, c->n_pos);
        st = ra_plan_layer(c, ops, il);
        if (st == RA_STATUS_OK && c->trace != NULL) {
            ra_trace_layer(c, il);
        }
    }
    for (int32_t il = 0; il < c->n_layer && st == RA_STATUS_OK; ++il) {
        if (c->layers[il].is_planned) {
            st = ra_commit_layer(c, ops, il);
            n_packed += st == RA_STATUS_OK;
        }
    }
    for (int32_t il = 0; il < c->n_layer; ++il) {
        ra_layer_show_dead(&c->layers[il]); /* of what was not packed */
    }
    c->n_compressions += n_packed > 0;
    if (n_layers_out != NULL) {
        *n_layers_out = n_packed;
    }
    return st;
}
