// ra_graph_layer.cpp - attention over the uneven heads of a layer as one masked op
//
// KV heads become the batch dimension (ne[3]) of flash attention, the query heads of a KV head its
// heads. Batch entry ih sees a window of the pool, the same number of rows for all of them, each
// `stride` rows after the one before (0: all see the whole pool); its mask hides what is not a
// visible row of its own segment. So the segments stay where they are, and a layer takes one launch
// in place of 2 * n_head_kv - 1.
//
// Only for single tokens: there launches are what counts. For a prompt the masks would be n_tokens
// times larger (8 heads, 4000 rows, 128 tokens: 8 MB per layer and step) and the result would have to
// be transposed, while one op per head has enough to do for each launch.
//
// What the CUDA sources of the pinned tree say (ggml-cuda/fattn*.cu*; read, not run):
//   - A mask with ne[2] != 1 is refused, one per ne[3] is taken. K and V are addressed by nb[3], so
//     overlapping windows and nb[3] = 0 are fine; ggml itself wants k->ne[3] == q->ne[3].
//   - Vector kernels and the grouping of a KV head's queries need a multiple of 256 KV rows
//     (FATTN_KQ_STRIDE), else each query head reads K and V by itself: hence RA_WINDOW_PAD.
//   - With ne[3] > 1 the end of each mask is scanned and 256-row tiles after the last visible row are
//     left out; hidden rows before the first visible one are computed. Hence narrow windows.
//   - That scan reads as many mask rows as the kernel has query columns (at most 16 for one token),
//     also where the mask has one row: into the next head's mask, which only makes it leave out less,
//     and behind the last mask: hence RA_MASK_TAIL.
//   - f16 takes the tensor-core kernel (Ampere and older without GQA: the vector kernel), q8_0 and
//     q4_0 the vector kernel, which reads them as they are; with an unpadded window they are first
//     expanded to f16, n_head_kv windows of them.
//   - Sinks are numbered by ne[2] alone, here the head within its group: a layer with sinks cannot
//     be attended this way.
#include "ra_graph_layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

static constexpr int64_t RA_WINDOW_PAD = 256;
static constexpr size_t  RA_MASK_TAIL  = 16; // mask rows
static constexpr size_t  RA_MASK_ALIGN = 64; // values; kernels load 16 bytes at once

// Whether one op per layer is faster than one per head, on the device that holds the layer's cache.
// Measured on CPUs only, where it is slower (a row costs there, not a launch): no device has it yet.
static bool ra_layer_op_pays(ggml_backend_dev_t dev) {
    GGML_UNUSED(dev);
    return false;
}

bool ra_attends_by_layer(const ra_cache & cache, const ra_tensors & t) {
    const ra_attention attention = cache.settings.attention;
    if (attention == RA_ATTENTION_AUTO) {
        const ggml_backend_buffer_t buf = t.k->buffer;
        return ra_layer_op_pays(ggml_backend_buft_get_device(ggml_backend_buffer_get_type(buf)));
    }
    return attention == RA_ATTENTION_LAYER;
}

// The narrowest equal windows, at equal distances and inside a pool of n_slots rows, that cover the
// segments [begin, end); n_rows is padded where the pool has the rows.
static ra_windows ra_fit_windows(const std::vector<int64_t> & begin,
                                 const std::vector<int64_t> & end, int64_t n_slots) {
    const int64_t n_last = (int64_t) begin.size() - 1;
    const auto    n_rows = [&](int64_t stride) {
        int64_t n = 0;
        for (int64_t ih = 0; ih <= n_last; ++ih) {
            n = std::max(n, end[ih] - ih * stride);
        }
        return n;
    };
    // no window begins behind its segment, and the last one, as long as any, ends in the pool
    int64_t stride = n_slots;
    for (int64_t ih = 0; ih <= n_last; ++ih) {
        stride = ih > 0 ? std::min(stride, begin[ih] / ih) : stride;
        stride = ih < n_last ? std::min(stride, (n_slots - end[ih]) / (n_last - ih)) : stride;
    }
    ra_windows w;
    w.stride = n_last > 0 ? stride : 0;
    w.n_rows = n_rows(w.stride);
    for (int64_t n = GGML_PAD(w.n_rows, RA_WINDOW_PAD); n <= n_slots; n += RA_WINDOW_PAD) {
        const int64_t narrower = n_last > 0 ? std::min(stride, (n_slots - n) / n_last) : 0;
        if (n_rows(narrower) <= n) {
            w.stride = narrower;
            w.n_rows = n;
            break;
        }
    }
    return w;
}

void ra_layer_attention::add_windows(const ra_view & view, int32_t il, ra_masks_kind kind,
                                     int32_t n_ahead) {
    const ra_layer & l = view.cache().layers[il];
    ra_windows &     w = windows[il];
    if (kind == RA_MASKS_FIT && !view.worst_case()) {
        std::vector<int64_t> begin, end;
        for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
            begin.push_back(l.offset[ih]);
            end.push_back(int64_t(l.offset[ih]) + view.n_span(il, ih, n_tokens, n_ahead));
        }
        w = ra_fit_windows(begin, end, l.n_slots);
    } else if (kind == RA_MASKS_FIT) {
        w.n_rows = l.n_slots; // no windows are wider
    } else {
        w.stride = view.n_capacity(il, 0); // of even heads; nobody looks at that of others
        for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
            w.n_rows = std::max<int64_t>(w.n_rows, view.n_span(il, ih, n_tokens, n_ahead));
        }
    }
    w.kind    = kind;
    w.n_masks = l.n_swa > 0 ? n_tokens : 1; // FIT: n_tokens is 1
    w.mask_at = n_values;
    n_values += GGML_PAD(size_t(w.n_rows * w.n_masks) * size_t(l.n_head_kv), RA_MASK_ALIGN);
}

// first value of the mask of head ih that is about its segment
size_t ra_layer_attention::mask_begin(const ra_windows & w, int32_t ih, int32_t offset) const {
    const int64_t before = w.kind == RA_MASKS_OWN ? 0 : offset - ih * w.stride;
    GGML_ASSERT(before >= 0);
    return w.mask_at + size_t(ih * w.n_rows * w.n_masks + before);
}

// Biases do not change while a graph is used: in the type of the masks, at their places.
void ra_layer_attention::keep_biases(const ra_view & view) {
    const ra_cache & c        = view.cache();
    const bool       is_f16   = masks_in->type == GGML_TYPE_F16;
    const auto       has_bias = [](const ra_layer & l) {
        return l.merge != nullptr && l.merge->has_bias;
    };
    if (view.worst_case() || std::none_of(c.layers, c.layers + c.n_layer, has_bias)) {
        return;
    }
    biases.assign(ggml_nbytes(masks_in), 0); // zeros of either type
    for (int32_t il = 0; il < c.n_layer; ++il) {
        const ra_layer & l = c.layers[il];
        for (int32_t ih = 0; ih < l.n_head_kv && windows[il].n_rows > 0 && has_bias(l); ++ih) {
            const float * src = l.merge->bias + l.offset[ih];
            const size_t  at  = mask_begin(windows[il], ih, l.offset[ih]);
            const int64_t n   = view.n_used(il, ih, n_tokens);
            if (is_f16) {
                ggml_fp32_to_fp16_row(src, (ggml_fp16_t *) biases.data() + at, n);
            } else {
                std::copy_n(src, n, (float *) biases.data() + at);
            }
        }
    }
}

void ra_layer_attention::init(const llm_graph_context & graph, const ra_view & view,
                              const std::vector<ra_masks_kind> & kinds, int32_t n_tokens_graph,
                              int32_t n_ahead) {
    const ra_cache & c      = view.cache();
    int64_t          widest = 0;
    n_tokens                = n_tokens_graph;
    windows.resize(c.n_layer);
    for (int32_t il = 0; il < c.n_layer; ++il) {
        if (kinds[il] != RA_MASKS_NONE) {
            add_windows(view, il, kinds[il], n_ahead);
            widest = std::max(widest, windows[il].n_rows);
        }
    }
    if (n_values > 0) {
        const ggml_type type = graph.cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32;
        n_values += RA_MASK_TAIL * size_t(widest);
        masks_in = ggml_new_tensor_1d(graph.ctx0, type, (int64_t) n_values);
        ggml_set_name(masks_in, "ra_masks");
        ggml_set_input(masks_in);
        keep_biases(view);
    }
}

// mask `i` of a layer; n_dead: rows at the beginning of the segment that are out of its sliding window
template <typename T>
static void ra_set_masks(T * data, const ra_windows & w, size_t begin, const T * biases, int32_t i,
                         int64_t n_dead, int64_t n_visible, T zero, T minus_inf) {
    T * mask = data + w.mask_at + size_t(i * w.n_rows);
    std::fill_n(mask, w.n_rows, minus_inf);
    if (biases != nullptr) {
        std::copy_n(biases + begin, n_visible, data + begin);
    } else {
        std::fill_n(data + begin, n_visible, zero);
    }
    std::fill_n(data + begin, n_dead, minus_inf);
}

// values: biases in the type of the masks, or NULL
void ra_layer_attention::set_mask(const ra_windows & w, size_t begin, const void * values,
                                  int32_t i, int64_t n_dead, int64_t n_visible) {
    if (masks_in->type == GGML_TYPE_F16) {
        ra_set_masks((ggml_fp16_t *) masks_in->data, w, begin, (const ggml_fp16_t *) values, i,
                     n_dead, n_visible, ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
    } else {
        ra_set_masks((float *) masks_in->data, w, begin, (const float *) values, i, n_dead,
                     n_visible, 0.0f, -INFINITY);
    }
}

// the masks of several tokens, in the layers with a sliding window
void ra_layer_attention::set_windows(const ra_view & view) {
    const ra_cache & c = view.cache();
    for (int32_t il = 0; il < c.n_layer; ++il) {
        const ra_windows & w = windows[il];
        const ra_layer &   l = c.layers[il];
        for (int64_t i = 0; i < l.n_head_kv * w.n_masks && w.n_rows > 0 && l.n_swa > 0; ++i) {
            const int32_t ih        = int32_t(i / w.n_masks);
            const int32_t t         = int32_t(i % w.n_masks);
            const int64_t n_visible = view.n_used(il, ih, n_tokens) + t + 1;
            const int64_t n_dead    = ra_head_dead(&l, ih, c.n_pos - n_tokens + t);
            GGML_ASSERT(n_dead < n_visible && n_visible <= w.n_rows);
            set_mask(w, w.mask_at + size_t(i * w.n_rows), nullptr, (int32_t) i, n_dead, n_visible);
        }
    }
}

void ra_layer_attention::set_input(const ra_view & view) {
    if (masks_in == nullptr || masks_in->buffer == nullptr) {
        return;
    }
    GGML_ASSERT(ggml_backend_buffer_is_host(masks_in->buffer));
    if (n_tokens > 1) {
        if (biases.empty()) {
            memset(masks_in->data, 0, ggml_nbytes(masks_in));
        } else {
            memcpy(masks_in->data, biases.data(), biases.size());
        }
        set_windows(view);
        return;
    }
    const ra_cache & c      = view.cache();
    const void *     values = biases.empty() ? nullptr : biases.data();
    for (int32_t il = 0; il < c.n_layer; ++il) {
        const ra_windows & w = windows[il];
        const ra_layer &   l = c.layers[il];
        for (int32_t ih = 0; ih < l.n_head_kv && w.n_rows > 0; ++ih) {
            // the token at hand included
            const int64_t n_visible = view.n_used(il, ih, 1) + 1;
            const int64_t n_dead    = ra_head_dead(&l, ih, c.n_pos - 1);
            const size_t  begin     = mask_begin(w, ih, l.offset[ih]);
            GGML_ASSERT(begin + size_t(n_visible) <= w.mask_at + size_t((ih + 1) * w.n_rows));
            set_mask(w, begin, values, ih, n_dead, n_visible);
        }
    }
}

// the masks where attention is: inputs are made in host memory, so that is one copy to the device, not one
// per layer and step
ggml_tensor * ra_layer_attention::masks(const llm_graph_context & graph) {
    masks_on = masks_on == nullptr ? ggml_cont(graph.ctx0, masks_in) : masks_on;
    return masks_on;
}

ggml_tensor * ra_layer_attention::head_mask(const llm_graph_context & graph, int32_t il, int32_t ih,
                                            int32_t offset, int64_t n_span) {
    const size_t       size = ggml_element_size(masks_in);
    const ra_windows & w    = windows[il];
    // masks of many tokens are large, and each is looked at once: no second copy of all of them
    return ggml_view_2d(graph.ctx0, w.n_masks > 1 ? masks_in : masks(graph), n_span, w.n_masks,
                        size_t(w.n_masks > 1 ? w.n_rows : n_span) * size,
                        mask_begin(w, ih, offset) * size);
}

// the windows of a pool [head_dim, n_slots] as [head_dim, n_rows, 1, n_head_kv]
static ggml_tensor * ra_view_windows(ggml_context * ctx, ggml_tensor * pool, const ra_windows & w,
                                     int32_t n_head_kv) {
    ggml_tensor * view =
        ggml_view_3d(ctx, pool, pool->ne[0], w.n_rows, 1, pool->nb[1], w.n_rows * pool->nb[1], 0);
    // ggml_view_4d() refuses windows that overlap: it takes the plain product of the sizes for the
    // memory that they need
    view->ne[3] = n_head_kv;
    view->nb[3] = size_t(w.stride) * pool->nb[1];
    return view;
}

// The scheduler cannot copy windows that overlap to another backend: the op runs where the pool is.
static ggml_backend_t ra_backend_with(ggml_backend_sched_t sched, const ggml_tensor * pool,
                                      const ggml_tensor * op) {
    const ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(pool->buffer);
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_supports_buft(backend, buft) && ggml_backend_supports_op(backend, op)) {
            return backend;
        }
    }
    return nullptr;
}

ggml_tensor * ra_layer_attention::attend(const llm_graph_context & graph, const ra_tensors & t,
                                         ggml_tensor * q, float kq_scale, int il) {
    ggml_context *     ctx     = graph.ctx0;
    const int64_t      n_group = t.n_own();
    const ra_windows & w       = windows[il];

    // [head_dim_k, 1, n_group, n_head_kv]
    q = ggml_view_4d(ctx, q, q->ne[0], 1, n_group, t.n_head_kv, q->nb[2], q->nb[1],
                     size_t(n_group) * q->nb[1], 0);

    // as build_attn_mha() does for its own flash attention
    ggml_tensor * pool_k = t.k->type == GGML_TYPE_F32 ? ggml_cast(ctx, t.k, GGML_TYPE_F16) : t.k;
    ggml_tensor * pool_v = t.v->type == GGML_TYPE_F32 ? ggml_cast(ctx, t.v, GGML_TYPE_F16) : t.v;
    ggml_tensor * k      = ra_view_windows(ctx, pool_k, w, t.n_head_kv);
    ggml_tensor * v      = ra_view_windows(ctx, pool_v, w, t.n_head_kv);
    const size_t  row    = size_t(w.n_rows) * ggml_element_size(masks_in);
    // [n_rows, 1, 1, n_head_kv]
    ggml_tensor * m   = ggml_view_4d(ctx, masks(graph), w.n_rows, 1, 1, t.n_head_kv, row, row, row,
                                     w.mask_at * ggml_element_size(masks_in));
    ggml_tensor * cur = ggml_flash_attn_ext(
        ctx, q, k, v, m, kq_scale, 0.0f,
        graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f);
    ggml_backend_t backend = ra_backend_with(graph.sched, t.k, cur);
    if (backend == nullptr) {
        return nullptr;
    }
    for (ggml_tensor * node : { pool_k, pool_v, cur }) {
        if (node != t.k && node != t.v) {
            ggml_backend_sched_set_tensor_backend(graph.sched, node, backend);
        }
    }
    graph.res->add_fused_node({ LLM_FUSED_OP_FLASH_ATTN, cur, il });
    ggml_prec_set_acc(cur, GGML_PREC_F32);
    // [head_dim_v, n_group, 1, n_head_kv]
    cur = ggml_reshape_2d(ctx, cur, cur->ne[0] * t.n_head, 1);
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}
