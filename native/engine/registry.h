/* registry.h - the tables that a newcomer edits: policies and allocators by name */
#ifndef RA_REGISTRY_H
#define RA_REGISTRY_H

#include "alloc.h"
#include "policy.h"

#ifdef __cplusplus
extern "C" {
#endif

/* NULL when there is none of that name; name == NULL: NULL. */
const ra_policy *       ra_policy_find(const char * name);
const ra_alloc_layers * ra_alloc_layers_find(const char * name);
const ra_alloc_heads *  ra_alloc_heads_find(const char * name);

#ifdef __cplusplus
}
#endif

#endif
