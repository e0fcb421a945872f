/* Head allocators over many compressions: heads that do not differ stay alike, and what a head got while
 * it mattered it gives back. Besides, "error" against its definition. */
#include "ra_pool.h"

#include <math.h>

enum { N_HEADS = 4, BUDGET = 60 };

static const int32_t four_heads[1] = { N_HEADS };

/* Keys of all heads repeat one another equally: similarities and logits are drawn per token. */
static ra_status alike_features(void * user, uint32_t needs, ra_features * f) {
    ra_pool *     p = user;
    const int32_t n = f->n_obs * RA_POOL_GROUP * f->n_kv;
    (void) needs;
    for (int32_t i = 0; i < n; ++i) {
        p->logits[i] = 2.0f * ra_test_float();
    }
    for (int32_t i = 0; i < f->n_kv; ++i) {
        p->key_sim[i]    = 0.2f + 0.1f * ra_test_float();
        p->value_dist[i] = 1.0f + 0.1f * ra_test_float();
    }
    f->n_group     = RA_POOL_GROUP;
    f->attn_logits = p->logits;
    f->attn_mass   = p->attn_mass;
    f->key_sim     = p->key_sim;
    f->value_dist  = p->value_dist;
    ra_attention_mass(f, p->attn_mass);
    return RA_STATUS_OK;
}

/* largest over smallest head budget, mean over the last 25 of 50 compressions */
static double spread_after(const char * policy, const char * head_alloc) {
    ra_config cfg  = ra_pool_config(policy, BUDGET);
    cfg.head_alloc = head_alloc;
    ra_pool p;
    if (!ra_pool_make(&p, &cfg, 1, four_heads)) {
        return NAN;
    }
    ra_cache_ops ops = ra_pool_ops(&p);
    ops.features     = alike_features;
    double mean      = 0.0;
    ra_pool_append(&p, BUDGET);
    for (int32_t round = 0; round < 50; ++round) {
        ra_pool_append(&p, ra_cache_room(p.cache));
        CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
        const int32_t * b  = p.cache->layers[0].budget;
        int32_t         lo = b[0];
        int32_t         hi = b[0];
        for (int32_t ih = 1; ih < N_HEADS; ++ih) {
            lo = b[ih] < lo ? b[ih] : lo;
            hi = b[ih] > hi ? b[ih] : hi;
        }
        mean += round >= 25 ? (double) hi / lo / 25.0 : 0.0;
    }
    ra_pool_free(&p);
    return mean;
}

static void test_alike_heads_stay_alike(void) {
    CHECK(spread_after("rkv", "adaptive") < 1.35);
    CHECK(spread_after("rkv-ema", "adaptive") < 1.35);
    CHECK(spread_after("snapkv", "adaptive") < 1.35);
    CHECK(spread_after("mass", "adaptive") < 1.35);
    CHECK(spread_after("mass", "error") < 1.35);
    CHECK(spread_after("rkv", "error") < 1.8);
    /* what they are saved from */
    CHECK(spread_after("rkv", "adaptive-literal") > 2.0);
}

static int32_t i_round;

/* head 1 scores higher in rounds 10 to 29 */
static void score_by_round(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    const bool matters = f->ih == 1 && i_round >= 10 && i_round < 30;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j] = (1.0f + ra_test_float()) * (matters ? 3.0f : 1.0f);
    }
}

static void test_what_matters_gets_more_and_gives_it_back(void) {
    const ra_policy policy    = { "by round", "", 0, score_by_round, NULL, 1, 0 };
    const char *    allocs[2] = { "adaptive", "error" };
    for (int32_t i = 0; i < 2; ++i) {
        ra_config cfg  = ra_pool_config("random", BUDGET);
        cfg.buffer     = 40;
        cfg.head_alloc = allocs[i];
        ra_pool p;
        if (!ra_pool_make(&p, &cfg, 1, four_heads)) {
            return;
        }
        const ra_cache_ops ops   = ra_pool_ops(&p);
        p.cache->settings.policy = &policy;
        double during            = 0.0;
        double after             = 0.0;
        ra_pool_append(&p, BUDGET);
        for (i_round = 0; i_round < 50; ++i_round) {
            ra_pool_append(&p, ra_cache_room(p.cache));
            CHECK_STATUS(ra_cache_compress(p.cache, &ops, NULL), RA_STATUS_OK);
            during += i_round >= 20 && i_round < 30 ? p.cache->layers[0].budget[1] / 10.0 : 0.0;
            after += i_round >= 40 ? p.cache->layers[0].budget[1] / 10.0 : 0.0;
        }
        CHECK(during > 1.2 * BUDGET);
        CHECK(after > 0.8 * BUDGET && after < 1.15 * BUDGET);
        ra_pool_free(&p);
    }
}

/* 3 heads, 2 tokens stay in each; of the other 9 rows one is everybody's own (mu 1/3 of 3) */
static void test_error_by_hand(void) {
    const float             inf       = INFINITY;
    const int32_t           n_kv[3]   = { 7, 6, 5 };
    const int32_t           budget[3] = { 5, 5, 5 };
    const float             score[18] = { inf, 9, 8,   7,   6,    5,    inf,  inf, 4,
                                          3,   2, inf, inf, 0.5f, 0.4f, 0.3f, inf, 0 };
    const ra_alloc_heads_in in        = {
               .n_head_kv = 3, .base = 2, .n_kv = n_kv, .score = score, .initial = budget
    };
    int32_t   out[3];
    ra_config cfg = ra_config_default_params();
    cfg.mu        = 0.34;
    CHECK_STATUS(ra_alloc_heads_error(&cfg, &in, out), RA_STATUS_OK);
    CHECK_ARRAY(out, ((int32_t[3]){ 2 + 5, 2 + 3, 2 + 1 }), 3);
    cfg.clip_hi = 4.0 / 3.0; /* nobody more than 4: the third head gets what the first may not */
    CHECK_STATUS(ra_alloc_heads_error(&cfg, &in, out), RA_STATUS_OK);
    CHECK_ARRAY(out, ((int32_t[3]){ 2 + 4, 2 + 3, 2 + 2 }), 3);
    cfg    = ra_config_default_params();
    cfg.mu = 1.0;
    CHECK_STATUS(ra_alloc_heads_error(&cfg, &in, out), RA_STATUS_OK);
    CHECK_ARRAY(out, budget, 3);
    ra_calloc_fail_at(1);
    CHECK_STATUS(ra_alloc_heads_error(&cfg, &in, out), RA_STATUS_NO_MEMORY);
    ra_alloc_heads_in tight = in;
    tight.base              = 5;
    CHECK_STATUS(ra_alloc_heads_error(&cfg, &tight, out), RA_STATUS_BUDGET);
}

int main(void) {
    test_alike_heads_stay_alike();
    test_what_matters_gets_more_and_gives_it_back();
    test_error_by_hand();
    return ra_test_result();
}
