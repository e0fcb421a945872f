// ra_memory.cpp - see ra_memory.h: sequence operations, batches and when to compress
#include "ra_memory.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "ra_batch.h"
#include "ra_state.h"

#include <algorithm>
#include <limits>

ra_memory::ra_memory(const llama_model & model, const llama_memory_params & params,
                     const llama_cparams & cparams, std::unique_ptr<ra_stock> stock_part,
                     ra_settings * settings)
    : stock(std::move(stock_part)),
      streams(ra_make_streams(model, params, cparams, stock->left_out(), settings)),
      n_ctx(cparams.n_ctx_seq) {
    const ra_settings & made = state(0).settings;
    LLAMA_LOG_INFO("%s: budget %d + buffer %d tokens per head, policy %s, %d x KV %.2f MiB\n",
                   __func__, made.cfg.budget, made.cfg.buffer, made.policy->name, n_seq(),
                   double(stream(0).store.kv_bytes()) / 1024.0 / 1024.0);
}

ra_memory::~ra_memory() = default;

std::map<ggml_backend_buffer_type_t, size_t> ra_memory::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res = stock->breakdown();
    for (const auto & s : streams) {
        for (const auto & [buft, size] : s->store.breakdown()) {
            res[buft] += size;
        }
    }
    return res;
}

int64_t ra_memory::scratch_bytes() const {
    int64_t host = 0;
    for (const auto & s : streams) {
        const ra_cache & c = *s->store.cache;
        host += int64_t(c.n_slots_max) * 6 * (int64_t) sizeof(float);
        for (int32_t il = 0; il < c.n_layer; ++il) {
            const ra_layer & l = c.layers[il];
            host += l.alike != nullptr ? int64_t(l.n_slots) * (int64_t) sizeof(ra_alike) : 0;
            host += l.merge != nullptr ? int64_t(l.n_slots) * ra_merge_row_bytes() : 0;
        }
    }
    return host + (compressor ? compressor->bytes() : 0);
}

int64_t ra_memory::planned_scratch_bytes(ggml_backend_sched_t sched) {
    if (compressor) {
        return scratch_bytes();
    }
    const ra_compressor planned(targets(), sched, watch, gathers_always, true);
    return scratch_bytes() + planned.bytes();
}

ra_memory * ra_memory_of(const llama_context * ctx) {
    return ctx == nullptr ? nullptr : dynamic_cast<ra_memory *>(ctx->get_memory());
}

// ---------------------------------------------------------------------------------------------
// sequence operations: sequences are copied as a whole, and lose their tail or all
// ---------------------------------------------------------------------------------------------

void ra_memory::clear(bool data) {
    for (auto & s : streams) {
        s->clear(data);
    }
    stock->clear(data);
}

// of one sequence
void ra_memory::forget(llama_seq_id seq_id, bool data) {
    stream(seq_id).clear(data);
    stock->forget(seq_id);
}

bool ra_memory::can_drop(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if (!stream(seq_id).can_drop(p0, p1)) {
        return false;
    }
    if (p0 < state(seq_id).n_pos && !stock->can_go_back(seq_id, p0)) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "the sliding windows or the recurrent state cannot go back to position %d: start "
                 "the sequence anew",
                 p0);
        return false;
    }
    return true;
}

bool ra_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
    if (seq_id >= n_seq() || p0 >= p1) {
        return true; // nothing there
    }
    const llama_seq_id begin = seq_id < 0 ? 0 : seq_id;
    const llama_seq_id end   = seq_id < 0 ? n_seq() : seq_id + 1;
    for (llama_seq_id id = begin; id < end; ++id) {
        if (!can_drop(id, p0, p1)) {
            return false;
        }
    }
    for (llama_seq_id id = begin; id < end; ++id) {
        if (p0 < state(id).n_pos) {
            stock->drop(id, p0);
        }
        stream(id).drop(p0);
    }
    return true;
}

static void ra_refuse(const char * what) {
    ra_error(RA_STATUS_UNSUPPORTED, "%s is not supported by a budgeted cache; nothing was changed",
             what);
    LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
}

void ra_memory::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0,
                       llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }
    if (!has_seq(seq_id_src) || !has_seq(seq_id_dst)) {
        ra_refuse("copying to or from a sequence beyond n_seq_max");
        return;
    }
    ra_stream & src = stream(seq_id_src);
    ra_stream & dst = stream(seq_id_dst);
    if (p0 > 0 || (p1 >= 0 && p1 < src.store.cache->n_pos)) {
        ra_refuse("copying a part of a sequence");
        return;
    }
    if (lctx != nullptr) {
        ggml_backend_sched_synchronize(lctx->get_sched()); // its last rows must have been written
    }
    forget(seq_id_dst, false);
    try {
        if (dst.store.copy_from(src.store) == RA_STATUS_OK) {
            stock->copy(seq_id_src, seq_id_dst);
            return;
        }
    } catch (const std::exception & e) {
        ra_error(RA_STATUS_NO_MEMORY, "%s", e.what());
    }
    LLAMA_LOG_ERROR("ReasonAlloc: sequence %d is empty, it could not be copied: %s\n", seq_id_dst,
                    ra_last_error());
}

void ra_memory::seq_keep(llama_seq_id seq_id) {
    for (llama_seq_id id = 0; id < n_seq(); ++id) {
        if (id != seq_id) {
            forget(id, false);
        }
    }
}

void ra_memory::seq_add(llama_seq_id, llama_pos, llama_pos, llama_pos shift) {
    if (shift != 0) {
        ra_refuse("shifting positions");
    }
}

void ra_memory::seq_div(llama_seq_id, llama_pos, llama_pos, int d) {
    if (d != 1) {
        ra_refuse("dividing positions");
    }
}

// llama.h promises that all of [pos_min, pos_max] is present: after evictions that is the tail which
// every head still holds
llama_pos ra_memory::seq_pos_min(llama_seq_id seq_id) const {
    return has_seq(seq_id) && state(seq_id).n_pos > 0
               ? std::max(ra_cache_contiguous_from(&state(seq_id)), stock->seq_pos_min(seq_id))
               : -1;
}

llama_pos ra_memory::seq_pos_max(llama_seq_id seq_id) const {
    return has_seq(seq_id) ? state(seq_id).n_pos - 1 : -1;
}

// ---------------------------------------------------------------------------------------------
// batches
// ---------------------------------------------------------------------------------------------

llama_memory_context_ptr ra_memory::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch,
                                               bool embd_all) {
    GGML_UNUSED(embd_all);
    const auto failed = [] {
        return std::make_unique<ra_memory_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    };
    if (lctx != nullptr && !lctx->get_cparams().causal_attn) {
        ra_error(RA_STATUS_UNSUPPORTED, "a budgeted cache needs causal attention");
        return failed();
    }
    std::vector<llama_ubatch> ubatches =
        ra_split_batch(balloc, targets(), n_ubatch, n_ctx, stock->is_recurrent());
    if (ubatches.empty() || balloc.get_n_used() < balloc.get_n_tokens()) {
        LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
        return failed();
    }
    auto part = stock->init_batch(ubatches);
    if (part == nullptr || part->get_status() != LLAMA_MEMORY_STATUS_SUCCESS) {
        ra_error(RA_STATUS_NO_MEMORY, "no room for a batch in the caches of llama.cpp");
        LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
        return failed();
    }
    return std::make_unique<ra_memory_context>(this, std::move(part), std::move(ubatches));
}

llama_memory_context_ptr ra_memory::init_full() {
    return std::make_unique<ra_memory_context>(this, stock->init_full());
}

llama_memory_context_ptr ra_memory::init_update(llama_context * context, bool optimize) {
    lctx = context;
    make_compressor();
    return std::make_unique<ra_memory_context>(stock->init_update(context, optimize));
}

// ---------------------------------------------------------------------------------------------
// compressions
// ---------------------------------------------------------------------------------------------

ra_status ra_memory::set_head_budgets(llama_seq_id seq_id, int32_t il, const int32_t * budgets,
                                      size_t n) {
    const ra_status st = ra_cache_set_head_budgets(&state(seq_id), il, budgets, n);
    stream(seq_id).store.layout_changed();
    return st;
}

ra_status ra_memory::set_protect(llama_seq_id seq_id, int32_t n_protect) {
    try {
        return stream(seq_id).store.set_protect(n_protect);
    } catch (const std::exception &) {
        return RA_STATUS_NO_MEMORY;
    }
}

int32_t ra_memory::n_splits() const {
    int32_t n = 0;
    for (const auto & s : streams) {
        n += s->store.cache->n_splits;
    }
    return n;
}

std::vector<ra_target> ra_memory::targets() {
    std::vector<ra_target> res;
    for (auto & s : streams) {
        res.push_back(s->store.target());
    }
    return res;
}

// at the first decode, so that a compression needs no memory; tried again if memory was short, and made
// anew for other tensors
void ra_memory::make_compressor() {
    if (compressor && n_splits_then == n_splits()) {
        return;
    }
    drop_compressor();
    try {
        n_splits_then = n_splits();
        compressor =
            std::make_unique<ra_compressor>(targets(), lctx->get_sched(), watch, gathers_always);
    } catch (const std::exception & e) {
        ra_error(RA_STATUS_NO_MEMORY, "no scratch memory for compressions: %s", e.what());
    }
}

void ra_memory::gather_always(bool on) {
    gathers_always = on;
    drop_compressor(); // it is made anew, with the scratch for it
}

// With any buffer that is freed an RPC server forgets the graphs that it keeps: none may be taken again.
void ra_memory::drop_compressor() {
    compressor.reset();
    for (auto & s : streams) {
        s->store.layout_changed();
    }
}

ra_status ra_memory::compress(llama_seq_id seq_id) {
    ra_stream &   s       = stream(seq_id);
    const int64_t t_start = ggml_time_us();
    ra_status     st      = RA_STATUS_OK;
    try {
        if (lctx == nullptr) {
            return RA_STATUS_OK; // nothing was decoded yet
        }
        make_compressor();
        if (!compressor) {
            return RA_STATUS_NO_MEMORY;
        }
        // the rows of the last micro-batch must have been written
        ggml_backend_sched_synchronize(lctx->get_sched());

        int32_t n_layers = 0;
        st               = compressor->run(s.store.target(), &n_layers);
        if (compressor->lost_rows()) {
            drop_compressor();
            forget(seq_id, true);
        } else if (n_layers > 0) {
            s.store.layout_changed();
        }
    } catch (const std::exception & e) {
        st = ra_error(RA_STATUS_NO_MEMORY, "compression failed: %s", e.what());
    }
    s.compress_us += ggml_time_us() - t_start;
    return st;
}

// ---------------------------------------------------------------------------------------------
// state
// ---------------------------------------------------------------------------------------------

// One sequence, or all of a context (seq_id -1), one after the other.
void ra_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id,
                            llama_state_seq_flags flags) const {
    ra_state_check(seq_id, n_seq(), flags);
    for (llama_seq_id id = 0; id < n_seq(); ++id) {
        if (seq_id < 0 || id == seq_id) {
            ra_state_write(io, stream(id).store);
        }
    }
    stock->state_write(io, seq_id);
}

void ra_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    ra_state_check(seq_id, n_seq(), flags);
    try {
        for (llama_seq_id id = 0; id < n_seq(); ++id) {
            if (seq_id < 0 || id == seq_id) {
                forget(id, false);
                ra_state_read(io, stream(id).store, n_ctx);
            }
        }
        stock->state_read(io, seq_id);
    } catch (...) {
        if (seq_id < 0) {
            clear(true);
        } else {
            forget(seq_id, true);
        }
        throw;
    }
}
