/* core/numerics.c: softmax, max-pool, sums of cosines */
#include "ra_test.h"

#include <stdlib.h>

#define N_MAX 64

static void test_softmax_values(void) {
    float x[3] = { 0.0f, logf(2.0f), logf(5.0f) };
    ra_softmax(3, x);
    CHECK_NEAR(x[0], 1.0 / 8.0, 1e-7);
    CHECK_NEAR(x[1], 2.0 / 8.0, 1e-7);
    CHECK_NEAR(x[2], 5.0 / 8.0, 1e-7);
    float one[1] = { -123.0f };
    ra_softmax(1, one);
    CHECK_NEAR(one[0], 1.0, 0.0);
}

static void test_softmax_extremes(void) {
    float large[3] = { 3e38f, 3e38f, -3e38f };
    ra_softmax(3, large);
    CHECK_NEAR(large[0], 0.5, 1e-7);
    CHECK_NEAR(large[2], 0.0, 0.0);

    float masked[3] = { -INFINITY, 1.0f, -INFINITY };
    ra_softmax(3, masked);
    CHECK_NEAR(masked[0], 0.0, 0.0);
    CHECK_NEAR(masked[1], 1.0, 0.0);

    float nothing[4] = { -INFINITY, -INFINITY, -INFINITY, -INFINITY };
    ra_softmax(4, nothing);
    for (int32_t i = 0; i < 4; ++i) {
        CHECK_NEAR(nothing[i], 0.25, 0.0);
    }
}

static void test_softmax_random(void) {
    for (int32_t round = 0; round < 200; ++round) {
        const int32_t n = ra_test_int(1, N_MAX + 1);
        float         a[N_MAX];
        float         b[N_MAX];
        for (int32_t i = 0; i < n; ++i) {
            a[i] = 8.0f * ra_test_float();
            b[i] = a[i] + 16.0f;
        }
        const float first = a[0];
        const float last  = a[n - 1];
        ra_softmax(n, a);
        ra_softmax(n, b);
        double sum = 0.0;
        for (int32_t i = 0; i < n; ++i) {
            sum += (double) a[i];
            CHECK_NEAR(b[i], a[i], 1e-5 * (double) a[i] + 1e-9);
        }
        CHECK_NEAR(sum, 1.0, 1e-5);
        CHECK_NEAR(log((double) a[n - 1] / (double) a[0]), (double) (last - first), 1e-4);
    }
}

static float naive_window_max(int32_t n, int32_t kernel, const float * src, int32_t i) {
    float max = -INFINITY;
    for (int32_t j = 0; j < n; ++j) {
        max = abs(i - j) <= (kernel - 1) / 2 && src[j] > max ? src[j] : max;
    }
    return max;
}

static void test_max_pool(void) {
    for (int32_t round = 0; round < 400; ++round) {
        const int32_t n      = ra_test_int(0, N_MAX);
        const int32_t kernel = round % 4 == 0 ? 255 : 2 * ra_test_int(0, 8) + 1;
        float         src[N_MAX];
        float         dst[N_MAX + 1];
        for (int32_t i = 0; i < n; ++i) {
            src[i] = ra_test_float();
        }
        dst[n] = 77.0f;
        ra_max_pool(n, kernel, src, dst);
        for (int32_t i = 0; i < n; ++i) {
            CHECK_NEAR(dst[i], naive_window_max(n, kernel, src, i), 0.0);
        }
        CHECK_NEAR(dst[n], 77.0, 0.0);
    }
}

static void test_key_cos_sums(void) {
    enum { D_MAX = 37 };
    for (int32_t round = 0; round < 50; ++round) {
        const int32_t n = ra_test_int(1, N_MAX);
        const int32_t d = ra_test_int(1, D_MAX + 1);
        static float  unit[N_MAX * D_MAX];
        float         sum[D_MAX];
        float         out[N_MAX];
        for (int32_t i = 0; i < n * d; ++i) {
            unit[i] = ra_test_float() / sqrtf((float) d);
        }
        ra_key_cos_sums(n, d, unit, sum, out);
        for (int32_t j = 0; j < n; ++j) {
            double want = 0.0;
            for (int32_t i = 0; i < n * d; ++i) {
                want += (double) unit[i] * (double) unit[j * d + i % d];
            }
            CHECK_NEAR(out[j], want, 1e-4);
        }
    }
}

/* H_2 by hand; and twice is nothing */
static void test_hadamard(void) {
    float two[2] = { 3.0f, 1.0f };
    ra_hadamard_transform(2, two);
    CHECK_NEAR(two[0], 4.0 / sqrt(2.0), 1e-6);
    CHECK_NEAR(two[1], 2.0 / sqrt(2.0), 1e-6);
    float unit[4] = { 0.0f, 0.0f, 1.0f, 0.0f }; /* row 2 of Sylvester's matrix: + + - - */
    ra_hadamard_transform(4, unit);
    CHECK(unit[0] == 0.5f && unit[1] == 0.5f && unit[2] == -0.5f && unit[3] == -0.5f);
    float x[N_MAX];
    float before[N_MAX];
    for (int32_t i = 0; i < N_MAX; ++i) {
        x[i] = before[i] = ra_test_float();
    }
    ra_hadamard_transform(N_MAX, x);
    ra_hadamard_transform(N_MAX, x);
    for (int32_t i = 0; i < N_MAX; ++i) {
        CHECK_NEAR(x[i], before[i], 1e-6);
    }
}

int main(void) {
    test_softmax_values();
    test_softmax_extremes();
    test_softmax_random();
    test_max_pool();
    test_key_cos_sums();
    test_hadamard();
    return ra_test_result();
}
