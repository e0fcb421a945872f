// check_archs.cpp - random models of llama.cpp's architectures, decoded with a budget and without
//
// The models are those of llama.cpp's own tests/test-llama-archs.cpp, which this file includes: with the
// folder of llama.cpp's sources in the include path, and this folder for what it takes from common/.
//
//   check_archs                    lists the models: "ARCH dense" or "ARCH moe"
//   check_archs ARCH dense|moe     "decoded ..." or "refused: ..." ; status 1 if something is wrong
//   check_archs --save DIR REGEX   writes those that llama.cpp can save as GGUF files, of the architectures
//                                  that match
#define main llama_cpp_main
#include "tests/test-llama-archs.cpp"
#undef main

#include "reasonalloc.h"

#include <algorithm>

static constexpr int N_PROMPT = 30;

static llama_context_ptr make_context(llama_model * model, int32_t budget, int32_t buffer,
                                      llama_flash_attn_type flash_attn, int32_t budget_swa = 0) {
    if (budget > 0) {
        ra_config cfg  = ra_config_default_params();
        cfg.budget     = budget;
        cfg.budget_swa = budget_swa;
        cfg.buffer     = buffer;
        cfg.n_window   = 8;
        if (ra_configure_next(&cfg) != RA_STATUS_OK) {
            throw std::runtime_error(ra_last_error());
        }
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 512;
    params.n_batch              = 64;
    params.n_ubatch             = 64;
    params.n_threads            = 1;
    params.n_threads_batch      = 1;
    params.flash_attn_type      = flash_attn;
    return llama_context_ptr(llama_init_from_model(model, params));
}

// logits of every token: a prompt in one batch, then token by token
static std::vector<float> decode(llama_context * ctx, std::vector<llama_token> tokens) {
    const size_t n_vocab =
        (size_t) llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    std::vector<float> logits;
    for (size_t begin = 0; begin < tokens.size();) {
        const int32_t n     = begin == 0 ? N_PROMPT : 1;
        llama_batch   batch = llama_batch_init(n, 0, 1);
        batch.n_tokens      = n;
        for (int32_t i = 0; i < n; ++i) {
            batch.token[i]     = tokens[begin + (size_t) i];
            batch.pos[i]       = (llama_pos) begin + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i]    = 1;
        }
        const int32_t failed = llama_decode(ctx, batch);
        for (int32_t i = 0; i < n && failed == 0; ++i) {
            const float * row = llama_get_logits_ith(ctx, i);
            logits.insert(logits.end(), row, row + n_vocab);
        }
        llama_batch_free(batch);
        if (failed != 0) {
            throw std::runtime_error(std::string("llama_decode failed: ") + ra_last_error());
        }
        begin += (size_t) n;
    }
    return logits;
}

static gguf_context_ptr make_gguf(llm_arch arch, bool moe) {
    gguf_context_ptr gguf = get_gguf_ctx(arch, moe);
    if (arch == LLM_ARCH_BAILINGMOE3) { // as in test_backends()
        gguf_remove_key(gguf.get(), "bailingmoe3.kda.safe_gate");
    }
    if (arch == LLM_ARCH_LFM2) { // the fixture's only layer with attention has a window
        gguf_remove_key(gguf.get(), "lfm2.attention.sliding_window");
    }
    if (arch == LLM_ARCH_GEMMA4) {
        // what the fixture lacks; and layers that read the rows of others, of both kinds
        const uint32_t pattern[10] = { 1, 1, 1, 1, 0, 1, 1, 1, 1, 0 };
        gguf_set_val_u32(gguf.get(), "gemma4.block_count", 10);
        gguf_set_val_u32(gguf.get(), "gemma4.attention.shared_kv_layers", 5);
        gguf_set_arr_data(gguf.get(), "gemma4.attention.sliding_window_pattern", GGUF_TYPE_UINT32,
                          pattern, 10);
    }
    return gguf;
}

// how far logits are off, of the largest
static float difference(const std::vector<float> & expected, const std::vector<float> & got) {
    float most = 0.0f, off = 0.0f;
    for (size_t i = 0; i < expected.size(); ++i) {
        most = std::max(most, std::fabs(expected[i]));
        off  = std::max(off, std::fabs(expected[i] - got[i]));
    }
    return off / most;
}

static bool all_finite(const std::vector<float> & logits) {
    return std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); });
}

// a budget for the layers with a window, too: as stock if it holds the window, else finite; " windows ..."
static bool check_windows(llama_model * model, llama_flash_attn_type flash,
                          const std::vector<llama_token> & tokens,
                          const std::vector<float> &       expected) {
    const llama_context_ptr whole = make_context(model, 200, 32, flash, 200);
    if (!whole) {
        printf("; %s", ra_last_error());
        return strstr(ra_last_error(), "budget_swa is for") != nullptr;
    }
    const float             off  = difference(expected, decode(whole.get(), tokens));
    const llama_context_ptr part = make_context(model, 200, 16, flash, 16);
    const bool              ok   = all_finite(decode(part.get(), tokens));
    printf("; windows off by %.1e, budget_swa 16: %s", (double) off, ok ? "finite" : "NOT FINITE");
    return ok && off < 1e-3f;
}

static int check(const char * name, bool moe) {
    const llm_arch         arch   = llm_arch_from_string(name);
    const gguf_context_ptr gguf   = make_gguf(arch, moe);
    tensor_data_params     data   = { 1, 0.1f };
    llama_model_params     params = llama_model_default_params();
    const llama_model_ptr  model(
        llama_model_init_from_user(gguf.get(), set_tensor_data, &data, params));
    if (!model) {
        throw std::runtime_error("no model");
    }
    // masks of flash attention are f16, too coarse for biases by distance to be compared exactly
    const bool alibi = arch == LLM_ARCH_MPT || arch == LLM_ARCH_BLOOM || arch == LLM_ARCH_JAIS ||
                       arch == LLM_ARCH_REFACT;
    const auto flash = alibi ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_AUTO;

    const llama_context_ptr ours = make_context(model.get(), 200, 32, flash);
    if (!ours) {
        printf("refused: %s\n", ra_last_error());
        return ra_model_supported(model.get(), GGML_TYPE_F16, GGML_TYPE_F16) != RA_STATUS_OK ||
                       strstr(ra_last_error(), "not supported with a budget") != nullptr
                   ? 0
                   : 1;
    }
    const llama_context_ptr        stock    = make_context(model.get(), 0, 0, flash);
    const std::vector<llama_token> tokens   = get_tokens(120, 100, 1);
    const std::vector<float>       expected = decode(stock.get(), tokens);
    const std::vector<float>       got      = decode(ours.get(), tokens);
    const float                    off      = difference(expected, got);
    const size_t                   n_vocab  = expected.size() / tokens.size();
    size_t                         n_same   = 0;
    for (size_t i = 0; i < expected.size(); i += n_vocab) {
        const auto best = [&](const std::vector<float> & v) {
            return std::max_element(v.begin() + (long) i, v.begin() + (long) (i + n_vocab)) -
                   v.begin();
        };
        n_same += best(expected) == best(got);
    }

    const llama_context_ptr  small  = make_context(model.get(), 40, 16, flash);
    std::vector<llama_token> longer = tokens;
    longer.insert(longer.end(), tokens.begin(), tokens.end());
    const bool is_finite = all_finite(decode(small.get(), longer));
    ra_stats   stats{};
    stats.size = sizeof(stats);
    if (ra_stats_get(small.get(), 0, &stats) != RA_STATUS_OK) {
        throw std::runtime_error(ra_last_error());
    }
    const bool ok = off < 1e-3f && n_same == tokens.size() && is_finite && stats.n_compressions > 5;
    printf("decoded: off by %.1e of the largest logit, %zu of %zu tokens the same; budget 40: %s, "
           "%lld "
           "compressions of %d layers",
           (double) off, n_same, tokens.size(), is_finite ? "finite" : "NOT FINITE",
           (long long) stats.n_compressions, stats.n_layer);
    const bool ok_windows = check_windows(model.get(), flash, tokens, expected);
    printf("\n");
    return ok && ok_windows ? 0 : 1;
}

static void silent(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        fprintf(stderr, "%s", text);
    }
}

int main(int argc, char ** argv) {
    llama_log_set(silent, nullptr);
    if (argc == 4 && strcmp(argv[1], "--save") == 0) {
        return save_models(argv[3], 1, 0.1f, 0, argv[2]);
    }
    if (argc == 3) {
        try {
            return check(argv[1], strcmp(argv[2], "moe") == 0);
        } catch (const std::exception & e) {
            printf("failed: %s\n", e.what());
            return 1;
        }
    }
    for (const llm_arch & arch : llm_arch_all()) {
        const bool is_made = arch_supported(arch) || arch == LLM_ARCH_GEMMA4 ||
                             arch == LLM_ARCH_DEEPSEEK2OCR || arch == LLM_ARCH_CHAMELEON;
        const bool encodes = arch == LLM_ARCH_T5 || arch == LLM_ARCH_DREAM ||
                             arch == LLM_ARCH_LLADA || arch == LLM_ARCH_LLADA_MOE ||
                             arch == LLM_ARCH_RND1;
        if (arch == LLM_ARCH_EAGLE3 || arch == LLM_ARCH_DFLASH || encodes || !is_made) {
            continue;
        }
        for (const bool moe : { false, true }) {
            const bool is_kind = arch == LLM_ARCH_DEEPSEEK2OCR ? moe
                                 : moe                         ? moe_implemented(arch)
                                                               : !moe_mandatory(arch);
            if (is_kind) {
                printf("%s %s\n", llm_arch_name(arch), moe ? "moe" : "dense");
            }
        }
    }
    return 0;
}
