// ra_storage.h - what a budgeted cache holds: the bookkeeping, the tensors, and the memory under them
#pragma once

#include "cache.h"
#include "ggml-cpp.h"
#include "ra_tensors.h"

#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

struct llama_hparams;
struct llama_memory_params;
struct llama_model;

// std::runtime_error with the thread's last error
[[noreturn]] inline void ra_throw_last() {
    throw std::runtime_error(std::string("ReasonAlloc: ") + ra_last_error());
}

struct ra_cache_deleter {
    void operator()(ra_cache * c) const { ra_cache_free(c); }
};

// The layer whose rows layer il reads: its own, or, where it has none, the last one of its kind (with a sliding
// window or without) that has.
int32_t ra_layer_of_rows(const llama_hparams & hparams, int32_t il);

class ra_storage {
  public:
    // throws std::runtime_error; settings is taken over
    //   offload  each layer's tensors are on the device of the layer, else in host memory
    //   grows [>= n_layer]  whether the layer is ours
    ra_storage(const llama_model & model, const llama_memory_params & params, bool offload,
               const std::vector<bool> & grows, ra_settings * settings);

    int64_t kv_bytes() const;
    int64_t window_bytes() const;
    int64_t row_bytes() const; // K and V rows of one token, all layers that grow and their heads
    int64_t full_bytes(int64_t n_pos) const; // the same of n_pos tokens, and windows

    std::map<ggml_backend_buffer_type_t, size_t> breakdown() const;

    // forgets all tokens; with `data` the tensors are zeroed, too
    void clear(bool data);
    // ra_cache_set_protect(); where that splits an empty cache anew, the tensors are made anew, of as many
    // bytes in all. RA_STATUS_NO_MEMORY if that fails: then the split is as before.
    ra_status set_protect(int32_t n_protect);
    void      layout_changed();
    // takes over what another sequence of the same context holds, bit for bit. RA_STATUS_NO_MEMORY: then this
    // one is empty.
    ra_status copy_from(const ra_storage & src);

    ra_target target() { return { cache.get(), &tensors }; }

    std::unique_ptr<ra_cache, ra_cache_deleter> cache;

    std::vector<ra_tensors> tensors;              // [n_layer]
    uint64_t                layout       = 1;     // changes whenever rows move or segments change
    int32_t                 n_since      = 0;     // tokens appended since `layout` changed
    bool                    needs_window = false; // the policy wants attention logits

  private:
    void add_layers(const llama_model & model, const llama_memory_params & params, bool offload);
    void make_tensors();
    bool alloc_buffers();

    // shape of the tensors of one layer
    struct shape {
        size_t    device; // index below
        int64_t   head_dim_k, head_dim_v;
        ggml_type type_k, type_v;
        bool      has_own_v; // else V rows are the first values of K rows (MLA)
    };

    // one context of tensors, its buffer and the buffer's type, per device
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
    std::vector<ggml_backend_buffer_type_t>                           bufts;
    std::vector<shape>                                                shapes; // [n_layer]

    bool no_alloc; // sizes only
};
