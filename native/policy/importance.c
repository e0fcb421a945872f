/* importance.c - attention of the observation window, as R-KV and SnapKV use it
 *
 * arXiv:2505.24133 (R-KV) sec. 3, after arXiv:2404.14469 (SnapKV):
 *   A_o,j = max over the G query heads of q_{o,g}.k_j / sqrt(d)     o in window, j outside it
 *   I_j   = maxpool_7( mean_o softmax_j(A_o,j) )
 * The maximum over the group is taken before the softmax, as in the authors' code; so is that of
 * attention sinks, which take their part of the softmax. */
#include "policy.h"

#include <math.h>

void ra_importance(const ra_config * cfg, const ra_features * f, float * out) {
    const int32_t n_cand = f->n_kv - f->n_window;
    float         sink   = -INFINITY;
    float *       row    = f->work;
    float *       mean   = f->work + f->n_kv;

    for (int32_t j = 0; j < n_cand; ++j) {
        mean[j] = 0.0f;
    }
    for (int32_t g = 0; g < f->n_group; ++g) {
        sink = fmaxf(sink, ra_sink_of(f, g));
    }
    for (int32_t o = 0; o < f->n_obs; ++o) {
        for (int32_t j = 0; j < n_cand; ++j) {
            row[j] = -INFINITY;
        }
        for (int32_t g = 0; g < f->n_group; ++g) {
            const float * logits =
                f->attn_logits + ((size_t) o * (size_t) f->n_group + (size_t) g) * (size_t) f->n_kv;
            for (int32_t j = 0; j < n_cand; ++j) {
                row[j] = logits[j] > row[j] ? logits[j] : row[j];
            }
        }
        if (n_cand > 0) {
            ra_softmax_sink(n_cand, row, sink);
        }
        for (int32_t j = 0; j < n_cand; ++j) {
            mean[j] += row[j] / (float) f->n_obs;
        }
    }
    ra_max_pool(n_cand, cfg->pool_kernel, mean, out);
}
