/* core/merge.c and engine/merge.c: evicted tokens merged into kept ones, over many compressions */
#include "ra_pool.h"

#include <math.h>

static const int32_t three_heads[1] = { 3 };

static void test_find_target(void) {
    const float   cos[5]    = { 0.9f, -0.5f, 0.2f, 0.9f, 1.0f };
    const uint8_t all[5]    = { 1, 1, 1, 1, 1 };
    const uint8_t some[5]   = { 1, 1, 0, 1, 0 };
    const uint8_t worst[5]  = { 0, 1, 0, 0, 0 };
    const uint8_t nobody[5] = { 0 };
    CHECK_EQ(ra_merge_find_target(5, all, cos), 4);
    CHECK_EQ(ra_merge_find_target(5, some, cos), 0); /* the older of equals */
    CHECK_EQ(ra_merge_find_target(5, worst, cos), 1);
    CHECK_EQ(ra_merge_find_target(5, nobody, cos), -1);
}

/* what comparing each pair once finds is what the whole matrix says, with ties and values equal to 1 */
static void test_compare_once(void) {
    enum { MOST = 40 };
    for (int32_t round = 0; round < 400; ++round) {
        const int32_t n     = ra_test_int(1, MOST + 1);
        const int32_t first = ra_test_int(0, n + 1);
        float         cos[MOST * MOST]; /* [n, n] */
        float         mass[MOST];
        float         twin[MOST];
        float         closest[MOST];
        uint8_t       can_take[MOST];
        int32_t       target[MOST];
        for (int32_t j = 0; j < n; ++j) {
            const bool goes = ra_test_int(0, 3) == 0;
            mass[j]         = (float) ra_test_int(0, 9);
            can_take[j]     = !goes && ra_test_int(0, 3) > 0;
            closest[j]      = goes ? -INFINITY : INFINITY;
            target[j]       = -1;
            for (int32_t i = 0; i <= j; ++i) {
                cos[j * n + i] = cos[i * n + j] = (float) ra_test_int(-10, 12) / 10.0f;
            }
        }
        float *       row   = malloc((size_t) n * sizeof(float)); /* no cosine is read beyond j's */
        const float * whole = cos;
        for (int32_t j = 0; j < n; ++j) {
            memcpy(row + n - j, cos + j * n, (size_t) j * sizeof(float));
            ra_twin_compare(j, first, mass, row + n - j, twin);
            ra_merge_compare(j, can_take, row + n - j, closest, target);
        }
        free(row);
        for (int32_t j = 0; j < n; ++j, whole += n) {
            float most = -1.0f;
            for (int32_t i = first; i < n; ++i) {
                most = mass[i] > mass[j] ? fmaxf(most, whole[i]) : most;
            }
            CHECK_NEAR(twin[j], fminf(most, 1.0f), 0.0);
            CHECK_EQ(target[j],
                     closest[j] == INFINITY ? -1 : ra_merge_find_target(n, can_take, whole));
        }
    }
}

/* tokens 1 and 3 go into 0, 4 into 2, 5 goes without a trace */
static void test_shares_by_hand(void) {
    const int32_t target[6] = { -1, 0, -1, 0, 2, -1 };
    const float   mass[6]   = { 0.5f, 0.3f, 0.0f, 0.2f, 0.1f, 0.7f };
    const float   bias[6]   = { 1.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.25f };
    float         share[6];
    float         bias_out[6];
    float         rows[12] = { 1, 10, 2, 20, 3, 30, 4, 40, 5, 50, 6, 60 };
    ra_merge_shares(6, target, mass, 8.0f, bias, share, bias_out);
    CHECK_NEAR(share[0], 0.5, 1e-6);
    CHECK_NEAR(share[1], 0.3, 1e-6);
    CHECK_NEAR(share[3], 0.2, 1e-6);
    CHECK_NEAR(bias_out[0], 1.0 + log(2.0), 1e-6);
    CHECK_NEAR(share[2], 0.0, 0.0); /* it had no attention of its own */
    CHECK_NEAR(share[4], 1.0, 0.0);
    CHECK_NEAR(bias_out[2], 8.0, 0.0);
    CHECK_NEAR(share[5], 1.0, 0.0);
    CHECK_NEAR(bias_out[5], 0.25, 0.0);
    ra_merge_rows(6, 2, target, share, rows);
    CHECK_NEAR(rows[0], 0.5 * 1 + 0.3 * 2 + 0.2 * 4, 1e-6);
    CHECK_NEAR(rows[1], 0.5 * 10 + 0.3 * 20 + 0.2 * 40, 1e-5);
    CHECK_NEAR(rows[4], 5.0, 0.0);
    CHECK_NEAR(rows[10], 6.0, 0.0);

    ra_merge_shares(6, target, mass, 1.5f, bias, share, bias_out); /* the largest bias */
    CHECK_NEAR(bias_out[0], 1.5, 0.0);
    const float nothing[6] = { 0 };
    ra_merge_shares(6, target, nothing, 8.0f, bias, share, bias_out); /* nobody was attended to */
    CHECK_NEAR(share[0], 1.0, 0.0);
    CHECK_NEAR(share[1], 0.0, 0.0);
    CHECK_NEAR(bias_out[0], 1.0, 0.0);
}

/* a pool whose rows hold one value each, next to their tags */
typedef struct merge_pool {
    ra_pool p;
    float   values[256];
    float   biases[4096]; /* [n_pos, 3] what each token of each head should have */
    float   wanted[4096]; /* likewise its value */
    bool    moved;        /* since move_begin */
} merge_pool;

static float mass_of(int32_t ih, int32_t pos) {
    return pos % 7 == 3 ? 0.0f : (float) ((pos * 29 + ih * 11) % 13) / 13.0f;
}

static float cosine_of(int32_t a, int32_t b) {
    return (float) (((a * 31) ^ (b * 17)) % 97) / 97.0f;
}

static void score_by_position(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j] = (float) ((f->pos[j] * 37 + f->ih) % 101);
        CHECK_NEAR(f->mass[j], mass_of(f->ih, f->pos[j]), 0.0);
    }
}

static void observe_mass(const ra_config * cfg, const ra_features * f) {
    (void) cfg;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        f->mass[j] = mass_of(f->ih, f->pos[j]);
    }
}

static ra_status find_targets(void * user, int32_t il) {
    merge_pool * mp = user;
    ra_layer *   l  = &mp->p.cache->layers[il];
    float        cos[256];
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        const int32_t at = l->offset[ih];
        for (int32_t j = 0; j < l->used[ih]; ++j) {
            CHECK_EQ(l->merge->target[at + j], -1);
            for (int32_t i = 0; i < l->used[ih]; ++i) {
                cos[i] = cosine_of(l->pos[at + j], l->pos[at + i]);
            }
            if (!l->keep[at + j]) {
                l->merge->target[at + j] =
                    ra_merge_find_target(l->used[ih], l->merge->can_take + at, cos);
            }
        }
    }
    return RA_STATUS_OK;
}

/* what should come of it, from the definition: values and biases by position */
static void expect(merge_pool * mp, int32_t il) {
    const ra_cache * c = mp->p.cache;
    const ra_layer * l = &c->layers[il];
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        const int32_t at = l->offset[ih];
        for (int32_t i = 0; i < l->used[ih]; ++i) {
            double       sum   = 0.0;
            const double own   = (double) mass_of(ih, l->pos[at + i]);
            double       value = own * (double) mp->values[at + i];
            for (int32_t j = 0; j < l->used[ih]; ++j) {
                if (l->merge->target[at + j] == i) {
                    CHECK(l->keep[at + i] && !l->keep[at + j]);
                    CHECK(l->pos[at + i] >=
                          c->settings.cfg.n_sink); /* sinks and window take none */
                    CHECK(i < l->used[ih] - c->settings.cfg.n_window);
                    const double mass = (double) mass_of(ih, l->pos[at + j]);
                    sum += mass;
                    value += mass * (double) mp->values[at + j];
                }
            }
            float * bias = &mp->biases[l->pos[at + i] * 3 + ih];
            mp->wanted[l->pos[at + i] * 3 + ih] =
                sum > 0.0 ? (float) (value / (own + sum)) : mp->values[at + i];
            if (sum > 0.0) {
                const double grown = own > 0.0 ? (double) *bias + log((own + sum) / own) : 8.0;
                *bias              = (float) fmin(grown, 8.0);
            }
        }
    }
}

static void merge_rows(void * user, int32_t il) {
    merge_pool * mp = user;
    ra_layer *   l  = &mp->p.cache->layers[il];
    CHECK_EQ(mp->p.open_layer, il);
    CHECK(!mp->moved);
    expect(mp, il);
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        const int32_t at = l->offset[ih];
        ra_merge_rows(l->used[ih], 1, l->merge->target + at, l->merge->share + at, mp->values + at);
    }
}

static void move(void * user, int32_t il, int32_t dst, int32_t src, int32_t n) {
    merge_pool * mp = user;
    mp->moved       = true;
    memmove(mp->values + dst, mp->values + src, (size_t) n * sizeof(float));
    ra_pool_move(user, il, dst, src, n);
}

static ra_status move_begin(void * user, int32_t il) {
    ((merge_pool *) user)->moved = false;
    return ra_pool_move_begin(user, il);
}

static void check_merged(const merge_pool * mp) {
    const ra_layer * l        = &mp->p.cache->layers[0];
    bool             has_bias = false;
    for (int32_t ih = 0; ih < l->n_head_kv; ++ih) {
        for (int32_t row = l->offset[ih]; row < l->offset[ih] + l->used[ih]; ++row) {
            const int32_t at = l->pos[row] * 3 + ih;
            CHECK_NEAR(l->merge->bias[row], mp->biases[at], 1e-5);
            CHECK_NEAR(mp->values[row], mp->wanted[at], 1e-4);
            has_bias = has_bias || l->merge->bias[row] != 0.0f;
        }
    }
    CHECK_EQ(l->merge->has_bias, has_bias);
}

static void test_values_and_biases_follow(void) {
    const ra_policy policy       = { .name    = "mass of its own",
                                     .summary = "",
                                     .score   = score_by_position,
                                     .n_state = 1,
                                     .observe = observe_mass };
    const int32_t   tables[4][3] = { { 16, 10, 10 }, { 10, 10, 16 }, { 8, 20, 8 }, { 12, 12, 12 } };
    ra_config       cfg          = ra_pool_config("random", 12);
    merge_pool      mp           = { 0 };
    cfg.merge                    = 1;
    if (!ra_pool_make(&mp.p, &cfg, 1, three_heads)) {
        return;
    }
    ra_cache *   c   = mp.p.cache;
    ra_cache_ops ops = ra_pool_ops(&mp.p);
    ops.find_targets = find_targets;
    ops.merge_rows   = merge_rows;
    ops.move         = move;
    ops.move_begin   = move_begin;
    CHECK((ra_cache_needs(c) & RA_FEATURE_ATTN_MASS) != 0);
    c->settings.policy = &policy;
    CHECK(!c->layers[0].merge->has_bias);
    for (int32_t round = 0; round < 60; ++round) {
        const int32_t n    = ra_cache_room(c);
        const int32_t pos0 = c->n_pos;
        ra_pool_append(&mp.p, n);
        for (int32_t ih = 0; ih < 3; ++ih) {
            const ra_layer * l = &c->layers[0];
            for (int32_t row = l->offset[ih] + l->used[ih] - n; row < l->offset[ih] + l->used[ih];
                 ++row) {
                mp.values[row] = mp.wanted[l->pos[row] * 3 + ih] = 10.0f * ra_test_float();
            }
        }
        CHECK(pos0 + n < 4096 / 3);
        if (round % 6 == 5) {
            mp.p.fail_begin = mp.p.n_begins + 1;
            CHECK_STATUS(ra_cache_compress(c, &ops, NULL), RA_STATUS_COMPUTE);
            check_merged(&mp);
        }
        CHECK_STATUS(ra_cache_set_head_budgets(c, 0, tables[round % 4], 3), RA_STATUS_OK);
        CHECK_STATUS(ra_cache_compress(c, &ops, NULL), RA_STATUS_OK);
        ra_pool_check(&mp.p);
        check_merged(&mp);
    }
    CHECK(c->layers[0].merge->has_bias);
    ra_cache_clear(c);
    CHECK(!c->layers[0].merge->has_bias);
    ra_pool_append(&mp.p, 3);
    CHECK_NEAR(c->layers[0].merge->bias[0], 0.0, 0.0);
    ra_pool_free(&mp.p);
}

/* ra_merge_head() on keys: the most similar of those that may take it */
static void test_merge_head(void) {
    const float          k[8]        = { 1, 0, 0, 1, 2, 0.1f, -1, 0 };
    const float          v[4]        = { 1, 2, 3, 4 };
    const int32_t        pos[4]      = { 0, 3, 5, 6 };
    const uint8_t        keep[4]     = { 1, 1, 0, 0 };
    const uint8_t        can_take[4] = { 1, 1, 0, 0 };
    const float          mass[4]     = { 0.25f, 0.25f, 0.75f, 0.25f };
    const ra_config      cfg         = ra_config_default_params();
    const ra_head_arrays head        = { .size       = sizeof(head),
                                         .n_kv       = 4,
                                         .n_group    = 1,
                                         .head_dim_k = 2,
                                         .head_dim_v = 1,
                                         .k          = k,
                                         .v          = v,
                                         .pos        = pos };
    int32_t              target[4];
    float                bias[4];
    float                out[4];
    CHECK_STATUS(ra_merge_head(&cfg, &head, keep, can_take, mass, target, bias, out), RA_STATUS_OK);
    CHECK_ARRAY(target, ((int32_t[4]){ -1, -1, 0, 1 }), 4);
    CHECK_NEAR(out[0], 2.5, 1e-6);
    CHECK_NEAR(out[1], 3.0, 1e-6);
    CHECK_NEAR(bias[0], log(4.0), 1e-6);
    CHECK_NEAR(bias[1], log(2.0), 1e-6);
    CHECK_STATUS(ra_merge_head(&cfg, &head, keep, can_take, NULL, target, bias, out),
                 RA_STATUS_INVALID);
    ra_calloc_fail_at(1);
    CHECK_STATUS(ra_merge_head(&cfg, &head, keep, can_take, mass, target, bias, out),
                 RA_STATUS_NO_MEMORY);
}

int main(void) {
    test_find_target();
    test_compare_once();
    test_shares_by_hand();
    test_values_and_biases_follow();
    test_merge_head();
    return ra_test_result();
}
