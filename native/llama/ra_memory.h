// ra_memory.h - the budgeted cache as a llama.cpp memory module
#pragma once

#include "cache.h"
#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-memory.h"
#include "llama-model.h"
#include "ra_debug.h"

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

class ra_scorer;

// std::runtime_error with the thread's last error
[[noreturn]] inline void ra_throw_last() {
    throw std::runtime_error(std::string("ReasonAlloc: ") + ra_last_error());
}

// the tensors of one layer with attention
struct ra_tensors {
    ggml_tensor * k         = nullptr; // [head_dim_k, n_slots] type_k
    ggml_tensor * v         = nullptr; // [head_dim_v, n_slots] type_v
    ggml_tensor * q         = nullptr; // [head_dim_k * n_head, n_ring] f32, slot = pos % n_ring
    int32_t       n_head    = 0;
    int32_t       n_head_kv = 0;
    float         kq_scale  = 0.0f; // as the model's graph applies it
};

// a Hadamard rotation of rows, in blocks of n values; n = 0: none
struct ra_rotation {
    int32_t            n = 0;
    std::vector<float> values; // [n, n]
};

struct ra_cache_deleter {
    void operator()(ra_cache * c) const { ra_cache_free(c); }
};

// Appends to every head; compresses when a segment is full. One sequence (id 0).
class ra_memory : public llama_memory_i {
  public:
    // throws std::runtime_error; settings is taken over
    ra_memory(const llama_model & model, const llama_memory_params & params,
              const llama_cparams & cparams, ra_settings * settings);
    ~ra_memory() override;

    // llama_memory_i

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch,
                                        bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0,
                llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id,
                     llama_state_seq_flags flags) const override;
    void state_read(llama_io_read_i & io, llama_seq_id seq_id,
                    llama_state_seq_flags flags) override;

    // used by the batch context (ra_memory_context)

    // makes room for and appends the tokens of a micro-batch; false: nothing appended
    bool begin_ubatch(const llama_ubatch & ubatch);
    // the micro-batch was computed
    void end_ubatch() { in_flight_pos = -1; }

    // used by the C API

    ra_status compress();
    ra_status set_head_budgets(int32_t il, const int32_t * budgets, size_t n);
    int64_t   kv_bytes() const;
    int64_t   window_bytes() const;
    int64_t   scratch_bytes() const;
    // what scratch_bytes() will be once something was decoded; throws std::runtime_error
    int64_t planned_scratch_bytes(ggml_backend_sched_t sched) const;
    int64_t row_bytes() const; // K and V rows of one token, all layers and heads

    ra_cache *       state() { return cache.get(); }
    const ra_cache * state() const { return cache.get(); }

    int64_t compress_us = 0;

    ra_debug_node_cb watch      = nullptr;
    void *           watch_user = nullptr;

    void gather_always(bool on);
    bool gathers_always = false; // pools in host memory are packed as those on a device are

    // used by the graph (ra_graph.cpp)

    const llama_hparams &   hparams;
    std::vector<ra_tensors> tensors;              // [n_layer]
    uint64_t                layout       = 1;     // changes whenever rows move or segments change
    int32_t                 n_since      = 0;     // tokens appended since `layout` changed
    bool                    needs_window = false; // the policy wants attention logits
    ra_rotation             rot_k;                // of Q and K
    ra_rotation             rot_v;

  private:
    void add_layers(const llama_model & model, const llama_memory_params & params, bool offload);
    void alloc_buffers(bool no_alloc);
    void make_scorer();
    void layout_changed();
    bool check_ubatch(const llama_ubatch & ubatch, llama_pos * pos_next) const;

    std::unique_ptr<ra_cache, ra_cache_deleter> cache;

    // one context of tensors, its buffer and the buffer's type, per device
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
    std::vector<ggml_backend_buffer_type_t>                           bufts;

    std::unique_ptr<ra_scorer> scorer; // made at the first decode

    llama_context * lctx = nullptr;     // the context of the decode under way
    uint32_t        n_ctx;              // positions end here
    llama_pos       in_flight_pos = -1; // first position of the micro-batch being computed
};

// What the graph builder sees of the cache, for one micro-batch or for the worst case.
class ra_memory_context : public llama_memory_context_i {
  public:
    // status only (nothing to update, or a failure)
    explicit ra_memory_context(llama_memory_status status) : status(status) {}
    // worst case
    explicit ra_memory_context(ra_memory * mem)
        : status(LLAMA_MEMORY_STATUS_SUCCESS), mem(mem), is_worst_case(true) {}
    // a batch
    ra_memory_context(ra_memory * mem, std::vector<llama_ubatch> ubatches)
        : status(LLAMA_MEMORY_STATUS_SUCCESS), mem(mem), ubatches(std::move(ubatches)) {}

    bool next() override;
    bool apply() override;

    const llama_ubatch & get_ubatch() const override { return ubatches[i_cur]; }
    llama_memory_status  get_status() const override { return status; }

    ra_memory * memory() const { return mem; }

    // rows that head ih of layer il holds before the micro-batch of n_tokens
    int32_t n_used(int32_t il, int32_t ih, int32_t n_tokens) const;
    // rows that its segment can hold
    int32_t n_capacity(int32_t il, int32_t ih) const;
    // tokens that fit before the next compression, the micro-batch included
    int32_t n_room(int32_t n_tokens) const;

    bool worst_case() const { return is_worst_case; }

  private:
    llama_memory_status       status;
    ra_memory *               mem           = nullptr;
    bool                      is_worst_case = false;
    size_t                    i_cur         = 0;
    std::vector<llama_ubatch> ubatches;
};

// the cache of a context; NULL if it is not ours
ra_memory * ra_memory_of(const llama_context * ctx);
