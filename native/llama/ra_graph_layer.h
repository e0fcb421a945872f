// ra_graph_layer.h - masks of a layer's heads of their own, and attention of one token as one masked op
#pragma once

#include "llama-graph.h"
#include "ra_view.h"

#include <vector>

// Whether one op serves the uneven heads of a layer (for a single token, with flash attention).
bool ra_attends_by_layer(const ra_cache & cache, const ra_tensors & t);

// what the masks of a layer's heads are for
enum ra_masks_kind {
    RA_MASKS_NONE, // the layer's heads share one mask (ra_graph_part::mask)
    RA_MASKS_FIT,  // one op over equal windows of the pool, wherever the segments lie; one token
    RA_MASKS_OWN   // windows that begin with the segments: biases of merged tokens, sliding windows
};

// rows of the pool that the masks of a layer are about: of head ih [ih * stride, ih * stride + n_rows), or
// as many from the beginning of its segment
struct ra_windows {
    ra_masks_kind kind    = RA_MASKS_NONE;
    int64_t       stride  = 0;
    int64_t       n_rows  = 0;
    int64_t       n_masks = 1; // of a head: one per token, or one for all
    size_t        mask_at = 0; // first value of its masks in ra_layer_attention::masks_in
};

// Windows and masks of the layers that have their own, for all of them in one input. For one token a mask
// holds the bias of each visible row and -infinity elsewhere; for more, only the biases, or in a layer with a
// sliding window, such a mask per token.
class ra_layer_attention {
  public:
    // kinds [n_layer]; n_ahead: rows for this and later tokens
    void init(const llm_graph_context & graph, const ra_view & view,
              const std::vector<ra_masks_kind> & kinds, int32_t n_tokens, int32_t n_ahead);
    void set_input(const ra_view & view);

    // attention of one token over the windows of layer il -> [head_dim_v * n_head, 1]; the heads of
    // RA_MASKS_OWN must be even. NULL, and the graph as before: the device of the pool has no such op.
    ggml_tensor * attend(const llm_graph_context & graph, const ra_tensors & t, ggml_tensor * q,
                         float kq_scale, int il);

    // the first n_span values of the masks of head ih, whose segment begins at row `offset` -> [n_span, n_masks]
    ggml_tensor * head_mask(const llm_graph_context & graph, int32_t il, int32_t ih, int32_t offset,
                            int64_t n_span);

  private:
    void   add_windows(const ra_view & view, int32_t il, ra_masks_kind kind, int32_t n_ahead);
    void   keep_biases(const ra_view & view);
    void   set_windows(const ra_view & view);
    void   set_mask(const ra_windows & w, size_t begin, const void * values, int32_t i,
                    int64_t n_dead, int64_t n_visible);
    size_t mask_begin(const ra_windows & w, int32_t ih, int32_t offset) const;
    ggml_tensor * masks(const llm_graph_context & graph);

    std::vector<ra_windows> windows; // [n_layer]
    std::vector<uint8_t>    biases;  // as masks_in; empty if no layer has any

    int32_t n_tokens = 0;
    size_t  n_values = 0; // of all masks

    ggml_tensor * masks_in = nullptr; // F16/F32 [sum of n_rows * n_head_kv, and padding]
    ggml_tensor * masks_on = nullptr; // the same, on the device that attends
};
