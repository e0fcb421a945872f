/* engine/cache.c and compress.c over thousands of random operations, beside a naive model
 *
 * The model keeps, per head, the plain list of positions held. At a compression it works out from
 * the traced scores alone which tokens stay; afterwards lists, rows and counters must agree. */
#include "ra_pool.h"

enum { N_LAYER = 4, MAX_HEADS = 5, MAX_HELD = 256, MAX_POS = 1 << 16, N_OPERATIONS = 800 };

static const int32_t n_head_kv[N_LAYER] = { 4, 0, 1, 5 };
static int32_t       n_swa[N_LAYER]; /* layer 3 has a window in half of the worlds */

typedef struct list {
    int32_t n;
    int32_t pos[MAX_HELD];
} list;

typedef struct world {
    ra_pool pool;
    list    held[N_LAYER][MAX_HEADS];
    list    next[N_LAYER][MAX_HEADS];    /* what a compression in progress would leave */
    int32_t budgets[N_LAYER][MAX_HEADS]; /* what it was given */
    bool    is_traced[N_LAYER];
    int32_t n_traced;
    int32_t n_slots[N_LAYER];
    bool    has_query[MAX_POS];
    int32_t n_pos;
    int32_t n_protect;
    int32_t n_pos_scored[N_LAYER]; /* n_pos at a layer's last compression */
    int32_t last_append;           /* its first position while it can be taken back; else -1 */
    int32_t min_evicted;
    int64_t n_evicted;
    bool    holds_window; /* the layer with a window can keep all of it */
} world;

static int32_t int_max(int32_t a, int32_t b) {
    return a > b ? a : b;
}

/* Checks one traced layer against the definition, and notes what is left. */
static void on_trace(void * user, const ra_trace_event * event) {
    world *           w       = user;
    const ra_config * cfg     = &w->pool.cache->settings.cfg;
    const int32_t     il      = event->il;
    const int32_t     n_heads = event->n_head_kv;
    const int32_t *   n_kv    = event->n_kv;
    const int32_t *   pos     = event->pos;
    const float *     score   = event->score;
    const uint8_t *   keep    = event->keep;
    const int32_t *   budgets = event->budgets;
    CHECK_EQ(event->i_compression, w->pool.cache->n_compressions);
    CHECK_EQ(event->n_pos, w->n_pos);
    CHECK(event->target == NULL && event->share == NULL && event->bias == NULL);
    CHECK_EQ(n_heads, n_head_kv[il]);
    w->is_traced[il] = true;
    ++w->n_traced;
    for (int32_t ih = 0; ih < n_heads; ++ih) {
        const list *  held = &w->held[il][ih];
        list *        next = &w->next[il][ih];
        const int32_t n    = held->n;
        CHECK_EQ(n_kv[ih], n);
        CHECK_ARRAY(pos, held->pos, n);
        next->n            = 0;
        w->budgets[il][ih] = budgets[ih];
        int32_t n_guarded  = 0;
        int32_t n_dead     = 0;
        for (; n_swa[il] > 0 && n_dead < n && pos[n_dead] <= w->n_pos - n_swa[il]; ++n_dead) {
            CHECK(score[n_dead] == -INFINITY && !keep[n_dead]);
        }
        const bool    holds_all = w->holds_window && n_swa[il] > 0;
        const int32_t n_first   = n_swa[il] > 0 ? cfg->n_sink : int_max(cfg->n_sink, w->n_protect);
        for (int32_t i = n_dead; i < n; ++i) {
            const bool must = holds_all || pos[i] < n_first || i >= n - cfg->n_window;
            CHECK(must ? score[i] == INFINITY : !isnan(score[i]) && score[i] != -INFINITY);
            n_guarded += !must && score[i] == INFINITY;
            int32_t rank = 0;
            for (int32_t j = n_dead; j < n; ++j) {
                rank += score[j] > score[i] || (score[j] == score[i] && j > i);
            }
            CHECK_EQ(keep[i], rank < budgets[ih]);
            CHECK(keep[i] || !must);
            if (rank < budgets[ih]) {
                next->pos[next->n++] = pos[i];
            }
        }
        CHECK(n_guarded <= (cfg->value_guard > 0.0f ? cfg->n_guard : 0));
        pos += n;
        score += n;
        keep += n;
    }
}

static bool holds(const list * l, int32_t pos) {
    for (int32_t i = 0; i < l->n; ++i) {
        if (l->pos[i] == pos) {
            return true;
        }
    }
    return false;
}

static int32_t naive_contiguous_from(const world * w) {
    for (int32_t pos = w->n_pos - 1; pos >= 0; --pos) {
        for (int32_t il = 0; il < N_LAYER; ++il) {
            for (int32_t ih = 0; ih < n_head_kv[il]; ++ih) {
                if (!holds(&w->held[il][ih], pos)) {
                    return pos + 1;
                }
            }
        }
    }
    return w->n_pos > 0 ? 0 : -1;
}

static bool wants_all(const world * w) {
    return (w->pool.cache->settings.policy->needs & RA_FEATURE_ALL_QUERIES) != 0;
}

/* queries that are remembered */
static int32_t ring_size(const world * w) {
    const ra_config * cfg = &w->pool.cache->settings.cfg;
    return wants_all(w) ? int_max(cfg->buffer, cfg->n_window) : cfg->n_window;
}

static void check_queries(const world * w) {
    ra_cache * c = w->pool.cache;
    for (int32_t il = 0; il < N_LAYER; ++il) {
        const int32_t n_obs = ra_cache_list_queries(c, il);
        const int32_t since = wants_all(w) ? w->n_pos_scored[il] : 0;
        int32_t       n     = 0;
        for (int32_t pos = int_max(since, w->n_pos - ring_size(w)); pos < w->n_pos; ++pos) {
            if (w->has_query[pos]) {
                CHECK(n < n_obs && c->obs_pos[n] == pos);
                ++n;
            }
        }
        CHECK_EQ(n_obs, n);
    }
}

static void check_world(const world * w) {
    ra_cache * c    = w->pool.cache;
    int32_t    room = INT32_MAX;
    ra_pool_check(&w->pool);
    for (int32_t il = 0; il < N_LAYER; ++il) {
        const ra_layer * l = &c->layers[il];
        CHECK_EQ(l->n_slots, w->n_slots[il]);
        for (int32_t ih = 0; ih < n_head_kv[il]; ++ih) {
            if (CHECK_EQ(l->used[ih], w->held[il][ih].n)) {
                CHECK_ARRAY(l->pos + l->offset[ih], w->held[il][ih].pos, l->used[ih]);
            }
            const int32_t left = l->budget[ih] + c->settings.cfg.buffer - l->used[ih];
            room               = left < room ? left : room;
            CHECK(l->used[ih] <= c->peak_tokens);
        }
    }
    CHECK_EQ(c->n_pos, w->n_pos);
    CHECK_EQ(ra_cache_room(c), room);
    check_queries(w);
    CHECK_EQ(ra_cache_contiguous_from(c), naive_contiguous_from(w));
    CHECK_EQ(c->n_evicted, w->n_evicted);
    CHECK_EQ(c->min_evicted, w->min_evicted);
}

static void do_append(world * w, int32_t n) {
    const int32_t n_ring = ring_size(w);
    ra_pool_append(&w->pool, n);
    w->last_append = w->n_pos;
    for (int32_t pos = w->n_pos; pos < w->n_pos + n; ++pos) {
        w->has_query[pos] = true;
        if (pos >= n_ring) {
            w->has_query[pos - n_ring] = false; /* they share a slot */
        }
        for (int32_t il = 0; il < N_LAYER; ++il) {
            for (int32_t ih = 0; ih < n_head_kv[il]; ++ih) {
                list * held          = &w->held[il][ih];
                held->pos[held->n++] = pos;
            }
        }
    }
    w->n_pos += n;
}

static void do_truncate(world * w, int32_t pos) {
    ra_cache_truncate(w->pool.cache, pos);
    if (pos <= w->min_evicted) { // all that was evicted was in the tail
        w->min_evicted = INT32_MAX;
        w->n_evicted   = 0;
    }
    for (int32_t il = 0; il < N_LAYER; ++il) {
        for (int32_t ih = 0; ih < n_head_kv[il]; ++ih) {
            list * held = &w->held[il][ih];
            while (held->n > 0 && held->pos[held->n - 1] >= pos) {
                --held->n;
            }
        }
    }
    for (int32_t dropped = pos; dropped < w->n_pos; ++dropped) {
        w->has_query[dropped] = false;
    }
    w->n_pos = pos < w->n_pos ? pos : w->n_pos;
    for (int32_t il = 0; il < N_LAYER; ++il) {
        w->n_pos_scored[il] = w->n_pos < w->n_pos_scored[il] ? w->n_pos : w->n_pos_scored[il];
    }
    w->last_append = -1;
}

static void forget_all(world * w) {
    memset(w->held, 0, sizeof(w->held));
    memset(w->has_query, 0, sizeof(w->has_query));
    memset(w->n_pos_scored, 0, sizeof(w->n_pos_scored));
    w->n_pos       = 0;
    w->last_append = -1;
    w->min_evicted = INT32_MAX;
    w->n_evicted   = 0;
}

/* What a layer's packing means for the model. */
static void take_over(world * w, int32_t il) {
    for (int32_t ih = 0; ih < n_head_kv[il]; ++ih) {
        list * held = &w->held[il][ih];
        for (int32_t i = 0; i < held->n; ++i) {
            if (!holds(&w->next[il][ih], held->pos[i])) {
                ++w->n_evicted;
                w->min_evicted = held->pos[i] < w->min_evicted ? held->pos[i] : w->min_evicted;
            }
        }
        *held = w->next[il][ih];
        CHECK_EQ(w->pool.cache->layers[il].budget[ih], w->budgets[il][ih]);
    }
}

static void check_within_budget(const world * w) {
    for (int32_t il = 0; il < N_LAYER; ++il) {
        const ra_layer * l = &w->pool.cache->layers[il];
        for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
            CHECK(l->used[ih] <= l->budget[ih]);
        }
    }
    CHECK(ra_cache_room(w->pool.cache) >= w->pool.cache->settings.cfg.buffer);
}

/* One compression; now and then a callback fails. */
static void do_compress(world * w) {
    ra_pool *          p           = &w->pool;
    const ra_cache_ops ops         = ra_pool_ops(p);
    int32_t            n_layers    = -1;
    int32_t            n_committed = 0;
    const int32_t      fate        = ra_test_int(0, 8);
    p->n_features = p->n_begins = 0;
    p->fail_features            = fate == 0 ? ra_test_int(1, 11) : 0;
    p->fail_begin               = fate == 1 ? ra_test_int(1, 4) : 0;
    memset(w->is_traced, 0, sizeof(w->is_traced));
    w->n_traced                 = 0;
    const ra_status st          = ra_cache_compress(p->cache, &ops, &n_layers);
    const bool      is_features = p->fail_features > 0 && p->n_features >= p->fail_features;
    const bool      is_begin    = p->fail_begin > 0 && p->n_begins >= p->fail_begin;
    CHECK_STATUS(st, is_features || is_begin ? RA_STATUS_COMPUTE : RA_STATUS_OK);
    const int32_t n_expected = is_features ? 0 : is_begin ? p->fail_begin - 1 : w->n_traced;
    for (int32_t il = 0; il < N_LAYER; ++il) {
        if (w->is_traced[il] && n_committed < n_expected) {
            ++n_committed;
            take_over(w, il);
            w->last_append      = -1;
            w->n_pos_scored[il] = w->n_pos;
        }
    }
    if (st == RA_STATUS_OK) {
        CHECK_EQ(n_layers, w->n_traced);
        check_within_budget(w);
    }
}

/* random budgets, each >= floor, sum <= total: spread out, or nearly all for one head */
static void random_split(int32_t n, int32_t floor, int32_t total, int32_t * budgets) {
    int32_t       left = total - n * floor;
    const int32_t rich = ra_test_int(0, n);
    for (int32_t ih = 0; ih < n; ++ih) {
        const int32_t extra = ra_test_int(0, left / n + 1);
        budgets[ih]         = floor + extra;
        left -= extra;
    }
    budgets[rich] += ra_test_int(0, 3) > 0 ? left : 0;
}

static void do_set_head_budgets(world * w) {
    ra_cache *       c     = w->pool.cache;
    const int32_t    il    = ra_test_int(0, 3) == 0 ? 2 : ra_test_int(0, 2) == 0 ? 0 : 3;
    const ra_layer * l     = &c->layers[il];
    const int32_t    n     = l->n_head_kv;
    const int32_t    total = l->n_slots - n * c->settings.cfg.buffer;
    const int32_t    floor = ra_config_floor(&c->settings.cfg, n_swa[il] > 0 ? 0 : w->n_protect);
    int32_t          budgets[MAX_HEADS];
    random_split(n, floor, total, budgets);
    const int32_t flaw = ra_test_int(0, 6);
    int32_t       sum  = 0;
    budgets[0] += flaw == 0 ? total : 0;
    budgets[n - 1] = flaw == 1 ? floor - 1 : budgets[n - 1];
    for (int32_t ih = 0; ih < n; ++ih) {
        sum += budgets[ih];
    }
    bool holds_all = true;
    for (int32_t ih = 0; ih < n; ++ih) {
        holds_all = holds_all && budgets[ih] >= n_swa[il];
    }
    const bool ok = flaw > 1 && sum <= total;
    CHECK_STATUS(ra_cache_set_head_budgets(c, il, budgets, (size_t) n),
                 ok ? RA_STATUS_OK : RA_STATUS_BUDGET);
    w->holds_window = ok && n_swa[il] > 0 ? holds_all : w->holds_window;
    if (ok && w->n_pos == 0) {
        forget_all(w);
    }
}

static void do_set_protect(world * w) {
    ra_cache *    c         = w->pool.cache;
    const int32_t n_protect = ra_test_int(0, 2) == 0 ? 0 : ra_test_int(0, 16);
    const int32_t floor     = ra_config_floor(&c->settings.cfg, n_protect);
    bool          fits      = true;
    for (int32_t il = 0; il < N_LAYER; ++il) {
        for (int32_t ih = 0; ih < n_head_kv[il]; ++ih) {
            fits = fits && (n_swa[il] > 0 || c->layers[il].initial[ih] >= floor);
        }
    }
    CHECK_STATUS(ra_cache_set_protect(c, n_protect), fits ? RA_STATUS_OK : RA_STATUS_BUDGET);
    w->n_protect = fits ? n_protect : w->n_protect;
}

/* an allocator that splits anew at every compression, as adaptive ones will */
static ra_status alloc_random(const ra_config * cfg, const ra_alloc_heads_in * in,
                              int32_t * budgets) {
    (void) cfg;
    int32_t total = 0;
    for (int32_t ih = 0; ih < in->n_head_kv; ++ih) {
        total += in->initial[ih];
    }
    random_split(in->n_head_kv, in->base + 1, total, budgets);
    return RA_STATUS_OK;
}

static const ra_alloc_heads random_allocator = { "random", alloc_random, true };

static bool world_make(world * w, const char * policy) {
    int32_t       heads[10];
    const int32_t n_window = ra_test_int(1, 6);
    ra_config     cfg      = ra_pool_config(policy, 40);
    cfg.n_window           = n_window;
    cfg.n_sink             = ra_test_int(0, 4);
    cfg.buffer             = ra_test_int(1, 12);
    cfg.value_guard        = ra_test_int(0, 3) == 0 ? 1.0f : 0.0f;
    cfg.n_guard            = ra_test_int(0, 4);
    cfg.head_budgets       = heads;
    cfg.n_head_budgets     = 10;
    for (int32_t i = 0; i < 10; ++i) {
        heads[i] = ra_config_floor(&cfg, 0) + ra_test_int(0, 24);
    }
    memset(w, 0, sizeof(*w));
    n_swa[3] = ra_test_int(0, 2) * ra_test_int(1, 60);
    if (n_swa[3] > 0) {
        cfg.n_head_budgets = 5;
        cfg.budget_swa     = ra_config_floor(&cfg, 0) + ra_test_int(0, 24);
    }
    if (!ra_pool_make_windows(&w->pool, &cfg, N_LAYER, n_head_kv, n_swa)) {
        return false;
    }
    w->holds_window = n_swa[3] > 0 && w->pool.cache->layers[3].initial[0] >= n_swa[3];
    forget_all(w);
    w->pool.cache->trace      = on_trace;
    w->pool.cache->trace_user = w;
    for (int32_t il = 0; il < N_LAYER; ++il) {
        w->n_slots[il] = w->pool.cache->layers[il].n_slots;
    }
    return true;
}

static void run_world(world * w) {
    for (int32_t op = 0; op < N_OPERATIONS; ++op) {
        const int32_t kind = ra_test_int(0, 100);
        if (kind < 70) {
            const int32_t wanted = ra_test_int(1, w->pool.cache->settings.cfg.buffer + 1);
            if (ra_cache_room(w->pool.cache) < wanted) {
                do_compress(w);
            }
            if (ra_cache_room(w->pool.cache) >= wanted && w->n_pos + wanted <= MAX_POS) {
                do_append(w, wanted);
            }
        } else if (kind < 78) {
            do_compress(w);
        } else if (kind < 86) {
            do_set_head_budgets(w);
        } else if (kind < 90) {
            do_set_protect(w);
        } else if (kind < 94 && w->last_append > 0) {
            do_truncate(w, w->last_append);
        } else if (kind < 97 && w->n_pos > 1) {
            /* only what the engine allows: back to where nothing older was evicted */
            const int32_t pos = ra_test_int(1, w->n_pos + 3);
            if (pos <= w->min_evicted) {
                do_truncate(w, pos);
            }
        } else if (kind == 99 && ra_test_int(0, 4) == 0) {
            ra_cache_clear(w->pool.cache);
            forget_all(w);
        }
        check_world(w);
    }
}

int main(void) {
    static world w;
    for (int32_t seed = 0; seed < 3 * ra_policy_count(); ++seed) {
        const int64_t n_failed = ra_test_n_failed;
        ra_test_seed((uint64_t) seed);
        if (!world_make(&w, ra_policy_name(seed % ra_policy_count()))) {
            break;
        }
        const ra_alloc_heads * allocs[3]  = { ra_alloc_heads_find("uniform"), &random_allocator,
                                              ra_alloc_heads_find("adaptive") };
        w.pool.cache->settings.head_alloc = allocs[seed / ra_policy_count() % 3];
        run_world(&w);
        ra_pool_free(&w.pool);
        if (ra_test_n_failed > n_failed) {
            fprintf(stderr, "seed %d\n", seed);
            break;
        }
    }
    return ra_test_result();
}
