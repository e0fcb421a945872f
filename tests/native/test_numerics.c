/* core/numerics.c: softmax, max-pool, similarity sums */
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

/* all rows in blocks of n_rows, the first one (the newest tokens) in what is left over */
static void sim_in_blocks(int32_t n, int32_t n_rows, const float * cos, float threshold,
                          float * acc) {
    int32_t open[N_MAX];
    int32_t n_open = 0;
    for (int32_t j = 0; j < n; ++j) {
        acc[j] = 0.0f;
        for (int32_t i = 0; i < n; ++i) {
            acc[j] += cos[i * n + j];
        }
    }
    for (int32_t end = n; end > 0;) {
        const int32_t i0 = (end - 1) / n_rows * n_rows;
        ra_key_sim_rows(n, i0, end - i0, cos + i0 * n + i0, n, threshold, acc, open, &n_open);
        end = i0;
    }
}

/* Keys 0 and 2 look alike (0.9). Row 0: its newest look-alike 2 is not charged. Row 1: 2 is alike by
 * 0.6. Row 2: 1 is the newest other one above 0.5. The column sums are what is left. */
static void test_key_sim_by_hand(void) {
    const float cos[9] = {
        1.0f, 0.2f, 0.9f, /* */
        0.2f, 1.0f, 0.6f, /* */
        0.9f, 0.6f, 1.0f,
    };
    for (int32_t n_rows = 1; n_rows <= 3; ++n_rows) {
        float acc[3];
        sim_in_blocks(3, n_rows, cos, 0.5f, acc);
        CHECK_NEAR(acc[0], 0.2 + 0.9, 1e-6);
        CHECK_NEAR(acc[1], 0.2, 1e-6);
        CHECK_NEAR(acc[2], 0.0, 1e-6);
    }

    /* the threshold itself is not above it, and nothing above it leaves all columns alone */
    const float flat[4] = { 1.0f, 0.5f, 0.5f, 1.0f };
    float       sum[2];
    sim_in_blocks(2, 2, flat, 0.5f, sum);
    CHECK_NEAR(sum[0], 0.5, 1e-7);
    CHECK_NEAR(sum[1], 0.5, 1e-7);

    /* a lone key has no other */
    const float one[1] = { 1.0f };
    float       alone[1];
    sim_in_blocks(1, 1, one, -1.0f, alone);
    CHECK_NEAR(alone[0], 0.0, 0.0);
}

static void naive_key_sim(int32_t n, const float * cos, float threshold, double * acc) {
    for (int32_t j = 0; j < n; ++j) {
        acc[j] = 0.0;
        for (int32_t i = 0; i < n; ++i) {
            bool is_newest = cos[i * n + j] > threshold;
            for (int32_t later = j + 1; later < n; ++later) {
                is_newest = is_newest && (later == i || !(cos[i * n + later] > threshold));
            }
            if (i != j && !is_newest) {
                acc[j] += (double) cos[i * n + j];
            }
        }
    }
}

static void test_key_sim_random_blocks(void) {
    for (int32_t round = 0; round < 300; ++round) {
        const int32_t n         = ra_test_int(1, round % 3 == 0 ? N_MAX : 24);
        const float   threshold = round % 5 == 0 ? 0.99f : ra_test_float();
        static float  cos[N_MAX * N_MAX];
        float         acc[N_MAX];
        double        want[N_MAX];
        for (int32_t i = 0; i < n; ++i) {
            for (int32_t j = i; j < n; ++j) {
                /* coarse values, so that many equal the threshold or one another */
                cos[i * n + j] =
                    round % 2 == 0 ? ra_test_float() : 0.25f * (float) ra_test_int(-4, 5);
                cos[j * n + i] = cos[i * n + j];
            }
        }
        sim_in_blocks(n, ra_test_int(1, n + 1), cos, threshold, acc);
        naive_key_sim(n, cos, threshold, want);
        for (int32_t j = 0; j < n; ++j) {
            CHECK_NEAR(acc[j], want[j], 1e-4);
        }
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

int main(void) {
    test_softmax_values();
    test_softmax_extremes();
    test_softmax_random();
    test_max_pool();
    test_key_sim_by_hand();
    test_key_sim_random_blocks();
    test_key_cos_sums();
    return ra_test_result();
}
