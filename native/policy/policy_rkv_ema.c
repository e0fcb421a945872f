/* R-KV with scores smoothed across compressions.
 *
 *   S_j = ema * S_j(before) + (1 - ema) * Z_j      Z_j of policy_rkv.c; S_j = Z_j for a new token
 *
 * ema = cfg->ema. What was useful once is not dropped at the first compression that does not look at
 * it. Tokens of the window have no R-KV score: their history begins when they leave it.
 * score [n_kv] f32 out, higher = keep. Needs what R-KV needs. */
#include "policy.h"

#include <math.h>

void ra_policy_rkv_ema_score(const ra_config * cfg, const ra_features * f, float * score) {
    ra_policy_rkv_score(cfg, f, score);
    for (int32_t j = 0; j < f->n_kv - f->n_window; ++j) {
        if (!isnan(f->state[j])) {
            score[j] = cfg->ema * f->state[j] + (1.0f - cfg->ema) * score[j];
        }
        f->state_out[j] = score[j];
    }
}
