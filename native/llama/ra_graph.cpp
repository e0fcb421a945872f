// ra_graph.cpp - attention over segments, built into the model's graph
//
// A micro-batch has tokens of one sequence or of several; each sequence is attended by itself.
// Rows are written with one SET_ROWS per tensor. Reading: where all heads of a layer hold equally
// many rows at equal distances, one attention op over a strided view serves the layer; else one op
// per KV head, or one masked op over the pool (ra_graph_layer.cpp). But for the latter, masks are
// views, at different offsets, of one row of zeros followed by -infinity; once tokens were merged, or are out
// of a layer's window, each head has a mask of its own, with the biases of its keys.
#include "ra_graph.h"

#include "ra_llama.h"

// of what a graph sees of a batch
static const ra_batch_view * ra_batch_of(const llama_memory_context_i * mctx) {
    const auto * part = dynamic_cast<const ra_stock_context *>(mctx);
    return part == nullptr ? nullptr : part->batch;
}

ra_graph_input::ra_graph_input(const llm_graph_context & graph, const ra_batch_view & batch) {
    const std::vector<ra_part> list = batch.parts((int32_t) graph.n_tokens);
    parts.reserve(list.size());
    for (const ra_part & part : list) {
        parts.emplace_back(graph, part);
    }
}

bool ra_graph_input::can_reuse(const llm_graph_params & params) {
    const ra_batch_view * batch = ra_batch_of(params.mctx);
    if (batch == nullptr) {
        return false;
    }
    const std::vector<ra_part> next = batch->parts((int32_t) params.ubatch.n_tokens);
    bool                       can  = next.size() == parts.size();
    for (size_t i = 0; i < next.size() && can; ++i) {
        can = parts[i].can_reuse(next[i]);
    }
    return can;
}

void ra_graph_input::set_input(const llama_ubatch * ubatch) {
    for (ra_graph_part & part : parts) {
        part.set_input(*ubatch);
    }
}

// ---------------------------------------------------------------------------------------------
// hooks
// ---------------------------------------------------------------------------------------------

const llama_memory_context_i * ra_stock_part(const llama_memory_context_i * mctx) {
    const auto * batch = dynamic_cast<const ra_batch_view *>(mctx);
    return batch == nullptr ? mctx : batch->stock();
}

// the input of all our layers, made for the first of them
static ra_graph_input * ra_input_of(const llm_graph_context & graph, const ra_batch_view & batch) {
    for (const llm_graph_input_ptr & inp : graph.res->inputs) {
        if (auto * found = dynamic_cast<ra_graph_input *>(inp.get())) {
            return found;
        }
    }
    return static_cast<ra_graph_input *>(
        graph.res->add_input(std::make_unique<ra_graph_input>(graph, batch)));
}

uint32_t ra_graph_count_nodes(const ra_storage & store, uint32_t n_seq) {
    uint32_t n = 64;
    for (const ra_tensors & t : store.tensors) {
        n += (uint32_t) t.n_readers * (24 + 24 * (uint32_t) t.n_head_kv);
        n += t.max_alibi_bias > 0.0f ? 12 * (uint32_t) t.n_head : 0;
    }
    return n * n_seq;
}

// writes cur [head_dim, n_head_kv, n_tokens] to the rows of its tokens
static void ra_store(const llm_graph_context & graph, ggml_tensor * pool, ggml_tensor * cur,
                     ggml_tensor * rows) {
    cur = ggml_is_contiguous(cur) ? cur : ggml_cont(graph.ctx0, cur);
    cur = ggml_reshape_2d(graph.ctx0, cur, cur->ne[0], cur->ne[1] * cur->ne[2]);
    ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx0, pool, cur, rows));
}

// remembers the newest queries q_cur [head_dim, n_head, n_tokens] of the i_reader-th layer that reads the rows,
// for the policy
static void ra_store_window(const llm_graph_context & graph, const ra_graph_part * inp,
                            const ra_tensors & t, ggml_tensor * q_cur, int32_t i_reader) {
    if (inp->window == nullptr || i_reader >= t.n_pooled) {
        return;
    }
    const int64_t n_ring = t.q->ne[1] / t.n_pooled;
    ggml_tensor * pool   = t.n_pooled == 1
                               ? t.q
                               : ggml_view_2d(graph.ctx0, t.q, t.q->ne[0], n_ring, t.q->nb[1],
                                              size_t(i_reader * n_ring) * t.q->nb[1]);
    const int64_t n      = inp->window->ne[0];
    ggml_tensor * cur = ggml_view_3d(graph.ctx0, q_cur, q_cur->ne[0], q_cur->ne[1], n, q_cur->nb[1],
                                     q_cur->nb[2], size_t(q_cur->ne[2] - n) * q_cur->nb[2]);
    cur               = ggml_is_contiguous(cur) ? cur : ggml_cont(graph.ctx0, cur);
    cur               = ggml_reshape_2d(graph.ctx0, cur, cur->ne[0] * cur->ne[1], n);
    ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx0, pool, cur, inp->window));
}

// one flash attention over all heads: heads are `stride` rows apart
static ggml_tensor * ra_attend_even(const llm_graph_context & graph, ra_graph_part * inp,
                                    const ra_tensors & t, const ra_layer & l, ggml_tensor * q,
                                    ggml_tensor * sinks, float kq_scale, int il) {
    ggml_context * ctx    = graph.ctx0;
    const int64_t  n_span = inp->n_span(il, 0);
    const size_t   stride = size_t(inp->view.n_capacity(il, 0));
    const int32_t  n_used = inp->view.n_used(il, 0, inp->n_tokens);

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
static ggml_tensor * ra_attend_head(const llm_graph_context & graph, ra_graph_part * inp,
                                    const ra_tensors & t, const ra_layer & l, const ra_attn & attn,
                                    int32_t ih) {
    ggml_context * ctx     = graph.ctx0;
    const int64_t  n_group = t.n_own();
    const int64_t  n_span  = inp->n_span(attn.il, ih);
    ggml_tensor *  q       = attn.q;

    ggml_tensor * q_h = ggml_view_3d(ctx, q, q->ne[0], n_group, q->ne[2], q->nb[1], q->nb[2],
                                     size_t(ih * n_group) * q->nb[1]);
    // [head_dim, one head, n_span]
    ggml_tensor * k_h  = ggml_view_3d(ctx, t.k, t.k->ne[0], 1, n_span, t.k->nb[1], t.k->nb[1],
                                      size_t(l.offset[ih]) * t.k->nb[1]);
    ggml_tensor * v_h  = ggml_view_3d(ctx, t.v, t.v->ne[0], 1, n_span, t.v->nb[1], t.v->nb[1],
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
    return graph.build_attn_mha(q_h, k_h, v_h, nullptr, mask, s_h, attn.v_mla, 0, attn.kq_scale,
                                attn.il);
}

// parts one after the other along `dim`, joined pairwise, so that every value is copied log2 times
static ggml_tensor * ra_join(ggml_context * ctx, std::vector<ggml_tensor *> parts, int dim) {
    while (parts.size() > 1) {
        std::vector<ggml_tensor *> pairs;
        for (size_t i = 0; i + 1 < parts.size(); i += 2) {
            pairs.push_back(ggml_concat(ctx, parts[i], parts[i + 1], dim));
        }
        if (parts.size() % 2 == 1) {
            pairs.push_back(parts.back());
        }
        parts = std::move(pairs);
    }
    return parts[0];
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

// what the model's graph says about attention, for compressions to come
static void ra_note_model(const llm_graph_context & graph, const ra_graph_part & part,
                          const ra_attn & attn) {
    ra_tensors & t = part.view.tensors(attn.il);
    t.logit        = ra_logit_of(graph, attn.kq_scale);
    t.sinks        = attn.sinks;
    t.n_hadamard   = attn.k_rot == nullptr ? 0 : (int32_t) attn.k_rot->ne[0];
    t.n_hadamard_v = attn.v_rot == nullptr ? 0 : (int32_t) attn.v_rot->ne[0];
    if (t.n_pooled > 1 && t.sinks != nullptr) {
        ra_error(RA_STATUS_UNSUPPORTED,
                 "layers that share rows and have attention sinks are not supported with a budget");
        ra_throw_last();
    }
    if (!t.rope.is_known && (ra_cache_needs(&part.view.cache()) & RA_FEATURE_CENTRES) != 0 &&
        ra_rope_find(attn.k, &t.rope) != RA_STATUS_OK) {
        ra_throw_last();
    }
}

// attn, here and below: of the tokens of one sequence
static void ra_store_rows(const llm_graph_context & graph, const ra_graph_part * part,
                          const ra_attn & attn) {
    const ra_tensors & t    = part->view.tensors(attn.il);
    ggml_tensor *      rows = part->rows_of(graph.ctx0, attn.il);
    ra_store(graph, t.k, attn.k, rows);
    if (t.has_own_v()) {
        ra_store(graph, t.v, attn.v, rows);
    }
}

static ggml_tensor * ra_attend(const llm_graph_context & graph, ra_graph_part * part,
                               const ra_attn & attn) {
    const int           il  = attn.il;
    const ra_layer &    l   = part->view.cache().layers[il];
    const ra_tensors &  t   = part->view.tensors(il);
    const ra_attend_way way = part->ways[il];
    if (way == RA_ATTEND_EVEN && !part->has_masks[il]) {
        return ra_attend_even(graph, part, t, l, attn.q, attn.sinks, attn.kq_scale, il);
    }
    if (way != RA_ATTEND_BY_HEAD && part->n_tokens == 1 && attn.sinks == nullptr) {
        ggml_tensor * cur = part->by_layer.attend(graph, t, attn.q, attn.kq_scale, il);
        if (cur != nullptr) {
            return cur;
        }
    }
    std::vector<ggml_tensor *> heads;
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        heads.push_back(ra_attend_head(graph, part, t, l, attn, ih));
    }
    return ra_join(graph.ctx0, std::move(heads), 0);
}

ggml_tensor * ra_graph_build_attn(const llm_graph_context & graph, const ra_attn & attn) {
    const ra_batch_view * batch  = ra_batch_of(graph.mctx);
    const bool            shares = attn.k == nullptr; // the rows of another layer
    const int             il     = shares ? ra_layer_of_rows(graph.hparams, attn.il) : attn.il;
    if (batch == nullptr || !batch->has_layer(il)) {
        return nullptr;
    }
    int32_t i_reader =
        0; // of the layers that read the rows, in their order; the owner is the first
    for (int32_t i = il; i < attn.il; ++i) {
        i_reader += ra_layer_of_rows(graph.hparams, i) == il;
    }
    GGML_ASSERT(attn.kq_b == nullptr);
    ra_graph_input *           inp = ra_input_of(graph, *batch);
    std::vector<ggml_tensor *> parts;
    for (ra_graph_part & part : inp->parts) {
        const auto tokens = [&](ggml_tensor * t) {
            return inp->parts.size() == 1
                       ? t
                       : ggml_view_3d(graph.ctx0, t, t->ne[0], t->ne[1], part.n_tokens, t->nb[1],
                                      t->nb[2], size_t(part.first) * t->nb[2]);
        };
        ra_attn own = attn;
        own.q       = tokens(attn.q);
        own.il      = il;
        if (!shares) {
            own.k = tokens(attn.k);
            own.v = tokens(attn.v);
            ra_note_model(graph, part, attn);
            ra_store_rows(graph, &part, own);
        }
        ra_store_window(graph, &part, part.view.tensors(il), own.q, i_reader);
        parts.push_back(ra_attend(graph, &part, own));
    }
    return ra_join(graph.ctx0, std::move(parts), 1);
}
