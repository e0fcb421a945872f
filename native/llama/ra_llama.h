// ra_llama.h - what the patched llama.cpp sources call. The patch includes this header and nothing
// else of ours; without a pending configuration every function here leaves llama.cpp as it is.
//
// A budgeted memory is made of two parts: pools of ours for the layers that grow, and the memory that
// llama.cpp itself makes for the model, with those layers left out of it. Graphs are given the latter,
// so that they cast it as ever; attention of the former is built by ra_graph_build_attn().
#pragma once

#include <cstdint>

struct ggml_tensor;
struct llama_cparams;
struct llama_memory_context_i;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;
struct llm_graph_context;

// --- llama_model::create_memory ---------------------------------------------------------------

// The budgeted memory, if this thread called ra_configure_next(); nullptr: go on, and make the stock
// memory (also of the part that stays stock). Throws std::runtime_error (text also in
// ra_last_error()) when the model or the parameters are not supported; the pending configuration is
// used up in any case.
llama_memory_i * ra_memory_create(const llama_model & model, const llama_memory_params & params,
                                  const llama_cparams & cparams);

// --- llama_kv_cache::llama_kv_cache -------------------------------------------------------------

// True if layer il of this cache goes into pools of ours, and gets no tensors here: while the stock part
// of a budgeted memory is made, for caches without a window (grows), and if windows have a budget, for all.
bool ra_takes_layer(uint32_t il, bool grows);

// --- llama_context ----------------------------------------------------------------------------

// Graph nodes needed on top of the stock graph's; 0 for a stock memory or NULL.
uint32_t ra_graph_extra_nodes(const llama_memory_i * mem);

// What graphs see of a batch: the stock part of a budgeted one, else mctx itself (may be NULL).
const llama_memory_context_i * ra_stock_part(const llama_memory_context_i * mctx);

// --- llm_graph_context ------------------------------------------------------------------------

// What attention of a layer is built from.
struct ra_attn {
    ggml_tensor * q;     // [head_dim_k, n_head, n_tokens]
    ggml_tensor * k;     // [head_dim_k, n_head_kv, n_tokens]; NULL: the layer reads another's rows
    ggml_tensor * v;     // [head_dim_v, n_head_kv, n_tokens]; likewise
    ggml_tensor * kq_b;  // must be NULL
    ggml_tensor * sinks; // [n_head] or NULL
    ggml_tensor * v_mla; // [head_dim_v, out, n_head] or NULL
    ggml_tensor * k_rot; // rotation that q and k have undergone, or NULL
    ggml_tensor * v_rot; // likewise v
    float         kq_scale;
    int           il;
};

// Writes k, v to their segments and attends over the segments of the layer -> [head_dim_v * n_head,
// n_tokens]. nullptr if the layer is not ours.
ggml_tensor * ra_graph_build_attn(const llm_graph_context & graph, const ra_attn & attn);
