/* Attention mass, remembered, times what a token's value says that the others do not.
 *
 *   Z_j  = A_j * |v_j - mean v|            A: memory.c
 *
 * Leaving j out moves the output of the head by about Z_j, so scores are comparable between the heads of a
 * layer. The factor is that of value-aware pruning (VATP, arXiv:2406.12335) with the distance from the mean
 * in the place of the norm.
 *
 * score [n_kv] f32 out, higher = keep. Needs attention mass and value distances. */
#include "policy.h"

void ra_policy_mass_score(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j] = f->mass[j] * f->value_dist[j];
    }
}
