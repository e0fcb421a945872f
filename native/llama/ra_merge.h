// ra_merge.h - merges rows of V as engine/merge.c has planned
#pragma once

#include "cache.h"
#include "ra_tensors.h"

class ra_merger {
  public:
    // the target must outlive it
    ra_merger(const ra_target & target);

    // makes the scratch large enough for the target at hand, too
    void reserve();

    // ra_cache_ops.merge_rows
    void run(int32_t il);

    int64_t bytes() const;

  private:
    const ra_cache &                cache() const { return *target.cache; }
    const std::vector<ra_tensors> & tensors() const { return *target.tensors; }

    const ra_target & target;

    std::vector<float>   values; // [rows of a head, head_dim_v] f32
    std::vector<uint8_t> rows;   // the same as they are stored, where they are not in host memory
};
