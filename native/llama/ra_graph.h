// ra_graph.h - inputs of attention over segments, and the ways to attend (ra_graph*.cpp)
#pragma once

#include "llama-graph.h"
#include "ra_graph_alibi.h"
#include "ra_graph_layer.h"
#include "ra_view.h"

// how the heads of a layer are attended
enum ra_attend_way {
    RA_ATTEND_EVEN, // one op over a strided view: heads hold equally many rows at equal distances
    RA_ATTEND_BY_HEAD, // one op per KV head, and concatenations
    RA_ATTEND_BY_LAYER // one op over equal windows of the pool, with a mask per head
};

// what one sequence of a micro-batch needs
class ra_graph_part {
  public:
    ra_graph_part(const llm_graph_context & graph, const ra_part & part);

    void set_input(const llama_ubatch & ubatch);
    // whether the graph serves another micro-batch; then that one is at hand
    bool can_reuse(const ra_part & part);

    ggml_tensor * rows_of(ggml_context * ctx, int32_t il) const;
    ggml_tensor * mask_of(const llm_graph_context & graph, int32_t n_used, int32_t n_span) const;
    // the same of head ih of layer il, with the biases that merging has left, and its window
    ggml_tensor * mask_of_head(const llm_graph_context & graph, int32_t il, int32_t ih);

    // rows of the segment that the graph attends, free ones included (masked)
    int32_t n_span(int32_t il, int32_t ih) const { return view.n_span(il, ih, n_tokens, n_ahead); }

    ra_view  view;  // of the micro-batch at hand
    int32_t  first; // of its tokens in the micro-batch
    int32_t  n_tokens;
    int32_t  n_ahead;    // n_tokens and the slack
    int32_t  n_used_max; // most rows of a head when the graph was built
    uint64_t layout;     // of the cache when the graph was built; 0: worst case
    int32_t  n_since;    // likewise, before the micro-batch

    std::vector<ra_attend_way> ways; // [n_layer]
    std::vector<bool>
        has_masks; // [n_layer] its heads have masks of their own: of biases or windows

    ra_alibi alibi; // where the model has it

    ra_layer_attention by_layer; // of layers that have masks of their own, or RA_ATTEND_BY_LAYER

    std::vector<size_t> rows_at; // [n_layer] first entry of the layer in `rows`

    ggml_tensor * rows   = nullptr; // I64 [sum of n_head_kv * n_tokens] row of token t, head h
    ggml_tensor * window = nullptr; // I64 [<= n_ring] slots of the newest queries
    ggml_tensor * mask   = nullptr; // F16/F32 [n_used_max + n_ahead, n_tokens]

  private:
    ra_attend_way way_of(const llm_graph_context & graph, int32_t il) const;
    bool          is_even(int32_t il) const;
    bool          has_bias(int32_t il) const;
    bool          has_dead(int32_t il) const;
};

class ra_graph_input : public llm_graph_input_i {
  public:
    ra_graph_input(const llm_graph_context & graph, const ra_batch_view & batch);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    std::vector<ra_graph_part> parts; // one per sequence, in the order of their tokens
};

// Most nodes that attention over the budgeted caches of n_seq sequences adds to the stock graph.
uint32_t ra_graph_count_nodes(const ra_storage & store, uint32_t n_seq);
