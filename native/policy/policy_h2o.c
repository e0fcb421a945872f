/* H2O, arXiv:2306.14048: heavy hitters, by attention accumulated over all decode steps.
 *
 *   Z_j = Z_j(before) + sum_o mean_g softmax_(k <= o)(q_(o,g).k / sqrt(d))_j
 *
 * over the queries o since the last compression; softmax over the tokens that query o could see. The
 * sum stays with the token (f->state). Differs from the paper: a GQA group counts by its mean, and of
 * the queries before the first compression only the newest `buffer` are counted.
 *
 * score [n_kv] f32 out, higher = keep. Needs the attention mass of all queries. */
#include "policy.h"

#include <math.h>

void ra_policy_h2o_score(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    float * n_seen = f->work;
    ra_queries_seen(f, n_seen);
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j]        = (isnan(f->state[j]) ? 0.0f : f->state[j]) + n_seen[j] * f->attn_mass[j];
        f->state_out[j] = score[j];
    }
}
