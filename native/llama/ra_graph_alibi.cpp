// ra_graph_alibi.cpp - see ra_graph_alibi.h
//
// ALiBi adds slope * -(distance) to a logit. A softmax does not change when the same is added to all its
// logits, so what counts is the position of the key, whatever the query: one number per row, for all
// tokens of a micro-batch. ggml computes slopes from the number of heads in an op; here each op has one
// head, so the slope goes into the mask. In f32 and without flash attention, whose masks are f16.
#include "ra_graph_alibi.h"

#include <cmath>

float ra_alibi_slope(const ra_tensors & t, int32_t head) {
    const int32_t n_even = int32_t(1) << int32_t(std::floor(std::log2(float(t.n_head))));
    return head < n_even ? std::pow(2.0f, -t.max_alibi_bias / float(n_even) * float(head + 1))
                         : std::pow(2.0f, -t.max_alibi_bias / 2.0f / float(n_even) *
                                              float(2 * (head - n_even) + 1));
}

void ra_alibi::init(ggml_context * ctx, const ra_view & view, int32_t n_tokens, int32_t n_ahead) {
    const ra_cache & c = view.cache();
    int64_t          n = 0;
    for (int32_t il = 0; il < c.n_layer; ++il) {
        for (int32_t ih = 0; ih < c.layers[il].n_head_kv; ++ih) {
            spans.push_back({ il, ih, n, view.n_span(il, ih, n_tokens, n_ahead) });
            n += spans.back().n;
        }
    }
    rows = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n);
    ggml_set_name(rows, "ra_alibi_rows");
    ggml_set_input(rows);
}

void ra_alibi::set_input(const ra_view & view, int32_t n_tokens) {
    if (rows == nullptr || rows->buffer == nullptr) {
        return;
    }
    GGML_ASSERT(ggml_backend_buffer_is_host(rows->buffer));
    const ra_cache & c    = view.cache();
    const int32_t    last = c.n_pos - 1;
    for (const span & s : spans) {
        const ra_layer & l      = c.layers[s.il];
        const int32_t    n_used = view.n_used(s.il, s.ih, n_tokens) + n_tokens;
        float *          dst    = (float *) rows->data + s.at;
        for (int64_t i = 0; i < s.n; ++i) {
            dst[i] = i < n_used ? float(l.pos[l.offset[s.ih] + i] - last) : 0.0f;
        }
    }
}

ggml_tensor * ra_alibi::positions(ggml_context * ctx, int32_t il, int32_t ih) const {
    for (const span & s : spans) {
        if (s.il == il && s.ih == ih) {
            return ggml_view_1d(ctx, rows, s.n, size_t(s.at) * sizeof(float));
        }
    }
    GGML_ABORT("no positions of layer %d, head %d", il, ih);
}

ggml_tensor * ra_attend_alibi(const llm_graph_context & graph, const ra_attn & attn,
                              const ra_tensors & t, int32_t ih, ggml_tensor * k, ggml_tensor * v,
                              ggml_tensor * mask, ggml_tensor * positions) {
    ggml_context * ctx     = graph.ctx0;
    const int32_t  n_group = t.n_own();
    ggml_tensor *  q       = attn.q;
    ggml_tensor *  out     = nullptr;

    mask = mask->type == GGML_TYPE_F32 ? mask : ggml_cast(ctx, mask, GGML_TYPE_F32);
    k    = ggml_view_2d(ctx, k, k->ne[0], k->ne[2], k->nb[2], 0);
    v    = ggml_view_2d(ctx, v, v->ne[0], v->ne[2], v->nb[2], 0);
    v    = v->type == GGML_TYPE_F32 ? v : ggml_cast(ctx, v, GGML_TYPE_F32);
    v    = ggml_cont(ctx, ggml_transpose(ctx, v));
    for (int32_t g = 0; g < n_group; ++g) {
        const int32_t head = ih * n_group + g;
        ggml_tensor * q_g =
            ggml_view_2d(ctx, q, q->ne[0], q->ne[2], q->nb[2], size_t(head) * q->nb[1]);
        ggml_tensor * bias = ggml_scale(ctx, positions, ra_alibi_slope(t, head));
        ggml_tensor * kq   = ggml_mul_mat(ctx, k, q_g); // [n_span, n_tokens]
        ggml_prec_set_acc(kq, GGML_PREC_F32);
        kq = ggml_soft_max_ext(ctx, kq, ggml_add(ctx, mask, bias), attn.kq_scale, 0.0f);
        ggml_tensor * cur = ggml_mul_mat(ctx, v, kq); // [head_dim_v, n_tokens]
        out               = out == nullptr ? cur : ggml_concat(ctx, out, cur, 0);
    }
    ggml_build_forward_expand(graph.gf, out);
    return out;
}
