/* status.c - status names, versions, and the thread's last error */
#include "core.h"

#include <stdarg.h>
#include <stdio.h>

#define RA_ERROR_BYTES 512

static _Thread_local char ra_error_text[RA_ERROR_BYTES];

ra_status ra_error(ra_status status, const char * fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(ra_error_text, sizeof(ra_error_text), fmt, args);
    va_end(args);
    return status;
}

void ra_error_clear(void) {
    ra_error_text[0] = '\0';
}

const char * ra_last_error(void) {
    return ra_error_text;
}

const char * ra_status_name(ra_status status) {
    switch (status) {
        case RA_STATUS_OK: return "RA_STATUS_OK";
        case RA_STATUS_INVALID: return "RA_STATUS_INVALID";
        case RA_STATUS_UNSUPPORTED: return "RA_STATUS_UNSUPPORTED";
        case RA_STATUS_NO_MEMORY: return "RA_STATUS_NO_MEMORY";
        case RA_STATUS_BUDGET: return "RA_STATUS_BUDGET";
        case RA_STATUS_NOT_FOUND: return "RA_STATUS_NOT_FOUND";
        case RA_STATUS_COMPUTE: return "RA_STATUS_COMPUTE";
    }
    return "RA_STATUS_UNKNOWN";
}

int32_t ra_abi_version(void) {
    return RA_ABI_VERSION;
}

#ifndef RA_VERSION
#    define RA_VERSION "0.0.0+unknown"
#endif

const char * ra_version(void) {
    return RA_VERSION;
}

size_t ra_sizeof_config(void) {
    return sizeof(ra_config);
}

size_t ra_sizeof_stats(void) {
    return sizeof(ra_stats);
}

size_t ra_sizeof_head_arrays(void) {
    return sizeof(ra_head_arrays);
}

size_t ra_sizeof_trace_event(void) {
    return sizeof(ra_trace_event);
}

size_t ra_sizeof_head_stats(void) {
    return sizeof(ra_head_stats);
}
