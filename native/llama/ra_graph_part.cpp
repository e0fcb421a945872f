// ra_graph_part.cpp - what the attention of one sequence of a micro-batch is given: rows, masks, windows
#include "ra_graph.h"

#include <algorithm>
#include <cmath>

// rows that a graph attends beyond those in use: it serves this many decode steps without a rebuild
static constexpr int32_t RA_SPAN_SLACK = 32;

ra_graph_part::ra_graph_part(const llm_graph_context & graph, const ra_part & part)
    : view(part.view), first(part.first), n_tokens(part.n_tokens),
      layout(view.worst_case() ? 0 : view.storage().layout),
      n_since(view.storage().n_since - n_tokens) {
    const ra_storage & store = view.storage();
    const ra_cache &   c     = view.cache();
    n_ahead                  = n_tokens + (n_tokens == 1 ? RA_SPAN_SLACK : 0);

    std::vector<ra_masks_kind> kinds;
    size_t                     n_rows = 0;
    n_used_max                        = 0;
    for (int32_t il = 0; il < c.n_layer; ++il) {
        rows_at.push_back(n_rows);
        n_rows += size_t(c.layers[il].n_head_kv) * size_t(n_tokens);
        for (int32_t ih = 0; ih < c.layers[il].n_head_kv; ++ih) {
            n_used_max = std::max(n_used_max, view.n_used(il, ih, n_tokens));
        }
        ways.push_back(way_of(graph, il));
        has_masks.push_back(has_bias(il) || has_dead(il));
        kinds.push_back(ways.back() == RA_ATTEND_BY_LAYER ? RA_MASKS_FIT
                        : has_masks.back()                ? RA_MASKS_OWN
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
    by_layer.init(graph, view, kinds, n_tokens, n_ahead);
    if (graph.hparams.use_alibi) {
        alibi.init(graph.ctx0, view, n_tokens, n_ahead);
    }
}

ra_attend_way ra_graph_part::way_of(const llm_graph_context & graph, int32_t il) const {
    if (!graph.cparams.flash_attn || graph.hparams.use_alibi || graph.hparams.is_mla() ||
        view.cache().layers[il].n_head_kv == 0) {
        return RA_ATTEND_BY_HEAD;
    }
    if (is_even(il)) {
        return RA_ATTEND_EVEN;
    }
    return n_tokens == 1 && ra_attends_by_layer(view.cache(), view.tensors(il)) ? RA_ATTEND_BY_LAYER
                                                                                : RA_ATTEND_BY_HEAD;
}

// whether one strided view can stand for all heads of the layer; in the worst case only if it always can
bool ra_graph_part::is_even(int32_t il) const {
    const ra_cache & c = view.cache();
    const ra_layer & l = c.layers[il];
    // a compression may leave heads of a window with fewer tokens than others
    if (view.worst_case() && (c.settings.head_alloc->moves_budgets || l.n_swa > 0)) {
        return false;
    }
    for (int32_t ih = 1; ih < l.n_head_kv; ++ih) {
        if (l.budget[ih] != l.budget[0] || n_span(il, ih) != n_span(il, 0) ||
            view.n_used(il, ih, n_tokens) != view.n_used(il, 0, n_tokens)) {
            return false;
        }
    }
    return true;
}

// in the worst case if it may ever have one
bool ra_graph_part::has_bias(int32_t il) const {
    const ra_merge * merge = view.cache().layers[il].merge;
    return merge != nullptr && (view.worst_case() || merge->has_bias);
}

// whether a token is out of the window of a query of the micro-batch, or of a later one that the graph serves
bool ra_graph_part::has_dead(int32_t il) const {
    const ra_layer & l    = view.cache().layers[il];
    const int32_t    last = view.cache().n_pos - 1 + n_ahead - n_tokens;
    bool             has  = view.worst_case() && l.n_swa > 0;
    for (int32_t ih = 0; ih < l.n_head_kv && !has; ++ih) {
        has = ra_head_dead(&l, ih, last) > 0;
    }
    return has;
}

bool ra_graph_part::can_reuse(const ra_part & part) {
    const ra_storage & next = part.view.storage();
    if (part.view.worst_case() || &next != &view.storage() || next.layout != layout ||
        part.first != first || part.n_tokens != n_tokens) {
        return false;
    }
    const int32_t n_steps = next.n_since - n_tokens - n_since;
    if (n_steps < 0 || n_steps > n_ahead - n_tokens) {
        return false;
    }
    view = part.view;
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

void ra_graph_part::set_input(const llama_ubatch & ubatch) {
    const ra_storage & store = view.storage();
    const ra_cache &   c     = view.cache();

    if (rows->buffer != nullptr) {
        GGML_ASSERT(ggml_backend_buffer_is_host(rows->buffer));
        int64_t * dst = (int64_t *) rows->data;
        for (int32_t il = 0; il < c.n_layer; ++il) {
            const ra_layer & l = c.layers[il];
            for (int32_t t = 0; t < n_tokens; ++t) {
                for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
                    *dst++ = l.offset[ih] + view.n_used(il, ih, n_tokens) + t;
                }
            }
        }
    }
    if (window != nullptr && window->buffer != nullptr) {
        GGML_ASSERT(ggml_backend_buffer_is_host(window->buffer));
        int64_t *     dst = (int64_t *) window->data;
        const int32_t n   = (int32_t) window->ne[0];
        for (int32_t i = 0; i < n; ++i) {
            dst[i] = ubatch.pos[first + n_tokens - n + i] % c.n_ring;
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
    by_layer.set_input(view);
    alibi.set_input(view, n_tokens);
}

ggml_tensor * ra_graph_part::rows_of(ggml_context * ctx, int32_t il) const {
    const int64_t n = int64_t(view.cache().layers[il].n_head_kv) * n_tokens;
    return ggml_view_1d(ctx, rows, n, rows_at[il] * sizeof(int64_t));
}

// mask [n_span, n_tokens] of a head that held n_used rows when the graph was built. For a prompt it is
// a copy, made anew for every op, though others may need the same: so it lives for one op only, and
// what the worst case reserves is enough for heads of any lengths.
ggml_tensor * ra_graph_part::mask_of(const llm_graph_context & graph, int32_t n_used,
                                     int32_t n_span) const {
    ggml_tensor * part = ggml_view_2d(graph.ctx0, mask, n_span, n_tokens, mask->nb[1],
                                      size_t(n_used_max - n_used) * mask->nb[0]);
    return ggml_is_contiguous(part) ? part : ggml_cont(graph.ctx0, part);
}

ggml_tensor * ra_graph_part::mask_of_head(const llm_graph_context & graph, int32_t il, int32_t ih) {
    const int32_t n_used = view.n_used(il, ih, n_tokens);
    const int32_t span   = n_span(il, ih);
    if (!has_masks[il]) {
        return mask_of(graph, n_used, span);
    }
    ggml_tensor * biases =
        by_layer.head_mask(graph, il, ih, view.cache().layers[il].offset[ih], span);
    if (n_tokens == 1 || view.cache().layers[il].n_swa > 0) {
        return ggml_is_contiguous(biases) ? biases
                                          : ggml_cont(graph.ctx0, biases); // and what is hidden
    }
    ggml_tensor * shared = ggml_view_2d(graph.ctx0, mask, span, n_tokens, mask->nb[1],
                                        size_t(n_used_max - n_used) * mask->nb[0]);
    return ggml_add(graph.ctx0, shared, biases);
}
