// ra_scorer_graph.cpp - the graphs of ra_scorer, and what is read from them
#include "ra_scorer.h"

#include <algorithm>

// ---------------------------------------------------------------------------------------------
// graphs
// ---------------------------------------------------------------------------------------------

// logits of all heads first: they want the keys as they are
void ra_scorer::list_jobs(const int32_t * n_kv, const int32_t * n_old, int32_t n_head_kv,
                          uint32_t needs) {
    jobs.clear();
    for (int32_t ih = 0; ih < n_head_kv && (needs & RA_FEATURE_ATTN_LOGITS); ++ih) {
        if (n_kv[ih] > 0) {
            jobs.push_back({ JOB_LOGITS, ih, n_kv[ih], 0, 0 });
        }
    }
    for (int32_t ih = 0; ih < n_head_kv; ++ih) {
        if (n_kv[ih] == 0) {
            continue;
        }
        // newest rows first, as ra_alike_compare_new() wants them
        const int32_t n_block = (int32_t) ra_score_block_rows(n_kv[ih]);
        for (int32_t end = n_kv[ih]; end > n_old[ih] && (needs & RA_FEATURE_KEY_SIM);) {
            const int32_t n_rows = std::min(n_block, end - n_old[ih]);
            jobs.push_back({ JOB_COSINES, ih, end, end - n_rows, n_rows });
            end -= n_rows;
        }
        if (needs & (RA_FEATURE_KEY_SIM | RA_FEATURE_KEY_COS)) {
            jobs.push_back({ JOB_COS_SUMS, ih, n_kv[ih], 0, 0 });
        }
        if (needs & RA_FEATURE_VALUE_NORM) {
            jobs.push_back({ JOB_VALUE_NORMS, ih, n_kv[ih], 0, 0 });
        }
    }
}

// compares tokens of head ih again, if that is needed; false: it is not
bool ra_scorer::list_jobs_again(int32_t il, int32_t ih) {
    const int32_t n_kv = mem.state()->layers[il].used[ih];
    const size_t  at   = tokens_at[ih];
    const int32_t n =
        ra_alike_list_unknown(n_old[ih], newer.data() + at, older.data() + at, again.data() + at);
    const int32_t n_block = (int32_t) ra_score_block_rows(n_kv);
    for (int32_t i = 0; i < n; i += n_block) {
        jobs_next.push_back({ JOB_COSINES_AGAIN, ih, n_old[ih], i, std::min(n_block, n - i) });
    }
    if (n > 0) {
        jobs_next.push_back({ JOB_COS_SUMS, ih, n_kv, 0, 0 });
    }
    return n > 0;
}

ggml_cgraph * ra_scorer::new_graph() {
    ctx.reset(ggml_init({ meta.size(), meta.data(), /*.no_alloc =*/true }));
    return ggml_new_graph_custom(ctx.get(), RA_SCORE_MAX_NODES, false);
}

// a copy also where the cache is f32: `unit` overwrites it
ggml_tensor * ra_scorer::keys_of(int32_t il, shared & s) {
    if (s.keys == nullptr) {
        s.keys = ggml_cast(ctx.get(), mem.tensors[il].k, GGML_TYPE_F32);
        ggml_set_output(s.keys);
    }
    return s.keys;
}

ggml_tensor * ra_scorer::unit_of(int32_t il, shared & s) {
    if (s.unit == nullptr) {
        s.unit = ggml_l2_norm_inplace(ctx.get(), keys_of(il, s), 1e-8f);
    }
    return s.unit;
}

ggml_tensor * ra_scorer::queries_of(int32_t il, shared & s) {
    if (s.queries == nullptr) {
        const ra_tensors & t       = mem.tensors[il];
        const int64_t      dim     = t.k->ne[0];
        const int64_t      n_group = t.n_head / t.n_head_kv;
        const size_t       row     = size_t(dim) * sizeof(float);
        s.queries =
            ggml_cont(ctx.get(), ggml_view_4d(ctx.get(), t.q, dim, n_group, t.q->ne[1], t.n_head_kv,
                                              row, t.q->nb[1], size_t(n_group) * row, 0));
        ggml_set_output(s.queries);
    }
    return s.queries;
}

ggml_tensor * ra_scorer::value_norms_of(int32_t il, shared & s) {
    if (s.value_norms == nullptr) {
        ggml_tensor * values = ggml_cast(ctx.get(), mem.tensors[il].v, GGML_TYPE_F32);
        ggml_set_output(values);
        ggml_tensor * sums = ggml_sum_rows(ctx.get(), ggml_sqr_inplace(ctx.get(), values));
        ggml_set_output(sums);
        s.value_norms = ggml_sqrt_inplace(ctx.get(), sums);
    }
    return s.value_norms;
}

// n rows of pool-like t from `row` on; where the pool has them, padded with rows before or behind
static ggml_tensor * ra_rows_padded(ggml_context * ctx, ggml_tensor * t, int64_t row, int64_t n,
                                    int64_t * n_before) {
    const int64_t n_pad = ra_score_pad(n) <= t->ne[1] ? ra_score_pad(n) : n;
    const int64_t begin = std::min(row, t->ne[1] - n_pad);
    *n_before           = row - begin;
    return ggml_view_2d(ctx, t, t->ne[0], n_pad, t->nb[1], size_t(begin) * t->nb[1]);
}

void ra_scorer::add_job(int32_t il, shared & s, job & j) {
    const ra_tensors & t   = mem.tensors[il];
    const int64_t      row = mem.state()->layers[il].offset[j.ih];
    switch (j.kind) {
        case JOB_LOGITS: {
            ggml_tensor * q    = queries_of(il, s);
            ggml_tensor * keys = ra_rows_padded(ctx.get(), keys_of(il, s), row, j.n_kv, &j.skip);
            q                  = ggml_view_2d(ctx.get(), q, q->ne[0], q->ne[1] * q->ne[2], q->nb[1],
                                              size_t(j.ih) * q->nb[3]);
            j.out              = ggml_mul_mat(ctx.get(), keys, q);
            j.stride           = j.out->ne[0];
            break;
        }
        case JOB_COS_SUMS: {
            j.out    = unit_of(il, s);
            j.stride = t.k->ne[0];
            j.skip   = row * j.stride;
            break;
        }
        case JOB_COSINES: {
            ggml_tensor * unit = unit_of(il, s);
            ggml_tensor * rows = ggml_view_2d(ctx.get(), unit, unit->ne[0], j.n_rows, unit->nb[1],
                                              size_t(row + j.row0) * unit->nb[1]);
            j.out = ggml_mul_mat(ctx.get(), ra_rows_padded(ctx.get(), unit, row, j.n_kv, &j.skip),
                                 rows);
            j.stride = j.out->ne[0];
            break;
        }
        case JOB_COSINES_AGAIN: {
            ggml_tensor * unit = unit_of(il, s);
            ggml_tensor * head = ggml_view_2d(ctx.get(), unit, unit->ne[0], j.n_kv, unit->nb[1],
                                              size_t(row) * unit->nb[1]);
            j.index            = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, j.n_rows);
            ggml_set_input(j.index);
            ggml_set_output(j.index);
            ggml_tensor * rows = ggml_get_rows(ctx.get(), head, j.index);
            ggml_set_output(rows);
            j.out = ggml_mul_mat(ctx.get(), ra_rows_padded(ctx.get(), unit, row, j.n_kv, &j.skip),
                                 rows);
            j.stride = j.out->ne[0];
            break;
        }
        case JOB_VALUE_NORMS: {
            j.out    = value_norms_of(il, s);
            j.stride = 1;
            j.skip   = row;
            break;
        }
    }
    ggml_set_output(j.out);
}

size_t ra_scorer::build(int32_t il, size_t begin, ggml_cgraph ** gf) {
    *gf = new_graph();
    shared s;
    size_t n_bytes = 0;
    size_t i       = begin;
    for (; i < jobs.size() && i - begin < RA_SCORE_MAX_JOBS; ++i) {
        n_bytes += job_bytes(il, jobs[i]);
        if (i > begin && n_bytes > max_out) {
            break;
        }
        add_job(il, s, jobs[i]);
        ggml_build_forward_expand(*gf, jobs[i].out);
    }
    return i;
}

ra_status ra_scorer::features_begin(uint32_t needs, int32_t il, int32_t n_obs,
                                    const int32_t * obs_pos) {
    this->obs_pos            = obs_pos;
    const ra_layer & l       = mem.state()->layers[il];
    const size_t     n_query = size_t(mem.tensors[il].n_head / l.n_head_kv) * size_t(n_obs);
    logits_at.assign(l.n_head_kv, 0);
    tokens_at.assign(l.n_head_kv, 0);
    for (int32_t ih = 1; ih < l.n_head_kv; ++ih) {
        logits_at[ih] = logits_at[ih - 1] + n_query * size_t(l.used[ih - 1]);
        tokens_at[ih] = tokens_at[ih - 1] + size_t(l.used[ih - 1]);
    }
    n_old.assign(l.n_head_kv, 0);
    for (int32_t ih = 0; ih < l.n_head_kv && (needs & RA_FEATURE_KEY_SIM); ++ih) {
        n_old[ih] =
            ra_alike_begin(l.used[ih], l.pos + l.offset[ih], l.n_pos_scored, l.alike + l.offset[ih],
                           newer.data() + tokens_at[ih], older.data() + tokens_at[ih]);
    }
    list_jobs(l.used, n_old.data(), l.n_head_kv, needs);
    ra_status st = RA_STATUS_OK;
    while (!jobs.empty() && st == RA_STATUS_OK) {
        jobs_next.clear();
        st = run_jobs(il, n_obs);
        jobs.swap(jobs_next);
    }
    return st;
}

ra_status ra_scorer::run_jobs(int32_t il, int32_t n_obs) {
    for (size_t begin = 0; begin < jobs.size();) {
        ggml_cgraph * gf  = nullptr;
        const size_t  end = build(il, begin, &gf);
        for (int i = 0; mem.watch != nullptr && i < ggml_graph_n_nodes(gf); ++i) {
            mem.watch(mem.watch_user, ggml_graph_node(gf, i));
        }
        ggml_backend_sched_reset(sched.get());
        if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
            return ra_error(RA_STATUS_NO_MEMORY, "out of memory scoring layer %d", il);
        }
        for (size_t i = begin; i < end; ++i) {
            if (jobs[i].index != nullptr) {
                const int32_t * rows = again.data() + tokens_at[jobs[i].ih] + jobs[i].row0;
                ggml_backend_tensor_set(jobs[i].index, rows, 0, ggml_nbytes(jobs[i].index));
            }
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

// ---------------------------------------------------------------------------------------------
// results
// ---------------------------------------------------------------------------------------------

const float * ra_scorer::fetch(const ggml_tensor * t, int64_t begin, int64_t n) {
    if (ggml_backend_buffer_is_host(t->buffer)) {
        return (const float *) t->data + begin;
    }
    staging.resize(std::max(staging.size(), size_t(n)));
    ggml_backend_tensor_get(t, staging.data(), size_t(begin) * sizeof(float),
                            size_t(n) * sizeof(float));
    return staging.data();
}

// of the queries in the ring, those that the compression uses
void ra_scorer::read_logits(int32_t il, const job & j, int32_t n_obs) {
    const ra_cache * c       = mem.state();
    const int32_t    n_group = mem.tensors[il].n_head / mem.tensors[il].n_head_kv;
    const float      scale   = mem.tensors[il].kq_scale;
    const float *    src     = fetch(j.out, j.skip, ggml_nelements(j.out) - j.skip);
    float *          dst     = logits.data() + logits_at[j.ih];
    for (int32_t o = 0; o < n_obs; ++o) {
        const int64_t slot = obs_pos[o] % c->n_ring;
        for (int32_t g = 0; g < n_group; ++g, dst += j.n_kv) {
            const float * row = src + (slot * n_group + g) * j.stride;
            std::transform(row, row + j.n_kv, dst, [=](float x) { return scale * x; });
        }
    }
}

void ra_scorer::read_cos_sums(int32_t il, const job & j) {
    const int32_t dim  = (int32_t) mem.tensors[il].k->ne[0];
    const float * unit = fetch(j.out, j.skip, int64_t(j.n_kv) * dim);
    const size_t  at   = tokens_at[j.ih];
    float *       sums = (key_cos.empty() ? key_sim : key_cos).data() + at;
    ra_key_cos_sums(j.n_kv, dim, unit, dim_sum.data(), sums);
    // in the end: the newest look-alike of every token must be known
    if (!key_sim.empty() && !list_jobs_again(il, j.ih)) {
        const ra_layer & l   = mem.state()->layers[il];
        float *          acc = key_sim.data() + at;
        std::copy_n(sums, sums == acc ? 0 : j.n_kv, acc);
        ra_alike_finish(j.n_kv, dim, unit, l.pos + l.offset[j.ih], newer.data() + at,
                        older.data() + at, acc, l.alike + l.offset[j.ih]);
    }
    if (!key_cos.empty()) {
        std::for_each(sums, sums + j.n_kv, [&](float & sum) { sum /= float(j.n_kv); });
    }
}

void ra_scorer::read_cosines(const job & j) {
    const float * rows      = fetch(j.out, j.skip, (j.n_rows - 1) * j.stride + j.n_kv);
    const size_t  at        = tokens_at[j.ih];
    const float   threshold = mem.state()->settings.cfg.sim_threshold;
    if (j.kind == JOB_COSINES) {
        ra_alike_compare_new(n_old[j.ih], j.row0, j.n_rows, rows, (int32_t) j.stride, threshold,
                             newer.data() + at, older.data() + at);
        return;
    }
    for (int32_t r = 0; r < j.n_rows; ++r) {
        ra_alike_compare_again(j.n_kv, again[at + size_t(j.row0 + r)], rows + r * j.stride,
                               threshold, newer.data() + at, older.data() + at);
    }
}

void ra_scorer::read(int32_t il, const job & j, int32_t n_obs) {
    switch (j.kind) {
        case JOB_LOGITS: return read_logits(il, j, n_obs);
        case JOB_COS_SUMS: return read_cos_sums(il, j);
        case JOB_COSINES:
        case JOB_COSINES_AGAIN: return read_cosines(j);
        case JOB_VALUE_NORMS: {
            std::copy_n(fetch(j.out, j.skip, j.n_kv), j.n_kv, value_norm.data() + tokens_at[j.ih]);
            break;
        }
    }
}

void ra_scorer::features(ra_features * f) const {
    f->n_group      = mem.tensors[f->il].n_head / mem.tensors[f->il].n_head_kv;
    const size_t at = tokens_at[f->ih];
    f->attn_logits  = logits.empty() ? nullptr : logits.data() + logits_at[f->ih];
    f->key_sim      = key_sim.empty() ? nullptr : key_sim.data() + at;
    f->key_cos      = key_cos.empty() ? nullptr : key_cos.data() + at;
    f->value_norm   = value_norm.empty() ? nullptr : value_norm.data() + at;
}
