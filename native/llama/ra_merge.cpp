// ra_merge.cpp - see ra_merge.h
//
// On the host: a head is some hundred short rows, and most of them are read once. Rows that take no other
// stay as they are, bit for bit; the others are written in the type of the cache().
#include "ra_merge.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>

ra_merger::ra_merger(const ra_target & target) : target(target) {}

void ra_merger::reserve() {
    for (int32_t il = 0; il < cache().n_layer && cache().settings.cfg.merge; ++il) {
        const ra_tensors & t = tensors()[il];
        if (t.v != nullptr) {
            const size_t n = size_t(ra_cache_longest_head(&cache(), il));
            values.resize(std::max(values.size(), n * size_t(t.v->ne[0])));
            rows.resize(std::max(rows.size(), n * t.v->nb[1]));
        }
    }
}

int64_t ra_merger::bytes() const {
    return int64_t(values.capacity() * sizeof(float) + rows.capacity());
}

static void ra_rows_to_float(const ggml_tensor * t, const uint8_t * src, float * dst, int64_t n) {
    const ggml_to_float_t to_float = ggml_get_type_traits(t->type)->to_float;
    if (to_float == nullptr) { // f32
        memcpy(dst, src, size_t(n) * t->nb[1]);
        return;
    }
    to_float(src, dst, n * t->ne[0]);
}

static void ra_row_from_float(const ggml_tensor * t, const float * src, uint8_t * dst) {
    const ggml_from_float_t from_float = ggml_get_type_traits(t->type)->from_float_ref;
    if (from_float == nullptr) {
        memcpy(dst, src, t->nb[1]);
        return;
    }
    from_float(src, dst, t->ne[0]);
}

void ra_merger::run(int32_t il) {
    const ra_layer & l    = cache().layers[il];
    const ra_merge & m    = *l.merge;
    ggml_tensor *    v    = tensors()[il].v;
    const size_t     row  = v->nb[1];
    const size_t     dim  = size_t(v->ne[0]);
    const bool       host = ggml_backend_buffer_is_host(v->buffer);
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        const int32_t at = l.offset[ih];
        const int32_t n  = l.used[ih];
        if (std::none_of(m.target + at, m.target + at + n, [](int32_t i) { return i >= 0; })) {
            continue;
        }
        uint8_t * data = rows.data();
        if (host) {
            data = (uint8_t *) v->data + size_t(at) * row;
        } else {
            ggml_backend_tensor_get(v, data, size_t(at) * row, size_t(n) * row);
        }
        ra_rows_to_float(v, data, values.data(), n);
        ra_merge_rows(n, (int32_t) dim, m.target + at, m.share + at, values.data());
        for (int32_t i = 0; i < n; ++i) {
            if (m.target[at + i] < 0 && m.share[at + i] < 1.0f) {
                ra_row_from_float(v, values.data() + size_t(i) * dim, data + size_t(i) * row);
            }
        }
        if (!host) {
            ggml_backend_tensor_set(v, data, size_t(at) * row, size_t(n) * row);
        }
    }
}
