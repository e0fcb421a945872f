// ra_graph_alibi.h - attention with biases by distance (ALiBi)
#pragma once

#include "llama-graph.h"
#include "ra_llama.h"
#include "ra_view.h"

#include <vector>

// Slope of query head `head` of the layer, as ggml computes it of max_alibi_bias.
float ra_alibi_slope(const ra_tensors & t, int32_t head);

// The positions of the rows that a graph attends, as an input.
class ra_alibi {
  public:
    void init(ggml_context * ctx, const ra_view & view, int32_t n_tokens, int32_t n_ahead);
    void set_input(const ra_view & view, int32_t n_tokens);

    // [n_span] f32 positions of the rows of a head, counted from some token of the sequence
    ggml_tensor * positions(ggml_context * ctx, int32_t il, int32_t ih) const;

  private:
    struct span {
        int32_t il, ih;
        int64_t at, n;
    };

    std::vector<span> spans;
    ggml_tensor *     rows = nullptr; // F32 [sum of spans]
};

// Attention of the query heads of KV head ih -> [head_dim_v * n_group, n_tokens], one product per query
// head, for each has a slope of its own.
//   k, v [head_dim, 1, n_span], mask [n_span, n_tokens] without the biases by distance,
//   positions [n_span]
ggml_tensor * ra_attend_alibi(const llm_graph_context & graph, const ra_attn & attn,
                              const ra_tensors & t, int32_t ih, ggml_tensor * k, ggml_tensor * v,
                              ggml_tensor * mask, ggml_tensor * positions);
