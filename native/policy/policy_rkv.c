/* R-KV, arXiv:2505.24133: importance minus redundancy.
 *
 *   Z_j = lambda * I_j - (1 - lambda) * R_j
 *
 * I   importance of the observation window (importance.c)
 * R   softmax over all tokens of the head of their mean thinned cosine (core/alike.c)
 *
 * symbol   here                 default
 * lambda   cfg->lambda          0.1 (paper; the authors' code: 0.07)
 * alpha    cfg->n_window        8
 * kernel   cfg->pool_kernel     7
 * T        cfg->sim_threshold   0.5
 *
 * score [n_kv] f32 out, higher = keep. Needs attention logits and key similarity. */
#include "policy.h"

void ra_policy_rkv_score(const ra_config * cfg, const ra_features * f, float * score) {
    const int32_t n_cand     = f->n_kv - f->n_window;
    float *       redundancy = f->work + 2 * (size_t) f->n_kv;

    ra_importance(cfg, f, score);
    for (int32_t j = 0; j < f->n_kv; ++j) {
        redundancy[j] = f->key_sim[j];
    }
    ra_softmax(f->n_kv, redundancy);
    for (int32_t j = 0; j < n_cand; ++j) {
        score[j] = cfg->lambda * score[j] - (1.0f - cfg->lambda) * redundancy[j];
    }
    for (int32_t j = n_cand; j < f->n_kv; ++j) {
        score[j] = 0.0f;
    }
}
