// ra_scorer.cpp - see ra_scorer.h
#include "ra_scorer.h"

#include <algorithm>
#include <cstring>

// values of all outputs of one graph (f32): bounds the scratch whatever the budget is
static constexpr size_t RA_SCORE_VALUES = size_t(2) << 20;

static constexpr size_t RA_SCORE_MAX_NODES = 2048;

// most tokens that a head of layer il can hold: with an allocator that moves capacity, up to clip_hi
// times the mean; 0 for a layer without heads
static int32_t ra_longest_head(const ra_cache * c, int32_t il) {
    const ra_layer & l       = c->layers[il];
    int64_t          total   = 0;
    int64_t          longest = 0;
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        total += l.initial[ih];
        longest = std::max<int64_t>(longest, l.initial[ih]);
    }
    if (l.n_head_kv > 0 && strcmp(c->settings.head_alloc->name, "uniform") != 0) {
        const double most = c->settings.cfg.clip_hi * double(total) / l.n_head_kv;
        longest           = std::max<int64_t>(longest, int64_t(std::min(most, 1e9)));
    }
    return l.n_head_kv == 0
               ? 0
               : (int32_t) std::min<int64_t>(longest + c->settings.cfg.buffer, l.n_slots);
}

ra_scorer::ra_scorer(const ra_memory & mem, ggml_backend_sched_t context_sched, bool measure)
    : mem(mem) {
    std::vector<ggml_backend_t> backends;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(context_sched); ++i) {
        backends.push_back(ggml_backend_sched_get_backend(context_sched, i));
    }
    sched.reset(ggml_backend_sched_new(backends.data(), nullptr, (int) backends.size(),
                                       RA_SCORE_MAX_NODES, false, false));
    if (!sched) {
        throw std::runtime_error("failed to create the scheduler for scores");
    }
    meta.resize(ggml_tensor_overhead() * RA_SCORE_MAX_NODES +
                ggml_graph_overhead_custom(RA_SCORE_MAX_NODES, false));

    // reserve everything now, for the largest layer with its segments full
    const ra_cache * c        = mem.state();
    const uint32_t   needs    = ra_cache_needs(c);
    size_t           n_logits = 0;
    int32_t          il_max   = -1;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        const ra_layer & l = c->layers[il];
        if (l.n_head_kv > 0 && (il_max < 0 || l.n_slots > c->layers[il_max].n_slots)) {
            il_max = il;
        }
        if (l.n_head_kv > 0) {
            const size_t n_group = mem.tensors[il].n_head / l.n_head_kv;
            n_logits             = std::max(n_logits, n_group * c->n_ring * l.n_slots);
        }
    }
    if (needs & RA_FEATURE_ATTN_LOGITS) {
        logits.resize(n_logits);
    }
    key_sim.resize(needs & RA_FEATURE_KEY_SIM ? c->n_slots_max : 0);
    key_cos.resize(needs & RA_FEATURE_KEY_COS ? c->n_slots_max : 0);
    value_norm.resize(needs & RA_FEATURE_VALUE_NORM ? c->n_slots_max : 0);
    if (il_max < 0 || needs == 0) {
        return;
    }
    // with segments full; uneven heads are scored one by one, so the longest that can be is the most
    one_by_one =
        c->settings.head_budgets != nullptr || strcmp(c->settings.head_alloc->name, "uniform") != 0;
    for (int32_t il = 0; one_by_one && il < c->n_layer; ++il) {
        il_max = ra_longest_head(c, il) > ra_longest_head(c, il_max) ? il : il_max;
    }
    std::vector<job>           jobs;
    const ra_layer &           l = c->layers[il_max];
    const std::vector<int32_t> used(l.used, l.used + l.n_head_kv);
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        l.used[ih] = l.budget[ih] + c->settings.cfg.buffer;
    }
    if (one_by_one) {
        l.used[0] = ra_longest_head(c, il_max);
    }
    list_jobs(il_max, needs, jobs);
    ggml_cgraph * gf = nullptr;
    build(il_max, jobs, 0, &gf);
    std::copy(used.begin(), used.end(), l.used);
    ggml_backend_sched_reset(sched.get());
    if (measure) {
        measured.resize(backends.size());
        ggml_backend_sched_reserve_size(sched.get(), gf, measured.data());
    } else if (!ggml_backend_sched_reserve(sched.get(), gf)) {
        throw std::runtime_error("failed to reserve the buffers for scores");
    }
}

int64_t ra_scorer::bytes() const {
    int64_t n = (int64_t) meta.capacity();
    for (const auto * values : { &logits, &key_sim, &key_cos, &value_norm, &staging }) {
        n += (int64_t) (values->capacity() * sizeof(float));
    }
    for (const size_t size : measured) {
        n += (int64_t) size;
    }
    for (int i = 0; measured.empty() && i < ggml_backend_sched_get_n_backends(sched.get()); ++i) {
        n += (int64_t) ggml_backend_sched_get_buffer_size(
            sched.get(), ggml_backend_sched_get_backend(sched.get(), i));
    }
    return n;
}

void ra_scorer::list_jobs(int32_t il, uint32_t needs, std::vector<job> & jobs) const {
    const ra_layer & l = mem.state()->layers[il];
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        const int32_t n_kv = l.used[ih];
        if (n_kv == 0) {
            continue;
        }
        if (needs & RA_FEATURE_ATTN_LOGITS) {
            jobs.push_back({ JOB_LOGITS, ih, 0, 0, nullptr });
        }
        if (needs & (RA_FEATURE_KEY_SIM | RA_FEATURE_KEY_COS)) {
            const int32_t n_rows =
                std::min<int32_t>(n_kv, std::max<int32_t>(64, int32_t(RA_SCORE_VALUES / n_kv)));
            for (int32_t row0 = 0; row0 < n_kv; row0 += n_rows) {
                jobs.push_back({ JOB_COSINES, ih, row0, std::min(n_rows, n_kv - row0), nullptr });
            }
        }
        if (needs & RA_FEATURE_VALUE_NORM) {
            jobs.push_back({ JOB_VALUE_NORMS, ih, 0, 1, nullptr });
        }
    }
}

static ggml_tensor * ra_rows_f32(ggml_context * ctx, ggml_tensor * pool, int64_t row0, int64_t n) {
    ggml_tensor * rows =
        ggml_view_2d(ctx, pool, pool->ne[0], n, pool->nb[1], size_t(row0) * pool->nb[1]);
    return pool->type == GGML_TYPE_F32 ? rows : ggml_cast(ctx, rows, GGML_TYPE_F32);
}

size_t ra_scorer::build(int32_t il, std::vector<job> & jobs, size_t begin, ggml_cgraph ** gf_out) {
    const ra_cache *   c = mem.state();
    const ra_layer &   l = c->layers[il];
    const ra_tensors & t = mem.tensors[il];

    ctx.reset(ggml_init({ meta.size(), meta.data(), /*.no_alloc =*/true }));
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), RA_SCORE_MAX_NODES, false);

    const int64_t head_dim = t.k->ne[0];
    const int64_t n_group  = t.n_head / t.n_head_kv;

    size_t        n_values = 0;
    size_t        i        = begin;
    int32_t       ih_last  = -1;
    ggml_tensor * keys     = nullptr;
    ggml_tensor * unit     = nullptr;
    for (; i < jobs.size() && i - begin < RA_SCORE_MAX_NODES / 16; ++i) {
        job &         j    = jobs[i];
        const int64_t n_kv = l.used[j.ih];
        const size_t  n_out =
            size_t(n_kv) * size_t(j.kind == JOB_LOGITS ? n_group * c->n_ring : j.n_rows);
        if (i > begin &&
            (n_values + n_out > RA_SCORE_VALUES || (one_by_one && j.ih != jobs[begin].ih))) {
            break;
        }
        n_values += n_out;
        if (j.ih != ih_last) {
            ih_last = j.ih;
            keys    = nullptr;
            unit    = nullptr;
        }
        if (j.kind != JOB_VALUE_NORMS && keys == nullptr) {
            keys = ra_rows_f32(ctx.get(), t.k, l.offset[j.ih], n_kv);
        }
        if (j.kind == JOB_LOGITS) {
            ggml_tensor * q =
                ggml_view_3d(ctx.get(), t.q, head_dim, n_group, c->n_ring, head_dim * sizeof(float),
                             t.q->nb[1], size_t(j.ih) * size_t(n_group * head_dim) * sizeof(float));
            j.out = ggml_mul_mat(ctx.get(), keys, q);
        } else if (j.kind == JOB_COSINES) {
            unit               = unit != nullptr ? unit : ggml_l2_norm(ctx.get(), keys, 1e-8f);
            ggml_tensor * rows = ggml_view_2d(ctx.get(), unit, head_dim, j.n_rows, unit->nb[1],
                                              size_t(j.row0) * unit->nb[1]);
            j.out              = ggml_mul_mat(ctx.get(), unit, rows);
        } else {
            ggml_tensor * values = ra_rows_f32(ctx.get(), t.v, l.offset[j.ih], n_kv);
            j.out = ggml_sqrt(ctx.get(), ggml_sum_rows(ctx.get(), ggml_sqr(ctx.get(), values)));
        }
        ggml_set_output(j.out);
        ggml_build_forward_expand(gf, j.out);
    }
    *gf_out = gf;
    return i;
}

const float * ra_scorer::fetch(const ggml_tensor * t) {
    if (ggml_backend_buffer_is_host(t->buffer)) {
        return (const float *) t->data;
    }
    staging.resize(std::max(staging.size(), size_t(ggml_nelements(t))));
    ggml_backend_tensor_get(t, staging.data(), 0, ggml_nbytes(t));
    return staging.data();
}

// of the queries in the ring, those that the compression uses
void ra_scorer::read_logits(int32_t il, const job & j, int32_t n_obs) {
    const ra_cache * c       = mem.state();
    const int32_t    n_group = mem.tensors[il].n_head / mem.tensors[il].n_head_kv;
    const size_t     n_query = size_t(n_group) * size_t(c->layers[il].used[j.ih]);
    const float      scale   = mem.tensors[il].kq_scale;
    const float *    src     = fetch(j.out);
    float *          dst     = logits.data() + logits_at[j.ih];
    for (int32_t o = 0; o < n_obs; ++o) {
        const size_t slot = size_t(c->obs_pos[o] % c->n_ring);
        for (size_t k = 0; k < n_query; ++k) {
            *dst++ = scale * src[slot * n_query + k];
        }
    }
}

void ra_scorer::read_cosines(int32_t il, const job & j) {
    const ra_cache * c       = mem.state();
    const int32_t    n_kv    = c->layers[il].used[j.ih];
    const float *    rows    = fetch(j.out);
    const size_t     at      = tokens_at[j.ih];
    const int32_t    n_clear = j.row0 == 0 ? n_kv : 0;
    if (!key_sim.empty()) {
        float * acc = key_sim.data() + at;
        std::fill(acc, acc + n_clear, 0.0f);
        ra_key_sim_rows(n_kv, j.row0, j.n_rows, rows, c->settings.cfg.sim_threshold, acc);
        if (j.row0 + j.n_rows == n_kv) {
            std::transform(acc, acc + n_kv, acc, [&](float sum) { return sum / float(n_kv); });
        }
    }
    if (!key_cos.empty()) {
        float * acc = key_cos.data() + at;
        std::fill(acc, acc + n_clear, 0.0f);
        for (int32_t r = 0; r < j.n_rows; ++r) {
            for (int32_t i = 0; i < n_kv; ++i) {
                acc[i] += rows[size_t(r) * size_t(n_kv) + size_t(i)] / float(n_kv);
            }
        }
    }
}

void ra_scorer::read(int32_t il, const job & j, int32_t n_obs) {
    if (j.kind == JOB_LOGITS) {
        read_logits(il, j, n_obs);
    } else if (j.kind == JOB_COSINES) {
        read_cosines(il, j);
    } else {
        std::copy_n(fetch(j.out), mem.state()->layers[il].used[j.ih],
                    value_norm.data() + tokens_at[j.ih]);
    }
}

ra_status ra_scorer::compute_layer(int32_t il, uint32_t needs, int32_t n_obs) {
    const ra_layer & l       = mem.state()->layers[il];
    const size_t     n_query = size_t(mem.tensors[il].n_head / l.n_head_kv) * size_t(n_obs);
    logits_at.assign(l.n_head_kv, 0);
    tokens_at.assign(l.n_head_kv, 0);
    for (int32_t ih = 1; ih < l.n_head_kv; ++ih) {
        logits_at[ih] = logits_at[ih - 1] + n_query * size_t(l.used[ih - 1]);
        tokens_at[ih] = tokens_at[ih - 1] + size_t(l.used[ih - 1]);
    }
    std::vector<job> jobs;
    list_jobs(il, needs, jobs);
    for (size_t begin = 0; begin < jobs.size();) {
        ggml_cgraph * gf  = nullptr;
        const size_t  end = build(il, jobs, begin, &gf);
        ggml_backend_sched_reset(sched.get());
        if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
            return ra_error(RA_STATUS_NO_MEMORY, "out of memory scoring layer %d", il);
        }
        const ggml_status st = ggml_backend_sched_graph_compute(sched.get(), gf);
        if (st != GGML_STATUS_SUCCESS) {
            return ra_error(RA_STATUS_COMPUTE, "scoring layer %d %s", il,
                            st == GGML_STATUS_ABORTED ? "was aborted" : "failed");
        }
        for (size_t i = begin; i < end; ++i) {
            read(il, jobs[i], n_obs);
        }
        begin = end;
    }
    return RA_STATUS_OK;
}

ra_status ra_scorer::features(uint32_t needs, ra_features * f) {
    if (f->ih == 0) {
        const ra_status st = compute_layer(f->il, needs, f->n_obs);
        if (st != RA_STATUS_OK) {
            return st;
        }
    }
    f->n_group      = mem.tensors[f->il].n_head / mem.tensors[f->il].n_head_kv;
    const size_t at = tokens_at[f->ih];
    f->attn_logits  = logits.empty() ? nullptr : logits.data() + logits_at[f->ih];
    f->key_sim      = key_sim.empty() ? nullptr : key_sim.data() + at;
    f->key_cos      = key_cos.empty() ? nullptr : key_cos.data() + at;
    f->value_norm   = value_norm.empty() ? nullptr : value_norm.data() + at;
    return RA_STATUS_OK;
}
