/* H2O, arXiv:2306.14048: heavy hitters, by attention accumulated over all decode steps.
 *
 *   Z_j = Z_j(before) + sum_o mean_g softmax_(k <= o)(q_(o,g).k / sqrt(d))_j
 *
 * over the queries o since the last compression; softmax over the tokens that query o could see. The
 * sum stays with the token (f->state). Differs from the paper: a GQA group counts by its mean, and of
 * the queries before the first compression only the newest `buffer` are counted.
 *
 * score [n_kv] f32 out, higher = keep. Needs the attention logits of all queries. */
#include "policy.h"

#include <math.h>

void ra_policy_h2o_score(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    float * row = f->work;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j] = isnan(f->state[j]) ? 0.0f : f->state[j];
    }
    for (int32_t o = 0; o < f->n_obs; ++o) {
        int32_t n_seen = f->n_kv;
        while (n_seen > 0 && f->pos[n_seen - 1] > f->obs_pos[o]) {
            --n_seen;
        }
        for (int32_t g = 0; g < f->n_group && n_seen > 0; ++g) {
            const float * logits =
                f->attn_logits + ((size_t) o * (size_t) f->n_group + (size_t) g) * (size_t) f->n_kv;
            for (int32_t j = 0; j < n_seen; ++j) {
                row[j] = logits[j];
            }
            ra_softmax_sink(n_seen, row, ra_sink_of(f, g));
            for (int32_t j = 0; j < n_seen; ++j) {
                score[j] += row[j] / (float) f->n_group;
            }
        }
    }
    for (int32_t j = 0; j < f->n_kv; ++j) {
        f->state_out[j] = score[j];
    }
}
