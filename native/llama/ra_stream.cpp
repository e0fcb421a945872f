// ra_stream.cpp - see ra_stream.h
#include "ra_stream.h"

#include "llama-memory.h"

std::vector<std::unique_ptr<ra_stream>> ra_make_streams(const llama_model &         model,
                                                        const llama_memory_params & params,
                                                        const llama_cparams &       cparams,
                                                        const std::vector<bool> &   grows,
                                                        ra_settings *               settings) {
    std::vector<std::unique_ptr<ra_stream>> streams;
    std::vector<ra_settings>                copies(cparams.n_seq_max);
    copies[0] = *settings;
    *settings = {};
    try {
        for (size_t i = 1; i < copies.size(); ++i) {
            if (ra_settings_init(&copies[i], &copies[0].cfg) != RA_STATUS_OK) {
                ra_throw_last();
            }
        }
        for (size_t i = 0; i < copies.size(); ++i) {
            streams.push_back(
                std::make_unique<ra_stream>(model, params, cparams.offload_kqv, grows, &copies[i]));
            streams.back()->store.cache->seq_id = (int32_t) i;
        }
    } catch (...) {
        for (ra_settings & copy : copies) {
            ra_settings_free(&copy);
        }
        throw;
    }
    return streams;
}

void ra_stream::clear(bool data) {
    store.clear(data);
    compress_us = 0;
}

bool ra_stream::can_drop(llama_pos p0, llama_pos p1) const {
    const ra_cache & c = *store.cache;
    if (p0 >= c.n_pos || p0 >= p1) {
        return true; // nothing there
    }
    if (p1 < c.n_pos) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "positions [%d, %d) are not the end of the sequence: a budgeted cache can only "
                 "drop its tail",
                 p0, p1);
        return false;
    }
    // tokens that came after the last compression may always go; before it, what was evicted must be
    // among them, and not live on in rows that stay
    const bool is_whole = p0 <= c.min_evicted && (!c.settings.cfg.merge || c.n_evicted == 0);
    if (p0 > 0 && !is_whole && p0 < ra_cache_compressed_at(&c)) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "tokens before position %d were evicted: the cache cannot go back to it, start "
                 "the sequence anew",
                 p0);
        return false;
    }
    return true;
}

void ra_stream::drop(llama_pos p0) {
    if (p0 >= store.cache->n_pos) {
        return;
    }
    if (p0 == 0) {
        clear(false);
        return;
    }
    ra_cache_truncate(store.cache.get(), p0);
    store.layout_changed();
}
