// ra_merge.h - merges rows of V as engine/merge.c has planned
#pragma once

#include "cache.h"
#include "ra_tensors.h"

class ra_merger {
  public:
    // the arguments must outlive it; reserves its scratch
    ra_merger(const ra_cache & cache, const std::vector<ra_tensors> & tensors);

    // ra_cache_ops.merge_rows
    void run(int32_t il);

    int64_t bytes() const;

  private:
    const ra_cache &                cache;
    const std::vector<ra_tensors> & tensors;

    std::vector<float>   values; // [rows of a head, head_dim_v] f32
    std::vector<uint8_t> rows;   // the same as they are stored, where they are not in host memory
};
