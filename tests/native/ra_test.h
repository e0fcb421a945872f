/* ra_test.h - all that the C unit tests share: checks that count, and seeded random numbers
 *
 * A failed check prints file, line and values, and the test goes on; main() returns
 * ra_test_result(), which is 0 only when nothing failed. */
#ifndef RA_TEST_H
#define RA_TEST_H

#include "core.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* failures printed before the rest is only counted */
#define RA_TEST_MAX_PRINTED 20

static int64_t ra_test_n_checks;
static int64_t ra_test_n_failed;

#define CHECK(cond)                 ra_test_true((cond), __FILE__, __LINE__, #cond)
#define CHECK_EQ(got, want)         ra_test_eq((got), (want), __FILE__, __LINE__, #got)
#define CHECK_NEAR(got, want, tol)  ra_test_near((got), (want), (tol), __FILE__, __LINE__, #got)
#define CHECK_STR(got, want)        ra_test_str((got), (want), __FILE__, __LINE__, #got)
#define CHECK_STATUS(got, want)     ra_test_status((got), (want), __FILE__, __LINE__, #got)
#define CHECK_ARRAY(got, want, n)   ra_test_array((got), (want), (n), __FILE__, __LINE__, #got)
#define CHECK_SAME(got, want, size) CHECK(memcmp((got), (want), (size)) == 0)

/* counts a check; true when this failure should be printed */
static inline bool ra_test_count(bool ok) {
    ++ra_test_n_checks;
    ra_test_n_failed += !ok;
    return !ok && ra_test_n_failed <= RA_TEST_MAX_PRINTED;
}

static inline bool ra_test_true(bool ok, const char * file, int line, const char * what) {
    if (ra_test_count(ok)) {
        fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    }
    return ok;
}

static inline bool ra_test_eq(int64_t got, int64_t want, const char * file, int line,
                              const char * what) {
    if (ra_test_count(got == want)) {
        fprintf(stderr, "%s:%d: %s is %" PRId64 ", expected %" PRId64 "\n", file, line, what, got,
                want);
    }
    return got == want;
}

static inline bool ra_test_near(double got, double want, double tol, const char * file, int line,
                                const char * what) {
    const bool ok = got == want || fabs(got - want) <= tol;
    if (ra_test_count(ok)) {
        fprintf(stderr, "%s:%d: %s is %.9g, expected %.9g within %g\n", file, line, what, got, want,
                tol);
    }
    return ok;
}

static inline bool ra_test_str(const char * got, const char * want, const char * file, int line,
                               const char * what) {
    const bool ok = got != NULL && strcmp(got, want) == 0;
    if (ra_test_count(ok)) {
        fprintf(stderr, "%s:%d: %s is \"%s\", expected \"%s\"\n", file, line, what,
                got != NULL ? got : "(null)", want);
    }
    return ok;
}

/* a failing status must come with a message */
static inline bool ra_test_status(ra_status got, ra_status want, const char * file, int line,
                                  const char * what) {
    const bool ok = got == want && (got == RA_STATUS_OK || ra_last_error()[0] != '\0');
    if (ra_test_count(ok)) {
        fprintf(stderr, "%s:%d: %s is %s, expected %s; ra_last_error() is \"%s\"\n", file, line,
                what, ra_status_name(got), ra_status_name(want), ra_last_error());
    }
    return ok;
}

static inline bool ra_test_array(const int32_t * got, const int32_t * want, int32_t n,
                                 const char * file, int line, const char * what) {
    int32_t i = 0;
    while (i < n && got[i] == want[i]) {
        ++i;
    }
    if (ra_test_count(i == n)) {
        fprintf(stderr, "%s:%d: %s[%d] is %d, expected %d\n", file, line, what, i, got[i], want[i]);
    }
    return i == n;
}

static inline int ra_test_result(void) {
    printf("%" PRId64 " checks, %" PRId64 " failed\n", ra_test_n_checks, ra_test_n_failed);
    return ra_test_n_failed == 0 && ra_test_n_checks > 0 ? 0 : 1;
}

/* --- random numbers: xorshift64*, so that every machine runs the same tests -------------------- */

static uint64_t ra_test_rng = 1;

static inline void ra_test_seed(uint64_t seed) {
    ra_test_rng = (seed + 1) * UINT64_C(0x9e3779b97f4a7c15);
}

/* uniform in [lo, hi) */
static inline int32_t ra_test_int(int32_t lo, int32_t hi) {
    ra_test_rng ^= ra_test_rng >> 12;
    ra_test_rng ^= ra_test_rng << 25;
    ra_test_rng ^= ra_test_rng >> 27;
    const uint64_t draw = (ra_test_rng * UINT64_C(0x2545f4914f6cdd1d)) >> 32;
    return lo + (int32_t) ((draw * (uint64_t) (hi - lo)) >> 32);
}

/* uniform in [-1, 1) */
static inline float ra_test_float(void) {
    return (float) ra_test_int(-(1 << 20), 1 << 20) / (float) (1 << 20);
}

#endif
