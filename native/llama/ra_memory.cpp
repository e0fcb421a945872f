// ra_memory.cpp - see ra_memory.h: tensors, sequence operations, batches and compressions
#include "ra_memory.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "ra_scorer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// ---------------------------------------------------------------------------------------------
// construction
// ---------------------------------------------------------------------------------------------

// Sylvester's Hadamard matrix, scaled to be orthogonal, as the stock cache uses it
static ra_rotation ra_hadamard(int32_t n) {
    ra_rotation rot{ n, {} };
    for (int32_t i = 0; i < n; ++i) {
        for (int32_t j = 0; j < n; ++j) {
            bool odd = false;
            for (int32_t bits = i & j; bits != 0; bits &= bits - 1) {
                odd = !odd;
            }
            rot.values.push_back((odd ? -1.0f : 1.0f) / std::sqrt(float(n)));
        }
    }
    return rot;
}

ra_memory::ra_memory(const llama_model & model, const llama_memory_params & params,
                     const llama_cparams & cparams, ra_settings * settings)
    : hparams(model.hparams), n_ctx(cparams.n_ctx_seq) {
    std::vector<int32_t> n_head_kv(hparams.n_layer());
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        n_head_kv[il] = (int32_t) hparams.n_head_kv(il);
    }
    ra_cache * made = nullptr;
    if (ra_cache_init(&made, settings, (int32_t) n_head_kv.size(), n_head_kv.data()) !=
        RA_STATUS_OK) {
        ra_throw_last();
    }
    cache.reset(made);
    needs_window = (made->settings.policy->needs & RA_FEATURE_ATTN_LOGITS) != 0;
    add_layers(model, params, cparams.offload_kqv);
    alloc_buffers(hparams.no_alloc);

    // as the stock cache: quantised rows are rotated, to spread outliers
    const char * off      = getenv("LLAMA_ATTN_ROT_DISABLE");
    const bool   disabled = off != nullptr && atoi(off) != 0;
    if (!disabled && !hparams.is_n_embd_k_gqa_variable() && ggml_is_quantized(params.type_k) &&
        hparams.n_embd_head_k() % 64 == 0) {
        int32_t n = 64;
        while (hparams.n_embd_head_k() % uint32_t(2 * n) == 0) {
            n *= 2;
        }
        rot_k = ra_hadamard(n);
    }
    if (!disabled && !hparams.is_n_embd_v_gqa_variable() && ggml_is_quantized(params.type_v) &&
        hparams.n_embd_head_v() % 64 == 0) {
        rot_v = ra_hadamard(64);
    }
    LLAMA_LOG_INFO("%s: budget %d + buffer %d tokens per head, policy %s, KV %.2f MiB\n", __func__,
                   made->settings.cfg.budget, made->settings.cfg.buffer,
                   made->settings.policy->name, double(kv_bytes()) / 1024.0 / 1024.0);
}

ra_memory::~ra_memory() = default;

void ra_memory::add_layers(const llama_model & model, const llama_memory_params & params,
                           bool offload) {
    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_of;
    tensors.resize(hparams.n_layer());
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        const ra_layer & l = cache->layers[il];
        if (l.n_head_kv == 0) {
            continue;
        }
        ggml_backend_buffer_type_t buft = offload
                                              ? ggml_backend_dev_buffer_type(model.dev_layer(il))
                                              : ggml_backend_cpu_buffer_type();
        if (ctx_of.count(buft) == 0) {
            ggml_context * ctx =
                ggml_init({ 3 * hparams.n_layer() * ggml_tensor_overhead(), nullptr, true });
            if (ctx == nullptr) {
                throw std::runtime_error("ReasonAlloc: out of memory for the cache");
            }
            ctx_of[buft] = ctx;
            ctxs_bufs.emplace_back(ctx, nullptr);
            bufts.push_back(buft);
        }
        ggml_context * ctx = ctx_of[buft];
        ra_tensors &   t   = tensors[il];
        t.n_head           = (int32_t) hparams.n_head(il);
        t.n_head_kv        = l.n_head_kv;
        t.k = ggml_new_tensor_2d(ctx, params.type_k, hparams.n_embd_head_k(il), l.n_slots);
        t.v = ggml_new_tensor_2d(ctx, params.type_v, hparams.n_embd_head_v(il), l.n_slots);
        ggml_format_name(t.k, "ra_cache_k_l%u", il);
        ggml_format_name(t.v, "ra_cache_v_l%u", il);
        if (needs_window) {
            t.q = ggml_new_tensor_2d(ctx, GGML_TYPE_F32,
                                     int64_t(hparams.n_embd_head_k(il)) * t.n_head, cache->n_ring);
            ggml_format_name(t.q, "ra_window_q_l%u", il);
        }
    }
}

void ra_memory::alloc_buffers(bool no_alloc) {
    for (size_t i = 0; i < ctxs_bufs.size(); ++i) {
        auto & [ctx, buf] = ctxs_bufs[i];
        if (no_alloc) {
            buf.reset(ggml_backend_buft_alloc_buffer(bufts[i], 0));
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t != nullptr;
                 t               = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf.get();
            }
        } else {
            buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), bufts[i]));
        }
        if (!buf) {
            ra_error(RA_STATUS_NO_MEMORY, "cannot allocate the cache (%.1f MiB): lower the budget",
                     double(kv_bytes() + window_bytes()) / 1024.0 / 1024.0);
            ra_throw_last();
        }
        // rows beyond `used` are masked, but must not hold NaN
        ggml_backend_buffer_clear(buf.get(), 0);
    }
}

int64_t ra_memory::kv_bytes() const {
    int64_t n = 0;
    for (const ra_tensors & t : tensors) {
        n += t.k != nullptr ? (int64_t) (ggml_nbytes(t.k) + ggml_nbytes(t.v)) : 0;
    }
    return n;
}

int64_t ra_memory::window_bytes() const {
    int64_t n = 0;
    for (const ra_tensors & t : tensors) {
        n += t.q != nullptr ? (int64_t) ggml_nbytes(t.q) : 0;
    }
    return n;
}

int64_t ra_memory::scratch_bytes() const {
    int64_t host = int64_t(cache->n_slots_max) * 4 * (int64_t) sizeof(float);
    for (int32_t il = 0; il < cache->n_layer; ++il) {
        const ra_layer & l = cache->layers[il];
        host += l.alike != nullptr ? int64_t(l.n_slots) * (int64_t) sizeof(ra_alike) : 0;
    }
    return host + (scorer ? scorer->bytes() : 0);
}

int64_t ra_memory::row_bytes() const {
    int64_t n = 0;
    for (const ra_tensors & t : tensors) {
        n += t.k != nullptr ? (int64_t) (t.k->nb[1] + t.v->nb[1]) * t.n_head_kv : 0;
    }
    return n;
}

std::map<ggml_backend_buffer_type_t, size_t> ra_memory::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (size_t i = 0; i < ctxs_bufs.size(); ++i) {
        res[bufts[i]] +=
            hparams.no_alloc
                ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctxs_bufs[i].first.get(), bufts[i])
                : ggml_backend_buffer_get_size(ctxs_bufs[i].second.get());
    }
    return res;
}

// ---------------------------------------------------------------------------------------------
// sequence operations: one sequence, id 0; only its tail can be removed
// ---------------------------------------------------------------------------------------------

void ra_memory::layout_changed() {
    ++layout;
    n_since = 0;
}

void ra_memory::clear(bool data) {
    ra_cache_clear(cache.get());
    compress_us   = 0;
    in_flight_pos = -1;
    layout_changed();
    if (data) {
        for (auto & [_, buf] : ctxs_bufs) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
    }
}

bool ra_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
    if (seq_id > 0 || p0 >= cache->n_pos || p0 >= p1) {
        return true; // nothing there
    }
    if (p1 < cache->n_pos) {
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
    if (!is_rollback && cache->min_evicted < p0) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "tokens before position %d were evicted: the cache cannot go back to it, start "
                 "the sequence anew",
                 p0);
        return false;
    }
    ra_cache_truncate(cache.get(), p0);
    in_flight_pos = -1;
    layout_changed();
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
    return seq_id == 0 ? ra_cache_contiguous_from(cache.get()) : -1;
}

llama_pos ra_memory::seq_pos_max(llama_seq_id seq_id) const {
    return seq_id == 0 ? cache->n_pos - 1 : -1;
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
    const uint32_t n_max = std::min(n_ubatch, (uint32_t) cache->settings.cfg.buffer);

    std::vector<llama_ubatch> ubatches;
    llama_pos                 pos_next = cache->n_pos > 0 ? cache->n_pos : -1;
    balloc.split_reset();
    while (true) {
        auto ubatch = balloc.split_simple(n_max);
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
    return std::make_unique<ra_memory_context>(this, std::move(ubatches));
}

llama_memory_context_ptr ra_memory::init_full() {
    return std::make_unique<ra_memory_context>(this);
}

llama_memory_context_ptr ra_memory::init_update(llama_context * context, bool optimize) {
    GGML_UNUSED(optimize);
    lctx = context;
    make_scorer();
    return std::make_unique<ra_memory_context>(LLAMA_MEMORY_STATUS_NO_UPDATE);
}

bool ra_memory::begin_ubatch(const llama_ubatch & ubatch) {
    const int32_t n_tokens = (int32_t) ubatch.n_tokens;
    in_flight_pos          = -1;
    if (ra_cache_room(cache.get()) < n_tokens && compress() != RA_STATUS_OK) {
        LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
        return false;
    }
    if (ra_cache_room(cache.get()) < n_tokens) {
        ra_error(RA_STATUS_BUDGET, "no room for %d tokens after a compression", n_tokens);
        LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
        return false;
    }
    ra_cache_append(cache.get(), ubatch.pos[0], n_tokens);
    n_since += n_tokens;
    in_flight_pos = ubatch.pos[0];
    return true;
}

bool ra_memory_context::next() {
    mem->end_ubatch();
    return ++i_cur < ubatches.size();
}

bool ra_memory_context::apply() {
    return ubatches.empty() || mem->begin_ubatch(ubatches[i_cur]);
}

int32_t ra_memory_context::n_used(int32_t il, int32_t ih, int32_t n_tokens) const {
    return is_worst_case ? std::max(0, n_capacity(il, ih) - n_tokens)
                         : mem->state()->layers[il].used[ih] - n_tokens;
}

int32_t ra_memory_context::n_capacity(int32_t il, int32_t ih) const {
    const ra_cache * c = mem->state();
    const ra_layer & l = c->layers[il];
    return is_worst_case ? std::min(ra_cache_longest_head(c, il), l.n_slots - l.offset[ih])
                         : l.budget[ih] + c->settings.cfg.buffer;
}

int32_t ra_memory_context::n_room(int32_t n_tokens) const {
    return is_worst_case ? n_tokens : ra_cache_room(mem->state()) + n_tokens;
}

ra_status ra_memory::set_head_budgets(int32_t il, const int32_t * budgets, size_t n) {
    const ra_status st = ra_cache_set_head_budgets(cache.get(), il, budgets, n);
    layout_changed();
    return st;
}
