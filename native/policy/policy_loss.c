/* What is lost when a token goes and the key most like its own stands in for it.
 *
 *   Z_j  = A_j * |v_j - mean v| * (1 - c_j)
 *
 * A    attention, remembered (memory.c), over all queries since the last compression
 * c_j  largest cosine of k_j with a key that receives more attention, sinks excepted: its twin, which
 *      answers to the queries that j answered to, and with merging takes over its value. Of two twins the
 *      one that is attended to less is charged, so one of them stays; R-KV (arXiv:2505.24133) spares the
 *      newer one.
 *
 * score [n_kv] f32 out, higher = keep. Needs the attention mass of all queries, value distances and twins. */
#include "policy.h"

void ra_policy_loss_score(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j] = f->mass[j] * f->value_dist[j] * (1.0f - f->twin[j]);
    }
}
