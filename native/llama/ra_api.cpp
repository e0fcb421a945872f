// ra_api.cpp - the C interface where it touches llama.cpp: pending configuration, support checks,
// statistics of a context
#include "llama-context.h"
#include "llama-impl.h"
#include "ra_llama.h"
#include "ra_memory.h"

#include <algorithm>
#include <cstring>
#include <exception>

// ---------------------------------------------------------------------------------------------
// support
// ---------------------------------------------------------------------------------------------

// architectures whose cache or graph is more than one plain attention cache, although their
// hyper-parameters do not show it
static bool ra_arch_is_special(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_T5:
        case LLM_ARCH_DREAM:
        case LLM_ARCH_LLADA:
        case LLM_ARCH_LLADA_MOE:
        case LLM_ARCH_RND1: return true;
        default: return false;
    }
}

static const char * ra_unsupported_feature(const llama_model & model) {
    const llama_hparams & hp = model.hparams;
    if (llm_arch_is_recurrent(model.arch)) {
        return "it is recurrent and has no attention cache";
    }
    if (llm_arch_is_hybrid(model.arch)) {
        return "it mixes attention with recurrent layers";
    }
    if (hp.swa_type != LLAMA_SWA_TYPE_NONE) {
        return "it uses sliding-window attention";
    }
    if (hp.is_mla()) {
        return "it uses multi-head latent attention (MLA)";
    }
    if (!hp.causal_attn || llama_model_has_encoder(&model) || ra_arch_is_special(model.arch)) {
        return "it does not keep one plain causal attention cache";
    }
    if (hp.use_alibi || hp.f_max_alibi_bias > 0.0f) {
        return "it uses ALiBi position biases";
    }
    if (hp.n_pos_per_embd() > 1) {
        return "it uses multi-dimensional positions (M-RoPE)";
    }
    if (hp.ple_n_heads > 0 || hp.router_layer >= 0) {
        return "its graph reads the cache in its own way";
    }
    for (uint32_t il = 0; il < hp.n_layer(); ++il) {
        if (!hp.has_kv(il)) {
            return "some of its layers share the cache of others";
        }
        if (hp.n_head_kv(il) > 0 && hp.n_head(il) % hp.n_head_kv(il) != 0) {
            return "its query heads do not divide evenly among its KV heads";
        }
    }
    return nullptr;
}

static ra_status ra_check_type(const char * name, int32_t type, uint32_t head_dim) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_IQ4_NL: break;
        default:
            return ra_error(
                RA_STATUS_UNSUPPORTED,
                "cache type %s of %s is not supported with a budget: use f32, f16, "
                "bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl",
                type >= 0 && type < GGML_TYPE_COUNT ? ggml_type_name((ggml_type) type) : "?", name);
    }
    if (head_dim % ggml_blck_size((ggml_type) type) != 0) {
        return ra_error(RA_STATUS_UNSUPPORTED,
                        "cache type %s of %s needs a head size divisible by %d, the model's is %u",
                        ggml_type_name((ggml_type) type), name,
                        (int) ggml_blck_size((ggml_type) type), head_dim);
    }
    return RA_STATUS_OK;
}

static ra_status ra_check_model(const llama_model & model, int32_t type_k, int32_t type_v) {
    const llama_hparams & hp  = model.hparams;
    const char *          why = ra_unsupported_feature(model);
    if (why != nullptr) {
        return ra_error(RA_STATUS_UNSUPPORTED,
                        "architecture '%s' is not supported with a budget: %s; run it without one",
                        llm_arch_name(model.arch), why);
    }
    for (uint32_t il = 0; il < hp.n_layer(); ++il) {
        ra_status st = ra_check_type("K", type_k, hp.n_embd_head_k(il));
        st           = st == RA_STATUS_OK ? ra_check_type("V", type_v, hp.n_embd_head_v(il)) : st;
        if (st != RA_STATUS_OK) {
            return st;
        }
    }
    return RA_STATUS_OK;
}

ra_status ra_model_supported(const llama_model * model, int32_t type_k, int32_t type_v) {
    if (model == nullptr) {
        return ra_error(RA_STATUS_INVALID, "ra_model_supported: no model");
    }
    return ra_check_model(*model, type_k, type_v);
}

// ---------------------------------------------------------------------------------------------
// the configuration of the next context
// ---------------------------------------------------------------------------------------------

namespace {
struct ra_pending {
    ra_settings settings{};
    bool        is_set = false;

    ~ra_pending() { reset(); }

    void reset() {
        ra_settings_free(&settings);
        is_set = false;
    }
};
} // namespace

static thread_local ra_pending pending;

ra_status ra_configure_next(const ra_config * cfg) {
    pending.reset();
    ra_error_clear(); // what is found there after a failed llama_init_from_model() is its own
    if (cfg == nullptr) {
        return RA_STATUS_OK;
    }
    const ra_status st = ra_settings_init(&pending.settings, cfg);
    pending.is_set     = st == RA_STATUS_OK;
    return st;
}

bool ra_memory_wanted(const llama_model & model, const llama_memory_params & params,
                      const llama_cparams & cparams) {
    if (!pending.is_set) {
        return false;
    }
    ra_status st = ra_check_model(model, params.type_k, params.type_v);
    if (st == RA_STATUS_OK && params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        st = ra_error(RA_STATUS_UNSUPPORTED, "a budget serves only the model's main context");
    }
    if (st == RA_STATUS_OK && cparams.n_seq_max != 1) {
        st = ra_error(RA_STATUS_UNSUPPORTED, "a budgeted cache holds one sequence, n_seq_max is %u",
                      cparams.n_seq_max);
    }
    if (st == RA_STATUS_OK && !cparams.causal_attn) {
        st = ra_error(RA_STATUS_UNSUPPORTED, "a budgeted cache needs causal attention");
    }
    if (st == RA_STATUS_OK && !cparams.flash_attn && ggml_is_quantized(params.type_v)) {
        st = ra_error(RA_STATUS_UNSUPPORTED,
                      "a quantised V cache (%s) needs flash attention: turn it on or use f16",
                      ggml_type_name(params.type_v));
    }
    if (st != RA_STATUS_OK) {
        pending.reset();
        ra_throw_last();
    }
    return true;
}

llama_memory_i * ra_memory_create(const llama_model & model, const llama_memory_params & params,
                                  const llama_cparams & cparams) {
    ra_settings settings = pending.settings;
    pending.settings     = {};
    pending.reset();
    return new ra_memory(model, params, cparams, &settings);
}

llama_memory_i * ra_memory_require(const llama_model & model, llama_memory_i * mem) {
    if (dynamic_cast<ra_memory *>(mem) == nullptr) {
        delete mem;
        pending.reset();
        ra_error(RA_STATUS_UNSUPPORTED,
                 "architecture '%s' is not supported with a budget: it does not keep one plain "
                 "attention cache; run it without one",
                 llm_arch_name(model.arch));
        ra_throw_last();
    }
    return mem;
}

// ---------------------------------------------------------------------------------------------
// a context with a budget
// ---------------------------------------------------------------------------------------------

ra_memory * ra_memory_of(const llama_context * ctx) {
    return ctx == nullptr ? nullptr : dynamic_cast<ra_memory *>(ctx->get_memory());
}

static ra_status ra_not_attached() {
    return ra_error(
        RA_STATUS_NOT_FOUND,
        "this context has no budgeted cache: call ra_configure_next() before making it");
}

int32_t ra_is_attached(const llama_context * ctx) {
    return ra_memory_of(ctx) != nullptr;
}

ra_status ra_set_protect(llama_context * ctx, int32_t n_protect) {
    ra_memory * mem = ra_memory_of(ctx);
    return mem == nullptr ? ra_not_attached() : ra_cache_set_protect(mem->state(), n_protect);
}

ra_status ra_set_head_budgets(llama_context * ctx, int32_t il, const int32_t * budgets, size_t n) {
    ra_memory * mem = ra_memory_of(ctx);
    return mem == nullptr ? ra_not_attached() : mem->set_head_budgets(il, budgets, n);
}

ra_status ra_compress(llama_context * ctx) {
    ra_memory * mem = ra_memory_of(ctx);
    return mem == nullptr ? ra_not_attached() : mem->compress();
}

ra_status ra_set_trace(llama_context * ctx, ra_trace_cb cb, void * user) {
    ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr) {
        return ra_not_attached();
    }
    mem->state()->trace      = cb;
    mem->state()->trace_user = user;
    return RA_STATUS_OK;
}

ra_status ra_stats_get(const llama_context * ctx, ra_stats * st) {
    const ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr) {
        return ra_not_attached();
    }
    if (st == nullptr || st->size != sizeof(*st)) {
        return ra_error(RA_STATUS_INVALID, "ra_stats_get: st->size must be %zu", sizeof(*st));
    }
    const ra_cache * c = mem->state();
    *st                = {};
    st->size           = sizeof(*st);
    for (int32_t il = 0; il < c->n_layer; ++il) {
        const ra_layer & l = c->layers[il];
        st->n_layer += l.n_head_kv > 0;
        st->n_head_kv_max = std::max(st->n_head_kv_max, l.n_head_kv);
        for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
            st->n_entries += l.used[ih];
        }
    }
    st->budget         = c->settings.cfg.budget;
    st->buffer         = c->settings.cfg.buffer;
    st->n_pos          = c->n_pos;
    st->peak_tokens    = c->peak_tokens;
    st->kv_bytes       = mem->kv_bytes();
    st->window_bytes   = mem->window_bytes();
    st->scratch_bytes  = mem->scratch_bytes();
    st->kv_bytes_full  = mem->row_bytes() * c->n_pos;
    st->n_evicted      = c->n_evicted;
    st->n_compressions = c->n_compressions;
    st->compress_us    = mem->compress_us;
    st->n_tokens_total = c->n_tokens_total;
    return RA_STATUS_OK;
}

ra_status ra_head_stats_get(const llama_context * ctx, int32_t il, int32_t ih, ra_head_stats * st) {
    const ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr) {
        return ra_not_attached();
    }
    const ra_cache * c = mem->state();
    if (st == nullptr || st->size != sizeof(*st) || il < 0 || il >= c->n_layer || ih < 0 ||
        ih >= c->layers[il].n_head_kv) {
        return ra_error(RA_STATUS_INVALID,
                        "ra_head_stats_get: no layer %d, head %d, or a wrong size", il, ih);
    }
    const ra_layer & l = c->layers[il];
    st->budget         = l.budget[ih];
    st->capacity       = l.budget[ih] + c->settings.cfg.buffer;
    st->used           = l.used[ih];
    st->offset         = l.offset[ih];
    st->n_evicted      = l.n_evicted[ih];
    return RA_STATUS_OK;
}

int32_t ra_n_head_kv(const llama_context * ctx, int32_t il) {
    const ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr || il < 0 || il >= mem->state()->n_layer) {
        return -1;
    }
    return mem->state()->layers[il].n_head_kv;
}

int32_t ra_kept_positions(const llama_context * ctx, int32_t il, int32_t ih, int32_t * pos,
                          int32_t n_max) {
    const int32_t n_head_kv = ra_n_head_kv(ctx, il);
    if (n_head_kv < 0 || ih < 0 || ih >= n_head_kv || n_max < 0 || (pos == nullptr && n_max > 0)) {
        ra_error(RA_STATUS_INVALID, "ra_kept_positions: no layer %d, head %d, or no room", il, ih);
        return -1;
    }
    const ra_layer & l = ra_memory_of(ctx)->state()->layers[il];
    std::copy_n(l.pos + l.offset[ih], std::min(n_max, l.used[ih]), pos);
    return l.used[ih];
}

int64_t ra_row_bytes(const llama_context * ctx) {
    const ra_memory * mem = ra_memory_of(ctx);
    return mem == nullptr ? -1 : mem->row_bytes();
}

int32_t ra_memory_breakdown(const llama_context * ctx, int64_t * model_bytes,
                            int64_t * context_bytes, int64_t * compute_bytes) {
    if (ctx == nullptr || model_bytes == nullptr || context_bytes == nullptr ||
        compute_bytes == nullptr) {
        return ra_error(RA_STATUS_INVALID, "ra_memory_breakdown: an argument is NULL");
    }
    *model_bytes = *context_bytes = *compute_bytes = 0;
    // tensor by tensor: a buffer over a mapped file also spans what other backends use
    for (const auto & [_, tensor] : ctx->get_model().tensors_by_name) {
        *model_bytes += (int64_t) ggml_backend_buft_get_alloc_size(
            ggml_backend_buffer_get_type(tensor->buffer), tensor);
    }
    for (const auto & [_, data] : ctx->memory_breakdown()) {
        *context_bytes += (int64_t) data.context;
        *compute_bytes += (int64_t) data.compute;
    }
    return RA_STATUS_OK;
}

int64_t ra_planned_scratch_bytes(const llama_context * ctx) {
    const ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr) {
        ra_not_attached();
        return -1;
    }
    try {
        return mem->planned_scratch_bytes(ctx->get_sched());
    } catch (const std::exception & e) {
        ra_error(RA_STATUS_NO_MEMORY, "cannot plan the scratch of compressions: %s", e.what());
        return -1;
    }
}

// ---------------------------------------------------------------------------------------------
// sizes without a context
// ---------------------------------------------------------------------------------------------

static ra_status ra_check_shape(const ra_shape * s) {
    if (s == nullptr || s->n_layer < 1 || s->n_layer > 4096 || s->n_head_kv < 1 ||
        s->n_head_kv > 4096 || s->head_dim_k < 1 || s->head_dim_k > 65536 || s->head_dim_v < 1 ||
        s->head_dim_v > 65536) {
        return ra_error(RA_STATUS_INVALID, "ra_shape: a count is out of range");
    }
    const ra_status st = ra_check_type("K", s->type_k, (uint32_t) s->head_dim_k);
    return st != RA_STATUS_OK ? st : ra_check_type("V", s->type_v, (uint32_t) s->head_dim_v);
}

static int64_t ra_shape_row_bytes(const ra_shape * s) {
    return (int64_t) (ggml_row_size((ggml_type) s->type_k, s->head_dim_k) +
                      ggml_row_size((ggml_type) s->type_v, s->head_dim_v));
}

int64_t ra_plan_kv_bytes(const ra_shape * shape, const ra_config * cfg) {
    if (ra_check_shape(shape) != RA_STATUS_OK) {
        return -1;
    }
    ra_settings settings{};
    if (ra_settings_init(&settings, cfg) != RA_STATUS_OK) {
        return -1;
    }
    const std::vector<int32_t> n_head_kv(shape->n_layer, shape->n_head_kv);
    std::vector<int32_t>       budgets(size_t(shape->n_layer) * shape->n_head_kv);
    int64_t                    n_slots = -1;
    if (ra_settings_budgets(&settings, shape->n_layer, n_head_kv.data(), budgets.data()) ==
        RA_STATUS_OK) {
        n_slots = 0;
        for (const int32_t budget : budgets) {
            n_slots += int64_t(budget) + settings.cfg.buffer;
        }
    }
    ra_settings_free(&settings);
    return n_slots < 0 ? -1 : n_slots * ra_shape_row_bytes(shape);
}

int64_t ra_plan_kv_bytes_full(const ra_shape * shape, int64_t n_tokens) {
    if (ra_check_shape(shape) != RA_STATUS_OK) {
        return -1;
    }
    if (n_tokens < 0 || n_tokens > (int64_t(1) << 40)) {
        ra_error(RA_STATUS_INVALID, "n_tokens = %lld is out of range", (long long) n_tokens);
        return -1;
    }
    return n_tokens * shape->n_layer * shape->n_head_kv * ra_shape_row_bytes(shape);
}
