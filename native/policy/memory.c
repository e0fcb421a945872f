/* memory.c - attention remembered from compression to compression, as "mass" and "loss" use it
 *
 *   a_j  = mean over the queries that see j, and over the query heads of the group, of the attention to j
 *   A_j  = sum_c decay^c a_j(c compressions ago) / sum_c decay^c
 *
 * H2O's sums (arXiv:2306.14048), as means and with an end to memory. A token's state is the two sums. */
#include "policy.h"

#include <math.h>

void ra_policy_observe_memory(const ra_config * cfg, const ra_features * f) {
    /* a compression without queries has seen nothing and changes nothing but the weight of what was */
    const float seen = f->n_obs > 0 ? 1.0f : 0.0f;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        const float * before = f->state + 2 * (size_t) j;
        float *       after  = f->state_out + 2 * (size_t) j;
        const bool    is_new = isnan(before[0]);
        after[0]             = f->attn_mass[j] + (is_new ? 0.0f : cfg->decay * before[0]);
        after[1]             = seen + (is_new ? 0.0f : cfg->decay * before[1]);
        f->mass[j]           = after[1] > 0.0f ? after[0] / after[1] : 0.0f;
    }
}
