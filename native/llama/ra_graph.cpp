// ra_graph.cpp - attention over segments, built into the model's graph
//
// Rows are written with one SET_ROWS per tensor. Reading: where all heads of a layer hold equally
// many rows at equal distances, one attention op over a strided view serves the layer; else one op
// per KV head, or one masked op over the pool (ra_graph_layer.cpp). But for the latter, masks are
// views, at different offsets, of one row of zeros followed by -infinity; once tokens were merged, each head
// has a mask of its own, with the biases of its keys.
#include "ra_graph.h"

#include "ra_llama.h"

#include <algorithm>
#include <cmath>

// rows that a graph attends beyond those in use: it serves this many decode steps without a rebuild
static constexpr int32_t RA_SPAN_SLACK = 32;

// of what a graph sees of a batch
static const ra_view * ra_view_of(const llama_memory_context_i * mctx) {
    const auto * part = dynamic_cast<const ra_stock_context *>(mctx);
    return part == nullptr ? nullptr : part->view;
}

ra_graph_input::ra_graph_input(const llm_graph_context & graph, const ra_view * view)
    : view(view), n_tokens((int32_t) graph.n_tokens), layout(view->worst_case() ? 0 : view->storage().layout),
      n_since(view->storage().n_since - (int32_t) graph.n_tokens) {
    const ra_storage & store = view->storage();
    const ra_cache &   c     = view->cache();
    n_ahead                  = n_tokens + (n_tokens == 1 ? RA_SPAN_SLACK : 0);

    std::vector<ra_masks_kind> kinds;
    size_t                     n_rows = 0;
    n_used_max                        = 0;
    for (int32_t il = 0; il < c.n_layer; ++il) {
        rows_at.push_back(n_rows);
        n_rows += size_t(c.layers[il].n_head_kv) * size_t(n_tokens);
        for (int32_t ih = 0; ih < c.layers[il].n_head_kv; ++ih) {
            n_used_max = std::max(n_used_max, view->n_used(il, ih, n_tokens));
        }
        ways.push_back(way_of(graph, il));
        is_biased.push_back(has_bias(il));
        kinds.push_back(ways.back() == RA_ATTEND_BY_LAYER ? RA_MASKS_FIT
                        : is_biased.back()                ? RA_MASKS_OWN
                                                          : RA_MASKS_NONE);
    }
    rows = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I64, (int64_t) n_rows);
    mask = ggml_new_tensor_2d(graph.ctx0, graph.cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32,
                              n_used_max + n_ahead, n_tokens);
    ggml_set_name(rows, "ra_rows");
    ggml_set_name(mask, "ra_mask");
    ggml_set_input(rows);
    ggml_set_input(mask);
    if (store.needs_window) {
        window = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I64, std::min(n_tokens, c.n_ring));
        ggml_set_name(window, "ra_window");
        ggml_set_input(window);
    }
    by_layer.init(graph, *view, kinds, n_tokens, n_ahead);
    if (graph.hparams.use_alibi) {
        alibi.init(graph.ctx0, *view, n_tokens, n_ahead);
    }
}

ra_attend_way ra_graph_input::way_of(const llm_graph_context & graph, int32_t il) const {
    if (!graph.cparams.flash_attn || graph.hparams.use_alibi || graph.hparams.is_mla() ||
        view->cache().layers[il].n_head_kv == 0) {
        return RA_ATTEND_BY_HEAD;
    }
    if (is_even(il)) {
        return RA_ATTEND_EVEN;
    }
    return n_tokens == 1 && ra_attends_by_layer(view->cache(), view->tensors(il))
               ? RA_ATTEND_BY_LAYER
               : RA_ATTEND_BY_HEAD;
}

// whether one strided view can stand for all heads of the layer; in the worst case only if it always can
bool ra_graph_input::is_even(int32_t il) const {
    const ra_cache & c = view->cache();
    const ra_layer & l = c.layers[il];
    if (view->worst_case() && c.settings.head_alloc->moves_budgets) {
        return false;
    }
    for (int32_t ih = 1; ih < l.n_head_kv; ++ih) {
        if (l.budget[ih] != l.budget[0] || n_span(il, ih) != n_span(il, 0) ||
            view->n_used(il, ih, n_tokens) != view->n_used(il, 0, n_tokens)) {
            return false;
        }
    }
    return true;
}

// in the worst case if it may ever have one
bool ra_graph_input::has_bias(int32_t il) const {
    const ra_merge * merge = view->cache().layers[il].merge;
    return merge != nullptr && (view->worst_case() || merge->has_bias);
}

bool ra_graph_input::can_reuse(const llm_graph_params & params) {
    const ra_view * next = ra_view_of(params.mctx);
    if (next == nullptr || next->worst_case() || next->storage().layout != layout ||
        (int32_t) params.ubatch.n_tokens != n_tokens) {
        return false;
    }
    const int32_t n_steps = next->storage().n_since - n_tokens - n_since;
    if (n_steps < 0 || n_steps > n_ahead - n_tokens) {
        return false;
    }
    view = next;
    return true;
}

template <typename T>
static void ra_fill_mask(T * data, int64_t n_cols, int64_t n_rows, int64_t n_visible, T zero,
                         T minus_inf) {
    for (int64_t t = 0; t < n_rows; ++t) {
        const int64_t n = std::min(n_cols, n_visible + t + 1);
        std::fill(data + t * n_cols, data + t * n_cols + n, zero);
        std::fill(data + t * n_cols + n, data + (t + 1) * n_cols, minus_inf);
    }
}

void ra_graph_input::set_input(const llama_ubatch * ubatch) {
    const ra_storage & store = view->storage();
    const ra_cache &   c     = view->cache();

    if (rows->buffer != nullptr) {
        GGML_ASSERT(ggml_backend_buffer_is_host(rows->buffer));
        int64_t * dst = (int64_t *) rows->data;
        for (int32_t il = 0; il < c.n_layer; ++il) {
            const ra_layer & l = c.layers[il];
            for (int32_t t = 0; t < n_tokens; ++t) {
                for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
                    *dst++ = l.offset[ih] + view->n_used(il, ih, n_tokens) + t;
                }
            }
        }
    }
    if (window != nullptr && window->buffer != nullptr) {
        GGML_ASSERT(ggml_backend_buffer_is_host(window->buffer));
        int64_t *     dst = (int64_t *) window->data;
        const int32_t n   = (int32_t) window->ne[0];
        for (int32_t i = 0; i < n; ++i) {
            dst[i] = ubatch->pos[n_tokens - n + i] % c.n_ring;
        }
    }
    if (mask->buffer != nullptr) {
        GGML_ASSERT(ggml_backend_buffer_is_host(mask->buffer));
        const int64_t n_visible = n_used_max + (store.n_since - n_tokens - n_since);
        if (mask->type == GGML_TYPE_F16) {
            ra_fill_mask((ggml_fp16_t *) mask->data, mask->ne[0], mask->ne[1], n_visible,
                         ggml_fp32_to_fp16(0.0f), ggml_fp32_to_fp16(-INFINITY));
        } else {
            ra_fill_mask((float *) mask->data, mask->ne[0], mask->ne[1], n_visible, 0.0f,
                         -INFINITY);
        }
    }
    by_layer.set_input(*view);
    alibi.set_input(*view, n_tokens);
}

ggml_tensor * ra_graph_input::rows_of(ggml_context * ctx, int32_t il) const {
    const int64_t n = int64_t(view->cache().layers[il].n_head_kv) * n_tokens;
    return ggml_view_1d(ctx, rows, n, rows_at[il] * sizeof(int64_t));
}

// mask [n_span, n_tokens] of a head that held n_used rows when the graph was built. For a prompt it is
// a copy, made anew for every op, though others may need the same: so it lives for one op only, and
// what the worst case reserves is enough for heads of any lengths.
ggml_tensor * ra_graph_input::mask_of(const llm_graph_context & graph, int32_t n_used,
                                      int32_t n_span) const {
    ggml_tensor * part = ggml_view_2d(graph.ctx0, mask, n_span, n_tokens, mask->nb[1],
                                      size_t(n_used_max - n_used) * mask->nb[0]);
    return ggml_is_contiguous(part) ? part : ggml_cont(graph.ctx0, part);
}

ggml_tensor * ra_graph_input::mask_of_head(const llm_graph_context & graph, int32_t il,
                                           int32_t ih) {
    const int32_t n_used = view->n_used(il, ih, n_tokens);
    const int32_t span   = n_span(il, ih);
    if (!is_biased[il]) {
        return mask_of(graph, n_used, span);
    }
    ggml_tensor * biases =
        by_layer.head_mask(graph, il, ih, view->cache().layers[il].offset[ih], span);
    if (n_tokens == 1) {
        return biases; // and what is hidden
    }
    ggml_tensor * shared = ggml_view_2d(graph.ctx0, mask, span, n_tokens, mask->nb[1],
                                        size_t(n_used_max - n_used) * mask->nb[0]);
    return ggml_add(graph.ctx0, shared, biases);
}

// ---------------------------------------------------------------------------------------------
// hooks
// ---------------------------------------------------------------------------------------------

const llama_memory_context_i * ra_stock_part(const llama_memory_context_i * mctx) {
    const auto * view = dynamic_cast<const ra_view *>(mctx);
    return view == nullptr ? mctx : view->stock();
}

// the input of all our layers, made for the first of them
static ra_graph_input * ra_input_of(const llm_graph_context & graph, const ra_view * view) {
    for (const llm_graph_input_ptr & inp : graph.res->inputs) {
        if (auto * found = dynamic_cast<ra_graph_input *>(inp.get())) {
            return found;
        }
    }
    return static_cast<ra_graph_input *>(
        graph.res->add_input(std::make_unique<ra_graph_input>(graph, view)));
}

uint32_t ra_graph_count_nodes(const ra_storage & store) {
    uint32_t n = 64;
    for (const ra_tensors & t : store.tensors) {
        n += 16 + 24 * (uint32_t) t.n_head_kv;
        n += t.max_alibi_bias > 0.0f ? 12 * (uint32_t) t.n_head : 0;
    }
    return n;
}

// writes cur [head_dim, n_head_kv, n_tokens] to the rows of its tokens
static void ra_store(const llm_graph_context & graph, ggml_tensor * pool, ggml_tensor * cur,
                     ggml_tensor * rows) {
    cur = ggml_is_contiguous(cur) ? cur : ggml_cont(graph.ctx0, cur);
    cur = ggml_reshape_2d(graph.ctx0, cur, cur->ne[0], cur->ne[1] * cur->ne[2]);
    ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx0, pool, cur, rows));
}

// remembers the newest queries q_cur [head_dim, n_head, n_tokens] for the policy
static void ra_store_window(const llm_graph_context & graph, const ra_graph_input * inp,
                            ggml_tensor * pool, ggml_tensor * q_cur) {
    const int64_t n   = inp->window->ne[0];
    ggml_tensor * cur = ggml_view_3d(graph.ctx0, q_cur, q_cur->ne[0], q_cur->ne[1], n, q_cur->nb[1],
                                     q_cur->nb[2], size_t(q_cur->ne[2] - n) * q_cur->nb[2]);
    cur               = ggml_is_contiguous(cur) ? cur : ggml_cont(graph.ctx0, cur);
    cur               = ggml_reshape_2d(graph.ctx0, cur, cur->ne[0] * cur->ne[1], n);
    ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx0, pool, cur, inp->window));
}

// one flash attention over all heads: heads are `stride` rows apart
static ggml_tensor * ra_attend_even(const llm_graph_context & graph, ra_graph_input * inp,
                                    const ra_tensors & t, const ra_layer & l, ggml_tensor * q,
                                    ggml_tensor * sinks, float kq_scale, int il) {
    ggml_context * ctx    = graph.ctx0;
    const int64_t  n_span = inp->n_span(il, 0);
    const size_t   stride = size_t(inp->view->n_capacity(il, 0));
    const int32_t  n_used = inp->view->n_used(il, 0, inp->n_tokens);

    q = ggml_permute(ctx, q, 0, 2, 1, 3);
    ggml_tensor * k =
        ggml_view_3d(ctx, t.k, t.k->ne[0], n_span, l.n_head_kv, t.k->nb[1], stride * t.k->nb[1], 0);
    ggml_tensor * v =
        ggml_view_3d(ctx, t.v, t.v->ne[0], n_span, l.n_head_kv, t.v->nb[1], stride * t.v->nb[1], 0);
    // as build_attn_mha() does for its own flash attention
    k                 = k->type == GGML_TYPE_F32 ? ggml_cast(ctx, k, GGML_TYPE_F16) : k;
    v                 = v->type == GGML_TYPE_F32 ? ggml_cast(ctx, v, GGML_TYPE_F16) : v;
    ggml_tensor * cur = ggml_flash_attn_ext(
        ctx, q, k, v, inp->mask_of(graph, n_used, (int32_t) n_span), kq_scale, 0.0f,
        graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f);
    graph.res->add_fused_node({ LLM_FUSED_OP_FLASH_ATTN, cur, il });
    ggml_flash_attn_ext_add_sinks(cur, sinks);
    ggml_prec_set_acc(cur, GGML_PREC_F32);
    cur = ggml_reshape_2d(ctx, cur, cur->ne[0] * cur->ne[1], cur->ne[2] * cur->ne[3]);
    ggml_build_forward_expand(graph.gf, cur);
    return cur;
}

// attention of the query heads of KV head ih -> [head_dim_v * n_group, n_tokens]
static ggml_tensor * ra_attend_head(const llm_graph_context & graph, ra_graph_input * inp,
                                    const ra_tensors & t, const ra_layer & l, const ra_attn & attn,
                                    int32_t ih) {
    ggml_context * ctx     = graph.ctx0;
    const int64_t  n_group = t.n_head / t.n_head_kv;
    const int64_t  n_span  = inp->n_span(attn.il, ih);
    ggml_tensor *  q       = attn.q;

    ggml_tensor * q_h = ggml_view_3d(ctx, q, q->ne[0], n_group, q->ne[2], q->nb[1], q->nb[2],
                                     size_t(ih * n_group) * q->nb[1]);
    // [head_dim, one head, n_span]
    ggml_tensor * k_h = ggml_view_3d(ctx, t.k, t.k->ne[0], 1, n_span, t.k->nb[1], t.k->nb[1],
                                     size_t(l.offset[ih]) * t.k->nb[1]);
    ggml_tensor * v_h = ggml_view_3d(ctx, t.v, t.v->ne[0], 1, n_span, t.v->nb[1], t.v->nb[1],
                                     size_t(l.offset[ih]) * t.v->nb[1]);
    ggml_tensor * mask = inp->mask_of_head(graph, attn.il, ih);
    if (graph.hparams.use_alibi) {
        return ra_attend_alibi(graph, attn, t, ih, k_h, v_h, mask,
                               inp->alibi.positions(ctx, attn.il, ih));
    }
    ggml_tensor * s_h = attn.sinks == nullptr
                            ? nullptr
                            : ggml_view_1d(ctx, attn.sinks, n_group,
                                           size_t(ih * n_group) * ggml_element_size(attn.sinks));
    return graph.build_attn_mha(q_h, k_h, v_h, nullptr, mask, s_h, attn.v_mla, 0, attn.kq_scale, attn.il);
}

// how the model's attention, in build_attn_mha(), goes from q.k to a logit
static ra_logit_cap ra_logit_of(const llm_graph_context & graph, float kq_scale) {
    const float cap = graph.hparams.f_attn_logit_softcapping;
    if (graph.arch == LLM_ARCH_GROK) {
        return { graph.hparams.f_attn_out_scale / cap, cap, kq_scale };
    }
    if (!graph.hparams.attn_soft_cap) {
        return { 0.0f, 0.0f, kq_scale };
    }
    return graph.cparams.flash_attn ? ra_logit_cap{ kq_scale / cap, cap, 1.0f }
                                    : ra_logit_cap{ 1.0f / cap, cap, kq_scale };
}

ggml_tensor * ra_graph_build_attn(const llm_graph_context & graph, const ra_attn & attn) {
    const ra_view * view = ra_view_of(graph.mctx);
    const int       il   = attn.il;
    if (view == nullptr || view->cache().layers[il].n_head_kv == 0) {
        return nullptr;
    }
    GGML_ASSERT(attn.kq_b == nullptr);
    ra_graph_input * inp = ra_input_of(graph, view);
    const ra_layer & l   = view->cache().layers[il];
    ra_tensors &     t   = view->tensors(il);
    t.logit              = ra_logit_of(graph, attn.kq_scale);
    t.sinks              = attn.sinks;
    t.n_hadamard         = attn.k_rot == nullptr ? 0 : (int32_t) attn.k_rot->ne[0];
    t.n_hadamard_v       = attn.v_rot == nullptr ? 0 : (int32_t) attn.v_rot->ne[0];
    if (!t.rope.is_known && (ra_cache_needs(&view->cache()) & RA_FEATURE_CENTRES) != 0 &&
        ra_rope_find(attn.k, &t.rope) != RA_STATUS_OK) {
        ra_throw_last();
    }

    ggml_tensor * rows = inp->rows_of(graph.ctx0, il);
    ra_store(graph, t.k, attn.k, rows);
    if (t.has_own_v()) {
        ra_store(graph, t.v, attn.v, rows);
    }
    if (inp->window != nullptr) {
        ra_store_window(graph, inp, t.q, attn.q);
    }
    const ra_attend_way way = inp->ways[il];
    if (way == RA_ATTEND_EVEN && !inp->is_biased[il]) {
        return ra_attend_even(graph, inp, t, l, attn.q, attn.sinks, attn.kq_scale, il);
    }
    if (way != RA_ATTEND_BY_HEAD && inp->n_tokens == 1 && attn.sinks == nullptr) {
        return inp->by_layer.attend(graph, t, attn.q, attn.kq_scale, il);
    }
    std::vector<ggml_tensor *> parts;
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        parts.push_back(ra_attend_head(graph, inp, t, l, attn, ih));
    }
    // pairwise, so that every value is copied log2(n_head_kv) times
    while (parts.size() > 1) {
        std::vector<ggml_tensor *> pairs;
        for (size_t i = 0; i + 1 < parts.size(); i += 2) {
            pairs.push_back(ggml_concat(graph.ctx0, parts[i], parts[i + 1], 0));
        }
        if (parts.size() % 2 == 1) {
            pairs.push_back(parts.back());
        }
        parts = std::move(pairs);
    }
    return parts[0];
}
