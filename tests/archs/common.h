// common.h - what llama.cpp's tests/test-llama-archs.cpp takes from its common/, for --out alone: so it is
// one file to compile. Decoding, which that needs not, aborts.
#pragma once

#include "llama-cpp.h"

#include <cstdlib>

struct common_batch {
    explicit common_batch(llama_context *) {}
    llama_batch_ext * get() { abort(); }
    void              clear() { abort(); }
    void              add(llama_token, llama_pos, llama_seq_id, bool) { abort(); }
};

inline void common_init() {}
