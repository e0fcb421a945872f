// ra_repack.h - the moves of rows at a compression, wherever the pools are
#pragma once

#include "cache.h"
#include "ra_scratch.h"
#include "ra_tensors.h"

#include <array>

// A pool in host memory is packed in place. Of another the moves are made on a list of row numbers, and
// in the end one graph on the pool's device gathers the rows in their new order. A pool that this cannot
// serve is packed in a host copy.
class ra_repacker {
  public:
    // the arguments must outlive it
    //   gather_always  pools in host memory are packed as those on a device are
    ra_repacker(const ra_target & target, ra_scratch & scratch, bool gather_always);

    // makes its arrays, and what its graphs need in the scratch, large enough for the target at hand, too.
    // Throws std::runtime_error.
    void reserve();

    // ra_cache_ops; if end() fails, the rows of the layer are lost
    void      begin(int32_t il);
    void      move(int32_t il, int32_t dst, int32_t src, int32_t n);
    ra_status end(int32_t il);

    bool lost_rows() const { return is_lost; }

    // host memory, without the scratch
    int64_t bytes() const;

  private:
    enum way { IN_PLACE, GATHERED, STAGED };

    way           way_of(ggml_tensor * rows);
    ggml_tensor * pool(int32_t il, int i) const; // K (i = 0) or V (1) of a layer
    void          build(int32_t il);
    void          new_graph(int32_t n_slots);
    void          add_gather(ggml_tensor * rows);
    ggml_tensor * words_of(ggml_tensor * rows);

    const ra_target & target;
    ra_scratch &      scratch;
    const bool        gather_always;

    std::vector<std::array<way, 2>> ways; // [n_layer] of K and V; the same for all sequences
    std::vector<int32_t> src_of; // [n_slots] row that each row of the layer at hand is made from
    std::vector<uint8_t> staging[2]; // of K and V

    std::vector<uint8_t> meta; // tensor structs of a graph
    ggml_context_ptr     ctx;
    ggml_cgraph *        gf      = nullptr;
    ggml_tensor *        order   = nullptr; // I32 [n_slots]
    bool                 is_lost = false;
};
