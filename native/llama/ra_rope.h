// ra_rope.h - how a model rotates keys and queries by their positions, as its graph says
#pragma once

#include "ggml.h"
#include "reasonalloc.h"

#include <vector>

// the RoPE of a layer, as one node of a graph has it
struct ra_rope_op {
    bool                is_known    = false;
    int32_t             n_rot       = 0; // 0: nothing is rotated
    int32_t             offset      = 0;
    int32_t             is_neox     = 0;
    int32_t             n_ctx_orig  = 0;
    float               freq_base   = 0.0f;
    float               freq_scale  = 0.0f;
    float               ext_factor  = 0.0f;
    float               beta_fast   = 0.0f;
    float               beta_slow   = 0.0f;
    const ggml_tensor * freq_factor = nullptr; // [>= n_rot / 2] f32, a weight; may be NULL
};

// The RoPE behind x, a tensor [head_dim, n_head, n_tokens] of Q or K as it is attended with; a Hadamard
// rotation of the stock cache after it does not count. RA_STATUS_UNSUPPORTED if something else was done
// to the rows after they were rotated, or if it is of another kind than NORM and NEOX.
ra_status ra_rope_find(const ggml_tensor * x, ra_rope_op * op);

// [n_rot / 2] radians per position, as ggml's op computes them; reads freq_factor from its device
std::vector<float> ra_rope_freqs(const ra_rope_op & op);
