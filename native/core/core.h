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

/* The same with one more logit, a sink, that takes its part and is not among x: what is left may sum to
 * less than 1. -INFINITY: none. */
void ra_softmax_sink(int32_t n, float * x, float sink);

/* dst[i] = max of src[i - kernel/2 .. i + kernel/2] clipped to [0, n): max-pool, stride 1, "same"
 * padding. kernel odd. dst must not overlap src. */
void ra_max_pool(int32_t n, int32_t kernel, const float * src, float * dst);

/* a . b of n values, in eight running sums */
float ra_dot(int32_t n, const float * a, const float * b);

/* x [n] <- H x / sqrt(n), H Sylvester's Hadamard matrix, in place. n a power of two. */
void ra_hadamard_transform(int32_t n, float * x);

/* out[j] = sum over i of unit_i . unit_j, i = j included: sums of cosines in linear time.
 *   unit [n_kv, head_dim]  keys of a head, normalised
 *   sum  [head_dim]        scratch */
void ra_key_cos_sums(int32_t n_kv, int32_t head_dim, const float * unit, float * sum, float * out);

/* out[i] = |row_i - mean of the rows|, Euclidean.
 *   rows [n, dim]; mean [dim] scratch */
void ra_mean_distance(int32_t n, int32_t dim, const float * rows, float * mean, float * out);

/* --- merge.c --------------------------------------------------------------------------------
 *
 * Merging in place of dropping: an evicted token j goes to the token i of its head that stays, may take
 * it, and whose key is most like its own. With A the attention that tokens receive (their mass),
 *
 *     V_i  =  (A_i V_i + sum_j A_j V_j) / (A_i + sum_j A_j)
 *     b_i +=  log((A_i + sum_j A_j) / A_i), at most bias_max
 *
 * b is added to the logits of key i, so that it carries the mass of those that went; keys stay. The
 * bias is what token merging calls proportional attention (ToMe, arXiv:2210.09461, sec. 3.2), with
 * attention mass in the place of counts. */

/* The i with can_take[i] of highest cosine; the older of equals; -1: none.
 *   cos [n_kv]  cosines of the evicted key with all keys of the head */
int32_t ra_merge_find_target(int32_t n_kv, const uint8_t * can_take, const float * cos);

/* The same where keys are compared once per pair: called for every token j, in ascending order.
 *   cos     [j]      cosines of key j with those before it
 *   closest [n_kv]   cosine with the target; before: INFINITY for tokens that stay, else -INFINITY
 *   target  [n_kv]   before: -1 */
void ra_merge_compare(int32_t j, const uint8_t * can_take, const float * cos, float * closest,
                      int32_t * target);

/* Likewise a token's twin: largest cosine with another one, from token `first` on, of more mass; -1: there is
 * none.
 *   mass [n_kv]
 *   cos  [j]         cosines of key j with those before it
 *   twin [n_kv] out  complete after the call for the last token */
void ra_twin_compare(int32_t j, int32_t first, const float * mass, const float * cos, float * twin);

/* Shares and biases of a head.
 *   target   [n_kv]      token that takes token j; -1: j stays, or goes without a trace
 *   mass     [n_kv]      >= 0
 *   bias     [n_kv]      before
 *   share    [n_kv] out  part of the merged value that is token i's own, or evicted j's
 *   bias_out [n_kv] out  after; of no meaning for what goes */
void ra_merge_shares(int32_t n_kv, const int32_t * target, const float * mass, float bias_max,
                     const float * bias, float * share, float * bias_out);

/* rows [n_kv, dim]: every row that takes others becomes the weighted mean; the others stay. */
void ra_merge_rows(int32_t n_kv, int32_t dim, const int32_t * target, const float * share,
                   float * rows);

/* --- alike.c --------------------------------------------------------------------------------
 *
 * The redundancy of R-KV (arXiv:2505.24133, sec. 3): of row i of a head's cosine matrix, the
 * diagonal counts 0, and so does the most recent other token whose cosine exceeds a threshold: the
 * newest of a group of look-alikes is not charged by it and survives. Token j's similarity is the
 * mean of column j. Differs from the authors' code: where no token exceeds the threshold, theirs
 * zeroes column 0; ours nothing.
 *
 * One head after another: _begin, _compare_new for blocks of rows, newest block first,
 * _list_unknown, _compare_again for each that it lists, _finish. Indices are those of the head's
 * n_kv tokens in position order; the first n_old of them were compared with each other before.
 *   newer, older [n_kv]  most recent newer, and older, token that each token is like: an index, or
 *                        one of the two below. `older` is looked for where there is no newer one. */
enum {
    RA_ALIKE_NONE    = -1,
    RA_ALIKE_UNKNOWN = -2,
};

/* What is kept of a token between compressions: positions of those two tokens, or as above. */
typedef struct ra_alike {
    int32_t newer;
    int32_t older;
} ra_alike;

/* Starts a head from what is kept of it. Returns n_old.
 *   pos          [n_kv] positions, ascending
 *   n_pos_scored positions below it were there at the last comparison. What is kept must be of then;
 *                of tokens from there on it is not read, and may point to tokens that are gone
 *   seen         [n_kv] what is kept */
int32_t ra_alike_begin(int32_t n_kv, const int32_t * pos, int32_t n_pos_scored,
                       const ra_alike * seen, int32_t * newer, int32_t * older);

/* Compares new tokens [row0, row0 + n_rows), row0 >= n_old, with all older ones.
 *   cos  cos[r * stride + i] is the cosine of tokens row0 + r and i, i in [0, row0 + r) */
void ra_alike_compare_new(int32_t n_old, int32_t row0, int32_t n_rows, const float * cos,
                          int32_t stride, float threshold, int32_t * newer, int32_t * older);

/* list [n_old]: tokens that must be compared with the old ones again; returns how many. */
int32_t ra_alike_list_unknown(int32_t n_old, const int32_t * newer, const int32_t * older,
                              int32_t * list);

/* Compares token i < n_old with the old ones; row [n_old]: its cosines with them. */
void ra_alike_compare_again(int32_t n_old, int32_t i, const float * row, float threshold,
                            int32_t * newer, int32_t * older);

/* acc [n_kv] in: ra_key_cos_sums(); out: the mean similarity of each token.
 *   unit [n_kv, head_dim]  keys, normalised
 *   seen [n_kv] out        what to keep; NULL: nothing */
void ra_alike_finish(int32_t n_kv, int32_t head_dim, const float * unit, const int32_t * pos,
                     const int32_t * newer, const int32_t * older, float * acc, ra_alike * seen);

#ifdef __cplusplus
}
#endif

#endif
