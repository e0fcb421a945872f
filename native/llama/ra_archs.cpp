// ra_archs.cpp - see ra_archs.h
//
// Accepted is what was seen to decode like stock llama.cpp, by tests/archs; an architecture that is new in
// llama.cpp has no row, and is refused until it was.
#include "ra_archs.h"

#include "llama-arch.h"
#include "ra_storage.h"
#include "reasonalloc_tools.h"

#include <algorithm>

namespace {
enum ra_arch_kind {
    PLAIN,
    WINDOWS,
    SHARED,
    LATENT,
    HYBRID,
    HYBRID_LATENT,
    // refused
    ENCODES,
    DIFFUSES,
    RECURRENT,
    INDEXED,
    COMPRESSED,
    DRAFTS,
    CROSS,
    NO_TEXT,
    NO_GRAPH,
    UNTESTED
};

struct ra_arch_row {
    llm_arch     arch;
    ra_arch_kind kind;
};
} // namespace

static const ra_arch_row ra_arch_rows[] = {
    { LLM_ARCH_CLIP, NO_TEXT },
    { LLM_ARCH_LLAMA, PLAIN },
    { LLM_ARCH_LLAMA4, WINDOWS },
    { LLM_ARCH_DECI, PLAIN },
    { LLM_ARCH_FALCON, PLAIN },
    { LLM_ARCH_BAICHUAN, PLAIN },
    { LLM_ARCH_GROK, PLAIN },
    { LLM_ARCH_GPT2, PLAIN },
    { LLM_ARCH_GPTJ, NO_GRAPH },
    { LLM_ARCH_GPTNEOX, PLAIN },
    { LLM_ARCH_MPT, PLAIN },
    { LLM_ARCH_STARCODER, PLAIN },
    { LLM_ARCH_REFACT, PLAIN },
    { LLM_ARCH_BERT, ENCODES },
    { LLM_ARCH_MODERN_BERT, ENCODES },
    { LLM_ARCH_NOMIC_BERT, ENCODES },
    { LLM_ARCH_NOMIC_BERT_MOE, ENCODES },
    { LLM_ARCH_NEO_BERT, ENCODES },
    { LLM_ARCH_JINA_BERT_V2, ENCODES },
    { LLM_ARCH_JINA_BERT_V3, ENCODES },
    { LLM_ARCH_EUROBERT, ENCODES },
    { LLM_ARCH_BLOOM, PLAIN },
    { LLM_ARCH_STABLELM, PLAIN },
    { LLM_ARCH_QWEN, PLAIN },
    { LLM_ARCH_QWEN2, PLAIN },
    { LLM_ARCH_QWEN2MOE, PLAIN },
    { LLM_ARCH_QWEN2VL, PLAIN },
    { LLM_ARCH_QWEN3, PLAIN },
    { LLM_ARCH_QWEN3MOE, PLAIN },
    { LLM_ARCH_QWEN3NEXT, HYBRID },
    { LLM_ARCH_QWEN3VL, PLAIN },
    { LLM_ARCH_QWEN3VLMOE, PLAIN },
    { LLM_ARCH_QWEN35, HYBRID },
    { LLM_ARCH_QWEN35MOE, HYBRID },
    { LLM_ARCH_QWEN4EXP, INDEXED },
    { LLM_ARCH_PHI2, PLAIN },
    { LLM_ARCH_PHI3, WINDOWS },
    { LLM_ARCH_PHIMOE, WINDOWS },
    { LLM_ARCH_PLAMO, PLAIN },
    { LLM_ARCH_PLAMO2, HYBRID },
    { LLM_ARCH_PLAMO3, WINDOWS },
    { LLM_ARCH_CODESHELL, PLAIN },
    { LLM_ARCH_ORION, PLAIN },
    { LLM_ARCH_INTERNLM2, PLAIN },
    { LLM_ARCH_MINICPM, PLAIN },
    { LLM_ARCH_MINICPM3, PLAIN },
    { LLM_ARCH_GEMMA, PLAIN },
    { LLM_ARCH_GEMMA2, WINDOWS },
    { LLM_ARCH_GEMMA3, WINDOWS },
    { LLM_ARCH_GEMMA3N, SHARED },
    { LLM_ARCH_GEMMA4, SHARED },
    { LLM_ARCH_GEMMA4_ASSISTANT, DRAFTS },
    { LLM_ARCH_GEMMA_EMBEDDING, ENCODES },
    { LLM_ARCH_STARCODER2, PLAIN },
    { LLM_ARCH_MAMBA, RECURRENT },
    { LLM_ARCH_MAMBA2, RECURRENT },
    { LLM_ARCH_MAPLE, WINDOWS },
    { LLM_ARCH_JAMBA, HYBRID },
    { LLM_ARCH_FALCON_H1, HYBRID },
    { LLM_ARCH_XVERSE, PLAIN },
    { LLM_ARCH_COMMAND_R, PLAIN },
    { LLM_ARCH_COHERE2, WINDOWS },
    { LLM_ARCH_COHERE2MOE, WINDOWS },
    { LLM_ARCH_DBRX, PLAIN },
    { LLM_ARCH_OLMO, PLAIN },
    { LLM_ARCH_OLMO2, WINDOWS },
    { LLM_ARCH_OLMOE, PLAIN },
    { LLM_ARCH_MUSE_GLIMMER, WINDOWS },
    { LLM_ARCH_OPENELM, PLAIN },
    { LLM_ARCH_ARCTIC, PLAIN },
    { LLM_ARCH_DEEPSEEK, PLAIN },
    { LLM_ARCH_DEEPSEEK2, LATENT },
    { LLM_ARCH_DEEPSEEK2OCR, LATENT },
    { LLM_ARCH_DEEPSEEK32, INDEXED },
    { LLM_ARCH_DEEPSEEK4, COMPRESSED },
    { LLM_ARCH_CHATGLM, PLAIN },
    { LLM_ARCH_GLM4, PLAIN },
    { LLM_ARCH_GLM4_MOE, PLAIN },
    { LLM_ARCH_GLM_DSA, INDEXED },
    { LLM_ARCH_BITNET, PLAIN },
    { LLM_ARCH_T5, CROSS },
    { LLM_ARCH_T5ENCODER, ENCODES },
    { LLM_ARCH_JAIS, PLAIN },
    { LLM_ARCH_JAIS2, PLAIN },
    { LLM_ARCH_NEMOTRON, PLAIN },
    { LLM_ARCH_NEMOTRON_H, HYBRID },
    { LLM_ARCH_NEMOTRON_H_MOE, HYBRID },
    { LLM_ARCH_EXAONE, PLAIN },
    { LLM_ARCH_EXAONE4, WINDOWS },
    { LLM_ARCH_EXAONE_MOE, WINDOWS },
    { LLM_ARCH_RWKV6, RECURRENT },
    { LLM_ARCH_RWKV6QWEN2, RECURRENT },
    { LLM_ARCH_RWKV7, RECURRENT },
    { LLM_ARCH_ARWKV7, RECURRENT },
    { LLM_ARCH_GRANITE, PLAIN },
    { LLM_ARCH_GRANITE_MOE, PLAIN },
    { LLM_ARCH_GRANITE_HYBRID, HYBRID },
    { LLM_ARCH_GRANITE_SWITCH, UNTESTED },
    { LLM_ARCH_GRANITE_SWA, WINDOWS },
    { LLM_ARCH_CHAMELEON, PLAIN },
    { LLM_ARCH_WAVTOKENIZER_DEC, NO_TEXT },
    { LLM_ARCH_PLM, UNTESTED },
    { LLM_ARCH_BAILINGMOE, PLAIN },
    { LLM_ARCH_BAILINGMOE2, PLAIN },
    { LLM_ARCH_BAILINGMOE3, HYBRID_LATENT },
    { LLM_ARCH_DOTS1, PLAIN },
    { LLM_ARCH_DOTS3NOTE, INDEXED },
    { LLM_ARCH_ARCEE, PLAIN },
    { LLM_ARCH_AFMOE, WINDOWS },
    { LLM_ARCH_LAGUNA, WINDOWS },
    { LLM_ARCH_ERNIE4_5, PLAIN },
    { LLM_ARCH_ERNIE4_5_MOE, PLAIN },
    { LLM_ARCH_HUNYUAN_MOE, PLAIN },
    { LLM_ARCH_HUNYUAN_DENSE, PLAIN },
    { LLM_ARCH_HUNYUAN_VL, PLAIN },
    { LLM_ARCH_HY_V3, PLAIN },
    { LLM_ARCH_HY_V4, INDEXED },
    { LLM_ARCH_SMOLLM3, PLAIN },
    { LLM_ARCH_OPENAI_MOE, WINDOWS },
    { LLM_ARCH_LFM2, HYBRID },
    { LLM_ARCH_LFM2MOE, HYBRID },
    { LLM_ARCH_DREAM, DIFFUSES },
    { LLM_ARCH_SMALLTHINKER, WINDOWS },
    { LLM_ARCH_LLADA, DIFFUSES },
    { LLM_ARCH_LLADA_MOE, DIFFUSES },
    { LLM_ARCH_SEED_OSS, PLAIN },
    { LLM_ARCH_GROVEMOE, PLAIN },
    { LLM_ARCH_APERTUS, PLAIN },
    { LLM_ARCH_MINIMAX_M2, PLAIN },
    { LLM_ARCH_COGVLM, PLAIN },
    { LLM_ARCH_RND1, DIFFUSES },
    { LLM_ARCH_PANGU_EMBED, PLAIN },
    { LLM_ARCH_MISTRAL3, PLAIN },
    { LLM_ARCH_MISTRAL4, LATENT },
    { LLM_ARCH_PADDLEOCR, PLAIN },
    { LLM_ARCH_MIMO2, WINDOWS },
    { LLM_ARCH_STEP35, WINDOWS },
    { LLM_ARCH_SPARK2_5, WINDOWS },
    { LLM_ARCH_LLAMA_EMBED, ENCODES },
    { LLM_ARCH_MAINCODER, PLAIN },
    { LLM_ARCH_KIMI_LINEAR, HYBRID_LATENT },
    { LLM_ARCH_KIMI_K3, HYBRID_LATENT },
    { LLM_ARCH_GLM5_NEXT, INDEXED },
    { LLM_ARCH_TALKIE, PLAIN },
    { LLM_ARCH_MELLUM, WINDOWS },
    { LLM_ARCH_EAGLE3, DRAFTS },
    { LLM_ARCH_MINIMAX_M3, INDEXED },
    { LLM_ARCH_DFLASH, DRAFTS },
    { LLM_ARCH_NANBEIGE, PLAIN },
    { LLM_ARCH_QWEN3TTS, PLAIN },
    { LLM_ARCH_POCKETTTS, PLAIN },
    { LLM_ARCH_MINIMAX_01, HYBRID },
    { LLM_ARCH_HRM_TEXT, PLAIN },
};

static ra_arch_kind ra_kind_of(llm_arch arch) {
    const auto * row = std::find_if(std::begin(ra_arch_rows), std::end(ra_arch_rows),
                                    [=](const ra_arch_row & r) { return r.arch == arch; });
    return row == std::end(ra_arch_rows) ? UNTESTED : row->kind;
}

// which layers of an accepted architecture have a budget; NULL: it is refused
static const char * ra_layers_of(ra_arch_kind kind) {
    switch (kind) {
        case PLAIN: return "all";
        case WINDOWS: return "those without a sliding window";
        case SHARED: return "those without a sliding window that own their rows";
        case LATENT: return "all, by latent rows (MLA)";
        case HYBRID: return "those with attention";
        case HYBRID_LATENT: return "those with attention, by latent rows (MLA)";
        default: return nullptr;
    }
}

static const char * ra_why_not(ra_arch_kind kind) {
    switch (kind) {
        case ENCODES: return "it encodes, and has no cache that grows";
        case DIFFUSES: return "it writes by diffusion, and has no cache that grows";
        case RECURRENT: return "it is recurrent and has no attention cache";
        case INDEXED:
            return "its sparse attention has an index over all tokens, which a budget would cut";
        case COMPRESSED: return "it compresses its cache in a way of its own";
        case DRAFTS: return "it drafts for another model, whose cache it reads";
        case CROSS: return "it attends to an encoder";
        case NO_TEXT: return "it is no language model";
        case NO_GRAPH: return "llama.cpp has no graph of it";
        case UNTESTED: return "nobody has tested it";
        default: return nullptr;
    }
}

const char * ra_arch_refusal(llm_arch arch) {
    return ra_why_not(ra_kind_of(arch));
}

static std::vector<llm_arch> ra_all_archs() {
    std::vector<llm_arch> archs = llm_arch_all();
    archs.erase(std::remove(archs.begin(), archs.end(), LLM_ARCH_UNKNOWN), archs.end());
    return archs;
}

int32_t ra_arch_count(void) {
    return (int32_t) ra_all_archs().size();
}

ra_status ra_arch_get(int32_t i, ra_arch * arch) {
    const std::vector<llm_arch> archs = ra_all_archs();
    if (arch == nullptr || arch->size != sizeof(*arch) || i < 0 || (size_t) i >= archs.size()) {
        return ra_error(RA_STATUS_INVALID, "ra_arch_get: no architecture %d, or a wrong size", i);
    }
    const ra_arch_kind kind = ra_kind_of(archs[(size_t) i]);
    arch->name              = llm_arch_name(archs[(size_t) i]);
    arch->layers            = ra_layers_of(kind);
    arch->why_not           = ra_why_not(kind);
    return RA_STATUS_OK;
}
