// ra_storage.cpp - see ra_storage.h
#include "ra_storage.h"

#include "llama-hparams.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <algorithm>

// ---------------------------------------------------------------------------------------------
// construction
// ---------------------------------------------------------------------------------------------

int32_t ra_layer_of_rows(const llama_hparams & hparams, int32_t il) {
    const int32_t n_own = hparams.n_layer_kv_from_start;
    return n_own < 2 || il < n_own ? il : n_own - (hparams.is_swa((uint32_t) il) ? 2 : 1);
}

ra_storage::ra_storage(const llama_model & model, const llama_memory_params & params, bool offload,
                       const std::vector<bool> & grows, ra_settings * settings)
    : no_alloc(model.hparams.no_alloc) {
    const llama_hparams & hparams = model.hparams;
    std::vector<int32_t>  n_head_kv(hparams.n_layer());
    std::vector<int32_t>  n_swa(hparams.n_layer());
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        const bool has_window = settings->cfg.budget_swa > 0 && hparams.is_swa(il);
        n_head_kv[il]         = grows[il] ? (int32_t) hparams.n_head_kv(il) : 0;
        n_swa[il]             = grows[il] && has_window ? (int32_t) hparams.n_swa : 0;
    }
    ra_cache * made = nullptr;
    if (ra_cache_init(&made, settings, (int32_t) n_head_kv.size(), n_head_kv.data(),
                      n_swa.data()) != RA_STATUS_OK) {
        ra_throw_last();
    }
    cache.reset(made);
    needs_window = (ra_cache_needs(made) & RA_FEATURES_OF_QUERIES) != 0;
    add_layers(model, params, offload);
    make_tensors();
    if (!alloc_buffers()) {
        ra_throw_last();
    }
}

void ra_storage::add_layers(const llama_model & model, const llama_memory_params & params,
                            bool offload) {
    const llama_hparams & hparams = model.hparams;

    tensors.resize(hparams.n_layer());
    shapes.resize(hparams.n_layer());
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (cache->layers[il].n_head_kv == 0) {
            continue;
        }
        ggml_backend_buffer_type_t buft = offload
                                              ? ggml_backend_dev_buffer_type(model.dev_layer(il))
                                              : ggml_backend_cpu_buffer_type();
        const size_t device = size_t(std::find(bufts.begin(), bufts.end(), buft) - bufts.begin());
        if (device == bufts.size()) {
            bufts.push_back(buft);
            ctxs_bufs.emplace_back(nullptr, nullptr);
        }
        shapes[il] = {
            device,        hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), params.type_k,
            params.type_v, !hparams.is_mla()
        };
        tensors[il].n_head         = (int32_t) hparams.n_head(il);
        tensors[il].n_head_kv      = cache->layers[il].n_head_kv;
        tensors[il].max_alibi_bias = hparams.f_max_alibi_bias;
    }
    for (int32_t il = 0; il < (int32_t) hparams.n_layer(); ++il) {
        const int32_t of = ra_layer_of_rows(hparams, il);
        tensors[(size_t) of].n_readers += of != il;
    }
    // tokens are scored by the queries of all layers that read them; query centres are those of the owner
    for (ra_tensors & t : tensors) {
        t.n_pooled = (ra_cache_needs(cache.get()) & RA_FEATURE_CENTRES) != 0 ? 1 : t.n_readers;
    }
}

// the tensors of all layers, for the rows that the bookkeeping has
void ra_storage::make_tensors() {
    for (auto & [ctx, buf] : ctxs_bufs) {
        buf.reset();
        ctx.reset(ggml_init({ 3 * tensors.size() * ggml_tensor_overhead(), nullptr, true }));
        if (!ctx) {
            throw std::runtime_error("ReasonAlloc: out of memory for the cache");
        }
    }
    for (size_t il = 0; il < tensors.size(); ++il) {
        const ra_layer & l = cache->layers[il];
        const shape &    s = shapes[il];
        ra_tensors &     t = tensors[il];
        if (l.n_head_kv == 0) {
            continue;
        }
        ggml_context * ctx = ctxs_bufs[s.device].first.get();
        t.k                = ggml_new_tensor_2d(ctx, s.type_k, s.head_dim_k, l.n_slots);
        t.v = s.has_own_v ? ggml_new_tensor_2d(ctx, s.type_v, s.head_dim_v, l.n_slots)
                          : ggml_view_2d(ctx, t.k, s.head_dim_v, l.n_slots, t.k->nb[1], 0);
        ggml_format_name(t.k, "ra_cache_k_l%zu", il);
        ggml_format_name(t.v, "ra_cache_v_l%zu", il);
        if (needs_window) {
            // all queries since the last compression are many, and only weigh tokens on average
            const int64_t n_row  = s.head_dim_k * t.n_head;
            const bool    is_few = !ra_cache_wants_all_queries(cache.get());
            const bool    fits   = n_row % ggml_blck_size(GGML_TYPE_Q8_0) == 0;
            t.q = ggml_new_tensor_2d(ctx, is_few || !fits ? GGML_TYPE_F32 : GGML_TYPE_Q8_0, n_row,
                                     int64_t(cache->n_ring) * t.n_pooled);
            ggml_format_name(t.q, "ra_window_q_l%zu", il);
        }
    }
}

// false with ra_last_error(): out of memory
bool ra_storage::alloc_buffers() {
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
            return false;
        }
        // rows beyond `used` are masked, but must not hold NaN
        ggml_backend_buffer_clear(buf.get(), 0);
    }
    return true;
}

// ---------------------------------------------------------------------------------------------
// sizes
// ---------------------------------------------------------------------------------------------

int64_t ra_storage::kv_bytes() const {
    int64_t n = 0;
    for (const ra_tensors & t : tensors) {
        n += t.k != nullptr ? (int64_t) ggml_nbytes(t.k) : 0;
        n += t.has_own_v() ? (int64_t) ggml_nbytes(t.v) : 0;
    }
    return n;
}

int64_t ra_storage::window_bytes() const {
    int64_t n = 0;
    for (const ra_tensors & t : tensors) {
        n += t.q != nullptr ? (int64_t) ggml_nbytes(t.q) : 0;
    }
    return n;
}

int64_t ra_storage::row_bytes() const {
    int64_t n = 0;
    for (size_t il = 0; il < tensors.size(); ++il) {
        n += cache->layers[il].n_swa == 0 ? tensors[il].row_bytes() * tensors[il].n_head_kv : 0;
    }
    return n;
}

int64_t ra_storage::full_bytes(int64_t n_pos) const {
    int64_t n = row_bytes() * n_pos;
    for (size_t il = 0; il < tensors.size(); ++il) {
        const int64_t n_rows = std::min<int64_t>(n_pos, cache->layers[il].n_swa);
        n += n_rows * tensors[il].row_bytes() * tensors[il].n_head_kv;
    }
    return n;
}

std::map<ggml_backend_buffer_type_t, size_t> ra_storage::breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (size_t i = 0; i < ctxs_bufs.size(); ++i) {
        const auto & [ctx, buf] = ctxs_bufs[i];
        res[bufts[i]] += no_alloc
                             ? ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), bufts[i])
                             : ggml_backend_buffer_get_size(buf.get());
    }
    return res;
}

// ---------------------------------------------------------------------------------------------
// contents
// ---------------------------------------------------------------------------------------------

void ra_storage::layout_changed() {
    ++layout;
    n_since = 0;
}

void ra_storage::clear(bool data) {
    ra_cache_clear(cache.get());
    layout_changed();
    if (data) {
        for (auto & [_, buf] : ctxs_bufs) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
    }
}

ra_status ra_storage::set_protect(int32_t n_protect) {
    const int32_t before   = cache->n_protect;
    const int32_t n_splits = cache->n_splits;
    ra_status     st       = ra_cache_set_protect(cache.get(), n_protect);
    if (st == RA_STATUS_OK && cache->n_splits != n_splits) {
        make_tensors();
        if (!alloc_buffers()) {
            st = RA_STATUS_NO_MEMORY;
            // memory of the same size was freed just now
            if (ra_cache_set_protect(cache.get(), before) != RA_STATUS_OK) {
                ra_throw_last();
            }
            make_tensors();
            if (!alloc_buffers()) {
                ra_throw_last();
            }
        }
        layout_changed();
    }
    return st;
}

ra_status ra_storage::copy_from(const ra_storage & src) {
    ra_cache_clear(cache.get());
    layout_changed();
    ra_status st = set_protect(src.cache->n_protect);
    st           = st == RA_STATUS_OK ? ra_cache_copy(cache.get(), src.cache.get()) : st;
    if (st != RA_STATUS_OK) {
        return st;
    }
    for (size_t il = 0; il < tensors.size(); ++il) {
        const ra_tensors & from = src.tensors[il];
        ra_tensors &       to   = tensors[il];
        if (from.k == nullptr) {
            continue;
        }
        ggml_backend_tensor_copy(from.k, to.k);
        if (from.has_own_v()) {
            ggml_backend_tensor_copy(from.v, to.v);
        }
        if (from.q != nullptr) {
            ggml_backend_tensor_copy(from.q, to.q);
        }
        to.logit        = from.logit;
        to.sinks        = from.sinks;
        to.rope         = from.rope;
        to.n_hadamard   = from.n_hadamard;
        to.n_hadamard_v = from.n_hadamard_v;
    }
    layout_changed();
    return RA_STATUS_OK;
}
