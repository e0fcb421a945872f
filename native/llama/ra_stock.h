// ra_stock.h - the part of a budgeted memory that llama.cpp makes itself: caches of sliding windows,
// recurrent states, and caches without layers in the place of those that are ours
#pragma once

#include "llama-memory.h"

#include <memory>
#include <vector>

class llama_kv_cache;
class llama_kv_cache_iswa;
class llama_memory_hybrid;
class llama_memory_recurrent;
struct llama_cparams;
struct llama_model;

class ra_stock {
  public:
    // throws std::runtime_error
    //   takes_windows  the layers with a sliding window are ours, too
    ra_stock(const llama_model & model, const llama_memory_params & params,
             const llama_cparams & cparams, bool takes_windows);
    ~ra_stock();

    // [n_layer_all] whether the layer is left out: it is ours
    const std::vector<bool> & left_out() const { return taken; }

    // whether nothing is in it: all layers are left out
    bool is_empty() const { return windows == nullptr && recr == nullptr; }
    bool is_recurrent() const { return recr != nullptr; }

    // a batch of these micro-batches; NULL: there is no room for it
    llama_memory_context_ptr init_batch(const std::vector<llama_ubatch> & ubatches);
    llama_memory_context_ptr init_full();
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize);

    void clear(bool data);
    // Whether the sequence, which is longer, can go back to its first p0 positions: a window must still be
    // whole, and a recurrent state has no past.
    bool can_go_back(llama_seq_id seq_id, llama_pos p0) const;
    void drop(llama_seq_id seq_id, llama_pos p0); // goes back
    void forget(llama_seq_id seq_id) { drop(seq_id, 0); }
    void copy(llama_seq_id src, llama_seq_id dst); // into an empty sequence
    // first position that is present; 0 if it does not say
    llama_pos seq_pos_min(llama_seq_id seq_id) const;

    std::map<ggml_backend_buffer_type_t, size_t> breakdown() const;
    int64_t                                      bytes() const;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id) const;
    void state_read(llama_io_read_i & io, llama_seq_id seq_id);

    llama_memory_i & memory() const { return *mem; }

  private:
    llama_kv_cache * grown() const;
    void             clear_empty() const;

    std::vector<bool>               taken;
    std::unique_ptr<llama_memory_i> mem;

    // mem as what it is, or NULL
    llama_kv_cache *         kv      = nullptr;
    llama_kv_cache_iswa *    iswa    = nullptr;
    llama_memory_hybrid *    hybrid  = nullptr;
    llama_memory_recurrent * recr    = nullptr; // of a hybrid
    llama_kv_cache *         windows = nullptr; // of iswa, if the layers are in it

    uint32_t n_swa;
};

// Whether this thread is making the stock part of a budgeted memory.
bool ra_stock_is_made();
