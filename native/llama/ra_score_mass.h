// ra_score_mass.h - the attention that the tokens of a head receive, summed over its queries on the device
#pragma once

#include "cache.h"
#include "ra_tensors.h"

// one head's part of a graph
struct ra_mass_job {
    int32_t ih;
    int32_t n_obs;   // of all pooled layers, one after the other
    int32_t n_group; // query heads of one layer
    int64_t n_pad;   // columns of its products, of which those from `skip` on are the head's tokens
    int64_t skip;

    ggml_tensor * mask  = nullptr; // F32 [n_pad, n_obs] input: biases, -INFINITY: not seen
    ggml_tensor * alibi = nullptr; // F32 [n_pad, 1, n_group] input: biases by distance; or none
};

// tensors that ra_mass_build() makes at most
static constexpr size_t RA_MASS_TENSORS = 13;

// Values that it makes, the inputs included, beside the products.
size_t ra_mass_values(const ra_tensors & t, int64_t n_pad, int64_t n_obs);

// Sums [n_pad], over the queries and query heads, of the attention as the model attends: with its soft cap,
// sinks and biases.
//   kq [n_pad, n_obs * n_group] products, query head after query head; is overwritten
ggml_tensor * ra_mass_build(ggml_context * ctx, const ra_tensors & t, ra_mass_job & j,
                            ggml_tensor * kq);

// Fills the inputs, once they have memory.
//   obs_pos positions of the queries of one layer, ascending; each sees some token of the head, at least its own
void ra_mass_set_inputs(const ra_tensors & t, const ra_layer & l, const ra_mass_job & j,
                        const int32_t * obs_pos);
