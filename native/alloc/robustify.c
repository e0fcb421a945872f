/* robustify.c - from a measured demand to whole-token budgets; one pipeline for layers and heads
 *
 * ReasonAlloc, arXiv:2606.11164:
 *   1. w_i = d_i^gamma                                     flatten
 *   2. w_i = clip(w_i, lo * mean(w), hi * mean(w))         no share far from the mean
 *   3. x_i = clip(s * w_i, floor, cap), s such that sum(x) = total
 *   4. whole tokens by largest remainder, so that the sum is exact
 * where cap = hi * total / n. The paper rescales by one factor in step 3 and does not say what becomes
 * of a floor or cap that this breaks; here the factor s is the one that honours both. */
#include "alloc.h"

#include <math.h>

static double ra_clip(double x, double lo, double hi) {
    return x < lo ? lo : (x > hi ? hi : x);
}

/* sum of clip(s * w_i, lo, hi) */
static double ra_clipped_sum(int32_t n, const double * w, double s, double lo, double hi) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; ++i) {
        sum += ra_clip(s * w[i], lo, hi);
    }
    return sum;
}

/* the s with ra_clipped_sum(s) == total, by bisection; exists since n*lo <= total <= n*hi, w > 0 */
static double ra_solve_scale(int32_t n, const double * w, double total, double lo, double hi) {
    double a = 0.0;
    double b = 1.0;
    while (ra_clipped_sum(n, w, b, lo, hi) < total && b < 1e300) {
        b *= 2.0;
    }
    for (int i = 0; i < 200; ++i) {
        const double mid = 0.5 * (a + b);
        if (ra_clipped_sum(n, w, mid, lo, hi) < total) {
            a = mid;
        } else {
            b = mid;
        }
    }
    return b;
}

/* w [n] <- steps 1 and 2; all equal when there is no demand at all */
static void ra_weights(const ra_robustify_params * p, int32_t n, const double * demand,
                       double * w) {
    double mean = 0.0;
    double max  = 0.0;
    for (int32_t i = 0; i < n; ++i) {
        max = demand[i] > max ? demand[i] : max;
    }
    for (int32_t i = 0; i < n; ++i) {
        w[i] = max > 0.0 ? pow(demand[i] / max, p->gamma) : 1.0;
        mean += w[i] / n;
    }
    for (int32_t i = 0; i < n; ++i) {
        w[i] = ra_clip(w[i], p->lo * mean, p->hi * mean);
        w[i] = w[i] > 1e-12 ? w[i] : 1e-12;
    }
}

/* budgets [n] <- x [n] rounded to whole tokens, sum == total: largest remainder, ties to the lower
 * index. x is overwritten by the remainders. */
static void ra_round_to_total(int32_t n, double * x, int64_t total, int32_t * budgets) {
    int64_t left = total;
    for (int32_t i = 0; i < n; ++i) {
        budgets[i] = (int32_t) floor(x[i] + 1e-9);
        x[i] -= budgets[i];
        left -= budgets[i];
    }
    for (; left > 0; --left) {
        int32_t best = 0;
        for (int32_t i = 1; i < n; ++i) {
            best = x[i] > x[best] + 1e-9 ? i : best;
        }
        ++budgets[best];
        x[best] -= 1.0;
    }
}

ra_status ra_robustify(const ra_robustify_params * p, int32_t n, const double * demand,
                       int64_t total, int32_t floor_tokens, int32_t * budgets) {
    if (p == NULL || n < 1 || demand == NULL || budgets == NULL || total < 0 ||
        total > (int64_t) n * RA_MAX_TOKENS || floor_tokens < 0 || !(p->gamma >= 0.0) ||
        !(p->lo >= 0.0) || !(p->lo <= 1.0) || !(p->hi >= 1.0) || !isfinite(p->gamma) ||
        !isfinite(p->hi)) {
        return ra_error(RA_STATUS_INVALID,
                        "robustify: n = %d, total = %lld, or its parameters are out of range", n,
                        (long long) total);
    }
    for (int32_t i = 0; i < n; ++i) {
        if (!isfinite(demand[i]) || demand[i] < 0.0) {
            return ra_error(RA_STATUS_INVALID, "demand[%d] = %g must be finite and not negative", i,
                            demand[i]);
        }
    }
    if ((int64_t) n * floor_tokens > total) {
        return ra_error(RA_STATUS_BUDGET,
                        "%lld tokens cannot give each of %d shares its floor of %d: raise the "
                        "budget or protect less",
                        (long long) total, n, floor_tokens);
    }
    double * w = ra_calloc((size_t) n, sizeof(*w));
    if (w == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory splitting a budget in %d", n);
    }
    const double mean = (double) total / n;
    double       cap  = floor(p->hi * mean + 1e-9);
    cap               = cap < ceil(mean) ? ceil(mean) : cap;
    cap               = cap < floor_tokens ? floor_tokens : cap;
    ra_weights(p, n, demand, w);
    const double s = ra_solve_scale(n, w, (double) total, floor_tokens, cap);
    for (int32_t i = 0; i < n; ++i) {
        w[i] = ra_clip(s * w[i], floor_tokens, cap);
    }
    ra_round_to_total(n, w, total, budgets);
    ra_free(w);
    return RA_STATUS_OK;
}
