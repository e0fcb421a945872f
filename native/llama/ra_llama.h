// ra_llama.h - what the patched llama.cpp sources call. The patch includes this header and nothing
// else of ours; without a pending configuration every function here leaves llama.cpp as it is.
#pragma once

#include <cstdint>

struct ggml_tensor;
struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;
struct llm_graph_context;
class llm_graph_input_attn_kv;

// --- llama_model::create_memory ---------------------------------------------------------------

// True if this thread called ra_configure_next(): the next cache is ours. Throws std::runtime_error
// (text also in ra_last_error()) when the model or the parameters are not supported; the pending
// configuration is used up in any case.
bool ra_memory_wanted(const llama_model & model, const llama_memory_params & params,
                      const llama_cparams & cparams);

// The budgeted cache; call where the one plain attention cache would be made. Throws like above.
llama_memory_i * ra_memory_create(const llama_model & model, const llama_memory_params & params,
                                  const llama_cparams & cparams);

// mem if it is a budgeted cache; else deletes it and throws: the model took another branch.
llama_memory_i * ra_memory_require(const llama_model & model, llama_memory_i * mem);

// --- llama_context ----------------------------------------------------------------------------

// Graph nodes needed on top of the stock graph's; 0 for a stock cache or NULL.
uint32_t ra_graph_extra_nodes(const llama_memory_i * mem);

// --- llm_graph_context ------------------------------------------------------------------------

// Inputs of attention over a budgeted cache, added to the graph; NULL when the cache is stock.
llm_graph_input_attn_kv * ra_graph_build_input(const llm_graph_context & graph);

// Whether `inp` was made by ra_graph_build_input().
bool ra_graph_is_input(const llm_graph_input_attn_kv * inp);

// Writes k_cur, v_cur to their segments and attends over the segments of layer il.
//   q_cur [head_dim_k, n_head, n_tokens], k_cur [head_dim_k, n_head_kv, n_tokens],
//   v_cur [head_dim_v, n_head_kv, n_tokens]   ->   [head_dim_v * n_head, n_tokens]
ggml_tensor * ra_graph_build_attn(const llm_graph_context & graph, llm_graph_input_attn_kv * inp,
                                  ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur,
                                  ggml_tensor * sinks, float kq_scale, int il);
