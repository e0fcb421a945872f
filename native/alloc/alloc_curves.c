/* error allocation over all heads of all layers, when the cache is made: by measured curves
 *
 * A curve gives the error of a KV head's output, weighted by how much the model minds it, for budgets of a
 * grid (calibration measures it: the head's own stream replayed at each budget). The split of least summed
 * error gives one token after another to the head whose error falls most by it:
 *
 *   e_h(n)  = exp of the line through the points (grid_i, log error_hi), made to fall; then its lower convex
 *             hull, so that a fall behind a flat piece counts by its chord
 *   b_h     = shift + n_h,   sum n_h = n_heads * (B - shift),   n_h >= least,   greedy in e_h(n) - e_h(n + 1)
 *   shift   = tokens that stay in any case - those that stayed in the measurement
 *   least   = tokens that stay + max(1, error_least * (B - tokens that stay)), of the same measure
 *
 * Beyond the end of the grid nothing more is gained; what is left then goes to the heads that hold least.
 * Budgets of single heads after Ada-KV (arXiv:2407.11550) and DuoAttention (arXiv:2410.10819), which finds
 * that few heads retrieve and the others stream. */
#include "alloc.h"

#include <math.h>

/* gain [n] out: by how much the hull of the curve falls from lo + i to lo + i + 1 tokens */
static void ra_curve_gains(const double * error, const int32_t * grid, size_t n_grid, int32_t lo,
                           int32_t n, double * value, int32_t * hull, double * gain) {
    double least = INFINITY;
    size_t i     = 0;
    for (int32_t x = 0; x <= n; ++x) {
        const double at = lo + x;
        while (i + 2 < n_grid && at > grid[i + 1]) {
            ++i;
        }
        const double a = log(error[i] + 1e-300);
        const double b = n_grid > 1 ? log(error[i + 1] + 1e-300) : a;
        const double t = n_grid > 1 ? (at - grid[i]) / (double) (grid[i + 1] - grid[i]) : 0.0;
        const double e = exp(a + (b - a) * (t < 0.0 ? 0.0 : t > 1.0 ? 1.0 : t));
        least          = e < least ? e : least;
        value[x]       = least;
    }
    int32_t n_hull = 0;
    for (int32_t x = 0; x <= n; ++x) {
        while (n_hull >= 2) {
            const int32_t p = hull[n_hull - 2];
            const int32_t q = hull[n_hull - 1];
            if ((value[q] - value[p]) * (x - p) < (value[x] - value[p]) * (q - p)) {
                break;
            }
            --n_hull;
        }
        hull[n_hull++] = x;
    }
    for (int32_t h = 0; h + 1 < n_hull; ++h) {
        const int32_t p = hull[h];
        const int32_t q = hull[h + 1];
        for (int32_t x = p; x < q; ++x) {
            gain[x] = (value[p] - value[q]) / (q - p);
        }
    }
}

/* budgets [n_heads], all `least`, grow by n_left tokens; gains [n_heads, n] fall along each row */
static void ra_grow_by_gain(int32_t n_heads, int32_t n, const double * gains, int32_t least,
                            int64_t n_left, int32_t * budgets) {
    for (; n_left > 0; --n_left) {
        int32_t best   = 0;
        double  most   = -1.0;
        int32_t lowest = 0;
        for (int32_t h = 0; h < n_heads; ++h) {
            const int32_t x = budgets[h] - least;
            const double  g = x < n ? gains[(size_t) h * (size_t) n + (size_t) x] : 0.0;
            if (g > most) {
                most = g;
                best = h;
            }
            lowest = budgets[h] < budgets[lowest] ? h : lowest;
        }
        ++budgets[most > 0.0 ? best : lowest];
    }
}

ra_status ra_alloc_every_head_error(const ra_config * cfg, int32_t n_heads, int32_t * budgets) {
    const size_t n_grid = cfg->n_error_grid;
    if (n_grid == 0 || cfg->n_head_error != (size_t) n_heads * n_grid) {
        return ra_error(RA_STATUS_INVALID,
                        "layer allocator 'error' needs a curve of %zu points for each of the %d KV "
                        "heads, got %zu values: calibrate a profile for this model",
                        n_grid, n_heads, cfg->n_head_error);
    }
    const int32_t base  = ra_config_base(cfg, cfg->n_protect);
    const int32_t shift = base - cfg->error_base;
    const int32_t share = (int32_t) (cfg->error_least * (double) (cfg->budget - base));
    if (cfg->budget <= base) {
        return ra_error(
            RA_STATUS_BUDGET,
            "a budget of %d tokens cannot hold the %d that every head keeps (sinks or "
            "protected prompt, window) and 1 to choose: raise the budget or protect less",
            cfg->budget, base);
    }
    const int32_t least = base + (share > 1 ? share : 1);
    const int32_t end   = cfg->error_grid[n_grid - 1] + shift;
    const int32_t n     = end > least ? end - least : 1;
    const size_t  rows  = (size_t) n_heads * (size_t) n;
    double *      gains = ra_calloc(rows + (size_t) n + 1, sizeof(*gains));
    int32_t *     hull  = ra_calloc((size_t) n + 1, sizeof(*hull));
    if (gains == NULL || hull == NULL) {
        ra_free(gains);
        ra_free(hull);
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory splitting a budget over %d heads",
                        n_heads);
    }
    for (int32_t h = 0; h < n_heads; ++h) {
        ra_curve_gains(cfg->head_error + (size_t) h * n_grid, cfg->error_grid, n_grid,
                       least - shift, n, gains + rows, hull, gains + (size_t) h * (size_t) n);
        budgets[h] = least;
    }
    ra_grow_by_gain(n_heads, n, gains, least, (int64_t) n_heads * (cfg->budget - least), budgets);
    ra_free(gains);
    ra_free(hull);
    return RA_STATUS_OK;
}
