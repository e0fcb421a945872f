// ra_scratch.h - the memory that a compression computes in, on the backends of the context
#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <vector>

static constexpr size_t RA_SCRATCH_MAX_NODES = 512; // of a graph

// for tests: called for every node of a graph before it runs
struct ra_watch {
    void (*cb)(void * user, const ggml_tensor * node) = nullptr;
    void * user                                       = nullptr;
};

// One scheduler for all graphs of a compression, which run one after the other.
class ra_scratch {
  public:
    // backends: those of context_sched; with `measure` nothing is reserved, only sizes are taken.
    // Throws std::runtime_error.
    ra_scratch(ggml_backend_sched_t context_sched, const ra_watch & watch, bool measure);

    // makes the scratch large enough for gf, too. Throws std::runtime_error; what: for its text.
    void reserve(ggml_cgraph * gf, const char * what);

    // places the tensors of gf; then its inputs can be set. false: out of memory
    bool        alloc(ggml_cgraph * gf);
    ggml_status compute(ggml_cgraph * gf);

    // whether one backend holds buf and has all operations of gf
    bool can_run(ggml_cgraph * gf, ggml_backend_buffer_t buf) const;

    int64_t bytes() const;

  private:
    const ra_watch &       watch;
    ggml_backend_sched_ptr sched;
    std::vector<size_t>    measured; // bytes per backend, where nothing is reserved
};
