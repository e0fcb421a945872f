// ra_repack.cpp - see ra_repack.h
//
// Rows are moved as they are: read as 32-bit words, they pass through GET_ROWS into scratch and through
// CPY back, both of which copy words of that type unchanged (docs/ops of llama.cpp lists them for CUDA
// and Metal; on CUDA the second is one copy within the device). K and V one after the other, so that
// the scratch holds the larger one. A row that is not made of whole words (q8_0 of 32 values: 34 bytes)
// has no type that every backend gathers exactly: GET_ROWS widens all others to f32.
#include "ra_repack.h"

#include <algorithm>
#include <cstring>
#include <numeric>

static constexpr size_t RA_REPACK_MAX_NODES = 16;

static void ra_move_rows(uint8_t * data, size_t row, int32_t dst, int32_t src, int32_t n) {
    memmove(data + size_t(dst) * row, data + size_t(src) * row, size_t(n) * row);
}

ra_repacker::ra_repacker(const ra_target & target, ra_scratch & scratch, bool gather_always)
    : target(target), scratch(scratch), gather_always(gather_always) {}

void ra_repacker::reserve() {
    const ra_cache & cache = *target.cache;
    ways.resize(size_t(cache.n_layer));
    for (int32_t il = 0; il < cache.n_layer; ++il) {
        bool gathers = false;
        for (int i = 0; i < 2; ++i) {
            ggml_tensor * rows = pool(il, i);
            ways[il][i]        = rows != nullptr ? way_of(rows) : IN_PLACE;
            if (ways[il][i] == STAGED) {
                staging[i].resize(std::max(staging[i].size(), ggml_nbytes(rows)));
            }
            gathers = gathers || ways[il][i] == GATHERED;
        }
        if (gathers) {
            src_of.resize(std::max(src_of.size(), size_t(cache.n_slots_max)));
            build(il);
            scratch.reserve(gf, "moving rows");
        }
    }
    ctx.reset();
}

ggml_tensor * ra_repacker::pool(int32_t il, int i) const {
    const ra_tensors & t = (*target.tensors)[(size_t) il];
    return i == 0 ? t.k : t.has_own_v() ? t.v : nullptr;
}

int64_t ra_repacker::bytes() const {
    return int64_t(src_of.capacity() * sizeof(int32_t) + meta.capacity() + staging[0].capacity() +
                   staging[1].capacity() + ways.capacity() * sizeof(ways[0]));
}

// ---------------------------------------------------------------------------------------------
// graphs
// ---------------------------------------------------------------------------------------------

// the pool as 32-bit words [row bytes / 4, n_slots]: a view, retyped by hand, as ggml has no such view
ggml_tensor * ra_repacker::words_of(ggml_tensor * rows) {
    ggml_tensor * t = ggml_view_2d(ctx.get(), rows, rows->ne[0], rows->ne[1], rows->nb[1], 0);
    t->type         = GGML_TYPE_I32;
    t->ne[0]        = int64_t(rows->nb[1] / sizeof(int32_t));
    t->nb[0]        = sizeof(int32_t);
    return t;
}

void ra_repacker::new_graph(int32_t n_slots) {
    meta.resize(ggml_tensor_overhead() * RA_REPACK_MAX_NODES +
                ggml_graph_overhead_custom(RA_REPACK_MAX_NODES, false));
    ctx.reset(ggml_init({ meta.size(), meta.data(), /*.no_alloc =*/true }));
    gf    = ggml_new_graph_custom(ctx.get(), RA_REPACK_MAX_NODES, false);
    order = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_slots);
    ggml_set_input(order);
}

void ra_repacker::add_gather(ggml_tensor * rows) {
    ggml_tensor * gathered = ggml_get_rows(ctx.get(), words_of(rows), order);
    ggml_build_forward_expand(gf, ggml_cpy(ctx.get(), gathered, words_of(rows)));
}

// how a pool is packed; STAGED also where its backend lacks an operation
ra_repacker::way ra_repacker::way_of(ggml_tensor * rows) {
    if (ggml_backend_buffer_is_host(rows->buffer) && !gather_always) {
        return IN_PLACE;
    }
    if (rows->nb[1] % sizeof(int32_t) != 0) {
        return STAGED;
    }
    new_graph((int32_t) rows->ne[1]);
    add_gather(rows);
    return scratch.can_run(gf, rows->buffer) ? GATHERED : STAGED;
}

// builds the graph of a layer
void ra_repacker::build(int32_t il) {
    new_graph(target.cache->layers[il].n_slots);
    for (int i = 0; i < 2; ++i) {
        if (ways[il][i] == GATHERED) {
            add_gather(pool(il, i));
        }
    }
}

// ---------------------------------------------------------------------------------------------
// moves
// ---------------------------------------------------------------------------------------------

void ra_repacker::begin(int32_t il) {
    std::iota(src_of.begin(), src_of.end(), 0);
    for (int i = 0; i < 2; ++i) {
        if (ways[il][i] == STAGED) {
            ggml_backend_tensor_get(pool(il, i), staging[i].data(), 0, ggml_nbytes(pool(il, i)));
        }
    }
}

void ra_repacker::move(int32_t il, int32_t dst, int32_t src, int32_t n) {
    for (int i = 0; i < 2; ++i) {
        ggml_tensor * rows = pool(il, i);
        if (rows != nullptr && ways[il][i] != GATHERED) {
            ra_move_rows(ways[il][i] == STAGED ? staging[i].data() : (uint8_t *) rows->data,
                         rows->nb[1], dst, src, n);
        }
    }
    if (!src_of.empty()) {
        ra_move_rows((uint8_t *) src_of.data(), sizeof(int32_t), dst, src, n);
    }
}

ra_status ra_repacker::end(int32_t il) {
    bool gathers = false;
    for (int i = 0; i < 2; ++i) {
        gathers = gathers || ways[il][i] == GATHERED;
        if (ways[il][i] == STAGED) {
            ggml_backend_tensor_set(pool(il, i), staging[i].data(), 0, ggml_nbytes(pool(il, i)));
        }
    }
    if (!gathers) {
        return RA_STATUS_OK;
    }
    build(il);
    if (scratch.alloc(gf)) {
        ggml_backend_tensor_set(order, src_of.data(), 0, ggml_nbytes(order));
        if (scratch.compute(gf) == GGML_STATUS_SUCCESS) {
            return RA_STATUS_OK;
        }
    }
    is_lost = true;
    return ra_error(
        RA_STATUS_COMPUTE,
        "moving the rows of layer %d failed or was aborted: the cache was emptied, start "
        "the sequence anew",
        il);
}
