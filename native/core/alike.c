/* alike.c - which keys of a head are alike, kept from compression to compression
 *
 * The redundancy of R-KV needs, of every token, the most recent other token that it is like. Pairs
 * of tokens that a compression has compared need not be compared again: only the new tokens with
 * all others, and those tokens whose look-alike was evicted since. */
#include "core.h"

#include <string.h>

/* last i with x[i] > threshold, or -1 */
static int32_t ra_last_above(int32_t n, const float * x, float threshold) {
    for (; n >= 32; n -= 32) {
        int32_t n_above = 0;
        for (int32_t k = n - 32; k < n; ++k) {
            n_above += x[k] > threshold;
        }
        if (n_above > 0) {
            break;
        }
    }
    while (n > 0 && !(x[n - 1] > threshold)) {
        --n;
    }
    return n - 1;
}

/* index of position p in pos [n], ascending; RA_ALIKE_UNKNOWN if it is not there */
static int32_t ra_index_of(int32_t n, const int32_t * pos, int32_t p) {
    int32_t lo = 0;
    int32_t hi = n;
    while (lo < hi) {
        const int32_t mid = lo + (hi - lo) / 2;
        if (pos[mid] < p) {
            lo = mid + 1;
        } else {
            hi = mid;
        }
    }
    return lo < n && pos[lo] == p ? lo : RA_ALIKE_UNKNOWN;
}

int32_t ra_alike_begin(int32_t n_kv, const int32_t * pos, int32_t n_pos_scored,
                       const ra_alike * seen, int32_t * newer, int32_t * older) {
    int32_t n_old = n_kv;
    while (n_old > 0 && pos[n_old - 1] >= n_pos_scored) {
        --n_old;
        newer[n_old] = RA_ALIKE_NONE;
        older[n_old] = RA_ALIKE_NONE;
    }
    for (int32_t i = 0; i < n_old; ++i) {
        newer[i] = seen[i].newer < 0 ? seen[i].newer : ra_index_of(n_old, pos, seen[i].newer);
        older[i] = seen[i].older < 0 ? seen[i].older : ra_index_of(n_old, pos, seen[i].older);
    }
    return n_old;
}

void ra_alike_compare_new(int32_t n_old, int32_t row0, int32_t n_rows, const float * cos,
                          int32_t stride, float threshold, int32_t * newer, int32_t * older) {
    for (int32_t r = n_rows - 1; r >= 0; --r) {
        const int32_t j   = row0 + r;
        const float * row = cos + (size_t) r * (size_t) stride;
        older[j]          = ra_last_above(j, row, threshold);
        if (older[j] < 0) {
            continue; /* like none, so none is like it */
        }
        /* rows come newest first: what a new token was found to be like stays */
        for (int32_t i = 0; i <= older[j]; ++i) {
            newer[i] = row[i] > threshold && newer[i] < n_old ? j : newer[i];
        }
    }
}

int32_t ra_alike_list_unknown(int32_t n_old, const int32_t * newer, const int32_t * older,
                              int32_t * list) {
    int32_t n = 0;
    for (int32_t i = 0; i < n_old; ++i) {
        if (newer[i] == RA_ALIKE_UNKNOWN ||
            (newer[i] == RA_ALIKE_NONE && older[i] == RA_ALIKE_UNKNOWN)) {
            list[n++] = i;
        }
    }
    return n;
}

void ra_alike_compare_again(int32_t n_old, int32_t i, const float * row, float threshold,
                            int32_t * newer, int32_t * older) {
    const int32_t last = ra_last_above(n_old - i - 1, row + i + 1, threshold);
    newer[i]           = last < 0 ? RA_ALIKE_NONE : i + 1 + last;
    older[i]           = ra_last_above(i, row, threshold);
}

void ra_alike_finish(int32_t n_kv, int32_t head_dim, const float * unit, const int32_t * pos,
                     const int32_t * newer, const int32_t * older, float * acc, ra_alike * seen) {
    const size_t n = (size_t) head_dim;
    for (int32_t i = 0; i < n_kv; ++i) {
        const float * u      = unit + (size_t) i * n;
        const int32_t recent = newer[i] >= 0 ? newer[i] : older[i];
        acc[i] -= ra_dot(head_dim, u, u);
        if (recent >= 0) {
            acc[recent] -= ra_dot(head_dim, u, unit + (size_t) recent * n);
        }
        if (seen != NULL) {
            seen[i].newer = newer[i] < 0 ? newer[i] : pos[newer[i]];
            seen[i].older = older[i] < 0 ? older[i] : pos[older[i]];
        }
    }
    for (int32_t i = 0; i < n_kv; ++i) {
        acc[i] /= (float) n_kv;
    }
}
