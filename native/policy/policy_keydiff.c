/* KeyDiff, arXiv:2504.15364: keep the keys least like the head's mean key.
 *
 *   Z_j = -cos(k_j, m)      m = mean of the normalised keys of the head
 *
 * With c_j = mean_i cos(k_j, k_i): k_j.m / |k_j| = c_j and |m|^2 = mean_j c_j, so Z_j = -c_j / |m|.
 * score [n_kv] f32 out, higher = keep. Needs mean cosines. */
#include "policy.h"

#include <math.h>

void ra_policy_keydiff_score(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    double norm2 = 0.0;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        norm2 += (double) f->key_cos[j] / f->n_kv;
    }
    const float norm = sqrtf(norm2 > 1e-12 ? (float) norm2 : 1e-12f);
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j] = -f->key_cos[j] / norm;
    }
}
