/* mass.c - attention that tokens receive, as the model computes it */
#include "policy.h"

#include <math.h>

void ra_queries_seen(const ra_features * f, float * out) {
    int32_t o = 0;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        while (o < f->n_obs && f->obs_pos[o] < f->pos[j]) {
            ++o;
        }
        out[j] = (float) (f->n_obs - o);
    }
}

void ra_attention_mass(const ra_features * f, float * out) {
    float * row    = f->work;
    float * n_seen = f->work + f->n_kv;

    ra_queries_seen(f, n_seen);
    for (int32_t j = 0; j < f->n_kv; ++j) {
        out[j] = 0.0f;
    }
    for (int32_t o = 0; o < f->n_obs; ++o) {
        int32_t n = f->n_kv;
        while (n > 0 && f->pos[n - 1] > f->obs_pos[o]) {
            --n;
        }
        for (int32_t g = 0; g < f->n_group && n > 0; ++g) {
            const float * logits =
                f->attn_logits + ((size_t) o * (size_t) f->n_group + (size_t) g) * (size_t) f->n_kv;
            for (int32_t j = 0; j < n; ++j) {
                row[j] = logits[j];
            }
            ra_softmax_sink(n, row, ra_sink_of(f, g));
            for (int32_t j = 0; j < n; ++j) {
                out[j] += row[j];
            }
        }
    }
    for (int32_t j = 0; j < f->n_kv; ++j) {
        out[j] = n_seen[j] > 0.0f ? out[j] / (n_seen[j] * (float) f->n_group) : 0.0f;
    }
}
