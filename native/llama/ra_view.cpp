// ra_view.cpp - see ra_view.h
#include "ra_view.h"

#include <algorithm>

int32_t ra_view::n_used(int32_t il, int32_t ih, int32_t n_tokens) const {
    return is_worst_case ? std::max(0, n_capacity(il, ih) - n_tokens)
                         : store->cache->layers[il].used[ih] - n_tokens;
}

int32_t ra_view::n_capacity(int32_t il, int32_t ih) const {
    const ra_cache * c = store->cache.get();
    const ra_layer & l = c->layers[il];
    return is_worst_case ? std::min(ra_cache_longest_head(c, il), l.n_slots - l.offset[ih])
                         : l.budget[ih] + c->settings.cfg.buffer;
}

int32_t ra_view::n_span(int32_t il, int32_t ih, int32_t n_tokens, int32_t n_ahead) const {
    return std::min(n_used(il, ih, n_tokens) + n_ahead, n_capacity(il, ih));
}
