// ra_score_graph.cpp - see ra_score_graph.h
//
// A graph works on the whole pool of a layer where the cost is linear (one cast, one normalisation),
// and per head where it is not. Everything in it is marked as an output: nothing is placed into memory
// that something else has left, so its size is the plain sum that build_largest() plans with.
#include "ra_score_graph.h"

#include "ra_scratch.h"

#include <map>

// of each tensor, so that a sum of sizes holds on every backend
static constexpr size_t RA_SCORE_ALIGN = 256;

// tensors of a graph beside those of its jobs, and of a job, at most
static constexpr size_t RA_SCORE_SHARED_TENSORS = 24;
static constexpr size_t RA_SCORE_JOB_TENSORS    = 5;

// ---------------------------------------------------------------------------------------------
// sizes of jobs
// ---------------------------------------------------------------------------------------------

static bool ra_has_index(const ra_job & j) {
    return j.kind == RA_JOB_COSINES_AGAIN || j.kind == RA_JOB_COSINES_GOING;
}

// rows gathered for a product, and their indices
static size_t ra_again_bytes(int64_t dim, int64_t n_rows) {
    return GGML_PAD(size_t(dim * n_rows) * sizeof(float), RA_SCORE_ALIGN) +
           GGML_PAD(size_t(n_rows) * sizeof(int32_t), RA_SCORE_ALIGN);
}

// results of one product of a layer, at most
size_t ra_score_graph::most_job_bytes(int32_t il, uint32_t needs) const {
    const int32_t n_kv = ra_cache_longest_head(&cache(), il);
    size_t        most = 0;
    if (needs & RA_FEATURE_ATTN_LOGITS) {
        most = job_bytes(il, { RA_JOB_LOGITS, 0, n_kv, 0, cache().n_ring });
    }
    if (needs & RA_FEATURE_ATTN_MASS) {
        most = std::max(most, job_bytes(il, { RA_JOB_MASS, 0, n_kv, 0, cache().n_ring }));
    }
    if (needs & (RA_FEATURE_KEY_SIM | RA_FEATURE_TWIN | RA_NEEDS_TARGETS)) {
        const int32_t n_rows = (int32_t) ra_score_block_rows(n_kv);
        most = std::max(most, job_bytes(il, { RA_JOB_COSINES_GOING, 0, n_kv, 0, n_rows }));
    }
    return most;
}

size_t ra_score_graph::job_bytes(int32_t il, const ra_job & j) const {
    const ra_tensors & t       = tensors()[il];
    int64_t            n       = 0;
    size_t             n_again = 0;
    if (j.kind == RA_JOB_LOGITS || j.kind == RA_JOB_MASS) {
        n = ra_score_pad(j.n_kv) * j.n_rows * t.n_group();
        if (j.kind == RA_JOB_MASS) {
            n += (int64_t) ra_mass_values(t, ra_score_pad(j.n_kv), int64_t(j.n_rows) * t.n_pooled);
        }
    } else if (j.kind == RA_JOB_COSINES || j.kind == RA_JOB_COSINES_ALL || ra_has_index(j)) {
        n       = ra_score_pad(j.n_kv) * j.n_rows;
        n_again = ra_has_index(j) ? ra_again_bytes(t.k->ne[0], j.n_rows) : 0;
    }
    return GGML_PAD(size_t(n) * sizeof(float), RA_SCORE_ALIGN) + n_again;
}

// results of all jobs of a layer with its segments full
size_t ra_score_graph::most_layer_bytes(int32_t il, uint32_t needs) const {
    const ra_layer &     l = cache().layers[il];
    std::vector<int32_t> full(l.budget, l.budget + l.n_head_kv);
    for (int32_t & n : full) {
        n += cache().settings.cfg.buffer;
    }
    std::vector<ra_job> jobs;
    ra_list_jobs(jobs, full.data(), l.budget, l.n_head_kv, cache().n_ring, needs);
    size_t n_bytes = 0;
    for (const ra_job & j : jobs) {
        n_bytes += job_bytes(il, j);
    }
    size_t n_going = 0;
    jobs.clear();
    for (int32_t ih = 0; ih < l.n_head_kv && (needs & RA_NEEDS_TARGETS); ++ih) {
        ra_list_jobs_going(jobs, ih, full[ih], cache().settings.cfg.buffer);
    }
    for (const ra_job & j : jobs) {
        n_going += job_bytes(il, j);
    }
    size_t n_all = 0;
    jobs.clear();
    for (int32_t ih = 0; ih < l.n_head_kv && (needs & RA_FEATURE_TWIN); ++ih) {
        ra_list_jobs_all(jobs, ih, full[ih]);
    }
    for (const ra_job & j : jobs) {
        n_all += job_bytes(il, j);
    }
    return std::max({ n_bytes, n_going, n_all });
}

// ---------------------------------------------------------------------------------------------
// graphs
// ---------------------------------------------------------------------------------------------

ra_score_graph::ra_score_graph(const ra_target & target) : target(target) {
    meta.resize(ggml_tensor_overhead() * RA_SCRATCH_MAX_NODES +
                ggml_graph_overhead_custom(RA_SCRATCH_MAX_NODES, false));
}

ggml_cgraph * ra_score_graph::new_graph() {
    slots = nullptr;
    ctx.reset(ggml_init({ meta.size(), meta.data(), /*.no_alloc =*/true }));
    return ggml_new_graph_custom(ctx.get(), RA_SCRATCH_MAX_NODES, false);
}

// a copy also where the cache is f32: `unit` overwrites it
ggml_tensor * ra_score_graph::keys_of(int32_t il, shared & s) {
    if (s.keys == nullptr) {
        s.keys = ggml_cast(ctx.get(), tensors()[il].k, GGML_TYPE_F32);
        ggml_set_output(s.keys);
    }
    return s.keys;
}

ggml_tensor * ra_score_graph::unit_of(int32_t il, shared & s) {
    if (s.unit == nullptr) {
        s.unit = ggml_l2_norm_inplace(ctx.get(), keys_of(il, s), 1e-8f);
    }
    return s.unit;
}

ggml_tensor * ra_score_graph::queries_of(int32_t il, shared & s, int64_t n_obs) {
    if (s.queries == nullptr) {
        const ra_tensors & t      = tensors()[il];
        const int64_t      dim    = t.k->ne[0];
        const int64_t      n_own  = t.n_own();
        const int64_t      n_rows = n_obs * t.n_pooled;
        const size_t       row    = size_t(dim) * sizeof(float);
        slots                     = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_rows);
        ggml_set_input(slots);
        ggml_set_output(slots);
        ggml_tensor * q = ggml_get_rows(ctx.get(), t.q, slots);
        ggml_set_output(q);
        s.queries = ggml_cont(ctx.get(), ggml_view_4d(ctx.get(), q, dim, n_rows, n_own, t.n_head_kv,
                                                      q->nb[1], row, size_t(n_own) * row, 0));
        ggml_set_output(s.queries);
    }
    return s.queries;
}

ggml_tensor * ra_score_graph::value_norms_of(int32_t il, shared & s) {
    if (s.value_norms == nullptr) {
        ggml_tensor * values = ggml_cast(ctx.get(), tensors()[il].v, GGML_TYPE_F32);
        ggml_set_output(values);
        ggml_tensor * sums = ggml_sum_rows(ctx.get(), ggml_sqr_inplace(ctx.get(), values));
        ggml_set_output(sums);
        s.value_norms = ggml_sqrt_inplace(ctx.get(), sums);
    }
    return s.value_norms;
}

ggml_tensor * ra_score_graph::values_of(int32_t il, shared & s) {
    if (s.values == nullptr) {
        s.values = ggml_cast(ctx.get(), tensors()[il].v, GGML_TYPE_F32);
        ggml_set_output(s.values);
    }
    return s.values;
}

ggml_tensor * ra_score_graph::raw_keys_of(int32_t il, shared & s) {
    if (s.raw_keys == nullptr) {
        s.raw_keys = ggml_cast(ctx.get(), tensors()[il].k, GGML_TYPE_F32);
        ggml_set_output(s.raw_keys);
    }
    return s.raw_keys;
}

// n rows of pool-like t from `row` on; where the pool has them, padded with rows before or behind
static ggml_tensor * ra_rows_padded(ggml_context * ctx, ggml_tensor * t, int64_t row, int64_t n,
                                    int64_t * n_before) {
    const int64_t n_pad = ra_score_pad(n) <= t->ne[1] ? ra_score_pad(n) : n;
    const int64_t begin = std::min(row, t->ne[1] - n_pad);
    *n_before           = row - begin;
    return ggml_view_2d(ctx, t, t->ne[0], n_pad, t->nb[1], size_t(begin) * t->nb[1]);
}

void ra_score_graph::add_job(int32_t il, shared & s, ra_job & j) {
    const ra_tensors & t   = tensors()[il];
    const int64_t      row = cache().layers[il].offset[j.ih];
    switch (j.kind) {
        case RA_JOB_LOGITS:
        case RA_JOB_MASS: {
            ggml_tensor * q    = queries_of(il, s, j.n_rows);
            ggml_tensor * keys = ra_rows_padded(ctx.get(), keys_of(il, s), row, j.n_kv, &j.skip);
            q                  = ggml_view_2d(ctx.get(), q, q->ne[0], q->ne[1] * q->ne[2], q->nb[1],
                                              size_t(j.ih) * q->nb[3]);
            j.out              = ggml_mul_mat(ctx.get(), keys, q);
            j.stride           = j.out->ne[0];
            if (j.kind == RA_JOB_MASS) {
                ggml_set_output(j.out);
                j.mass = { j.ih, j.n_rows * t.n_pooled, t.n_own(), j.stride, j.skip };
                j.out  = ra_mass_build(ctx.get(), t, j.mass, j.out);
            }
            break;
        }
        case RA_JOB_COS_SUMS: {
            j.out    = unit_of(il, s);
            j.stride = t.k->ne[0];
            j.skip   = row * j.stride;
            break;
        }
        case RA_JOB_COSINES:
        case RA_JOB_COSINES_ALL: {
            ggml_tensor * unit = unit_of(il, s);
            ggml_tensor * rows = ggml_view_2d(ctx.get(), unit, unit->ne[0], j.n_rows, unit->nb[1],
                                              size_t(row + j.row0) * unit->nb[1]);
            j.out = ggml_mul_mat(ctx.get(), ra_rows_padded(ctx.get(), unit, row, j.n_kv, &j.skip),
                                 rows);
            j.stride = j.out->ne[0];
            break;
        }
        case RA_JOB_COSINES_AGAIN:
        case RA_JOB_COSINES_GOING: {
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
        case RA_JOB_VALUE_NORMS: {
            j.out    = value_norms_of(il, s);
            j.stride = 1;
            j.skip   = row;
            break;
        }
        case RA_JOB_VALUES: {
            j.out    = values_of(il, s);
            j.stride = t.v->ne[0];
            j.skip   = row * j.stride;
            break;
        }
        case RA_JOB_KEYS: {
            j.out    = raw_keys_of(il, s);
            j.stride = t.k->ne[0];
            j.skip   = row * j.stride;
            break;
        }
    }
    ggml_set_output(j.out);
}

size_t ra_score_graph::build(int32_t il, std::vector<ra_job> & jobs, size_t begin,
                             ggml_cgraph ** gf) {
    *gf = new_graph();
    shared s;
    size_t n_bytes   = 0;
    size_t n_tensors = RA_SCORE_SHARED_TENSORS;
    size_t i         = begin;
    for (; i < jobs.size(); ++i) {
        n_bytes += job_bytes(il, jobs[i]);
        n_tensors += RA_SCORE_JOB_TENSORS + (jobs[i].kind == RA_JOB_MASS ? RA_MASS_TENSORS : 0);
        if (i > begin && (n_bytes > n_out || n_tensors > RA_SCRATCH_MAX_NODES)) {
            break;
        }
        add_job(il, s, jobs[i]);
        ggml_build_forward_expand(*gf, jobs[i].out);
    }
    return i;
}

void ra_score_graph::add_largest(ggml_cgraph * gf, int32_t il, uint32_t needs) {
    shared s;
    if (needs & RA_FEATURES_OF_QUERIES) {
        ggml_build_forward_expand(gf, queries_of(il, s, cache().n_ring));
    }
    if (needs & RA_FEATURE_VALUE_NORM) {
        ggml_build_forward_expand(gf, value_norms_of(il, s));
    }
    if (needs & RA_FEATURE_VALUE_DIST) {
        ggml_build_forward_expand(gf, values_of(il, s));
    }
    if (needs & RA_FEATURE_KEYS) {
        ggml_build_forward_expand(gf, raw_keys_of(il, s));
    }
    if (needs & (RA_FEATURES_OF_QUERIES | RA_FEATURE_KEY_SIM | RA_FEATURE_KEY_COS |
                 RA_FEATURE_TWIN | RA_NEEDS_TARGETS)) {
        ggml_build_forward_expand(gf, keys_of(il, s));
    }
    const ggml_backend_buffer_t buf = tensors()[il].k->buffer;
    if ((needs & (RA_FEATURE_KEY_SIM | RA_NEEDS_TARGETS)) && !ggml_backend_buffer_is_host(buf)) {
        // lists of tokens are inputs: in host memory too, before they are copied
        const ra_layer & l       = cache().layers[il];
        const int64_t    n_kv    = ra_cache_longest_head(&cache(), il);
        const int64_t    n_block = ra_score_block_rows(n_kv);
        const int64_t    n_lists = l.n_head_kv * ((n_kv + n_block - 1) / n_block);
        ggml_tensor *    lists =
            ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32,
                               l.n_slots + n_lists * int64_t(RA_SCORE_ALIGN / sizeof(int32_t)));
        ggml_set_input(lists);
        ggml_build_forward_expand(gf, lists);
    }
    if (n_out > 0) {
        ggml_tensor * one = ggml_view_1d(ctx.get(), keys_of(il, s), 1, 0);
        if (!ggml_backend_buffer_is_host(tensors()[il].k->buffer)) {
            // inputs have memory on the host, too: lists of tokens, or masks, which are part of n_out
            const size_t n_in =
                needs & RA_FEATURE_ATTN_MASS ? n_out / sizeof(float) : size_t(cache().n_slots_max);
            ggml_tensor * in = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, int64_t(n_in));
            ggml_set_input(in);
            ggml_set_output(in);
            one = ggml_add(ctx.get(), one, ggml_view_1d(ctx.get(), in, 1, 0));
            ggml_set_output(one);
        }
        ggml_tensor * out = ggml_repeat_4d(ctx.get(), one, int64_t(n_out / sizeof(float)), 1, 1, 1);
        ggml_set_output(out);
        ggml_build_forward_expand(gf, out);
    }
}

ggml_cgraph * ra_score_graph::build_largest(uint32_t needs) {
    std::map<ggml_backend_buffer_type_t, int32_t> largest;

    size_t most = 0;
    for (int32_t il = 0; il < cache().n_layer; ++il) {
        if (cache().layers[il].n_head_kv == 0) {
            continue;
        }
        const ra_tensors & t    = tensors()[il];
        n_out                   = std::max(n_out, most_job_bytes(il, needs));
        most                    = std::max(most, most_layer_bytes(il, needs));
        const auto [it, is_new] = largest.emplace(ggml_backend_buffer_get_type(t.k->buffer), il);
        if (!is_new && ggml_nelements(t.k) > ggml_nelements(tensors()[it->second].k)) {
            it->second = il;
        }
    }
    n_out = std::max(n_out, std::min(most, size_t(RA_SCORE_VALUES) * sizeof(float)));

    ggml_cgraph * gf = new_graph();
    for (const auto & [_, il] : largest) {
        add_largest(gf, il, needs);
    }
    return gf;
}
