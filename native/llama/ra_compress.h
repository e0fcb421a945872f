// ra_compress.h - the compressions of a cache whose rows are tensors
#pragma once

#include "ra_merge.h"
#include "ra_repack.h"
#include "ra_scorer.h"

class ra_compressor {
  public:
    // Reserves all scratch, so that a compression allocates nothing; with `measure` only sizes are taken.
    // Throws std::runtime_error. The arguments must outlive it.
    //   context_sched  whose backends compute
    //   gather_always  see ra_repacker
    ra_compressor(ra_cache & cache, const std::vector<ra_tensors> & tensors,
                  ggml_backend_sched_t context_sched, const ra_watch & watch, bool gather_always,
                  bool measure = false);

    // *n_layers: layers that were packed. If it fails, see lost_rows().
    ra_status run(int32_t * n_layers);

    // rows were lost when they were moved: this and the contents of the cache can only be dropped
    bool lost_rows() const { return repacker.lost_rows(); }

    int64_t bytes() const {
        return scratch.bytes() + scorer.bytes() + merger.bytes() + repacker.bytes();
    }

  private:
    ra_cache &  cache;
    ra_scratch  scratch; // of scores and moves
    ra_scorer   scorer;
    ra_merger   merger;
    ra_repacker repacker;
};
