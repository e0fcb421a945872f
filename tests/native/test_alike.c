/* core/alike.c: thinned similarity, from scratch and from compression to compression */
#include "ra_test.h"

#include <string.h>

enum { N_MAX = 64, DIM = 2, N_ANGLES = 12 };

/* Unit keys at angles of 30 degrees: cosines are 0, +-0.5, +-0.866 and +-1, well away from these
 * thresholds, and many are equal. */
static const float THRESHOLDS[] = { 0.4f, 0.6f, 0.95f, -0.3f, -2.0f, 2.0f };

typedef struct head {
    int32_t  n_kv;
    int32_t  pos[N_MAX];
    int32_t  angle[N_MAX];
    ra_alike seen[N_MAX];
} head;

static void unit_of(const head * h, float * unit) {
    for (int32_t i = 0; i < h->n_kv; ++i) {
        const double a    = 2.0 * 3.14159265358979 * h->angle[i] / N_ANGLES;
        unit[DIM * i]     = (float) cos(a);
        unit[DIM * i + 1] = (float) sin(a);
    }
}

/* column means of the cosine matrix; of each row, the most recent other token above the threshold
 * and the diagonal left out */
static void naive(const head * h, float threshold, double * want) {
    float unit[DIM * N_MAX];
    unit_of(h, unit);
    memset(want, 0, sizeof(*want) * N_MAX);
    for (int32_t i = 0; i < h->n_kv; ++i) {
        double  row[N_MAX];
        int32_t recent = -1;
        for (int32_t j = 0; j < h->n_kv; ++j) {
            row[j] = (double) unit[DIM * i] * (double) unit[DIM * j] +
                     (double) unit[DIM * i + 1] * (double) unit[DIM * j + 1];
            recent = j != i && row[j] > (double) threshold ? j : recent;
        }
        for (int32_t j = 0; j < h->n_kv; ++j) {
            want[j] += i == j || j == recent ? 0.0 : row[j] / h->n_kv;
        }
    }
}

/* As a compression does it: blocks of n_rows new rows, newest first, then what is unknown. Returns
 * how many rows were compared again. */
static int32_t compare(head * h, int32_t n_pos_scored, int32_t n_rows, float threshold,
                       float * acc) {
    float   unit[DIM * N_MAX];
    float   sum[DIM];
    float   block[N_MAX * N_MAX];
    int32_t newer[N_MAX];
    int32_t older[N_MAX];
    int32_t list[N_MAX];
    unit_of(h, unit);
    const int32_t n_old = ra_alike_begin(h->n_kv, h->pos, n_pos_scored, h->seen, newer, older);
    for (int32_t end = h->n_kv; end > n_old;) {
        const int32_t n    = n_rows < end - n_old ? n_rows : end - n_old;
        const int32_t row0 = end - n;
        for (int32_t r = 0; r < n; ++r) {
            for (int32_t i = 0; i < end; ++i) {
                block[r * end + i] = ra_dot(DIM, unit + DIM * (row0 + r), unit + DIM * i);
            }
        }
        ra_alike_compare_new(n_old, row0, n, block, end, threshold, newer, older);
        end = row0;
    }
    const int32_t n_again = ra_alike_list_unknown(n_old, newer, older, list);
    for (int32_t r = 0; r < n_again; ++r) {
        for (int32_t i = 0; i < n_old; ++i) {
            block[i] = ra_dot(DIM, unit + DIM * list[r], unit + DIM * i);
        }
        ra_alike_compare_again(n_old, list[r], block, threshold, newer, older);
    }
    ra_key_cos_sums(h->n_kv, DIM, unit, sum, acc);
    ra_alike_finish(h->n_kv, DIM, unit, h->pos, newer, older, acc, h->seen);
    return n_again;
}

static void append(head * h, int32_t pos0, int32_t n) {
    for (int32_t t = 0; t < n; ++t, ++h->n_kv) {
        h->pos[h->n_kv]   = pos0 + t;
        h->angle[h->n_kv] = ra_test_int(0, N_ANGLES);
        /* stale, as in a pool */
        h->seen[h->n_kv] = (ra_alike){ ra_test_int(-2, 99), ra_test_int(-2, 99) };
    }
}

static void evict(head * h, int32_t n_keep) {
    while (h->n_kv > n_keep) {
        const int32_t i = ra_test_int(0, h->n_kv);
        const size_t  n = (size_t) (h->n_kv - i - 1);
        memmove(h->pos + i, h->pos + i + 1, n * sizeof(*h->pos));
        memmove(h->angle + i, h->angle + i + 1, n * sizeof(*h->angle));
        memmove(h->seen + i, h->seen + i + 1, n * sizeof(*h->seen));
        --h->n_kv;
    }
}

/* Tokens 0 and 2 look alike (0.866), so do 1 and 2 (0.866). Row 0 leaves out its newest look-alike
 * 2, row 1 too; row 2 leaves out 1, the newest other one. The column sums are what is left. */
static void test_by_hand(void) {
    for (int32_t n_rows = 1; n_rows <= 3; ++n_rows) {
        head  h = { .n_kv = 3, .pos = { 0, 1, 2 }, .angle = { 0, 2, 1 } };
        float acc[N_MAX];
        compare(&h, 0, n_rows, 0.6f, acc);
        CHECK_NEAR(3.0f * acc[0], 0.5 + sqrt(0.75), 1e-6);
        CHECK_NEAR(3.0f * acc[1], 0.5, 1e-6);
        CHECK_NEAR(3.0f * acc[2], 0.0, 1e-6);
        CHECK_EQ(h.seen[0].newer, 2);
        CHECK_EQ(h.seen[1].newer, 2);
        CHECK_EQ(h.seen[2].newer, RA_ALIKE_NONE);
        CHECK_EQ(h.seen[2].older, 1);
    }
    /* a lone key has no other */
    head  h = { .n_kv = 1, .pos = { 7 } };
    float acc[N_MAX];
    compare(&h, 0, 1, -2.0f, acc);
    CHECK_NEAR(acc[0], 0.0, 1e-7);
}

/* Compress, evict at random, append, take back, and so on: always what the definition says. */
static void test_kept_from_compression_to_compression(void) {
    int64_t n_again = 0;
    int64_t n_rows  = 0;
    for (int32_t round = 0; round < 300; ++round) {
        head          h            = { .n_kv = 0 };
        const float   threshold    = THRESHOLDS[ra_test_int(0, 6)];
        const int32_t n_keep       = ra_test_int(1, 40);
        int32_t       n_pos        = 0;
        int32_t       n_pos_scored = 0;
        for (int32_t step = 0; step < 8; ++step) {
            const int32_t n_new = ra_test_int(h.n_kv == 0, 1 + N_MAX - h.n_kv);
            append(&h, n_pos, n_new);
            n_pos += n_new;
            float  acc[N_MAX];
            double want[N_MAX];
            n_rows += h.n_kv;
            n_again += compare(&h, n_pos_scored, ra_test_int(1, N_MAX), threshold, acc);
            naive(&h, threshold, want);
            for (int32_t j = 0; j < h.n_kv; ++j) {
                CHECK_NEAR(acc[j], want[j], 1e-5);
            }
            if (step % 3 == 2) {
                continue; /* the compression failed: what it wrote must do no harm */
            }
            n_pos_scored = n_pos;
            evict(&h, n_keep);
            if (step == 4 && h.n_kv > 0) { /* the tail is taken back, other tokens come */
                n_pos = h.pos[h.n_kv / 2];
                while (h.n_kv > 0 && h.pos[h.n_kv - 1] >= n_pos) {
                    --h.n_kv;
                }
                n_pos_scored = n_pos;
            }
        }
    }
    CHECK(n_again > 0);
    CHECK(n_again < n_rows / 3);
}

/* After loading a state nothing is known. */
static void test_unknown(void) {
    head h = { .n_kv = 0 };
    append(&h, 0, 30);
    for (int32_t i = 0; i < h.n_kv; ++i) {
        h.seen[i] = (ra_alike){ RA_ALIKE_UNKNOWN, RA_ALIKE_UNKNOWN };
    }
    float  acc[N_MAX];
    double want[N_MAX];
    CHECK_EQ(compare(&h, 30, 8, 0.6f, acc), 30);
    naive(&h, 0.6f, want);
    for (int32_t j = 0; j < h.n_kv; ++j) {
        CHECK_NEAR(acc[j], want[j], 1e-5);
    }
    CHECK_EQ(compare(&h, 30, 8, 0.6f, acc), 0);
}

int main(void) {
    test_by_hand();
    test_kept_from_compression_to_compression();
    test_unknown();
    return ra_test_result();
}
