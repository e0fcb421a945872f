// ra_compress.cpp - a compression of the cache in a context: scores from the backends, rows moved
#include "llama-context.h"
#include "ra_memory.h"
#include "ra_scorer.h"

#include <algorithm>
#include <cstring>

static void ra_tensor_move(ggml_tensor * t, uint8_t * data, int32_t dst, int32_t src, int32_t n) {
    memmove(data + size_t(dst) * t->nb[1], data + size_t(src) * t->nb[1], size_t(n) * t->nb[1]);
}

// rows of a pool that is not in host memory are packed in a host copy of it
ra_status ra_memory::move_begin(int32_t il) {
    const ra_tensors & t = tensors[il];
    if (!ggml_backend_buffer_is_host(t.k->buffer)) {
        staging_k.resize(std::max(staging_k.size(), ggml_nbytes(t.k)));
        staging_v.resize(std::max(staging_v.size(), ggml_nbytes(t.v)));
        ggml_backend_tensor_get(t.k, staging_k.data(), 0, ggml_nbytes(t.k));
        ggml_backend_tensor_get(t.v, staging_v.data(), 0, ggml_nbytes(t.v));
    }
    return RA_STATUS_OK;
}

void ra_memory::move(int32_t il, int32_t dst, int32_t src, int32_t n) {
    const ra_tensors & t       = tensors[il];
    const bool         is_host = ggml_backend_buffer_is_host(t.k->buffer);
    ra_tensor_move(t.k, is_host ? (uint8_t *) t.k->data : staging_k.data(), dst, src, n);
    ra_tensor_move(t.v, is_host ? (uint8_t *) t.v->data : staging_v.data(), dst, src, n);
}

ra_status ra_memory::move_end(int32_t il) {
    const ra_tensors & t = tensors[il];
    if (!ggml_backend_buffer_is_host(t.k->buffer)) {
        ggml_backend_tensor_set(t.k, staging_k.data(), 0, ggml_nbytes(t.k));
        ggml_backend_tensor_set(t.v, staging_v.data(), 0, ggml_nbytes(t.v));
    }
    return RA_STATUS_OK;
}

// at the first decode, so that a compression allocates nothing; tried again if memory was short
void ra_memory::make_scorer() {
    if (scorer) {
        return;
    }
    try {
        scorer = std::make_unique<ra_scorer>(*this, lctx->get_sched());
    } catch (const std::exception & e) {
        ra_error(RA_STATUS_NO_MEMORY, "no scratch memory for compressions: %s", e.what());
    }
}

int64_t ra_memory::planned_scratch_bytes(ggml_backend_sched_t sched) const {
    return scratch_bytes() + (scorer ? 0 : ra_scorer(*this, sched, true).bytes());
}

ra_status ra_memory::compress() {
    const int64_t t_start = ggml_time_us();
    ra_status     st      = RA_STATUS_OK;
    try {
        if (lctx == nullptr) {
            return RA_STATUS_OK; // nothing was decoded yet
        }
        make_scorer();
        if (!scorer) {
            return RA_STATUS_NO_MEMORY;
        }
        // the rows of the last micro-batch must have been written
        ggml_backend_sched_synchronize(lctx->get_sched());

        ra_cache_ops ops;
        ops.user     = this;
        ops.features = [](void * user, uint32_t needs, ra_features * f) {
            return static_cast<ra_memory *>(user)->scorer->features(needs, f);
        };
        ops.move = [](void * user, int32_t il, int32_t dst, int32_t src, int32_t n) {
            static_cast<ra_memory *>(user)->move(il, dst, src, n);
        };
        ops.move_begin = [](void * user, int32_t il) {
            return static_cast<ra_memory *>(user)->move_begin(il);
        };
        ops.move_end = [](void * user, int32_t il) {
            return static_cast<ra_memory *>(user)->move_end(il);
        };
        int32_t n_layers = 0;
        st               = ra_cache_compress(cache.get(), &ops, &n_layers);
        if (n_layers > 0) {
            layout_changed();
        }
    } catch (const std::exception & e) {
        st = ra_error(RA_STATUS_NO_MEMORY, "compression failed: %s", e.what());
    }
    compress_us += ggml_time_us() - t_start;
    return st;
}
