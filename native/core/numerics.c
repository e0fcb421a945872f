/* numerics.c - softmax, max-pool and the similarity sums that the policies share */
#include "core.h"

#include <math.h>

void ra_softmax(int32_t n, float * x) {
    float max = -INFINITY;
    for (int32_t i = 0; i < n; ++i) {
        max = x[i] > max ? x[i] : max;
    }
    double sum = 0.0;
    for (int32_t i = 0; i < n; ++i) {
        x[i] = max == -INFINITY ? 1.0f : expf(x[i] - max);
        sum += (double) x[i];
    }
    const float scale = (float) (1.0 / sum);
    for (int32_t i = 0; i < n; ++i) {
        x[i] *= scale;
    }
}

void ra_max_pool(int32_t n, int32_t kernel, const float * src, float * dst) {
    const int32_t half = kernel / 2;
    for (int32_t i = 0; i < n; ++i) {
        const int32_t begin = i > half ? i - half : 0;
        const int32_t end   = n - i > half ? i + half + 1 : n;
        float         max   = src[begin];
        for (int32_t j = begin + 1; j < end; ++j) {
            max = src[j] > max ? src[j] : max;
        }
        dst[i] = max;
    }
}

void ra_key_sim_rows(int32_t n_kv, int32_t i0, int32_t n_rows, const float * cos, float threshold,
                     float * acc) {
    for (int32_t r = 0; r < n_rows; ++r) {
        const int32_t i   = i0 + r;
        const float * row = cos + (size_t) r * (size_t) n_kv;
        for (int32_t j = 0; j < n_kv; ++j) {
            acc[j] += row[j];
        }
        acc[i] -= row[i];
        for (int32_t j = n_kv - 1; j >= 0; --j) {
            if (j != i && row[j] > threshold) {
                acc[j] -= row[j];
                break;
            }
        }
    }
}
