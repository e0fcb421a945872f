/* Random eviction: the baseline that every table shows.
 *
 *   Z_j = u(seed, layer, head, n, position of j)     uniform in [0, 1)
 *
 * where n is the position of the newest token, so that every compression draws afresh, and the same
 * run always draws the same. score [n_kv] f32 out, higher = keep. Needs no features. */
#include "policy.h"

/* splitmix64 (public domain, Vigna 2015): one step of a 64-bit mixing function */
static uint64_t ra_mix64(uint64_t x) {
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

void ra_policy_random_score(const ra_config * cfg, const ra_features * f, float * score) {
    uint64_t state = ra_mix64(cfg->seed);
    state          = ra_mix64(state ^ (uint64_t) (uint32_t) f->il);
    state          = ra_mix64(state ^ (uint64_t) (uint32_t) f->ih);
    state          = ra_mix64(state ^ (uint64_t) (uint32_t) f->pos[f->n_kv - 1]);
    for (int32_t j = 0; j < f->n_kv; ++j) {
        const uint64_t draw = ra_mix64(state ^ (uint64_t) (uint32_t) f->pos[j]);
        score[j]            = (float) (draw >> 40) * 0x1.0p-24f;
    }
}
