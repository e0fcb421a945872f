// ra_state.cpp - see ra_state.h
//
// Layout: header (shape and settings that must match), counters, then per layer and head the budget
// in force, the positions, and the rows of K and V as they are; last the window's queries. Everything
// read is checked before it is used: state files are untrusted.
#include "ra_state.h"

#include <algorithm>
#include <cstring>

static constexpr uint32_t RA_STATE_MAGIC   = 0x56534152; // "RASV"
static constexpr uint32_t RA_STATE_VERSION = 4;

namespace {
// what a state must share with the cache that it is loaded into
struct ra_state_header {
    uint32_t magic;
    uint32_t version;
    int32_t  n_layer;
    int32_t  buffer;
    int32_t  n_ring;
    int32_t  n_pooled; // most layers whose queries are remembered with a layer; 0: no queries are
    int32_t  n_state;  // numbers that the policy keeps with a token
    int32_t  merge;
};

struct ra_state_counters {
    int32_t n_pos;
    int32_t n_protect;
    int32_t peak_tokens;
    int32_t min_evicted;
    int64_t n_compressions;
    int64_t n_evicted;
};

struct ra_state_layer {
    int32_t n_head_kv;
    int32_t n_slots;
    int32_t type_k;
    int32_t type_v;
    int64_t row_k_bytes;
    int64_t row_v_bytes;
    int32_t n_hadamard_k; // rows are rotated in blocks of so many values
    int32_t n_hadamard_v;
};
} // namespace

template <typename T> static void ra_write(llama_io_write_i & io, const T & value) {
    io.write(&value, sizeof(value));
}

template <typename T> static T ra_read(llama_io_read_i & io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

[[noreturn]] static void ra_state_throw(const char * what) {
    ra_error(RA_STATUS_INVALID, "the saved state cannot be loaded: %s", what);
    ra_throw_last();
}

static ra_state_header ra_header_of(const ra_storage & store) {
    const ra_cache * c        = store.cache.get();
    int32_t          n_pooled = 0;
    for (const ra_tensors & t : store.tensors) {
        n_pooled = store.needs_window ? std::max(n_pooled, t.n_pooled) : 0;
    }
    return { RA_STATE_MAGIC,
             RA_STATE_VERSION,
             c->n_layer,
             c->settings.cfg.buffer,
             c->n_ring,
             n_pooled,
             c->settings.policy->n_state,
             c->settings.cfg.merge };
}

static ra_state_layer ra_layer_of(const ra_layer & l, const ra_tensors & t) {
    if (l.n_head_kv == 0) {
        return {};
    }
    return { l.n_head_kv,          l.n_slots,
             (int32_t) t.k->type,  (int32_t) t.v->type,
             (int64_t) t.k->nb[1], (int64_t) t.v->nb[1],
             t.n_hadamard,         t.n_hadamard_v };
}

void ra_state_check(llama_seq_id seq_id, int32_t n_seq, llama_state_seq_flags flags) {
    if (seq_id >= n_seq) {
        ra_state_throw("the context holds fewer sequences, raise n_seq_max");
    }
    if (flags != LLAMA_STATE_SEQ_FLAGS_NONE) {
        ra_state_throw("partial and on-device states are not supported with a budget");
    }
}

void ra_state_write(llama_io_write_i & io, const ra_storage & store) {
    const ra_cache * c       = store.cache.get();
    const int32_t    n_state = c->settings.policy->n_state;
    ra_write(io, ra_header_of(store));
    ra_write(io, ra_state_counters{ c->n_pos, c->n_protect, c->peak_tokens, c->min_evicted,
                                    c->n_compressions, c->n_evicted });
    for (int32_t il = 0; il < c->n_layer; ++il) {
        const ra_layer & l = c->layers[il];
        ra_write(io, ra_layer_of(l, store.tensors[il]));
        ra_write(io, l.n_pos_scored);
        for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
            ra_write(io, l.budget[ih]);
            ra_write(io, l.used[ih]);
            ra_write(io, l.n_evicted[ih]);
            io.write(l.pos + l.offset[ih], size_t(l.used[ih]) * sizeof(int32_t));
            io.write(l.state + size_t(n_state) * size_t(l.offset[ih]),
                     size_t(n_state) * size_t(l.used[ih]) * sizeof(float));
            if (l.merge != nullptr) {
                io.write(l.merge->bias + l.offset[ih], size_t(l.used[ih]) * sizeof(float));
            }
        }
    }
    for (int32_t il = 0; il < c->n_layer; ++il) {
        const ra_layer &   l = c->layers[il];
        const ra_tensors & t = store.tensors[il];
        for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
            for (ggml_tensor * pool : { t.k, t.v }) {
                if (l.used[ih] > 0 && pool->view_src == nullptr) {
                    io.write_tensor(pool, size_t(l.offset[ih]) * pool->nb[1],
                                    size_t(l.used[ih]) * pool->nb[1]);
                }
            }
        }
    }
    if (store.needs_window) {
        io.write(c->window_pos, size_t(c->n_ring) * sizeof(int32_t));
        for (const ra_tensors & t : store.tensors) {
            if (t.q != nullptr) {
                io.write_tensor(t.q, 0, ggml_nbytes(t.q));
            }
        }
    }
}

// one head's bookkeeping; offset: where its segment starts now
static void ra_read_head(llama_io_read_i & io, ra_cache * c, ra_layer & l, int32_t ih,
                         int64_t * offset, int32_t n_pos) {
    const int32_t budget    = ra_read<int32_t>(io);
    const int32_t used      = ra_read<int32_t>(io);
    const int64_t n_evicted = ra_read<int64_t>(io);
    const int64_t end       = *offset + budget + c->settings.cfg.buffer;
    if (budget < ra_config_floor(&c->settings.cfg, 0) || budget > RA_MAX_TOKENS || used < 0 ||
        used > budget + c->settings.cfg.buffer || end > l.n_slots || n_evicted < 0) {
        ra_state_throw("it does not fit the budget of this cache");
    }
    int32_t * pos = l.pos + *offset;
    io.read(pos, size_t(used) * sizeof(int32_t));
    const size_t n_state = (size_t) c->settings.policy->n_state;
    io.read(l.state + n_state * size_t(*offset), n_state * size_t(used) * sizeof(float));
    if (l.merge != nullptr) {
        float * bias = l.merge->bias + *offset;
        io.read(bias, size_t(used) * sizeof(float));
        for (int32_t i = 0; i < used; ++i) {
            if (!(bias[i] >= 0.0f && bias[i] <= c->settings.cfg.bias_max)) {
                ra_state_throw("its biases are damaged, or larger than bias_max");
            }
            l.merge->has_bias = l.merge->has_bias || bias[i] != 0.0f;
        }
    }
    for (int32_t i = 0; i < used; ++i) {
        if (pos[i] < 0 || pos[i] >= n_pos || (i > 0 && pos[i] <= pos[i - 1])) {
            ra_state_throw("its positions are damaged");
        }
    }
    if ((used == 0) != (n_pos == 0) || (used > 0 && pos[used - 1] != n_pos - 1)) {
        ra_state_throw("its positions are damaged");
    }
    for (int32_t i = 0; i < used && l.alike != nullptr; ++i) {
        l.alike[*offset + i] = { RA_ALIKE_UNKNOWN, RA_ALIKE_UNKNOWN }; // not worth saving
    }
    l.budget[ih]    = budget;
    l.used[ih]      = used;
    l.offset[ih]    = (int32_t) *offset;
    l.n_evicted[ih] = n_evicted;
    *offset         = end;
}

static void ra_read_bookkeeping(llama_io_read_i & io, ra_storage & store, uint32_t n_ctx) {
    ra_cache *            c    = store.cache.get();
    const ra_state_header want = ra_header_of(store);
    const ra_state_header got  = ra_read<ra_state_header>(io);
    if (memcmp(&want, &got, sizeof(want)) != 0) {
        ra_state_throw(
            "it was saved by another kind of cache (another model, buffer, window, policy or "
            "version, merging or not, or no budget at all)");
    }
    const ra_state_counters n = ra_read<ra_state_counters>(io);
    if (n.n_pos < 0 || (uint32_t) n.n_pos > n_ctx || n.n_protect < 0 || n.peak_tokens < 0 ||
        n.min_evicted < 0 || n.n_compressions < 0 || n.n_evicted < 0 ||
        store.set_protect(n.n_protect) != RA_STATUS_OK) {
        ra_state_throw("its counters are damaged or do not fit the budget");
    }
    for (int32_t il = 0; il < c->n_layer; ++il) {
        ra_layer &           l          = c->layers[il];
        const ra_state_layer want_layer = ra_layer_of(l, store.tensors[il]);
        const ra_state_layer got_layer  = ra_read<ra_state_layer>(io);
        if (memcmp(&want_layer, &got_layer, sizeof(want_layer)) != 0) {
            ra_state_throw("a layer has another shape, cache type or budget");
        }
        l.n_pos_scored = ra_read<int32_t>(io);
        if (l.n_pos_scored < 0 || l.n_pos_scored > n.n_pos) {
            ra_state_throw("its counters are damaged");
        }
        int64_t offset = 0;
        for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
            ra_read_head(io, c, l, ih, &offset, n.n_pos);
        }
    }
    c->n_pos          = n.n_pos;
    c->peak_tokens    = n.peak_tokens;
    c->min_evicted    = n.min_evicted;
    c->n_compressions = n.n_compressions;
    c->n_evicted      = n.n_evicted;
}

void ra_state_read(llama_io_read_i & io, ra_storage & store, uint32_t n_ctx) {
    ra_cache *    c         = store.cache.get();
    const int32_t n_protect = c->n_protect;
    try {
        ra_read_bookkeeping(io, store, n_ctx);
        for (int32_t il = 0; il < c->n_layer; ++il) {
            const ra_layer &   l = c->layers[il];
            const ra_tensors & t = store.tensors[il];
            for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
                for (ggml_tensor * pool : { t.k, t.v }) {
                    if (l.used[ih] > 0 && pool->view_src == nullptr) {
                        io.read_tensor(pool, size_t(l.offset[ih]) * pool->nb[1],
                                       size_t(l.used[ih]) * pool->nb[1]);
                    }
                }
            }
        }
        if (store.needs_window) {
            io.read(c->window_pos, size_t(c->n_ring) * sizeof(int32_t));
            for (int32_t slot = 0; slot < c->n_ring; ++slot) {
                const int32_t pos = c->window_pos[slot];
                if (pos != -1 && (pos < 0 || pos >= c->n_pos || pos % c->n_ring != slot)) {
                    ra_state_throw("its observation window is damaged");
                }
            }
            for (const ra_tensors & t : store.tensors) {
                if (t.q != nullptr) {
                    io.read_tensor(t.q, 0, ggml_nbytes(t.q));
                }
            }
        }
    } catch (...) {
        store.clear(true);
        if (store.set_protect(n_protect) != RA_STATUS_OK) {
            c->n_protect = n_protect;
        }
        throw;
    }
    store.layout_changed();
}
