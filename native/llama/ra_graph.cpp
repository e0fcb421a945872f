// ra_graph.cpp - attention over segments, built into the model's graph
//
// A micro-batch has tokens of one sequence or of several; each sequence is attended by itself.
// Rows are written with one SET_ROWS per tensor. Reading: where all heads of a layer hold equally
// many rows at equal distances, one attention op over a strided view serves the layer; else one op
// per KV head, or one masked op over the pool (ra_graph_layer.cpp). But for the latter, masks are
// views, at different offsets, of one row of zeros followed by -infinity; once tokens were merged, each head
// has a mask of its own, with the biases of its keys.
#include "ra_graph.h"

#include "ra_llama.h"

static const ra_batch_view * ra_batch_of(const llama_memory_context_i * mctx) {
    return dynamic_cast<const ra_batch_view *>(mctx);
}

// the graph input for a rotation; NULL without one
static ggml_tensor * ra_new_rotation(ggml_context * ctx, const char * name,
                                     const ra_rotation & rot) {
    if (rot.n == 0) {
        return nullptr;
    }
    ggml_tensor * t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, rot.n, rot.n);
    ggml_set_name(t, name);
    ggml_set_input(t);
    return t;
}

static void ra_set_rotation(ggml_tensor * t, const ra_rotation & rot) {
    if (t != nullptr && t->buffer != nullptr) {
        ggml_backend_tensor_set(t, rot.values.data(), 0, ggml_nbytes(t));
    }
}

ra_graph_input::ra_graph_input(const llm_graph_context & graph, const ra_batch_view & batch)
    : llm_graph_input_attn_kv(graph.hparams, graph.cparams, nullptr) {
    const std::vector<ra_part> list = batch.parts((int32_t) graph.n_tokens);
    parts.reserve(list.size());
    for (const ra_part & part : list) {
        parts.emplace_back(graph, part);
    }
    const ra_storage & store = parts[0].view.storage(); // all have the same rotations
    self_k_rot               = ra_new_rotation(graph.ctx0, "attn_inp_k_rot", store.rot_k);
    self_v_rot               = ra_new_rotation(graph.ctx0, "attn_inp_v_rot", store.rot_v);
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
    const ra_storage & store = parts[0].view.storage();
    ra_set_rotation(self_k_rot, store.rot_k);
    ra_set_rotation(self_v_rot, store.rot_v);
}

// ---------------------------------------------------------------------------------------------
// hooks
// ---------------------------------------------------------------------------------------------

llm_graph_input_attn_kv * ra_graph_build_input(const llm_graph_context & graph) {
    const ra_batch_view * batch = ra_batch_of(graph.mctx);
    if (batch == nullptr) {
        return nullptr;
    }
    auto inp = std::make_unique<ra_graph_input>(graph, *batch);
    return static_cast<llm_graph_input_attn_kv *>(graph.res->add_input(std::move(inp)));
}

bool ra_graph_is_input(const llm_graph_input_attn_kv * inp) {
    return dynamic_cast<const ra_graph_input *>(inp) != nullptr;
}

uint32_t ra_graph_count_nodes(const ra_cache & cache, uint32_t n_seq) {
    uint32_t n = 64;
    for (int32_t il = 0; il < cache.n_layer; ++il) {
        n += 24 + 24 * (uint32_t) cache.layers[il].n_head_kv;
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

// remembers the newest queries q_cur [head_dim, n_head, n_tokens] for the policy
static void ra_store_window(const llm_graph_context & graph, const ra_graph_part * inp,
                            ggml_tensor * pool, ggml_tensor * q_cur) {
    const int64_t n   = inp->window->ne[0];
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
                                    const ra_tensors & t, const ra_layer & l, ggml_tensor * q,
                                    ggml_tensor * sinks, float kq_scale, int il, int32_t ih) {
    ggml_context * ctx     = graph.ctx0;
    const int64_t  n_group = t.n_head / t.n_head_kv;
    const int64_t  n_span  = inp->n_span(il, ih);

    ggml_tensor * q_h = ggml_view_3d(ctx, q, q->ne[0], n_group, q->ne[2], q->nb[1], q->nb[2],
                                     size_t(ih * n_group) * q->nb[1]);
    // [head_dim, one head, n_span]
    ggml_tensor * k_h = ggml_view_3d(ctx, t.k, t.k->ne[0], 1, n_span, t.k->nb[1], t.k->nb[1],
                                     size_t(l.offset[ih]) * t.k->nb[1]);
    ggml_tensor * v_h = ggml_view_3d(ctx, t.v, t.v->ne[0], 1, n_span, t.v->nb[1], t.v->nb[1],
                                     size_t(l.offset[ih]) * t.v->nb[1]);
    ggml_tensor * s_h =
        sinks == nullptr
            ? nullptr
            : ggml_view_1d(ctx, sinks, n_group, size_t(ih * n_group) * ggml_element_size(sinks));
    return graph.build_attn_mha(q_h, k_h, v_h, nullptr, inp->mask_of_head(graph, il, ih), s_h,
                                nullptr, 0, kq_scale, il);
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

// what the model's graph says about attention, for compressions to come
static void ra_note_model(const ra_graph_part & part, const ggml_tensor * k_cur, float kq_scale,
                          int il) {
    ra_tensors & t = part.view.tensors(il);
    t.kq_scale     = kq_scale;
    if (!t.rope.is_known && (ra_cache_needs(&part.view.cache()) & RA_FEATURE_CENTRES) != 0 &&
        ra_rope_find(k_cur, &t.rope) != RA_STATUS_OK) {
        ra_throw_last();
    }
}

// q_cur, k_cur, v_cur: of the tokens of one sequence
static ggml_tensor * ra_attend(const llm_graph_context & graph, ra_graph_part * part,
                               ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur,
                               ggml_tensor * sinks, float kq_scale, int il) {
    const ra_layer &   l    = part->view.cache().layers[il];
    const ra_tensors & t    = part->view.tensors(il);
    ggml_tensor *      rows = part->rows_of(graph.ctx0, il);
    ra_store(graph, t.k, k_cur, rows);
    ra_store(graph, t.v, v_cur, rows);
    if (part->window != nullptr) {
        ra_store_window(graph, part, t.q, q_cur);
    }
    const ra_attend_way way = part->ways[il];
    if (way == RA_ATTEND_EVEN && !part->is_biased[il]) {
        return ra_attend_even(graph, part, t, l, q_cur, sinks, kq_scale, il);
    }
    if (way != RA_ATTEND_BY_HEAD && part->n_tokens == 1 && sinks == nullptr) {
        return part->by_layer.attend(graph, t, q_cur, kq_scale, il);
    }
    std::vector<ggml_tensor *> heads;
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        heads.push_back(ra_attend_head(graph, part, t, l, q_cur, sinks, kq_scale, il, ih));
    }
    return ra_join(graph.ctx0, std::move(heads), 0);
}

ggml_tensor * ra_graph_build_attn(const llm_graph_context & graph, llm_graph_input_attn_kv * inp_kv,
                                  ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur,
                                  ggml_tensor * sinks, float kq_scale, int il) {
    ra_graph_input *           inp = static_cast<ra_graph_input *>(inp_kv);
    std::vector<ggml_tensor *> parts;
    for (ra_graph_part & part : inp->parts) {
        const auto tokens = [&](ggml_tensor * t) {
            return inp->parts.size() == 1
                       ? t
                       : ggml_view_3d(graph.ctx0, t, t->ne[0], t->ne[1], part.n_tokens, t->nb[1],
                                      t->nb[2], size_t(part.first) * t->nb[2]);
        };
        ra_note_model(part, k_cur, kq_scale, il);
        parts.push_back(ra_attend(graph, &part, tokens(q_cur), tokens(k_cur), tokens(v_cur), sinks,
                                  kq_scale, il));
    }
    return ra_join(graph.ctx0, std::move(parts), 1);
}
