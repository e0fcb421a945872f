/* mem.c - the one place that allocates, so that tests can make it fail */
#include "core.h"

#include <stdlib.h>

static int64_t ra_calloc_countdown;

void ra_calloc_fail_at(int64_t n) {
    ra_calloc_countdown = n;
}

void * ra_calloc(size_t n, size_t size) {
    if (ra_calloc_countdown > 0 && --ra_calloc_countdown == 0) {
        return NULL;
    }
    return calloc(n > 0 ? n : 1, size > 0 ? size : 1);
}

void ra_free(void * p) {
    free(p);
}
