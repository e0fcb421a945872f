/* policy/, the registry, and engine/score.c: every registered policy on hand-made and odd features.
 * The exact values of all policies are tested against NumPy in tests/python. */
#include "cache.h"
#include "ra_test.h"

#include <stdlib.h>

#define ALL_FEATURES                                                                             \
    ((uint32_t) (RA_FEATURE_ATTN_LOGITS | RA_FEATURE_KEY_SIM | RA_FEATURE_KEY_COS |              \
                 RA_FEATURE_ALL_QUERIES | RA_FEATURE_VALUE_NORM | RA_FEATURE_VALUE_DIST |        \
                 RA_FEATURE_TWIN | RA_FEATURE_KEYS | RA_FEATURE_CENTRES | RA_FEATURE_ATTN_MASS | \
                 RA_FEATURE_SAMPLED))

/* exact-size heap arrays, so that the address sanitizer sees a read or write beyond them */
typedef struct features_heap {
    ra_features f;
    int32_t *   pos;
    int32_t *   obs_pos;
    float *     logits;
    float *     sim; /* all features of one number per token */
    float *     state;
    float *     state_out;
    float *     score;
    float *     mass;
    float *     keys;
    float *     freq;
    float *     centres;
    ra_rope     rope;
} features_heap;

/* keys of up to 12 values with a rotation of any kind, and query centres */
static void features_add_keys(features_heap * h, int32_t n_kv, int32_t n_group) {
    const int32_t dim       = ra_test_int(1, 13);
    const int32_t n_rot     = 2 * ra_test_int(0, dim / 2 + 1);
    const int32_t n_keys    = n_kv * dim;
    const int32_t n_centres = n_group * ra_centre_values(dim);
    h->keys                 = malloc((size_t) n_keys * sizeof(float));
    h->freq                 = malloc((size_t) (n_rot / 2) * sizeof(float));
    h->centres              = malloc((size_t) n_centres * sizeof(float));
    for (int32_t i = 0; i < n_keys; ++i) {
        h->keys[i] = ra_test_float();
    }
    for (int32_t i = 0; i < n_rot / 2; ++i) {
        h->freq[i] = fabsf(ra_test_float());
    }
    for (int32_t i = 0; i < n_centres; ++i) {
        h->centres[i] = ra_test_float();
    }
    h->rope       = (ra_rope){ .n_rot   = n_rot,
                               .offset  = ra_test_int(0, dim - n_rot + 1),
                               .is_neox = ra_test_int(0, 2),
                               .freq    = h->freq };
    h->f.keys     = h->keys;
    h->f.head_dim = dim;
    h->f.centres  = h->centres;
}

static features_heap features_make(uint32_t needs, int32_t n_state, int32_t n_kv, int32_t n_window,
                                   int32_t n_obs, int32_t n_group) {
    const size_t  n_logits = (size_t) n_obs * (size_t) n_group * (size_t) n_kv;
    features_heap h        = {
               .pos       = malloc((size_t) n_kv * sizeof(int32_t)),
               .obs_pos   = malloc((size_t) n_obs * sizeof(int32_t)),
               .logits    = malloc(n_logits * sizeof(float)),
               .sim       = malloc((size_t) n_kv * sizeof(float)),
               .state     = malloc((size_t) (n_kv * n_state) * sizeof(float)),
               .state_out = malloc((size_t) (n_kv * n_state) * sizeof(float)),
               .score     = malloc((size_t) n_kv * sizeof(float)),
               .mass      = malloc((size_t) n_kv * sizeof(float)),
    };
    int32_t pos = ra_test_int(0, 3);
    for (int32_t j = 0; j < n_kv; ++j) {
        h.pos[j]          = pos;
        h.sim[j]          = ra_test_float();
        h.score[j]        = NAN;
        h.mass[j]         = NAN;
        const bool is_new = ra_test_int(0, 3) == 0;
        for (int32_t s = n_state * j; s < n_state * (j + 1); ++s) {
            h.state[s] = h.state_out[s] = is_new ? NAN : ra_test_float();
        }
        pos += ra_test_int(1, 4);
    }
    for (size_t i = 0; i < n_logits; ++i) {
        h.logits[i] = 10.0f * ra_test_float();
    }
    /* queries of the newest tokens, evicted ones among them */
    for (int32_t o = n_obs - 1; o >= 0; --o) {
        h.obs_pos[o] = --pos;
    }
    h.f = (ra_features){
        .il          = ra_test_int(0, 40),
        .ih          = ra_test_int(0, 8),
        .n_kv        = n_kv,
        .n_window    = n_window,
        .n_obs       = n_obs,
        .n_group     = n_group,
        .pos         = h.pos,
        .obs_pos     = h.obs_pos,
        .state       = h.state,
        .state_out   = h.state_out,
        .attn_logits = needs & RA_FEATURE_ATTN_LOGITS ? h.logits : NULL,
        .attn_mass   = needs & RA_FEATURE_ATTN_MASS ? h.sim : NULL,
        .key_sim     = needs & RA_FEATURE_KEY_SIM ? h.sim : NULL,
        .key_cos     = needs & RA_FEATURE_KEY_COS ? h.sim : NULL,
        .value_norm  = needs & RA_FEATURE_VALUE_NORM ? h.sim : NULL,
        .value_dist  = needs & RA_FEATURE_VALUE_DIST ? h.sim : NULL,
        .twin        = needs & RA_FEATURE_TWIN ? h.sim : NULL,
        .mass        = h.mass,
        .work        = malloc(3 * (size_t) n_kv * sizeof(float)),
    };
    if (needs & RA_FEATURE_KEYS) {
        features_add_keys(&h, n_kv, n_group);
    }
    return h;
}

static void features_free(features_heap * h) {
    free(h->pos);
    free(h->logits);
    free(h->obs_pos);
    free(h->sim);
    free(h->state);
    free(h->state_out);
    free(h->score);
    free(h->mass);
    free(h->keys);
    free(h->freq);
    free(h->centres);
    free(h->f.work);
}

static void test_registry_walk(void) {
    const int32_t n = ra_policy_count();
    CHECK(n >= 1);
    for (int32_t i = 0; i < n; ++i) {
        const ra_policy * p = ra_policy_find(ra_policy_name(i));
        CHECK(p != NULL && p->score != NULL);
        CHECK_STR(p->name, ra_policy_name(i));
        CHECK_STR(p->summary, ra_policy_summary(i));
        CHECK(p->name[0] != '\0' && p->summary[0] != '\0' && strchr(p->summary, '\n') == NULL);
        CHECK((p->needs & ~ALL_FEATURES) == 0);
        CHECK(p->n_state >= 1 && p->n_state <= RA_MAX_STATE);
        CHECK_EQ(ra_policy_n_state(i), p->n_state);
        for (int32_t j = 0; j < i; ++j) {
            CHECK(strcmp(ra_policy_name(i), ra_policy_name(j)) != 0);
        }
    }
    CHECK(ra_policy_name(-1) == NULL && ra_policy_name(n) == NULL);
    CHECK(ra_policy_summary(-1) == NULL && ra_policy_summary(n) == NULL);
    CHECK(ra_policy_find(NULL) == NULL && ra_policy_find("") == NULL);
    CHECK(ra_policy_find(ra_config_default_params().policy) != NULL);
}

static void test_allocator_walk(void) {
    for (int32_t kind = 0; kind < 2; ++kind) {
        CHECK(ra_alloc_count(kind) >= 1);
        for (int32_t i = 0; i < ra_alloc_count(kind); ++i) {
            const char * name = ra_alloc_name(kind, i);
            CHECK(kind == 0 ? ra_alloc_layers_find(name) != NULL
                            : ra_alloc_heads_find(name) != NULL);
        }
        CHECK(ra_alloc_name(kind, -1) == NULL);
        CHECK(ra_alloc_name(kind, ra_alloc_count(kind)) == NULL);
    }
    CHECK_EQ(ra_alloc_count(2), 0);
    CHECK_EQ(ra_alloc_count(-1), 0);
    CHECK(ra_alloc_name(2, 0) == NULL);
    CHECK(ra_alloc_layers_find(NULL) == NULL && ra_alloc_heads_find("nonsense") == NULL);
}

/* Finite scores for all tokens of any shape, the same twice, and no feature read that was not
 * asked for. */
static void test_every_policy_on_random_shapes(void) {
    for (int32_t i = 0; i < ra_policy_count(); ++i) {
        const ra_policy * p   = ra_policy_find(ra_policy_name(i));
        ra_config         cfg = ra_config_default_params();
        for (int32_t round = 0; round < 300; ++round) {
            cfg.pool_kernel         = 2 * ra_test_int(0, 128) + 1;
            cfg.lambda              = 0.5f + 0.5f * ra_test_float();
            cfg.seed                = (uint64_t) round;
            const int32_t n_kv      = round < 20 ? 1 + round / 4 : ra_test_int(1, 90);
            const int32_t n_window  = round % 5 == 0 ? n_kv : ra_test_int(1, n_kv + 1);
            const bool    is_all    = (p->needs & RA_FEATURE_ALL_QUERIES) != 0;
            const int32_t n_obs_max = is_all ? 2 * n_window + 5 : n_window;
            const int32_t n_obs     = round % 7 == 0 ? 0 : ra_test_int(0, n_obs_max + 1);
            features_heap h =
                features_make(p->needs, p->n_state, n_kv, n_window, n_obs, ra_test_int(1, 5));
            h.f.rope      = h.keys != NULL ? &h.rope : NULL;
            float * again = malloc((size_t) n_kv * sizeof(float));
            if (p->observe != NULL) {
                p->observe(&cfg, &h.f);
            }
            p->score(&cfg, &h.f, h.score);
            p->score(&cfg, &h.f, again);
            for (int32_t j = 0; j < n_kv; ++j) {
                CHECK(isfinite(h.score[j]));
            }
            CHECK_SAME(h.score, again, (size_t) n_kv * sizeof(float));
            for (int32_t j = 0; j < n_kv; ++j) {
                CHECK(p->observe != NULL || isnan(h.mass[j]));
            }
            free(again);
            features_free(&h);
        }
    }
}

/* Two queries, group of two, window of one: group maximum, softmax, mean, pooling of width 3. */
static void test_importance_by_hand(void) {
    const float log2              = logf(2.0f);
    const float logits[2 * 2 * 5] = {
        0.0f, log2, 0.0f, 0.0f, 99.0f, /* query 0, head 0 */
        log2, 0.0f, 0.0f, 0.0f, 99.0f, /* query 0, head 1: maxima 2 2 1 1 of 6 */
        0.0f, 0.0f, 0.0f, 0.0f, 99.0f, /* query 1, head 0 */
        0.0f, 0.0f, 0.0f, 0.0f, 99.0f, /* query 1, head 1: a quarter each */
    };
    const double mean[4] = { (1.0 / 3 + 0.25) / 2, (1.0 / 3 + 0.25) / 2, (1.0 / 6 + 0.25) / 2,
                             (1.0 / 6 + 0.25) / 2 };
    float        work[15];
    float        out[5] = { 0.0f, 0.0f, 0.0f, 0.0f, 77.0f };
    ra_config    cfg    = ra_config_default_params();
    ra_features  f      = {
              .n_kv = 5, .n_window = 1, .n_obs = 2, .n_group = 2, .attn_logits = logits, .work = work
    };
    cfg.pool_kernel = 1;
    ra_importance(&cfg, &f, out);
    for (int32_t j = 0; j < 4; ++j) {
        CHECK_NEAR(out[j], mean[j], 1e-7);
    }
    CHECK_NEAR(out[4], 77.0, 0.0);
    cfg.pool_kernel = 3;
    ra_importance(&cfg, &f, out);
    CHECK_NEAR(out[2], mean[1], 1e-7);
    CHECK_NEAR(out[3], mean[3], 1e-7);
    f.n_obs = 0;
    ra_importance(&cfg, &f, out);
    CHECK_NEAR(out[0], 0.0, 0.0);
}

/* Two queries of which the first sees two of three tokens, a group of two, a sink in one of them. */
static void test_attention_mass_by_hand(void) {
    const float log2              = logf(2.0f);
    const float logits[2 * 2 * 3] = {
        0.0f, log2, 99.0f, /* query 0, head 0: a third, two thirds */
        0.0f, 0.0f, 99.0f, /* query 0, head 1, with a sink of 2: a quarter each */
        0.0f, 0.0f, log2,  /* query 1, head 0: a quarter, a quarter, a half */
        0.0f, log2, log2,  /* query 1, head 1: a seventh, two sevenths each */
    };
    const float   sinks[2]   = { -INFINITY, log2 };
    const int32_t pos[3]     = { 0, 4, 7 };
    const int32_t obs_pos[2] = { 5, 7 };
    float         work[9];
    float         out[3];
    ra_features   f = { .n_kv        = 3,
                        .n_window    = 1,
                        .n_obs       = 2,
                        .n_group     = 2,
                        .pos         = pos,
                        .obs_pos     = obs_pos,
                        .attn_logits = logits,
                        .sinks       = sinks,
                        .work        = work };
    ra_attention_mass(&f, out);
    CHECK_NEAR(out[0], (1.0 / 3 + 1.0 / 4 + 1.0 / 4 + 1.0 / 7) / 4, 1e-7);
    CHECK_NEAR(out[1], (2.0 / 3 + 1.0 / 4 + 1.0 / 4 + 2.0 / 7) / 4, 1e-7);
    CHECK_NEAR(out[2], (1.0 / 2 + 2.0 / 7) / 2, 1e-7);
    ra_queries_seen(&f, out);
    CHECK_NEAR(out[0] + 10 * out[1] + 100 * out[2], 122.0, 0.0);
    f.n_obs = 0;
    ra_attention_mass(&f, out);
    CHECK_NEAR(out[0] + out[1] + out[2], 0.0, 0.0);
}

/* The two ends of lambda: attention alone is SnapKV, redundancy alone is minus the softmax. */
static void test_rkv_ends(void) {
    features_heap h = features_make(RA_FEATURE_ATTN_LOGITS | RA_FEATURE_KEY_SIM, 1, 40, 8, 8, 3);
    float         snapkv[40];
    ra_config     cfg = ra_config_default_params();
    ra_policy_snapkv_score(&cfg, &h.f, snapkv);
    cfg.lambda = 1.0f;
    ra_policy_rkv_score(&cfg, &h.f, h.score);
    CHECK_SAME(h.score, snapkv, sizeof(snapkv));

    cfg.lambda = 0.0f;
    ra_policy_rkv_score(&cfg, &h.f, h.score);
    double sum = 0.0;
    for (int32_t j = 0; j < 40; ++j) {
        sum += exp((double) h.sim[j]);
    }
    for (int32_t j = 0; j < 32; ++j) {
        CHECK_NEAR(h.score[j], -exp((double) h.sim[j]) / sum, 1e-6);
    }
    features_free(&h);
}

/* One pair that turns by a quarter circle per step, in both orders, and a value beside it. */
static void test_triattention_by_hand(void) {
    const float   turn       = acosf(0.0f);
    const float   keys[3][3] = { { 1, 0, 0 }, { 0, 2, 0 }, { 1, 1, 5 } };
    const float   centre[4]  = { 1, 0, 1, 1.5f }; /* mean 1 + 0 i, of modulus 1.5; and 1 */
    ra_rope       rope       = { .n_rot = 2, .freq = &turn };
    float         score[3];
    float         work[9];
    const int32_t pos[3] = { 0, 4, 8 };
    ra_features   f      = { .n_kv     = 3,
                             .n_group  = 1,
                             .pos      = pos,
                             .keys     = &keys[0][0],
                             .head_dim = 3,
                             .rope     = &rope,
                             .centres  = centre,
                             .work     = work };
    ra_config     cfg    = ra_config_default_params();
    /* at position 8 + o the centre is 1 again for o = 4, 8, ...; i for 1, -1 for 2: (14 + i) / 17 */
    const double s[3] = { 14.0 / 17 + 0.5, 2.0 / 17 + 0.5 * 2, 15.0 / 17 + 0.5 * sqrt(2.0) + 5.0 };
    const double mean = (s[0] + s[1] + s[2]) / 3;
    double       sq   = 0.0;
    for (int32_t j = 0; j < 3; ++j) {
        sq += (s[j] - mean) * (s[j] - mean);
    }
    for (rope.is_neox = 0; rope.is_neox < 2; ++rope.is_neox) {
        ra_policy_triattention_score(&cfg, &f, score);
        for (int32_t j = 0; j < 3; ++j) {
            /* a quarter circle in float, 2^16 times, is off by 0.003 */
            CHECK_NEAR(score[j], (s[j] - mean) / sqrt(sq / 3), 2e-3);
        }
    }
    const float same[9] = { 0 };
    f.keys              = same;
    ra_policy_triattention_score(&cfg, &f, score);
    CHECK(score[0] == 0.0f && score[1] == 0.0f && score[2] == 0.0f);
}

/* The first outputs of splitmix64 for seed 0 are published; every draw chains four such steps. */
static uint64_t splitmix64(uint64_t x) {
    uint64_t z = x + UINT64_C(0x9e3779b97f4a7c15);
    z          = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z          = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static void test_random_draws(void) {
    CHECK(splitmix64(0) == UINT64_C(0xe220a8397b1dcdaf));
    const int32_t pos[4] = { 3, 10, 11, 500 };
    ra_config     cfg    = ra_config_default_params();
    ra_features   f      = { .il = 5, .ih = 2, .n_kv = 4, .n_window = 1, .pos = pos };
    float         score[4];
    cfg.seed = UINT64_C(0xfedcba9876543210);
    ra_policy_random_score(&cfg, &f, score);
    for (int32_t j = 0; j < 4; ++j) {
        const uint64_t state =
            splitmix64(splitmix64(splitmix64(splitmix64(cfg.seed) ^ 5) ^ 2) ^ 500);
        const uint64_t draw = splitmix64(state ^ (uint64_t) pos[j]);
        CHECK_NEAR(score[j], (double) (draw >> 40) / (double) (1 << 24), 0.0);
    }
    /* a token's draw does not depend on which others are held */
    float       fewer[2];
    ra_features g = f;
    g.pos         = pos + 2;
    g.n_kv        = 2;
    ra_policy_random_score(&cfg, &g, fewer);
    CHECK_SAME(fewer, score + 2, sizeof(fewer));
}

static void test_what_must_stay(void) {
    const int32_t pos[8]  = { 0, 1, 5, 6, 7, 9, 12, 13 };
    ra_features   f       = { .n_kv = 8, .n_window = 2, .pos = pos };
    ra_config     cfg     = ra_config_default_params();
    float         made[8] = { 1, 2, NAN, INFINITY, -INFINITY, 3, 4, NAN };
    float         score[8];
    cfg.n_sink = 1;
    memcpy(score, made, sizeof(made));
    ra_score_protect(&cfg, 0, &f, score);
    CHECK(score[0] == INFINITY && score[6] == INFINITY && score[7] == INFINITY);
    CHECK_NEAR(score[1], 2.0, 0.0);
    for (int32_t i = 2; i < 5; ++i) {
        CHECK(isfinite(score[i]) && score[i] < -3e38f);
    }
    /* protection goes by position: 5 and 6 are among the first 7 */
    memcpy(score, made, sizeof(made));
    ra_score_protect(&cfg, 7, &f, score);
    for (int32_t i = 0; i < 8; ++i) {
        CHECK_EQ(score[i] == INFINITY, i < 4 || i >= 6);
    }
    CHECK_NEAR(score[5], 3.0, 0.0);
}

/* ra_policy_score() checks its arguments and then leaves score alone */
static void test_policy_score_arguments(void) {
    enum { N = 3, D = 2 };
    const float          k[N * D] = { 1, 0, 0, 1, 1, 1 };
    const float          q[D]     = { 1, 2 };
    const int32_t        pos[N]   = { 4, 5, 9 };
    const int32_t        same[N]  = { 4, 4, 9 };
    const int32_t        below[N] = { -1, 5, 9 };
    ra_config            cfg      = ra_config_default_params();
    float                score[N] = { 7, 7, 7 };
    const ra_head_arrays good     = { .size       = sizeof(good),
                                      .n_kv       = N,
                                      .n_group    = 1,
                                      .n_obs      = 1,
                                      .head_dim_k = D,
                                      .kq_scale   = 1.0f,
                                      .k          = k,
                                      .q          = q,
                                      .pos        = pos };
    const ra_rope        ropes[5] = { { .n_rot = 2 },
                                      { .n_rot = 1, .freq = k },
                                      { .n_rot = 4, .freq = k },
                                      { .n_rot = 2, .offset = 1, .freq = k },
                                      { .n_rot = -2, .freq = k } };
    ra_head_arrays       bad[24];
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); ++i) {
        bad[i] = good;
    }
    bad[0].il          = -1;
    bad[1].ih          = -1;
    bad[2].n_kv        = 0;
    bad[3].n_kv        = INT32_MAX;
    bad[4].head_dim_k  = 0;
    bad[5].head_dim_k  = INT32_MAX;
    bad[6].n_group     = 0;
    bad[7].n_group     = INT32_MAX;
    bad[8].n_obs       = -1;
    bad[9].n_obs       = N + 1;
    bad[10].k          = NULL;
    bad[11].q          = NULL;
    bad[12].pos        = NULL;
    bad[13].pos        = same;
    bad[14].pos        = below;
    bad[15].size       = 8;
    bad[16].v          = k;
    bad[16].head_dim_v = 0;
    for (size_t i = 0; i < 5; ++i) {
        bad[17 + i].rope = &ropes[i];
    }
    bad[22].centres   = k;
    bad[22].n_centres = 2;
    bad[23].n_centres = 3;
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); ++i) {
        CHECK_STATUS(ra_policy_score(&cfg, &bad[i], score, NULL, NULL), RA_STATUS_INVALID);
    }
    CHECK_STATUS(ra_policy_score(&cfg, NULL, score, NULL, NULL), RA_STATUS_INVALID);
    CHECK_STATUS(ra_policy_score(&cfg, &good, NULL, NULL, NULL), RA_STATUS_INVALID);
    cfg.policy = "no such policy";
    CHECK_STATUS(ra_policy_score(&cfg, &good, score, NULL, NULL), RA_STATUS_NOT_FOUND);
    cfg = ra_config_default_params();
    ra_calloc_fail_at(1);
    CHECK_STATUS(ra_policy_score(&cfg, &good, score, NULL, NULL), RA_STATUS_NO_MEMORY);
    CHECK(score[0] == 7.0f && score[1] == 7.0f && score[2] == 7.0f);
    ra_head_arrays no_queries = good;
    no_queries.n_obs          = 0;
    no_queries.q              = NULL;
    CHECK_STATUS(ra_policy_score(&cfg, &no_queries, score, NULL, NULL), RA_STATUS_OK);
    CHECK(score[0] == INFINITY && score[2] == INFINITY); /* all in the window */
    cfg.policy = "triattention";
    CHECK_STATUS(ra_policy_score(&cfg, &good, score, NULL, NULL), RA_STATUS_INVALID);
    CHECK(strstr(ra_last_error(), "needs the query centres") != NULL);
    ra_head_arrays centred = good;
    centred.centres        = k;
    centred.n_centres      = 3;
    CHECK_STATUS(ra_policy_score(&cfg, &centred, score, NULL, NULL), RA_STATUS_OK);
    for (int32_t i = -1; i <= ra_policy_count(); ++i) {
        const char * name = ra_policy_name(i);
        CHECK_EQ(ra_policy_needs_centres(i), name != NULL && strcmp(name, "triattention") == 0);
    }
}

int main(void) {
    test_registry_walk();
    test_allocator_walk();
    test_every_policy_on_random_shapes();
    test_importance_by_hand();
    test_attention_mass_by_hand();
    test_rkv_ends();
    test_triattention_by_hand();
    test_random_draws();
    test_what_must_stay();
    test_policy_score_arguments();
    return ra_test_result();
}
