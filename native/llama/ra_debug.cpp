// ra_debug.cpp - see ra_debug.h
#include "ra_debug.h"

#include "ra_memory.h"

static std::string ra_describe(const ggml_tensor * t) {
    std::string text = std::string(" ") + ggml_type_name(t->type) + "[";
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        text += (i > 0 ? "," : "") + std::to_string(t->ne[i]);
    }
    return text + "]";
}

int32_t ra_debug_describe(const ggml_tensor * node, char * text, size_t size) {
    std::string line = ggml_op_desc(node) + ra_describe(node);
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (node->src[i] != nullptr) {
            line += ra_describe(node->src[i]);
        }
    }
    return snprintf(text, size, "%s", line.c_str());
}

static ra_status ra_debug_not_found() {
    return ra_error(RA_STATUS_NOT_FOUND, "this context has no budgeted cache");
}

ra_status ra_debug_gather_always(llama_context * ctx, int32_t on) {
    ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr) {
        return ra_debug_not_found();
    }
    mem->gather_always(on != 0);
    return RA_STATUS_OK;
}

ra_status ra_debug_watch_scores(llama_context * ctx, ra_debug_node_cb cb, void * user) {
    ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr) {
        return ra_debug_not_found();
    }
    mem->watch = { cb, user };
    return RA_STATUS_OK;
}
