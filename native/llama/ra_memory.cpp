// ra_memory.cpp - see ra_memory.h: sequence operations, batches and when to compress
#include "ra_memory.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "ra_state.h"

#include <algorithm>
#include <limits>

ra_memory::ra_memory(const llama_model & model, const llama_memory_params & params,
                     const llama_cparams & cparams, std::unique_ptr<ra_stock> stock_part,
                     ra_settings * settings)
    : stock(std::move(stock_part)),
      store(model, params, cparams.offload_kqv, stock->left_out(), settings),
      n_ctx(cparams.n_ctx_seq) {
    const ra_settings & made = store.cache->settings;
    LLAMA_LOG_INFO("%s: budget %d + buffer %d tokens per head, policy %s, KV %.2f MiB\n", __func__,
                   made.cfg.budget, made.cfg.buffer, made.policy->name,
                   double(store.kv_bytes()) / 1024.0 / 1024.0);
}

ra_memory::~ra_memory() = default;

std::map<ggml_backend_buffer_type_t, size_t> ra_memory::memory_breakdown() const {
    auto res = store.breakdown();
    for (const auto & [buft, size] : stock->breakdown()) {
        res[buft] += size;
    }
    return res;
}

int64_t ra_memory::scratch_bytes() const {
    const ra_cache & c    = *store.cache;
    int64_t          host = int64_t(c.n_slots_max) * 6 * (int64_t) sizeof(float);
    for (int32_t il = 0; il < c.n_layer; ++il) {
        const ra_layer & l = c.layers[il];
        host += l.alike != nullptr ? int64_t(l.n_slots) * (int64_t) sizeof(ra_alike) : 0;
        host += l.merge != nullptr ? int64_t(l.n_slots) * ra_merge_row_bytes() : 0;
    }
    return host + (compressor ? compressor->bytes() : 0);
}

int64_t ra_memory::planned_scratch_bytes(ggml_backend_sched_t sched) const {
    if (compressor) {
        return scratch_bytes();
    }
    const ra_compressor planned(*store.cache, store.tensors, sched, watch, gathers_always, true);
    return scratch_bytes() + planned.bytes();
}

ra_memory * ra_memory_of(const llama_context * ctx) {
    return ctx == nullptr ? nullptr : dynamic_cast<ra_memory *>(ctx->get_memory());
}

// ---------------------------------------------------------------------------------------------
// sequence operations: one sequence, id 0; only its tail can be removed
// ---------------------------------------------------------------------------------------------

void ra_memory::clear(bool data) {
    store.clear(data);
    stock->clear(data);
    compress_us   = 0;
    in_flight_pos = -1;
}

bool ra_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
    if (seq_id > 0 || p0 >= store.cache->n_pos || p0 >= p1) {
        return true; // nothing there
    }
    if (p1 < store.cache->n_pos) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "positions [%d, %d) are not the end of the sequence: a budgeted cache can only "
                 "drop its tail",
                 p0, p1);
        return false;
    }
    if (p0 == 0) {
        clear(false);
        return true;
    }
    // tokens of a micro-batch that failed may always go: no compression ran since they came
    const bool is_rollback = in_flight_pos >= 0 && p0 == in_flight_pos;
    if (!is_rollback && store.cache->min_evicted < p0) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "tokens before position %d were evicted: the cache cannot go back to it, start "
                 "the sequence anew",
                 p0);
        return false;
    }
    if (!is_rollback && !stock->can_go_back(0, p0)) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "the sliding window before position %d is no longer there: the cache cannot go "
                 "back to it, start the sequence anew",
                 p0);
        return false;
    }
    if (!stock->seq_rm(0, p0, p1)) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "a recurrent state cannot go back to position %d: start the sequence anew", p0);
        return false;
    }
    ra_cache_truncate(store.cache.get(), p0);
    in_flight_pos = -1;
    store.layout_changed();
    return true;
}

static void ra_refuse(const char * what) {
    ra_error(RA_STATUS_UNSUPPORTED, "%s is not supported by a budgeted cache; nothing was changed",
             what);
    LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
}

void ra_memory::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos, llama_pos) {
    if (seq_id_src != seq_id_dst) {
        ra_refuse("copying a sequence");
    }
}

void ra_memory::seq_keep(llama_seq_id seq_id) {
    if (seq_id != 0) {
        clear(false);
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
    return seq_id != 0 || store.cache->n_pos == 0
               ? -1
               : std::max(ra_cache_contiguous_from(store.cache.get()), stock->seq_pos_min(seq_id));
}

llama_pos ra_memory::seq_pos_max(llama_seq_id seq_id) const {
    return seq_id == 0 ? store.cache->n_pos - 1 : -1;
}

// ---------------------------------------------------------------------------------------------
// batches
// ---------------------------------------------------------------------------------------------

bool ra_memory::check_ubatch(const llama_ubatch & ubatch, llama_pos * pos_next) const {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (ubatch.n_seq_id[i] != 1 || ubatch.seq_id[i][0] != 0) {
            ra_error(RA_STATUS_UNSUPPORTED,
                     "a budgeted cache holds one sequence (id 0); the batch names another");
            return false;
        }
        const llama_pos pos = ubatch.pos[i];
        if (pos < 0 || (uint32_t) pos >= n_ctx) {
            ra_error(RA_STATUS_INVALID,
                     "position %d is beyond the context of %u tokens: the sequence ends here", pos,
                     n_ctx);
            return false;
        }
        if (*pos_next >= 0 && pos != *pos_next) {
            ra_error(RA_STATUS_INVALID, "positions must follow one another: expected %d, got %d",
                     *pos_next, pos);
            return false;
        }
        *pos_next = pos + 1;
    }
    return true;
}

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
    // a micro-batch must fit the room that a compression leaves
    const uint32_t n_max = std::min(n_ubatch, (uint32_t) store.cache->settings.cfg.buffer);

    std::vector<llama_ubatch> ubatches;
    llama_pos                 pos_next = store.cache->n_pos > 0 ? store.cache->n_pos : -1;
    balloc.split_reset();
    while (true) {
        // a recurrent state wants to know which tokens are of one sequence
        auto ubatch = stock->is_recurrent() ? balloc.split_equal(n_max, false, 0)
                                           : balloc.split_simple(n_max);
        if (ubatch.n_tokens == 0) {
            break;
        }
        if (!check_ubatch(ubatch, &pos_next)) {
            LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
            return failed();
        }
        ubatches.push_back(std::move(ubatch));
    }
    if (ubatches.empty() || balloc.get_n_used() < balloc.get_n_tokens()) {
        return failed();
    }
    auto part = stock->init_batch(ubatches);
    if (part == nullptr || part->get_status() != LLAMA_MEMORY_STATUS_SUCCESS) {
        ra_error(RA_STATUS_NO_MEMORY, "no room for a batch in the caches of llama.cpp");
        LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
        return failed();
    }
    return std::make_unique<ra_memory_context>(this, &store, std::move(part), std::move(ubatches));
}

llama_memory_context_ptr ra_memory::init_full() {
    return std::make_unique<ra_memory_context>(this, &store, stock->init_full());
}

llama_memory_context_ptr ra_memory::init_update(llama_context * context, bool optimize) {
    lctx = context;
    make_compressor();
    return std::make_unique<ra_memory_context>(stock->init_update(context, optimize));
}

bool ra_memory::begin_ubatch(const llama_ubatch & ubatch) {
    const int32_t n_tokens = (int32_t) ubatch.n_tokens;
    in_flight_pos          = -1;
    if (ra_cache_room(store.cache.get()) < n_tokens && compress() != RA_STATUS_OK) {
        LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
        return false;
    }
    if (ra_cache_room(store.cache.get()) < n_tokens) {
        ra_error(RA_STATUS_BUDGET, "no room for %d tokens after a compression", n_tokens);
        LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
        return false;
    }
    ra_cache_append(store.cache.get(), ubatch.pos[0], n_tokens);
    store.n_since += n_tokens;
    in_flight_pos = ubatch.pos[0];
    return true;
}

bool ra_memory_context::next() {
    mem->end_ubatch();
    stock()->next();
    return ++i_cur < ubatches.size();
}

bool ra_memory_context::apply() {
    return (ubatches.empty() || mem->begin_ubatch(ubatches[i_cur])) && stock()->apply();
}

// ---------------------------------------------------------------------------------------------
// compressions
// ---------------------------------------------------------------------------------------------

ra_status ra_memory::set_head_budgets(int32_t il, const int32_t * budgets, size_t n) {
    const ra_status st = ra_cache_set_head_budgets(store.cache.get(), il, budgets, n);
    store.layout_changed();
    return st;
}

ra_status ra_memory::set_protect(int32_t n_protect) {
    try {
        return store.set_protect(n_protect);
    } catch (const std::exception &) {
        return RA_STATUS_NO_MEMORY;
    }
}

// at the first decode, so that a compression needs no memory; tried again if memory was short, and made
// anew for other tensors
void ra_memory::make_compressor() {
    if (compressor && n_splits_then == store.cache->n_splits) {
        return;
    }
    try {
        compressor.reset();
        n_splits_then = store.cache->n_splits;
        compressor = std::make_unique<ra_compressor>(*store.cache, store.tensors, lctx->get_sched(),
                                                     watch, gathers_always);
    } catch (const std::exception & e) {
        ra_error(RA_STATUS_NO_MEMORY, "no scratch memory for compressions: %s", e.what());
    }
}

void ra_memory::gather_always(bool on) {
    gathers_always = on;
    compressor.reset(); // it is made anew, with the scratch for it
}

ra_status ra_memory::compress() {
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
        st               = compressor->run(&n_layers);
        if (compressor->lost_rows()) {
            compressor.reset();
            clear(true);
        } else if (n_layers > 0) {
            store.layout_changed();
        }
    } catch (const std::exception & e) {
        st = ra_error(RA_STATUS_NO_MEMORY, "compression failed: %s", e.what());
    }
    compress_us += ggml_time_us() - t_start;
    return st;
}

// ---------------------------------------------------------------------------------------------
// state
// ---------------------------------------------------------------------------------------------

void ra_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id,
                            llama_state_seq_flags flags) const {
    ra_state_check(seq_id, flags);
    ra_state_write(io, store);
    stock->state_write(io, seq_id);
}

void ra_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    ra_state_check(seq_id, flags);
    clear(false);
    ra_state_read(io, store, n_ctx);
    try {
        stock->state_read(io, seq_id);
    } catch (...) {
        clear(true);
        throw;
    }
}
