// ra_repack.h - the moves of rows at a compression, wherever the pools are
#pragma once

#include "cache.h"
#include "ra_scratch.h"
#include "ra_tensors.h"

// A pool in host memory is packed in place. Of another the moves are made on a list of row numbers, and
// in the end one graph on the pool's device gathers the rows in their new order. A pool that this cannot
// serve is packed in a host copy.
class ra_repacker {
  public:
    // reserves what its graphs need in the scratch; throws std::runtime_error. The arguments must
    // outlive it.
    //   gather_always  pools in host memory are packed as those on a device are
    ra_repacker(const ra_cache & cache, const std::vector<ra_tensors> & tensors,
                ra_scratch & scratch, bool gather_always);

    // ra_cache_ops; if end() fails, the rows of the layer are lost
    void      begin(int32_t il);
    void      move(int32_t il, int32_t dst, int32_t src, int32_t n);
    ra_status end(int32_t il);

    bool lost_rows() const { return is_lost; }

    // host memory, without the scratch
    int64_t bytes() const;

  private:
    enum way { IN_PLACE, GATHERED, STAGED };

    // K or V of a layer
    struct pool {
        ggml_tensor *          rows;
        way                    how;
        std::vector<uint8_t> * staging;
    };

    way           way_of(ggml_tensor * rows, bool gather_always);
    void          build(int32_t il);
    void          new_graph(int32_t n_slots);
    void          add_gather(ggml_tensor * rows);
    ggml_tensor * words_of(ggml_tensor * rows);

    const ra_cache &     cache;
    ra_scratch &         scratch;
    std::vector<pool>    pools;  // [n_layer][2]
    std::vector<int32_t> src_of; // [n_slots] row that each row of the layer at hand is made from

    std::vector<uint8_t> staging_k, staging_v;

    std::vector<uint8_t> meta; // tensor structs of a graph
    ggml_context_ptr     ctx;
    ggml_cgraph *        gf      = nullptr;
    ggml_tensor *        order   = nullptr; // I32 [n_slots]
    bool                 is_lost = false;
};
