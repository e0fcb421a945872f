// ra_debug.h - for tests: which ggml operations our graphs consist of, and what else runs on GPUs only.
// Exported by the library, but no part of the interface in reasonalloc.h.
#pragma once

#include "reasonalloc.h"

struct ggml_tensor;

#ifdef __cplusplus
extern "C" {
#endif

// Called for every node of a graph of a compression (scores, rows moved), before it runs.
typedef void (*ra_debug_node_cb)(void * user, const struct ggml_tensor * node);

// Sets (or with NULL removes) the callback of a context. Nodes of the model's own graph, attention
// included, are seen by llama_context_params.cb_eval.
RA_API ra_status ra_debug_watch_scores(struct llama_context * ctx, ra_debug_node_cb cb,
                                       void * user);

// on != 0: pools in host memory are packed as those on a device are. The scratch for it is reserved at the
// next decode or compression.
RA_API ra_status ra_debug_gather_always(struct llama_context * ctx, int32_t on);

// Writes a node as one line "OP type[ne0,ne1,ne2,ne3] type[...] ...", the node itself first, then its
// sources, to text [size] (cut and terminated as by snprintf). Returns the full length.
RA_API int32_t ra_debug_describe(const struct ggml_tensor * node, char * text, size_t size);

#ifdef __cplusplus
}
#endif
