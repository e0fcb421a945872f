/* core/select.c: the highest scores stay, the newer one among equals */
#include "ra_test.h"

#define N_MAX 200

static int32_t count(int32_t n, const uint8_t * keep) {
    int32_t n_kept = 0;
    for (int32_t i = 0; i < n; ++i) {
        CHECK(keep[i] <= 1);
        n_kept += keep[i];
    }
    return n_kept;
}

/* tokens that go before token i */
static int32_t naive_rank(int32_t n, const float * score, int32_t i) {
    int32_t     rank = 0;
    const float own  = isnan(score[i]) ? -INFINITY : score[i];
    for (int32_t j = 0; j < n; ++j) {
        const float other = isnan(score[j]) ? -INFINITY : score[j];
        rank += other > own || (other == own && j > i);
    }
    return rank;
}

static void test_ties_go_to_the_newer(void) {
    const float score[6] = { 1.0f, 2.0f, 1.0f, 2.0f, 1.0f, 0.0f };
    uint8_t     keep[6];
    CHECK_STATUS(ra_select_keep(6, score, 4, keep), RA_STATUS_OK);
    CHECK_SAME(keep, ((uint8_t[6]){ 0, 1, 1, 1, 1, 0 }), 6);
    CHECK_STATUS(ra_select_keep(6, score, 1, keep), RA_STATUS_OK);
    CHECK_SAME(keep, ((uint8_t[6]){ 0, 0, 0, 1, 0, 0 }), 6);
    /* +0 and -0 are equal */
    const float zeros[3] = { 0.0f, -0.0f, 0.0f };
    CHECK_STATUS(ra_select_keep(3, zeros, 2, keep), RA_STATUS_OK);
    CHECK_SAME(keep, ((uint8_t[3]){ 0, 1, 1 }), 3);
}

static void test_not_finite(void) {
    const float score[7] = { NAN, -INFINITY, INFINITY, -3e38f, NAN, INFINITY, 0.5f };
    uint8_t     keep[7];
    CHECK_STATUS(ra_select_keep(7, score, 2, keep), RA_STATUS_OK);
    CHECK_SAME(keep, ((uint8_t[7]){ 0, 0, 1, 0, 0, 1, 0 }), 7);
    CHECK_STATUS(ra_select_keep(7, score, 4, keep), RA_STATUS_OK);
    CHECK_SAME(keep, ((uint8_t[7]){ 0, 0, 1, 1, 0, 1, 1 }), 7);
    /* NaN counts as -INFINITY: the newer of them goes first */
    CHECK_STATUS(ra_select_keep(7, score, 5, keep), RA_STATUS_OK);
    CHECK_SAME(keep, ((uint8_t[7]){ 0, 0, 1, 1, 1, 1, 1 }), 7);
}

static void test_budget_bounds(void) {
    const float score[3] = { 3.0f, 1.0f, 2.0f };
    uint8_t     keep[3];
    CHECK_STATUS(ra_select_keep(3, score, 0, keep), RA_STATUS_OK);
    CHECK_EQ(count(3, keep), 0);
    CHECK_STATUS(ra_select_keep(3, score, 3, keep), RA_STATUS_OK);
    CHECK_EQ(count(3, keep), 3);
    CHECK_STATUS(ra_select_keep(3, score, INT32_MAX, keep), RA_STATUS_OK);
    CHECK_EQ(count(3, keep), 3);
}

static void test_errors_leave_keep_alone(void) {
    const float score[3] = { INFINITY, INFINITY, 0.0f };
    uint8_t     keep[3]  = { 7, 7, 7 };
    CHECK_STATUS(ra_select_keep(3, score, 1, keep), RA_STATUS_BUDGET);
    CHECK(strstr(ra_last_error(), "budget 1 cannot hold the 2 tokens") != NULL);
    CHECK_STATUS(ra_select_keep(3, score, -1, keep), RA_STATUS_INVALID);
    CHECK_STATUS(ra_select_keep(0, score, 1, keep), RA_STATUS_INVALID);
    CHECK_STATUS(ra_select_keep(-5, score, 1, keep), RA_STATUS_INVALID);
    CHECK_STATUS(ra_select_keep(RA_MAX_TOKENS + 1, score, 1, keep), RA_STATUS_INVALID);
    CHECK_STATUS(ra_select_keep(3, NULL, 2, keep), RA_STATUS_INVALID);
    CHECK_STATUS(ra_select_keep(3, score, 2, NULL), RA_STATUS_INVALID);
    ra_calloc_fail_at(1);
    CHECK_STATUS(ra_select_keep(3, score, 2, keep), RA_STATUS_NO_MEMORY);
    CHECK_SAME(keep, ((uint8_t[3]){ 7, 7, 7 }), 3);
    CHECK_STATUS(ra_select_keep(3, score, 2, keep), RA_STATUS_OK);
    CHECK_SAME(keep, ((uint8_t[3]){ 1, 1, 0 }), 3);
}

static void test_random_against_naive(void) {
    for (int32_t round = 0; round < 500; ++round) {
        const int32_t n        = ra_test_int(1, N_MAX + 1);
        const int32_t n_values = ra_test_int(1, 40); /* few values: many ties */
        float         score[N_MAX];
        uint8_t       keep[N_MAX];
        int32_t       n_must = 0;
        for (int32_t i = 0; i < n; ++i) {
            const int32_t kind = ra_test_int(0, 20);
            score[i] = kind == 0 ? INFINITY : kind == 1 ? NAN : (float) ra_test_int(0, n_values);
            n_must += kind == 0;
        }
        const int32_t   budget = ra_test_int(0, n + 2);
        const ra_status st     = ra_select_keep(n, score, budget, keep);
        CHECK_STATUS(st, budget < n_must ? RA_STATUS_BUDGET : RA_STATUS_OK);
        for (int32_t i = 0; i < n && st == RA_STATUS_OK; ++i) {
            CHECK_EQ(keep[i], naive_rank(n, score, i) < budget);
        }
    }
}

int main(void) {
    test_ties_go_to_the_newer();
    test_not_finite();
    test_budget_bounds();
    test_errors_leave_keep_alone();
    test_random_against_naive();
    return ra_test_result();
}
