// ra_memory.h - the budgeted cache as a llama.cpp memory module
#pragma once

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-memory.h"
#include "ra_compress.h"
#include "ra_stock.h"
#include "ra_stream.h"
#include "ra_view.h"

#include <memory>
#include <vector>

// Appends to every head of a sequence, of the layers that grow; compresses when a segment is full. Sequences
// 0..n_seq_max-1, each with the memory that one takes. Every call is forwarded to the stock part, which has
// the other layers.
class ra_memory : public llama_memory_i {
  public:
    // throws std::runtime_error; settings is taken over
    ra_memory(const llama_model & model, const llama_memory_params & params,
              const llama_cparams & cparams, std::unique_ptr<ra_stock> stock,
              ra_settings * settings);
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
    // see ra_batch_view
    std::vector<ra_part> parts_of(const llama_ubatch & ubatch);
    std::vector<ra_part> worst_parts(int32_t n_tokens);

    // used by the C API

    ra_status compress(llama_seq_id seq_id);
    ra_status set_head_budgets(llama_seq_id seq_id, int32_t il, const int32_t * budgets, size_t n);
    ra_status set_protect(llama_seq_id seq_id, int32_t n_protect);
    int64_t   scratch_bytes() const;
    // what scratch_bytes() will be once something was decoded; throws std::runtime_error
    int64_t planned_scratch_bytes(ggml_backend_sched_t sched);

    int32_t n_seq() const { return (int32_t) streams.size(); }
    bool    has_seq(llama_seq_id seq_id) const { return seq_id >= 0 && seq_id < n_seq(); }

    ra_stream &       stream(llama_seq_id seq_id) { return *streams[(size_t) seq_id]; }
    const ra_stream & stream(llama_seq_id seq_id) const { return *streams[(size_t) seq_id]; }
    ra_cache &        state(llama_seq_id seq_id) { return *stream(seq_id).store.cache; }
    const ra_cache &  state(llama_seq_id seq_id) const { return *stream(seq_id).store.cache; }
    const ra_stock &  stock_part() const { return *stock; }

    // for tests

    void gather_always(bool on);

    ra_watch watch; // of the graphs of compressions

  private:
    void                   make_compressor();
    void                   drop_compressor();
    bool                   can_drop(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    void                   forget(llama_seq_id seq_id, bool data);
    std::vector<ra_target> targets();
    int32_t                n_splits() const;

    std::unique_ptr<ra_stock>               stock;
    std::vector<std::unique_ptr<ra_stream>> streams; // [n_seq_max]

    std::unique_ptr<ra_compressor> compressor;        // made at the first decode
    int32_t                        n_splits_then = 0; // n_splits() when it was made

    bool gathers_always = false; // pools in host memory are packed as those on a device are

    llama_context * lctx = nullptr; // the context of the decode under way
    uint32_t        n_ctx;          // positions end here
};

// A batch, or the worst case, as llama.cpp walks through it; with the same of the stock part.
class ra_memory_context : public ra_batch_view {
  public:
    // a failure
    explicit ra_memory_context(llama_memory_status status)
        : ra_batch_view(nullptr), status(status) {}
    // an update of the stock part
    explicit ra_memory_context(llama_memory_context_ptr update)
        : ra_batch_view(std::move(update)), status(stock()->get_status()) {}
    // worst case
    ra_memory_context(ra_memory * mem, llama_memory_context_ptr stock)
        : ra_batch_view(std::move(stock)), status(LLAMA_MEMORY_STATUS_SUCCESS), mem(mem) {}
    // a batch
    ra_memory_context(ra_memory * mem, llama_memory_context_ptr stock,
                      std::vector<llama_ubatch> ubatches)
        : ra_batch_view(std::move(stock)), status(LLAMA_MEMORY_STATUS_SUCCESS), mem(mem),
          ubatches(std::move(ubatches)) {}

    bool next() override;
    bool apply() override;

    bool                 has_layer(int32_t il) const override;
    std::vector<ra_part> parts(int32_t n_tokens) const override;

    const llama_ubatch & get_ubatch() const override { return ubatches[i_cur]; }
    llama_memory_status  get_status() const override { return status; }

  private:
    llama_memory_status       status;
    ra_memory *               mem   = nullptr;
    size_t                    i_cur = 0;
    std::vector<llama_ubatch> ubatches;
};

// the cache of a context; NULL if it is not ours
ra_memory * ra_memory_of(const llama_context * ctx);
