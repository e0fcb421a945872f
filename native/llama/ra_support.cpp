// ra_support.cpp - see ra_support.h
#include "ra_support.h"

#include "llama-model.h"
#include "ra_archs.h"

// what refuses a model, whatever its architecture; NULL: nothing
static const char * ra_unsupported_feature(const llama_model & model) {
    const llama_hparams & hp = model.hparams;
    if (!hp.causal_attn || llama_model_has_encoder(&model)) {
        return "its attention is not causal";
    }
    if (hp.ple_n_heads > 0 || hp.router_layer >= 0) {
        return "its graph reads the cache in its own way";
    }
    for (uint32_t il = 0; il < hp.n_layer(); ++il) {
        if (hp.is_mla() && hp.n_head_kv(il) > 1) {
            return "its latent rows are several to a token";
        }
        if (hp.n_head_kv(il) > 0 && hp.n_head(il) % hp.n_head_kv(il) != 0) {
            return "its query heads do not divide evenly among its KV heads";
        }
    }
    return nullptr;
}

ra_status ra_check_type(const char * name, int32_t type, uint32_t head_dim) {
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

ra_status ra_check_model(const llama_model & model, int32_t type_k, int32_t type_v) {
    const llama_hparams & hp  = model.hparams;
    const char *          why = ra_arch_refusal(model.arch);
    why                       = why == nullptr ? ra_unsupported_feature(model) : why;
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

ra_status ra_check_windows(const llama_model & model) {
    const llama_hparams & hp = model.hparams;
    if (hp.swa_type == LLAMA_SWA_TYPE_NONE || !hp.is_swa_any()) {
        return ra_error(
            RA_STATUS_UNSUPPORTED,
            "budget_swa is for layers with a sliding window, and this '%s' model has none: "
            "leave it out",
            llm_arch_name(model.arch));
    }
    if (hp.swa_type != LLAMA_SWA_TYPE_STANDARD) {
        return ra_error(RA_STATUS_UNSUPPORTED,
                        "budget_swa is for sliding windows, and architecture '%s' attends within "
                        "%s of %u tokens: leave it out",
                        llm_arch_name(model.arch),
                        hp.swa_type == LLAMA_SWA_TYPE_CHUNKED ? "chunks" : "symmetric windows",
                        hp.n_swa);
    }
    return RA_STATUS_OK;
}

ra_status ra_check_policy(const llama_model & model, const ra_settings & settings,
                          const std::vector<bool> & grows) {
    const llama_hparams & hp   = model.hparams;
    const char *          name = settings.policy->name;
    if ((settings.policy->needs & RA_FEATURE_CENTRES) == 0) {
        return RA_STATUS_OK;
    }
    if (hp.rope_type != LLAMA_ROPE_TYPE_NORM && hp.rope_type != LLAMA_ROPE_TYPE_NEOX) {
        return ra_error(RA_STATUS_UNSUPPORTED,
                        "policy '%s' needs rotary positions (RoPE), which architecture '%s' does "
                        "not have: use another policy",
                        name, llm_arch_name(model.arch));
    }
    size_t n = 0;
    for (uint32_t il = 0; il < hp.n_layer(); ++il) {
        n += hp.n_head_kv(il) == 0 || !grows[il]
                 ? 0
                 : size_t(hp.n_head(il)) * size_t(ra_centre_values((int32_t) hp.n_embd_head_k(il)));
    }
    if (settings.cfg.n_centres != n && settings.cfg.budget_swa > 0) {
        return ra_error(
            RA_STATUS_INVALID,
            "policy '%s' with budget_swa needs query centres of layers with a window, too, "
            "which no profile has: use another policy, or leave budget_swa out",
            name);
    }
    if (settings.cfg.n_centres != n) {
        return ra_error(RA_STATUS_INVALID,
                        "policy '%s' needs the query centres of this model: calibrate a profile "
                        "with reasonalloc-profile (%zu numbers given, the model has %zu)",
                        name, settings.cfg.n_centres, n);
    }
    return RA_STATUS_OK;
}

ra_status ra_check_devices(const llama_model & model) {
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return ra_error(RA_STATUS_UNSUPPORTED,
                        "a budgeted cache cannot be split tensor by tensor over devices: split the "
                        "model by layers");
    }
    return RA_STATUS_OK;
}

ra_status ra_model_supported(const llama_model * model, int32_t type_k, int32_t type_v) {
    if (model == nullptr) {
        return ra_error(RA_STATUS_INVALID, "ra_model_supported: no model");
    }
    return ra_check_model(*model, type_k, type_v);
}
