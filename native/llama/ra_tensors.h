// ra_tensors.h - the tensors of a budgeted cache
#pragma once

#include "ra_rope.h"

#include <cstdint>
#include <vector>

// from a product q.k to the logit of attention: after * cap * tanh(before * x); cap 0: after * x
struct ra_logit_cap {
    float before = 0.0f;
    float cap    = 0.0f;
    float after  = 0.0f;
};

// the tensors of one layer with attention
struct ra_tensors {
    ggml_tensor * k = nullptr; // [head_dim_k, n_slots] type_k
    ggml_tensor * v = nullptr; // [head_dim_v, n_slots] type_v; MLA: the first values of k
    // [head_dim_k * n_head, n_ring * n_pooled] f32 or q8_0: of each pooled layer n_ring, slot = pos % n_ring
    ggml_tensor * q              = nullptr;
    float         max_alibi_bias = 0.0f; // biases by distance (ra_alibi_slope()); 0: none
    int32_t       n_head         = 0;
    int32_t       n_head_kv      = 0;
    int32_t       n_readers      = 1; // layers that attend to its rows, itself included
    int32_t       n_pooled = 1; // of these, those whose queries are remembered: itself, or all
    // as the model's graph has it
    ra_logit_cap  logit;            // of attention
    ggml_tensor * sinks = nullptr;  // [n_head] f32, a weight; NULL: none
    ra_rope_op    rope;             // of the keys; known where the policy asks for it
    int32_t       n_hadamard   = 0; // K rows are rotated in blocks of so many values, 0: not at all
    int32_t       n_hadamard_v = 0; // likewise V rows

    int64_t row_bytes() const { // of one token and head
        return k == nullptr ? 0 : (int64_t) (k->nb[1] + (has_own_v() ? v->nb[1] : 0));
    }
    // query heads whose logits a KV head has
    int32_t n_group() const { return n_own() * n_pooled; }
    int32_t n_own() const { return n_head / n_head_kv; } // of one layer
    bool    has_own_v() const { return v != nullptr && v->view_src == nullptr; }
};

struct ra_cache;

// what a compression works on: the bookkeeping and the tensors of one sequence
struct ra_target {
    ra_cache *                      cache   = nullptr;
    const std::vector<ra_tensors> * tensors = nullptr; // [n_layer]
};
