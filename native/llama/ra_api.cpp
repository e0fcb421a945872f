// ra_api.cpp - the C interface of a context with a budget, and sizes without one
#include "llama-context.h"
#include "llama-model.h"
#include "ra_memory.h"
#include "ra_support.h"

#include <algorithm>
#include <exception>

// ---------------------------------------------------------------------------------------------
// a context with a budget
// ---------------------------------------------------------------------------------------------

static ra_status ra_not_attached() {
    return ra_error(
        RA_STATUS_NOT_FOUND,
        "this context has no budgeted cache: call ra_configure_next() before making it");
}

static ra_status ra_no_seq(const ra_memory * mem, int32_t seq_id) {
    return ra_error(RA_STATUS_INVALID, "there is no sequence %d: the context holds %d", seq_id,
                    mem->n_seq());
}

// calls what(ra_memory &, id) for a sequence, or for all (-1) until one fails
template <typename F> static ra_status ra_for_seq(llama_context * ctx, int32_t seq_id, F && what) {
    ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr) {
        return ra_not_attached();
    }
    if (seq_id != -1) {
        return mem->has_seq(seq_id) ? what(*mem, seq_id) : ra_no_seq(mem, seq_id);
    }
    ra_status st = RA_STATUS_OK;
    for (int32_t id = 0; id < mem->n_seq() && st == RA_STATUS_OK; ++id) {
        st = what(*mem, id);
    }
    return st;
}

int32_t ra_is_attached(const llama_context * ctx) {
    return ra_memory_of(ctx) != nullptr;
}

int32_t ra_n_seq(const llama_context * ctx) {
    const ra_memory * mem = ra_memory_of(ctx);
    return mem == nullptr ? 0 : mem->n_seq();
}

ra_status ra_set_protect(llama_context * ctx, int32_t seq_id, int32_t n_protect) {
    return ra_for_seq(ctx, seq_id,
                      [&](ra_memory & mem, int32_t id) { return mem.set_protect(id, n_protect); });
}

ra_status ra_set_head_budgets(llama_context * ctx, int32_t seq_id, int32_t il,
                              const int32_t * budgets, size_t n) {
    return ra_for_seq(ctx, seq_id, [&](ra_memory & mem, int32_t id) {
        return mem.set_head_budgets(id, il, budgets, n);
    });
}

ra_status ra_compress(llama_context * ctx, int32_t seq_id) {
    return ra_for_seq(ctx, seq_id, [](ra_memory & mem, int32_t id) { return mem.compress(id); });
}

int32_t ra_room(const llama_context * ctx, int32_t seq_id) {
    const ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr || !mem->has_seq(seq_id)) {
        mem == nullptr ? ra_not_attached() : ra_no_seq(mem, seq_id);
        return -1;
    }
    return ra_cache_room(&mem->state(seq_id));
}

ra_status ra_set_trace(llama_context * ctx, ra_trace_cb cb, void * user) {
    return ra_for_seq(ctx, -1, [&](ra_memory & mem, int32_t id) {
        mem.state(id).trace      = cb;
        mem.state(id).trace_user = user;
        return RA_STATUS_OK;
    });
}

// adds what one sequence has to *st
static void ra_add_stats(const ra_stream & s, ra_stats * st) {
    const ra_cache & c = *s.store.cache;
    for (int32_t il = 0; il < c.n_layer; ++il) {
        const ra_layer & l = c.layers[il];
        for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
            st->n_entries += l.used[ih];
        }
    }
    st->n_seq += 1;
    st->n_pos       = std::max(st->n_pos, c.n_pos);
    st->peak_tokens = std::max(st->peak_tokens, c.peak_tokens);
    st->kv_bytes += s.store.kv_bytes();
    st->window_bytes += s.store.window_bytes();
    st->kv_bytes_full += s.store.full_bytes(c.n_pos);
    st->n_evicted += c.n_evicted;
    st->n_compressions += c.n_compressions;
    st->compress_us += s.compress_us;
    st->n_tokens_total += c.n_tokens_total;
}

ra_status ra_stats_get(const llama_context * ctx, int32_t seq_id, ra_stats * st) {
    const ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr) {
        return ra_not_attached();
    }
    if (st == nullptr || st->size != sizeof(*st)) {
        return ra_error(RA_STATUS_INVALID, "ra_stats_get: st->size must be %zu", sizeof(*st));
    }
    if (seq_id != -1 && !mem->has_seq(seq_id)) {
        return ra_no_seq(mem, seq_id);
    }
    const ra_cache & c = mem->state(0);
    *st                = {};
    st->size           = sizeof(*st);
    for (int32_t il = 0; il < c.n_layer; ++il) {
        st->n_layer += c.layers[il].n_head_kv > 0;
        st->n_head_kv_max = std::max(st->n_head_kv_max, c.layers[il].n_head_kv);
    }
    st->budget        = c.settings.cfg.budget;
    st->buffer        = c.settings.cfg.buffer;
    st->scratch_bytes = mem->scratch_bytes();
    st->stock_bytes   = mem->stock_part().bytes();
    for (int32_t id = 0; id < mem->n_seq(); ++id) {
        if (seq_id == -1 || id == seq_id) {
            ra_add_stats(mem->stream(id), st);
        }
    }
    return RA_STATUS_OK;
}

// layer il of a sequence if it has a head ih, else NULL
static const ra_layer * ra_layer_with(const ra_memory * mem, int32_t seq_id, int32_t il,
                                      int32_t ih) {
    if (!mem->has_seq(seq_id) || il < 0 || il >= mem->state(seq_id).n_layer || ih < 0 ||
        ih >= mem->state(seq_id).layers[il].n_head_kv) {
        return nullptr;
    }
    return &mem->state(seq_id).layers[il];
}

ra_status ra_head_stats_get(const llama_context * ctx, int32_t seq_id, int32_t il, int32_t ih,
                            ra_head_stats * st) {
    const ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr) {
        return ra_not_attached();
    }
    const ra_layer * l = ra_layer_with(mem, seq_id, il, ih);
    if (st == nullptr || st->size != sizeof(*st) || l == nullptr) {
        return ra_error(RA_STATUS_INVALID,
                        "ra_head_stats_get: no sequence %d, layer %d, head %d, or a wrong size",
                        seq_id, il, ih);
    }
    st->budget    = l->budget[ih];
    st->capacity  = l->budget[ih] + mem->state(seq_id).settings.cfg.buffer;
    st->used      = l->used[ih];
    st->offset    = l->offset[ih];
    st->n_evicted = l->n_evicted[ih];
    st->row_bytes = mem->stream(seq_id).store.tensors[(size_t) il].row_bytes();
    return RA_STATUS_OK;
}

int32_t ra_n_head_kv(const llama_context * ctx, int32_t il) {
    const ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr || il < 0 || il >= mem->state(0).n_layer) {
        return -1;
    }
    return mem->state(0).layers[il].n_head_kv;
}

int32_t ra_kept_positions(const llama_context * ctx, int32_t seq_id, int32_t il, int32_t ih,
                          int32_t * pos, int32_t n_max) {
    const ra_memory * mem = ra_memory_of(ctx);
    const ra_layer *  l   = mem == nullptr ? nullptr : ra_layer_with(mem, seq_id, il, ih);
    if (l == nullptr || n_max < 0 || (pos == nullptr && n_max > 0)) {
        ra_error(RA_STATUS_INVALID,
                 "ra_kept_positions: no sequence %d, layer %d, head %d, or no room", seq_id, il,
                 ih);
        return -1;
    }
    std::copy_n(l->pos + l->offset[ih], std::min(n_max, l->used[ih]), pos);
    return l->used[ih];
}

int64_t ra_row_bytes(const llama_context * ctx) {
    const ra_memory * mem = ra_memory_of(ctx);
    return mem == nullptr ? -1 : mem->stream(0).store.row_bytes();
}

int32_t ra_memory_breakdown(const llama_context * ctx, int64_t * model_bytes,
                            int64_t * context_bytes, int64_t * compute_bytes) {
    if (ctx == nullptr || model_bytes == nullptr || context_bytes == nullptr ||
        compute_bytes == nullptr) {
        return ra_error(RA_STATUS_INVALID, "ra_memory_breakdown: an argument is NULL");
    }
    *model_bytes = *context_bytes = *compute_bytes = 0;
    // tensor by tensor: a buffer over a mapped file also spans what other backends use
    for (const auto & [_, tensor] : ctx->get_model().tensors_by_name) {
        *model_bytes += (int64_t) ggml_backend_buft_get_alloc_size(
            ggml_backend_buffer_get_type(tensor->buffer), tensor);
    }
    for (const auto & [_, data] : ctx->memory_breakdown()) {
        *context_bytes += (int64_t) data.context;
        *compute_bytes += (int64_t) data.compute;
    }
    return RA_STATUS_OK;
}

int64_t ra_planned_scratch_bytes(const llama_context * ctx) {
    ra_memory * mem = ra_memory_of(ctx);
    if (mem == nullptr) {
        ra_not_attached();
        return -1;
    }
    try {
        return mem->planned_scratch_bytes(ctx->get_sched());
    } catch (const std::exception & e) {
        ra_error(RA_STATUS_NO_MEMORY, "cannot plan the scratch of compressions: %s", e.what());
        return -1;
    }
}

// ---------------------------------------------------------------------------------------------
// sizes without a context
// ---------------------------------------------------------------------------------------------

static ra_status ra_check_shape(const ra_shape * s) {
    if (s == nullptr || s->n_layer < 1 || s->n_layer > 4096 || s->n_head_kv < 1 ||
        s->n_head_kv > 4096 || s->head_dim_k < 1 || s->head_dim_k > 65536 || s->head_dim_v < 1 ||
        s->head_dim_v > 65536) {
        return ra_error(RA_STATUS_INVALID, "ra_shape: a count is out of range");
    }
    const ra_status st = ra_check_type("K", s->type_k, (uint32_t) s->head_dim_k);
    return st != RA_STATUS_OK ? st : ra_check_type("V", s->type_v, (uint32_t) s->head_dim_v);
}

static int64_t ra_shape_row_bytes(const ra_shape * s) {
    return (int64_t) (ggml_row_size((ggml_type) s->type_k, s->head_dim_k) +
                      ggml_row_size((ggml_type) s->type_v, s->head_dim_v));
}

int64_t ra_plan_kv_bytes(const ra_shape * shape, const ra_config * cfg) {
    if (ra_check_shape(shape) != RA_STATUS_OK) {
        return -1;
    }
    ra_settings settings{};
    if (ra_settings_init(&settings, cfg) != RA_STATUS_OK) {
        return -1;
    }
    const std::vector<int32_t> n_head_kv(shape->n_layer, shape->n_head_kv);
    std::vector<int32_t>       budgets(size_t(shape->n_layer) * shape->n_head_kv);
    int64_t                    n_slots = -1;
    if (ra_settings_budgets(&settings, settings.cfg.n_protect, shape->n_layer, n_head_kv.data(),
                            budgets.data()) == RA_STATUS_OK) {
        n_slots = 0;
        for (const int32_t budget : budgets) {
            n_slots += int64_t(budget) + settings.cfg.buffer;
        }
    }
    ra_settings_free(&settings);
    return n_slots < 0 ? -1 : n_slots * ra_shape_row_bytes(shape);
}

int64_t ra_plan_kv_bytes_full(const ra_shape * shape, int64_t n_tokens) {
    if (ra_check_shape(shape) != RA_STATUS_OK) {
        return -1;
    }
    if (n_tokens < 0 || n_tokens > (int64_t(1) << 40)) {
        ra_error(RA_STATUS_INVALID, "n_tokens = %lld is out of range", (long long) n_tokens);
        return -1;
    }
    return n_tokens * shape->n_layer * shape->n_head_kv * ra_shape_row_bytes(shape);
}
