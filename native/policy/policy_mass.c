/* Attention mass, remembered, times what a token's value says that the others do not.
 *
 *   a_j  = mean over the queries that see j, and over the query heads of the group, of the attention to j
 *   A_j  = sum_c decay^c a_j(c compressions ago) / sum_c decay^c
 *   Z_j  = A_j * |v_j - mean v|
 *
 * symbol   here             default
 * decay    cfg->decay       0.75
 *
 * Leaving j out moves the output of the head by about A_j |v_j - mean v|, so Z is comparable between the
 * heads of a layer. The remembered sums are H2O's (arXiv:2306.14048) with an end to memory; the factor is
 * that of value-aware pruning (VATP, arXiv:2406.12335) with the distance from the mean in the place of
 * the norm. A token's state is the two sums. A_j is its mass when tokens are merged.
 *
 * score [n_kv] f32 out, higher = keep. Needs attention logits and value distances. */
#include "policy.h"

#include <math.h>

void ra_policy_mass_score(const ra_config * cfg, const ra_features * f, float * score) {
    ra_attention_mass(f, score);
    for (int32_t j = 0; j < f->n_kv; ++j) {
        const float * before = f->state + 2 * (size_t) j;
        float *       after  = f->state_out + 2 * (size_t) j;
        const bool    is_new = isnan(before[0]);
        /* a compression without queries has seen nothing and changes nothing */
        const float seen = f->n_obs > 0 ? 1.0f : 0.0f;
        after[0]         = score[j] + (is_new ? 0.0f : cfg->decay * before[0]);
        after[1]         = seen + (is_new ? 0.0f : cfg->decay * before[1]);
        f->mass[j]       = after[1] > 0.0f ? after[0] / after[1] : 0.0f;
        score[j]         = f->mass[j] * f->value_dist[j];
    }
}
