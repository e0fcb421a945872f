// ra_memory_batch.cpp - see ra_memory.h: micro-batches, as llama.cpp walks through them
#include "ra_memory.h"

#include "llama-impl.h"

#include <algorithm>

std::vector<ra_part> ra_memory::parts_of(const llama_ubatch & ubatch) {
    std::vector<ra_part> parts;
    for (int32_t i = 0; i < (int32_t) ubatch.n_tokens; ++i) {
        ra_storage & store = stream(ubatch.seq_id[i][0]).store;
        if (parts.empty() || &parts.back().view.storage() != &store) {
            parts.push_back({ ra_view(&store, false), i, 0 });
        }
        ++parts.back().n_tokens;
    }
    return parts;
}

// a piece of a prompt beside a token of every other sequence: no micro-batch takes more
std::vector<ra_part> ra_memory::worst_parts(int32_t n_tokens) {
    const int32_t        n_others = std::min(n_seq(), n_tokens) - 1;
    std::vector<ra_part> parts;
    parts.push_back({ ra_view(&stream(0).store, true), 0, n_tokens - n_others });
    for (int32_t i = 0; i < n_others; ++i) {
        parts.push_back({ ra_view(&stream(i + 1).store, true), n_tokens - n_others + i, 1 });
    }
    return parts;
}

bool ra_memory::begin_ubatch(const llama_ubatch & ubatch) {
    const std::vector<ra_part> parts = parts_of(ubatch);
    for (const ra_part & part : parts) {
        const llama_seq_id seq_id = ubatch.seq_id[part.first][0];
        const ra_cache *   c      = &state(seq_id);
        if (ra_cache_room(c) < part.n_tokens && compress(seq_id) != RA_STATUS_OK) {
            LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
            return false;
        }
        if (ra_cache_room(c) < part.n_tokens) {
            ra_error(RA_STATUS_BUDGET, "no room for %d tokens after a compression", part.n_tokens);
            LLAMA_LOG_ERROR("ReasonAlloc: %s\n", ra_last_error());
            return false;
        }
    }
    for (const ra_part & part : parts) {
        ra_stream & s = stream(ubatch.seq_id[part.first][0]);
        ra_cache_append(s.store.cache.get(), ubatch.pos[part.first], part.n_tokens);
        s.store.n_since += part.n_tokens;
    }
    return true;
}

bool ra_memory_context::next() {
    stock()->next();
    return ++i_cur < ubatches.size();
}

bool ra_memory_context::apply() {
    return (ubatches.empty() || mem->begin_ubatch(ubatches[i_cur])) && stock()->apply();
}

bool ra_memory_context::has_layer(int32_t il) const {
    const ra_cache & c = mem->state(0);
    return il < c.n_layer && c.layers[il].n_head_kv > 0;
}

std::vector<ra_part> ra_memory_context::parts(int32_t n_tokens) const {
    return ubatches.empty() ? mem->worst_parts(n_tokens) : mem->parts_of(ubatches[i_cur]);
}
