/* core.h - what every room of native/ may use: errors, memory, numerics, selection.
 * Depends on nothing but the C library and the public header. */
#ifndef RA_CORE_H
#define RA_CORE_H

#include "reasonalloc.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* --- status.c ------------------------------------------------------------------------------- */

#if defined(__GNUC__)
#    define RA_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#    define RA_PRINTF(a, b)
#endif

/* Sets the thread's last error (one line, cut at 511 bytes) and returns status. */
ra_status ra_error(ra_status status, const char * fmt, ...) RA_PRINTF(2, 3);

/* Makes the thread's last error "". */
void ra_error_clear(void);

/* --- mem.c ---------------------------------------------------------------------------------- */

/* Zeroed array of n elements of size bytes; NULL when memory is short or n*size overflows. */
void * ra_calloc(size_t n, size_t size);
void   ra_free(void * p); /* NULL ok */

/* Tests only: the n-th ra_calloc from now on fails (n >= 1); 0 turns it off. */
void ra_calloc_fail_at(int64_t n);

/* --- numerics.c ----------------------------------------------------------------------------- */

/* x[n] <- softmax(x), computed in double, in place. n >= 1. All -INFINITY: uniform. */
void ra_softmax(int32_t n, float * x);

/* dst[i] = max of src[i - kernel/2 .. i + kernel/2] clipped to [0, n): max-pool, stride 1, "same"
 * padding. kernel odd. dst must not overlap src. */
void ra_max_pool(int32_t n, int32_t kernel, const float * src, float * dst);

/* out[j] = sum over i of unit_i . unit_j, i = j included: sums of cosines in linear time.
 *   unit [n_kv, head_dim]  keys of a head, normalised
 *   sum  [head_dim]        scratch */
void ra_key_cos_sums(int32_t n_kv, int32_t head_dim, const float * unit, float * sum, float * out);

/* One pass of the redundancy of R-KV (arXiv:2505.24133, sec. 3) over a block of rows of the cosine
 * matrix of one head's keys, of which only the upper triangle is read. Blocks come newest first:
 * i0 + n_rows is n_kv in the first one, and the i0 of the block before in each other.
 *   cos   cos[r * stride + c] is the cosine of keys i0 + r and i0 + c, c in [r, n_kv - i0)
 *   acc   [n_kv] in/out: ra_key_cos_sums() before the first block
 *   open  [n_kv] in/out: the *n_open tokens that are like no token seen so far; none at first
 * Of row i, the diagonal counts 0, and so does the most recent other token whose cosine exceeds
 * threshold: the newest of a group of look-alikes is not charged by it and survives.
 * After all rows, acc[j] / n_kv is the mean similarity of token j. Differs from the authors' code:
 * where no token exceeds the threshold, theirs zeroes column 0; ours nothing. */
void ra_key_sim_rows(int32_t n_kv, int32_t i0, int32_t n_rows, const float * cos, int32_t stride,
                     float threshold, float * acc, int32_t * open, int32_t * n_open);

#ifdef __cplusplus
}
#endif

#endif
