// ra_tensors.h - the tensors of a budgeted cache
#pragma once

#include "ra_rope.h"

#include <cstdint>

// the tensors of one layer with attention
struct ra_tensors {
    ggml_tensor * k = nullptr; // [head_dim_k, n_slots] type_k
    ggml_tensor * v = nullptr; // [head_dim_v, n_slots] type_v
    ggml_tensor * q = nullptr; // [head_dim_k * n_head, n_ring] f32 or q8_0, slot = pos % n_ring
    int32_t       n_head    = 0;
    int32_t       n_head_kv = 0;
    float         kq_scale  = 0.0f; // as the model's graph applies it
    ra_rope_op    rope;             // likewise, of the keys; known where the policy asks for it
    int32_t       n_hadamard = 0; // likewise: K rows are rotated in blocks of so many values, 0: not at all
    int32_t       n_hadamard_v = 0; // likewise V rows
};
