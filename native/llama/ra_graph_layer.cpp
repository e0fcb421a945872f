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

void ra_layer_attention::init(const llm_graph_context & graph, const ra_view & view,
                              const std::vector<bool> & is_taken, int32_t n_ahead) {
    const ra_cache & c        = view.cache();
    size_t           n_values = 0;
    int64_t          widest   = 0;
    windows.resize(c.n_layer);
    for (int32_t il = 0; il < c.n_layer; ++il) {
        if (!is_taken[il]) {
            continue;
        }
        const ra_layer & l = c.layers[il];
        ra_windows &     w = windows[il];
        if (view.worst_case()) {
            w.n_rows = l.n_slots; // no windows are wider
        } else {
            std::vector<int64_t> begin, end;
            for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
                begin.push_back(l.offset[ih]);
                end.push_back(int64_t(l.offset[ih]) + view.n_span(il, ih, 1, n_ahead));
            }
            w = ra_fit_windows(begin, end, l.n_slots);
        }
        w.mask_at = n_values;
        n_values += GGML_PAD(size_t(w.n_rows) * size_t(l.n_head_kv), RA_MASK_ALIGN);
        widest = std::max(widest, w.n_rows);
    }
    if (n_values > 0) {
        n_values += RA_MASK_TAIL * size_t(widest);
        masks_in = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_F16, (int64_t) n_values);
        ggml_set_name(masks_in, "ra_masks");
        ggml_set_input(masks_in);
    }
}

void ra_layer_attention::set_input(const ra_view & view) {
    if (masks_in == nullptr || masks_in->buffer == nullptr) {
        return;
    }
    GGML_ASSERT(ggml_backend_buffer_is_host(masks_in->buffer));
    const ra_cache &  c    = view.cache();
    ggml_fp16_t *     data = (ggml_fp16_t *) masks_in->data;
    const ggml_fp16_t zero = ggml_fp32_to_fp16(0.0f);
    std::fill(data, data + masks_in->ne[0], ggml_fp32_to_fp16(-INFINITY));
    for (int32_t il = 0; il < c.n_layer; ++il) {
        const ra_windows & w = windows[il];
        const ra_layer &   l = c.layers[il];
        for (int32_t ih = 0; ih < l.n_head_kv && w.n_rows > 0; ++ih) {
            // the token at hand included
            const int64_t n_visible = view.n_used(il, ih, 1) + 1;
            const int64_t begin     = l.offset[ih] - ih * w.stride;
            GGML_ASSERT(begin >= 0 && begin + n_visible <= w.n_rows);
            std::fill_n(data + w.mask_at + ih * w.n_rows + begin, n_visible, zero);
        }
    }
}

// masks [n_rows, 1, 1, n_head_kv] of layer il
ggml_tensor * ra_layer_attention::mask_of(const llm_graph_context & graph, int32_t il,
                                          int32_t n_head_kv) {
    if (masks_on == nullptr) {
        // inputs are made in host memory: one copy to the device, not one per layer and step
        masks_on = ggml_cont(graph.ctx0, masks_in);
    }
    const ra_windows & w   = windows[il];
    const size_t       row = size_t(w.n_rows) * sizeof(ggml_fp16_t);
    return ggml_view_4d(graph.ctx0, masks_on, w.n_rows, 1, 1, n_head_kv, row, row, row,
                        w.mask_at * sizeof(ggml_fp16_t));
}

// the windows of a pool [head_dim, n_slots] as [head_dim, n_rows, 1, n_head_kv]
static ggml_tensor * ra_view_windows(ggml_context * ctx, ggml_tensor * pool, const ra_windows & w,
                                     int32_t n_head_kv) {
    // as build_attn_mha() does for its own flash attention
    pool = pool->type == GGML_TYPE_F32 ? ggml_cast(ctx, pool, GGML_TYPE_F16) : pool;
    ggml_tensor * view =
        ggml_view_3d(ctx, pool, pool->ne[0], w.n_rows, 1, pool->nb[1], w.n_rows * pool->nb[1], 0);
    // ggml_view_4d() refuses windows that overlap: it takes the plain product of the sizes for the
    // memory that they need
    view->ne[3] = n_head_kv;
    view->nb[3] = size_t(w.stride) * pool->nb[1];
    return view;
}

ggml_tensor * ra_layer_attention::attend(const llm_graph_context & graph, const ra_tensors & t,
                                         ggml_tensor * q, float kq_scale, int il) {
    ggml_context *     ctx     = graph.ctx0;
    const int64_t      n_group = t.n_head / t.n_head_kv;
    const ra_windows & w       = windows[il];

    // [head_dim_k, 1, n_group, n_head_kv]
    q = ggml_view_4d(ctx, q, q->ne[0], 1, n_group, t.n_head_kv, q->nb[2], q->nb[1],
                     size_t(n_group) * q->nb[1], 0);

    ggml_tensor * k   = ra_view_windows(ctx, t.k, w, t.n_head_kv);
    ggml_tensor * v   = ra_view_windows(ctx, t.v, w, t.n_head_kv);
    ggml_tensor * cur = ggml_flash_attn_ext(
        ctx, q, k, v, mask_of(graph, il, t.n_head_kv), kq_scale, 0.0f,
        graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f);
    graph.res->add_fused_node({ LLM_FUSED_OP_FLASH_ATTN, cur, il });
    ggml_prec_set_acc(cur, GGML_PREC_F32);
    // [head_dim_v, n_group, 1, n_head_kv]
    cur = ggml_reshape_2d(ctx, cur, cur->ne[0] * t.n_head, 1);
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}
