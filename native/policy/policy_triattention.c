/* TriAttention (arXiv:2604.04921): how much attention a key will get at the distances to come, from the
 * centres around which the head's queries lie before the rotary embedding. Needs keys and centres.
 *
 *     S_k = mean_o Re( sum_f E[q_f] conj(k_f) e^{i w_f (D + o)} ) + sum_f (E|q_f| - |E[q_f]|) |k_f|
 *     Z_j = max_h z(S_h)_j      o: 1, 2, 4, ... 2^16; z: in standard deviations from the head's mean
 *
 * k is the key without its rotation by its position p, and D the distance P - p from the newest token.
 * So k_f e^{-i w_f (D + o)} is the key as the cache holds it, rotated by p, times e^{-i w_f (P + o)}: the
 * first sum is the product of the stored key with the centre rotated to P + o, and the mean over the
 * offsets is one factor per frequency. Values beyond the rotated ones count by their plain product. */
#include "policy.h"

#include <math.h>
#include <string.h>

enum { RA_N_OFFSETS = 17 };

/* one pair of values of a key, for one query head */
typedef struct ra_pair {
    int32_t a, b;
    double  re, im; /* what they are multiplied with */
    double  spread; /* E|q| - |E q| */
} ra_pair;

/* Pair f of a centre rotated to the positions p + o, mean over the offsets o. */
static ra_pair ra_pair_ahead(const ra_rope * rope, int32_t head_dim, const float * centre,
                             int32_t f, int32_t p) {
    const int32_t half = rope->n_rot / 2;
    ra_pair       pair = { .a = rope->offset + (rope->is_neox ? f : 2 * f),
                           .b = rope->offset + (rope->is_neox ? f + half : 2 * f + 1) };
    const double  w    = (double) rope->freq[f];
    double        re   = 0.0;
    double        im   = 0.0;
    double        c    = cos(w); /* e^{i w o}; squared, it is that of the next offset */
    double        s    = sin(w);
    for (int32_t i = 0; i < RA_N_OFFSETS; ++i) {
        re += c / RA_N_OFFSETS;
        im += s / RA_N_OFFSETS;
        const double c2 = c * c - s * s;
        s               = 2.0 * c * s;
        c               = c2;
    }
    const double cp = cos(w * p);
    const double sp = sin(w * p);
    const double tr = cp * re - sp * im;
    const double ti = cp * im + sp * re;
    const double qa = (double) centre[pair.a];
    const double qb = (double) centre[pair.b];
    pair.re         = qa * tr - qb * ti;
    pair.im         = qa * ti + qb * tr;
    pair.spread     = (double) centre[head_dim + f] - sqrt(qa * qa + qb * qb);
    return pair;
}

/* s [n_kv] <- S of one query head */
static void ra_tri_head(const ra_features * f, const float * centre, float * s) {
    const ra_rope * rope   = f->rope;
    const size_t    dim    = (size_t) f->head_dim;
    const int32_t   p      = f->pos[f->n_kv - 1];
    const int32_t   behind = rope->offset + rope->n_rot;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        const float * k   = f->keys + (size_t) j * dim;
        double        sum = 0.0;
        for (int32_t d = 0; d < rope->offset; ++d) {
            sum += (double) centre[d] * (double) k[d];
        }
        for (int32_t d = behind; d < f->head_dim; ++d) {
            sum += (double) centre[d] * (double) k[d];
        }
        s[j] = (float) sum;
    }
    for (int32_t i = 0; i < rope->n_rot / 2; ++i) {
        const ra_pair pair = ra_pair_ahead(rope, f->head_dim, centre, i, p);
        for (int32_t j = 0; j < f->n_kv; ++j) {
            const double a = (double) f->keys[(size_t) j * dim + (size_t) pair.a];
            const double b = (double) f->keys[(size_t) j * dim + (size_t) pair.b];
            s[j] += (float) (pair.re * a + pair.im * b + pair.spread * sqrt(a * a + b * b));
        }
    }
}

/* s [n] -> standard deviations from the mean; zeros where they are the same but for rounding */
static void ra_standardise(int32_t n, float * s) {
    double sum = 0.0;
    double sq  = 0.0;
    for (int32_t j = 0; j < n; ++j) {
        sum += (double) s[j];
    }
    const double mean = sum / n;
    for (int32_t j = 0; j < n; ++j) {
        const double x = (double) s[j] - mean;
        sq += x * x;
    }
    const double deviation = sqrt(sq / n);
    const bool   differ    = deviation > 1e-5 * fabs(mean);
    for (int32_t j = 0; j < n; ++j) {
        s[j] = differ ? (float) (((double) s[j] - mean) / deviation) : 0.0f;
    }
}

void ra_policy_triattention_score(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    const size_t n_centre = (size_t) ra_centre_values(f->head_dim);
    for (int32_t g = 0; g < f->n_group; ++g) {
        ra_tri_head(f, f->centres + (size_t) g * n_centre, f->work);
        ra_standardise(f->n_kv, f->work);
        for (int32_t j = 0; j < f->n_kv; ++j) {
            score[j] = g == 0 || f->work[j] > score[j] ? f->work[j] : score[j];
        }
    }
}
