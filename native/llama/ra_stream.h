// ra_stream.h - one sequence of a context: its cache, and what happened to it
#pragma once

#include "llama-cparams.h"
#include "llama.h"
#include "ra_storage.h"

struct ra_stream {
    ra_stream(const llama_model & model, const llama_memory_params & params, bool offload,
              const std::vector<bool> & grows, ra_settings * settings)
        : store(model, params, offload, grows, settings) {}

    void clear(bool data);

    // whether the tokens [p0, p1) can go, 0 <= p0; else false with ra_last_error()
    bool can_drop(llama_pos p0, llama_pos p1) const;
    // drops the tokens from p0 on, which must be able to go
    void drop(llama_pos p0);

    ra_storage store;
    int64_t    compress_us = 0; // since the last clear
};

// [n_seq_max] alike; grows [n_layer_all]: the layers that are ours. Throws std::runtime_error; settings is
// taken over.
std::vector<std::unique_ptr<ra_stream>> ra_make_streams(const llama_model &         model,
                                                        const llama_memory_params & params,
                                                        const llama_cparams &       cparams,
                                                        const std::vector<bool> &   grows,
                                                        ra_settings *               settings);
