/* numerics.c - softmax, max-pool, products and sums that the policies share */
#include "core.h"

#include <math.h>

void ra_softmax(int32_t n, float * x) {
    ra_softmax_sink(n, x, -INFINITY);
}

void ra_softmax_sink(int32_t n, float * x, float sink) {
    float max = sink;
    for (int32_t i = 0; i < n; ++i) {
        max = x[i] > max ? x[i] : max;
    }
    double sum = 0.0;
    for (int32_t i = 0; i < n; ++i) {
        x[i] = max == -INFINITY ? 1.0f : expf(x[i] - max);
        sum += (double) x[i];
    }
    sum += max == -INFINITY ? 0.0 : (double) expf(sink - max);
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

/* eight running sums, so that compilers may use vector registers */
float ra_dot(int32_t n, const float * a, const float * b) {
    float   lane[8] = { 0.0f };
    int32_t i       = 0;
    for (; i + 8 <= n; i += 8) {
        for (int32_t k = 0; k < 8; ++k) {
            lane[k] += a[i + k] * b[i + k];
        }
    }
    for (; i < n; ++i) {
        lane[0] += a[i] * b[i];
    }
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) +
           ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

void ra_mean_distance(int32_t n, int32_t dim, const float * rows, float * mean, float * out) {
    for (int32_t d = 0; d < dim; ++d) {
        mean[d] = 0.0f;
    }
    for (int32_t i = 0; i < n; ++i) {
        const float * row = rows + (size_t) i * (size_t) dim;
        for (int32_t d = 0; d < dim; ++d) {
            mean[d] += row[d];
        }
    }
    for (int32_t d = 0; d < dim; ++d) {
        mean[d] /= (float) n;
    }
    for (int32_t i = 0; i < n; ++i) {
        const float * row = rows + (size_t) i * (size_t) dim;
        float         sum = 0.0f;
        for (int32_t d = 0; d < dim; ++d) {
            sum += (row[d] - mean[d]) * (row[d] - mean[d]);
        }
        out[i] = sqrtf(sum);
    }
}

void ra_hadamard_transform(int32_t n, float * x) {
    for (int32_t half = 1; half < n; half *= 2) {
        for (int32_t i = 0; i < n; ++i) {
            if ((i & half) == 0) {
                const float a = x[i];
                const float b = x[i + half];
                x[i]          = a + b;
                x[i + half]   = a - b;
            }
        }
    }
    const float scale = 1.0f / sqrtf((float) n);
    for (int32_t i = 0; i < n; ++i) {
        x[i] *= scale;
    }
}

void ra_key_cos_sums(int32_t n_kv, int32_t head_dim, const float * unit, float * sum, float * out) {
    for (int32_t d = 0; d < head_dim; ++d) {
        sum[d] = 0.0f;
    }
    for (int32_t i = 0; i < n_kv; ++i) {
        const float * u = unit + (size_t) i * (size_t) head_dim;
        for (int32_t d = 0; d < head_dim; ++d) {
            sum[d] += u[d];
        }
    }
    for (int32_t j = 0; j < n_kv; ++j) {
        out[j] = ra_dot(head_dim, unit + (size_t) j * (size_t) head_dim, sum);
    }
}
