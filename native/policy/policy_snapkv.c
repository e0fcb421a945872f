/* SnapKV at decode time, arXiv:2404.14469 as the R-KV authors run it (max-pool 7, window 8).
 *
 *   Z_j = I_j     (importance.c)
 *
 * score [n_kv] f32 out, higher = keep. Needs attention logits. */
#include "policy.h"

void ra_policy_snapkv_score(const ra_config * cfg, const ra_features * f, float * score) {
    ra_importance(cfg, f, score);
    for (int32_t j = f->n_kv - f->n_window; j < f->n_kv; ++j) {
        score[j] = 0.0f;
    }
}
