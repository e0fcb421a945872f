/* registry.c - add a policy or an allocator: one row here */
#include "registry.h"

#include <string.h>

static const ra_policy ra_policies[] = {
    { "rkv", "R-KV: attention importance minus key redundancy (arXiv:2505.24133)",
      RA_FEATURE_ATTN_LOGITS | RA_FEATURE_KEY_SIM, ra_policy_rkv_score, NULL, 1, RA_GIVES_SHARES },
    { "snapkv", "SnapKV at decode time: attention importance only (arXiv:2404.14469)",
      RA_FEATURE_ATTN_LOGITS, ra_policy_snapkv_score, NULL, 1, 0 },
    { "rkv-ema", "R-KV with scores smoothed across compressions",
      RA_FEATURE_ATTN_LOGITS | RA_FEATURE_KEY_SIM, ra_policy_rkv_ema_score, NULL, 1,
      RA_GIVES_SHARES },
    { "h2o", "H2O: attention accumulated over all steps (arXiv:2306.14048)",
      RA_FEATURE_ATTN_MASS | RA_FEATURE_ALL_QUERIES, ra_policy_h2o_score, NULL, 1, 0 },
    { "mass", "attention remembered with decay, times the value's distance from the mean value",
      RA_FEATURE_ATTN_MASS | RA_FEATURE_VALUE_DIST, ra_policy_mass_score, ra_policy_observe_memory,
      2, 0 },
    { "loss", "mass over all queries, times what the most alike key that stays cannot stand in for",
      RA_FEATURE_ATTN_MASS | RA_FEATURE_ALL_QUERIES | RA_FEATURE_SAMPLED | RA_FEATURE_VALUE_DIST |
          RA_FEATURE_TWIN,
      ra_policy_loss_score, ra_policy_observe_memory, 2, 0 },
    { "keydiff", "KeyDiff: keys least like the head's mean key (arXiv:2504.15364)",
      RA_FEATURE_KEY_COS, ra_policy_keydiff_score, NULL, 1, 0 },
    { "triattention", "TriAttention: distance preferences of query centres (arXiv:2604.04921)",
      RA_FEATURE_KEYS | RA_FEATURE_CENTRES, ra_policy_triattention_score, NULL, 1, 0 },
    { "streaming", "StreamingLLM: first and most recent tokens (arXiv:2309.17453)", 0,
      ra_policy_streaming_score, NULL, 1, 0 },
    { "random", "uniform random: the baseline of every table", 0, ra_policy_random_score, NULL, 1,
      0 },
};

static const ra_alloc_layers ra_layer_allocs[] = {
    { "uniform", ra_alloc_layers_uniform, NULL },
    { "pyramid", ra_alloc_layers_pyramid, NULL },
    { "wave", ra_alloc_layers_wave, NULL },
    { "error", NULL, ra_alloc_every_head_error },
};

static const ra_alloc_heads ra_head_allocs[] = {
    { "uniform", ra_alloc_heads_uniform, false },
    { "adaptive", ra_alloc_heads_adaptive, true },
    { "adaptive-literal", ra_alloc_heads_adaptive_literal, true },
    { "error", ra_alloc_heads_error, true },
};

#define RA_COUNT(table) ((int32_t) (sizeof(table) / sizeof((table)[0])))

/* index of the row called `name` in a table whose rows begin with their name, or -1 */
static int32_t ra_row_find(const void * table, int32_t n_rows, size_t row_bytes,
                           const char * name) {
    for (int32_t i = 0; name != NULL && i < n_rows; ++i) {
        const char * const * row = (const void *) ((const char *) table + (size_t) i * row_bytes);
        if (strcmp(*row, name) == 0) {
            return i;
        }
    }
    return -1;
}

#define RA_FIND(table, name)                                                         \
    const int32_t i = ra_row_find(table, RA_COUNT(table), sizeof((table)[0]), name); \
    return i < 0 ? NULL : &(table)[i]

const ra_policy * ra_policy_find(const char * name) {
    RA_FIND(ra_policies, name);
}

const ra_alloc_layers * ra_alloc_layers_find(const char * name) {
    RA_FIND(ra_layer_allocs, name);
}

const ra_alloc_heads * ra_alloc_heads_find(const char * name) {
    RA_FIND(ra_head_allocs, name);
}

int32_t ra_policy_count(void) {
    return RA_COUNT(ra_policies);
}

const char * ra_policy_name(int32_t i) {
    return i >= 0 && i < RA_COUNT(ra_policies) ? ra_policies[i].name : NULL;
}

const char * ra_policy_summary(int32_t i) {
    return i >= 0 && i < RA_COUNT(ra_policies) ? ra_policies[i].summary : NULL;
}

int32_t ra_policy_n_state(int32_t i) {
    return i >= 0 && i < RA_COUNT(ra_policies) ? ra_policies[i].n_state : 0;
}

int32_t ra_policy_needs_centres(int32_t i) {
    return i >= 0 && i < RA_COUNT(ra_policies) &&
           (ra_policies[i].needs & (uint32_t) RA_FEATURE_CENTRES) != 0;
}

int32_t ra_alloc_count(int32_t kind) {
    return kind == 0 ? RA_COUNT(ra_layer_allocs) : kind == 1 ? RA_COUNT(ra_head_allocs) : 0;
}

const char * ra_alloc_name(int32_t kind, int32_t i) {
    if (i < 0 || i >= ra_alloc_count(kind)) {
        return NULL;
    }
    return kind == 0 ? ra_layer_allocs[i].name : ra_head_allocs[i].name;
}
