// ra_hooks.cpp - where the patched llama.cpp makes its cache: the configuration of the next context
#include "llama-model.h"
#include "ra_graph.h"
#include "ra_llama.h"
#include "ra_memory.h"
#include "ra_stock.h"
#include "ra_support.h"

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

static ra_status ra_check_context(const llama_model & model, const llama_memory_params & params,
                                  const llama_cparams & cparams) {
    ra_status st = ra_check_model(model, params.type_k, params.type_v);
    st           = st == RA_STATUS_OK ? ra_check_devices(model) : st;
    if (st == RA_STATUS_OK && params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        st = ra_error(RA_STATUS_UNSUPPORTED, "a budget serves only the model's main context");
    }
    if (st == RA_STATUS_OK && model.hparams.is_mla() && pending.settings.cfg.merge) {
        st = ra_error(RA_STATUS_UNSUPPORTED,
                      "merging averages values, which are parts of keys in latent attention (MLA): "
                      "turn it off for architecture '%s'",
                      llm_arch_name(model.arch));
    }
    if (st == RA_STATUS_OK && pending.settings.cfg.budget_swa > 0) {
        st = ra_check_windows(model);
    }
    if (st == RA_STATUS_OK && !cparams.causal_attn) {
        st = ra_error(RA_STATUS_UNSUPPORTED, "a budgeted cache needs causal attention");
    }
    if (st == RA_STATUS_OK && !cparams.flash_attn && ggml_is_quantized(params.type_v)) {
        st = ra_error(RA_STATUS_UNSUPPORTED,
                      "a quantised V cache (%s) needs flash attention: turn it on or use f16",
                      ggml_type_name(params.type_v));
    }
    return st;
}

llama_memory_i * ra_memory_create(const llama_model & model, const llama_memory_params & params,
                                  const llama_cparams & cparams) {
    if (!pending.is_set || ra_stock_is_made()) {
        return nullptr;
    }
    std::unique_ptr<ra_stock> stock;
    try {
        if (ra_check_context(model, params, cparams) != RA_STATUS_OK) {
            ra_throw_last();
        }
        stock =
            std::make_unique<ra_stock>(model, params, cparams, pending.settings.cfg.budget_swa > 0);
        if (ra_check_policy(model, pending.settings, stock->left_out()) != RA_STATUS_OK) {
            ra_throw_last();
        }
    } catch (...) {
        pending.reset();
        throw;
    }
    ra_settings settings = pending.settings;
    pending.settings     = {};
    pending.reset();
    return new ra_memory(model, params, cparams, std::move(stock), &settings);
}

uint32_t ra_graph_extra_nodes(const llama_memory_i * mem) {
    const ra_memory * m = dynamic_cast<const ra_memory *>(mem);
    return m == nullptr ? 0 : ra_graph_count_nodes(m->stream(0).store, (uint32_t) m->n_seq());
}
