// ra_stock.cpp - see ra_stock.h
//
// llama_model::create_memory() is called once more, and llama_kv_cache asks for every layer whether it is
// ours (ra_takes_layer()), and says whether the layer has a window: so which layers grow is what llama.cpp
// itself decides, for every architecture. A cache that layers are left out of has no tensors; it still
// finds cells for tokens, as graphs make their inputs of it, and forgets them before each batch: a few
// thousand cells will do, however long the context.
#include "ra_stock.h"

#include "llama-cparams.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"
#include "ra_llama.h"
#include "ra_storage.h"
#include "ra_view.h"

#include <algorithm>

static thread_local std::vector<bool> * taking         = nullptr;
static thread_local bool                taking_windows = false;

bool ra_stock_is_made() {
    return taking != nullptr;
}

bool ra_takes_layer(uint32_t il, bool grows) {
    if (taking != nullptr && (grows || taking_windows)) {
        (*taking)[il] = true;
        return true;
    }
    return false;
}

// a context of a stock memory that graphs can be given
template <typename T> class ra_stock_context_of : public T, public ra_stock_context {
  public:
    using T::T;
};

template <typename T, typename... A> static llama_memory_context_ptr ra_make_context(A &&... args) {
    return std::make_unique<ra_stock_context_of<T>>(std::forward<A>(args)...);
}

// cells for a batch, and for the windows as large as in the stock memory
static uint32_t ra_stock_cells(const llama_cparams & cparams, uint32_t n_swa) {
    const uint64_t n_window = uint64_t(n_swa) * cparams.n_seq_max + cparams.n_ubatch;
    const uint64_t n        = std::max<uint64_t>(cparams.n_batch, n_window);
    return (uint32_t) std::min<uint64_t>(cparams.n_ctx_seq, GGML_PAD(n, 256));
}

ra_stock::ra_stock(const llama_model & model, const llama_memory_params & params,
                   const llama_cparams & cparams, bool takes_windows)
    : taken(model.hparams.n_layer_all, false), n_swa(model.hparams.n_swa) {
    llama_memory_params part_params  = params;
    llama_cparams       part_cparams = cparams;
    part_params.swa_full             = false; // would keep windows as long as the context
    part_cparams.n_ctx_seq           = ra_stock_cells(cparams, n_swa);
    part_cparams.kv_unified          = true; // matters only where rows are left

    taking         = &taken;
    taking_windows = takes_windows;
    try {
        mem.reset(model.create_memory(part_params, part_cparams));
    } catch (...) {
        taking = nullptr;
        throw;
    }
    taking = nullptr;
    kv     = dynamic_cast<llama_kv_cache *>(mem.get());
    iswa   = dynamic_cast<llama_kv_cache_iswa *>(mem.get());
    hybrid = dynamic_cast<llama_memory_hybrid *>(mem.get());
    if (iswa != nullptr && !takes_windows) {
        windows = iswa->get_swa();
    }
    if (hybrid != nullptr) {
        kv   = hybrid->get_mem_attn();
        recr = hybrid->get_mem_recr();
    }
    if (std::find(taken.begin(), taken.end(), true) == taken.end()) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "this '%s' model is not supported with a budget: no layer of it has a cache that "
                 "grows; run it without one",
                 llm_arch_name(model.arch));
        ra_throw_last();
    }
    if (kv == nullptr && iswa == nullptr) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "architecture '%s' is not supported with a budget: its memory is of another kind; "
                 "run it without one",
                 llm_arch_name(model.arch));
        ra_throw_last();
    }
    if (cparams.n_seq_max > 1 && iswa != nullptr && !cparams.kv_unified) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "several sequences (n_seq_max = %u) of a model with sliding windows need "
                 "kv_unified with a budget",
                 cparams.n_seq_max);
        ra_throw_last();
    }
}

ra_stock::~ra_stock() = default;

// the cache that layers are left out of
llama_kv_cache * ra_stock::grown() const {
    return iswa != nullptr ? iswa->get_base() : kv;
}

void ra_stock::clear_empty() const {
    grown()->clear(false);
    if (iswa != nullptr && windows == nullptr) {
        iswa->get_swa()->clear(false);
    }
}

llama_memory_context_ptr ra_stock::init_batch(const std::vector<llama_ubatch> & ubatches) {
    clear_empty();
    if (recr != nullptr && !recr->prepare(ubatches)) {
        return nullptr;
    }
    auto cells = grown()->prepare(ubatches);
    if (cells.empty()) {
        return nullptr;
    }
    if (iswa == nullptr) {
        return hybrid != nullptr
                   ? ra_make_context<llama_memory_hybrid_context>(hybrid, std::move(cells),
                                                                  ubatches)
                   : ra_make_context<llama_kv_cache_context>(kv, std::move(cells), ubatches);
    }
    auto cells_swa = iswa->get_swa()->prepare(ubatches);
    if (cells_swa.empty()) {
        return nullptr;
    }
    return ra_make_context<llama_kv_cache_iswa_context>(iswa, std::move(cells),
                                                        std::move(cells_swa), ubatches);
}

llama_memory_context_ptr ra_stock::init_full() {
    if (hybrid != nullptr) {
        return ra_make_context<llama_memory_hybrid_context>(hybrid);
    }
    return iswa != nullptr ? ra_make_context<llama_kv_cache_iswa_context>(iswa)
                           : ra_make_context<llama_kv_cache_context>(kv);
}

llama_memory_context_ptr ra_stock::init_update(llama_context * lctx, bool optimize) {
    return mem->init_update(lctx, optimize);
}

void ra_stock::clear(bool data) {
    mem->clear(data);
}

bool ra_stock::can_go_back(llama_seq_id seq_id, llama_pos p0) const {
    if (p0 == 0) {
        return true;
    }
    if (recr != nullptr && recr->seq_pos_max(seq_id) >= p0) {
        return false;
    }
    if (windows == nullptr) {
        return true;
    }
    const llama_pos first = windows->seq_pos_min(seq_id);
    return first >= 0 && first <= std::max<int64_t>(0, int64_t(p0) - n_swa + 1);
}

void ra_stock::drop(llama_seq_id seq_id, llama_pos p0) {
    if (recr != nullptr) {
        recr->seq_rm(seq_id, p0, -1);
    }
    if (windows != nullptr) {
        windows->seq_rm(seq_id, p0, -1);
    }
}

void ra_stock::copy(llama_seq_id src, llama_seq_id dst) {
    if (windows != nullptr) {
        windows->seq_cp(src, dst, -1, -1);
    }
    if (recr != nullptr) {
        recr->seq_cp(src, dst, -1, -1);
    }
}

llama_pos ra_stock::seq_pos_min(llama_seq_id seq_id) const {
    llama_pos first = 0;
    if (windows != nullptr) {
        first = std::max(first, windows->seq_pos_min(seq_id));
    }
    if (recr != nullptr) {
        first = std::max(first, recr->seq_pos_min(seq_id));
    }
    return first;
}

std::map<ggml_backend_buffer_type_t, size_t> ra_stock::breakdown() const {
    return mem->memory_breakdown();
}

int64_t ra_stock::bytes() const {
    int64_t n = 0;
    for (const auto & [_, size] : breakdown()) {
        n += (int64_t) size;
    }
    return n;
}

void ra_stock::state_write(llama_io_write_i & io, llama_seq_id seq_id) const {
    if (!is_empty()) {
        clear_empty();
        mem->state_write(io, seq_id, LLAMA_STATE_SEQ_FLAGS_NONE);
    }
}

void ra_stock::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    if (!is_empty()) {
        mem->state_read(io, seq_id, LLAMA_STATE_SEQ_FLAGS_NONE);
    }
}
