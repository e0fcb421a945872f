// ra_storage.cpp - see ra_storage.h
#include "ra_storage.h"

#include "llama-hparams.h"
#include "llama-memory.h"
#include "llama-model.h"

#include <cmath>
#include <cstdlib>

// ---------------------------------------------------------------------------------------------
// construction
// ---------------------------------------------------------------------------------------------

ra_storage::ra_storage(const llama_model & model, const llama_memory_params & params, bool offload,
                       ra_settings * settings)
    : no_alloc(model.hparams.no_alloc) {
    const llama_hparams & hparams = model.hparams;
    std::vector<int32_t>  n_head_kv(hparams.n_layer());
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
    add_layers(model, params, offload);
    alloc_buffers();
    add_rotations(model, params);
}

void ra_storage::add_layers(const llama_model & model, const llama_memory_params & params,
                            bool offload) {
    const llama_hparams & hparams = model.hparams;

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

void ra_storage::alloc_buffers() {
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

// as the stock cache: quantised rows are rotated, to spread outliers
void ra_storage::add_rotations(const llama_model & model, const llama_memory_params & params) {
    const llama_hparams & hparams = model.hparams;
    const char *          off     = getenv("LLAMA_ATTN_ROT_DISABLE");
    if (off != nullptr && atoi(off) != 0) {
        return;
    }
    if (!hparams.is_n_embd_k_gqa_variable() && ggml_is_quantized(params.type_k) &&
        hparams.n_embd_head_k() % 64 == 0) {
        int32_t n = 64;
        while (hparams.n_embd_head_k() % uint32_t(2 * n) == 0) {
            n *= 2;
        }
        rot_k = ra_hadamard(n);
    }
    if (!hparams.is_n_embd_v_gqa_variable() && ggml_is_quantized(params.type_v) &&
        hparams.n_embd_head_v() % 64 == 0) {
        rot_v = ra_hadamard(64);
    }
}

// ---------------------------------------------------------------------------------------------
// sizes
// ---------------------------------------------------------------------------------------------

int64_t ra_storage::kv_bytes() const {
    int64_t n = 0;
    for (const ra_tensors & t : tensors) {
        n += t.k != nullptr ? (int64_t) (ggml_nbytes(t.k) + ggml_nbytes(t.v)) : 0;
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
    for (const ra_tensors & t : tensors) {
        n += t.k != nullptr ? (int64_t) (t.k->nb[1] + t.v->nb[1]) * t.n_head_kv : 0;
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
