// ra_compress.h - the compressions of a cache whose rows are tensors
#pragma once

#include "ra_merge.h"
#include "ra_repack.h"
#include "ra_scorer.h"

// One for all sequences of a context: compressions run one after the other, in the same scratch.
class ra_compressor {
  public:
    // Reserves all scratch for any of the targets, so that a compression allocates nothing; with `measure`
    // only sizes are taken. Throws std::runtime_error.
    //   context_sched  whose backends compute
    //   gather_always  see ra_repacker
    ra_compressor(const std::vector<ra_target> & targets, ggml_backend_sched_t context_sched,
                  const ra_watch & watch, bool gather_always, bool measure = false);

    // Compresses one of the targets. *n_layers: layers that were packed. If it fails, see lost_rows().
    ra_status run(const ra_target & what, int32_t * n_layers);

    // rows were lost when they were moved: this and the contents of the sequence can only be dropped
    bool lost_rows() const { return repacker.lost_rows(); }

    int64_t bytes() const {
        return scratch.bytes() + scorer.bytes() + merger.bytes() + repacker.bytes();
    }

  private:
    ra_target   target;  // at hand
    ra_scratch  scratch; // of scores and moves
    ra_scorer   scorer;
    ra_merger   merger;
    ra_repacker repacker;
};
