/* A text from a model with a fixed KV cache: budget, decoding, statistics.
 *   generate MODEL.gguf [BUDGET] [N_TOKENS]
 */
#include <llama.h>
#include <reasonalloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_PROMPT 512

static void silent(enum ggml_log_level level, const char * text, void * user) {
    (void) level, (void) text, (void) user;
}

static int fail(const char * what) {
    fprintf(stderr, "error: %s%s%s\n", what, ra_last_error()[0] ? ": " : "", ra_last_error());
    return 1;
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: generate MODEL.gguf [BUDGET] [N_TOKENS]\n");
        return 2;
    }
    llama_log_set(silent, NULL);
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return fail("the model cannot be loaded");
    }

    /* the next context of this thread gets a cache of `budget` tokens per head */
    ra_config config = ra_config_default_params();
    config.budget    = argc > 2 ? atoi(argv[2]) : 256;
    if (ra_configure_next(&config) != RA_STATUS_OK) {
        return fail("configuration");
    }
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx                       = 0; /* as trained: with a budget, length takes no memory */
    params.n_ubatch                    = config.buffer;
    params.flash_attn_type             = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    struct llama_context * ctx         = llama_init_from_model(model, params);
    if (!ctx) {
        return fail("no context");
    }

    const struct llama_vocab * vocab  = llama_model_get_vocab(model);
    const char *               prompt = "Once upon a time";
    llama_token                tokens[N_PROMPT];
    int32_t                    n =
        llama_tokenize(vocab, prompt, (int32_t) strlen(prompt), tokens, N_PROMPT, true, true);
    if (n <= 0) {
        return fail("the prompt has no tokens");
    }
    struct llama_sampler * greedy = llama_sampler_init_greedy();

    const int n_max = argc > 3 ? atoi(argv[3]) : 200;
    for (int i = 0; i < n_max; i++) {
        if (llama_decode(ctx, llama_batch_get_one(tokens, n)) != 0) {
            return fail("decode");
        }
        tokens[0] = llama_sampler_sample(greedy, ctx, -1);
        n         = 1;
        if (llama_vocab_is_eog(vocab, tokens[0])) {
            break;
        }
        char    piece[256];
        int32_t size = llama_token_to_piece(vocab, tokens[0], piece, sizeof(piece), 0, false);
        if (size > 0) {
            fwrite(piece, 1, (size_t) size, stdout);
        }
    }

    ra_stats stats = { .size = sizeof(stats) };
    if (ra_stats_get(ctx, 0, &stats) != RA_STATUS_OK) {
        return fail("statistics");
    }
    printf("\n%d tokens, at most %d held, %lld evicted, %lld bytes\n", stats.n_pos,
           stats.peak_tokens, (long long) stats.n_evicted, (long long) stats.kv_bytes);
    llama_sampler_free(greedy);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
