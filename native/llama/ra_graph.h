// ra_graph.h - inputs of attention over segments, and the ways to attend (ra_graph*.cpp)
#pragma once

#include "llama-graph.h"
#include "ra_memory.h"

// how the heads of a layer are attended
enum ra_attend_way {
    RA_ATTEND_EVEN, // one op over a strided view: heads hold equally many rows at equal distances
    RA_ATTEND_BY_HEAD, // one op per KV head, and concatenations
    RA_ATTEND_BY_LAYER // one op over equal windows of the pool, with a mask per head
};

// rows of the pool that one op over a layer sees: head ih gets [ih * stride, ih * stride + n_rows)
struct ra_windows {
    int64_t stride  = 0;
    int64_t n_rows  = 0; // 0: the layer is attended in another way
    size_t  mask_at = 0; // first value of its masks in ra_graph_input::masks_in
};

class ra_graph_input : public llm_graph_input_attn_kv {
  public:
    ra_graph_input(const llm_graph_context & graph, const ra_memory_context * mctx);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    ggml_tensor * rows_of(ggml_context * ctx, int32_t il) const;
    ggml_tensor * mask_of(const llm_graph_context & graph, int32_t n_used, int32_t n_span) const;

    // rows of the segment that the graph attends, free ones included (masked)
    int32_t n_span(int32_t il, int32_t ih) const {
        return std::min(ra_mctx->n_used(il, ih, n_tokens) + n_ahead, ra_mctx->n_capacity(il, ih));
    }

    const ra_memory_context * ra_mctx; // of the micro-batch at hand
    int32_t                   n_tokens;
    int32_t                   n_ahead;    // n_tokens and the slack
    int32_t                   n_used_max; // most rows of a head when the graph was built
    uint64_t                  layout;     // of the cache when the graph was built; 0: worst case
    int32_t                   n_since;    // likewise, before the micro-batch

    std::vector<ra_attend_way> ways; // [n_layer]

    // one op per layer (ra_graph_layer.cpp)

    void          add_windows(const llm_graph_context & graph);
    void          set_windows();
    ggml_tensor * windows_mask(const llm_graph_context & graph, int32_t il);

    std::vector<ra_windows> windows; // [n_layer]

    std::vector<size_t> rows_at; // [n_layer] first entry of the layer in `rows`

    ggml_tensor * rows     = nullptr; // I64 [sum of n_head_kv * n_tokens] row of token t, head h
    ggml_tensor * window   = nullptr; // I64 [<= n_ring] slots of the newest queries
    ggml_tensor * mask     = nullptr; // F16/F32 [n_used_max + n_ahead, n_tokens]
    ggml_tensor * masks_in = nullptr; // F16 [sum of n_rows * n_head_kv, and padding]
    ggml_tensor * masks_on = nullptr; // the same, on the device that attends

  private:
    ra_attend_way way_of(const llm_graph_context & graph, int32_t il) const;
    bool          is_even(int32_t il) const;
};

// Whether one op serves the uneven heads of a layer (for a single token, with flash attention).
bool ra_attends_by_layer(const ra_memory & mem, int32_t il);

// Attention of a single token over the windows of layer il -> [head_dim_v * n_head, 1]
ggml_tensor * ra_attend_layer(const llm_graph_context & graph, ra_graph_input * inp,
                              const ra_tensors & t, ggml_tensor * q, float kq_scale, int il);
