// ra_graph_layer.h - attention of one token over the uneven heads of a layer, as one masked op
#pragma once

#include "llama-graph.h"
#include "ra_view.h"

#include <vector>

// Whether one op serves the uneven heads of a layer (for a single token, with flash attention).
bool ra_attends_by_layer(const ra_cache & cache, const ra_tensors & t);

// rows of the pool that one op over a layer sees: head ih gets [ih * stride, ih * stride + n_rows)
struct ra_windows {
    int64_t stride  = 0;
    int64_t n_rows  = 0; // 0: the layer is attended in another way
    size_t  mask_at = 0; // first value of its masks in ra_layer_attention::masks_in
};

// Windows and masks of the layers that are attended so, for all of them in one input.
class ra_layer_attention {
  public:
    // is_taken [n_layer]: the layers; n_ahead: rows for this and later tokens
    void init(const llm_graph_context & graph, const ra_view & view,
              const std::vector<bool> & is_taken, int32_t n_ahead);
    void set_input(const ra_view & view);

    // attention over the windows of layer il -> [head_dim_v * n_head, 1]
    ggml_tensor * attend(const llm_graph_context & graph, const ra_tensors & t, ggml_tensor * q,
                         float kq_scale, int il);

  private:
    ggml_tensor * mask_of(const llm_graph_context & graph, int32_t il, int32_t n_head_kv);

    std::vector<ra_windows> windows; // [n_layer]

    ggml_tensor * masks_in = nullptr; // F16 [sum of n_rows * n_head_kv, and padding]
    ggml_tensor * masks_on = nullptr; // the same, on the device that attends
};
