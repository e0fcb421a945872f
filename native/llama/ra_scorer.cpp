// ra_scorer.cpp - see ra_scorer.h
//
// A graph works on the whole pool of a layer where the cost is linear (one cast, one normalisation),
// and per head where it is not. Everything in it is marked as an output: nothing is placed into memory
// that something else has left, so its size is the plain sum that reserve() plans with.
#include "ra_scorer.h"

#include <algorithm>
#include <cstring>

// results of one graph (f32): bounds the scratch whatever the budget is
static constexpr int64_t RA_SCORE_VALUES = int64_t(1) << 20;

static constexpr size_t RA_SCORE_MAX_NODES = 512;
static constexpr size_t RA_SCORE_MAX_JOBS  = RA_SCORE_MAX_NODES / 4 - 8;

// of each tensor, so that a sum of sizes holds on every backend
static constexpr size_t RA_SCORE_ALIGN = 256;

// ---------------------------------------------------------------------------------------------
// sizes
// ---------------------------------------------------------------------------------------------

// products of multiples of 16 rows are the fast ones; what is too much is computed and not read
static int64_t ra_pad(int64_t n) {
    return GGML_PAD(n, 16);
}

// rows of the cosine matrix per product: of n_kv new rows eight blocks, so that little more than a
// triangle is computed
static int64_t ra_block_rows(int64_t n_kv) {
    const int64_t most = std::max<int64_t>(16, RA_SCORE_VALUES / ra_pad(n_kv) / 16 * 16);
    return std::min(ra_pad(std::max<int64_t>(32, n_kv / 8)), most);
}

// rows gathered for a product, and their indices
static size_t ra_again_bytes(int64_t dim, int64_t n_rows) {
    return GGML_PAD(size_t(dim * n_rows) * sizeof(float), RA_SCORE_ALIGN) +
           GGML_PAD(size_t(n_rows) * sizeof(int32_t), RA_SCORE_ALIGN);
}

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

// results of one product of a layer, at most
size_t ra_scorer::most_job_bytes(int32_t il, uint32_t needs) const {
    const ra_cache * c     = mem.state();
    const int64_t    n_kv  = ra_longest_head(c, il);
    const int64_t    n_pad = ra_pad(n_kv);
    int64_t          n     = 0;
    if (needs & RA_FEATURE_ATTN_LOGITS) {
        n = n_pad * c->n_ring * (mem.tensors[il].n_head / mem.tensors[il].n_head_kv);
    }
    size_t n_again = 0;
    if (needs & RA_FEATURE_KEY_SIM) {
        const int64_t n_rows = ra_block_rows(n_kv);
        n                    = std::max(n, n_rows * n_pad);
        n_again              = ra_again_bytes(mem.tensors[il].k->ne[0], n_rows);
    }
    return GGML_PAD(size_t(n) * sizeof(float), RA_SCORE_ALIGN) + n_again;
}

size_t ra_scorer::job_bytes(int32_t il, const job & j) const {
    const ra_tensors & t       = mem.tensors[il];
    int64_t            n       = 0;
    size_t             n_again = 0;
    if (j.kind == JOB_LOGITS) {
        n = ra_pad(j.n_kv) * mem.state()->n_ring * (t.n_head / t.n_head_kv);
    } else if (j.kind == JOB_COSINES || j.kind == JOB_COSINES_AGAIN) {
        n       = ra_pad(j.n_kv) * j.n_rows;
        n_again = j.kind == JOB_COSINES_AGAIN ? ra_again_bytes(t.k->ne[0], j.n_rows) : 0;
    }
    return GGML_PAD(size_t(n) * sizeof(float), RA_SCORE_ALIGN) + n_again;
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
    measured.resize(measure ? backends.size() : 0);
    meta.resize(ggml_tensor_overhead() * RA_SCORE_MAX_NODES +
                ggml_graph_overhead_custom(RA_SCORE_MAX_NODES, false));
    const uint32_t needs = ra_cache_needs(mem.state());
    if (needs != 0) {
        reserve(needs, measure);
    }
}

// host arrays, and on each device the largest layer with as many results as one graph may have
void ra_scorer::reserve(uint32_t needs, bool measure) {
    const ra_cache * c         = mem.state();
    const bool       needs_cos = needs & (RA_FEATURE_KEY_SIM | RA_FEATURE_KEY_COS);
    size_t           n_logits  = 0;
    size_t           dim       = 0;
    size_t           most      = 0; // results of a layer with its segments full
    bool             is_host   = true;

    std::map<ggml_backend_buffer_type_t, int32_t> largest;
    for (int32_t il = 0; il < c->n_layer; ++il) {
        const ra_layer &   l = c->layers[il];
        const ra_tensors & t = mem.tensors[il];
        if (l.n_head_kv == 0) {
            continue;
        }
        n_logits = std::max(n_logits, size_t(t.n_head / l.n_head_kv) * c->n_ring * l.n_slots);
        dim      = std::max(dim, size_t(t.k->ne[0]));
        is_host  = is_host && ggml_backend_buffer_is_host(t.k->buffer);
        max_out  = std::max(max_out, most_job_bytes(il, needs));

        std::vector<int32_t> full(l.budget, l.budget + l.n_head_kv);
        for (int32_t & n : full) {
            n += c->settings.cfg.buffer;
        }
        list_jobs(full.data(), l.budget, l.n_head_kv, needs);
        size_t n_bytes = 0;
        for (const job & j : jobs) {
            n_bytes += job_bytes(il, j);
        }
        most = std::max(most, n_bytes);

        const auto [it, is_new] = largest.emplace(ggml_backend_buffer_get_type(t.k->buffer), il);
        if (!is_new && ggml_nelements(t.k) > ggml_nelements(mem.tensors[it->second].k)) {
            it->second = il;
        }
    }
    max_out = std::max(max_out, std::min(most, size_t(RA_SCORE_VALUES) * sizeof(float)));

    logits.resize(needs & RA_FEATURE_ATTN_LOGITS ? n_logits : 0);
    key_sim.resize(needs & RA_FEATURE_KEY_SIM ? c->n_slots_max : 0);
    key_cos.resize(needs & RA_FEATURE_KEY_COS ? c->n_slots_max : 0);
    value_norm.resize(needs & RA_FEATURE_VALUE_NORM ? c->n_slots_max : 0);
    newer.resize(key_sim.size());
    older.resize(key_sim.size());
    again.resize(key_sim.size());
    dim_sum.resize(needs_cos ? dim : 0);
    if (!is_host) {
        staging.resize(std::max(max_out / sizeof(float), size_t(c->n_slots_max) * dim));
    }

    ggml_cgraph * gf = new_graph();
    for (const auto & [_, il] : largest) {
        shared s;
        if (needs & RA_FEATURE_ATTN_LOGITS) {
            ggml_build_forward_expand(gf, queries_of(il, s));
        }
        if (needs & RA_FEATURE_VALUE_NORM) {
            ggml_build_forward_expand(gf, value_norms_of(il, s));
        }
        if (needs & (RA_FEATURE_ATTN_LOGITS | RA_FEATURE_KEY_SIM | RA_FEATURE_KEY_COS)) {
            ggml_build_forward_expand(gf, keys_of(il, s));
        }
        if (max_out > 0) {
            ggml_tensor * one = ggml_view_1d(ctx.get(), keys_of(il, s), 1, 0);
            ggml_tensor * out =
                ggml_repeat_4d(ctx.get(), one, int64_t(max_out / sizeof(float)), 1, 1, 1);
            ggml_set_output(out);
            ggml_build_forward_expand(gf, out);
        }
    }
    ggml_backend_sched_reset(sched.get());
    if (measure) {
        ggml_backend_sched_reserve_size(sched.get(), gf, measured.data());
    } else if (!ggml_backend_sched_reserve(sched.get(), gf)) {
        throw std::runtime_error("failed to reserve the buffers for scores");
    }
}

int64_t ra_scorer::bytes() const {
    int64_t n = (int64_t) meta.capacity();
    for (const auto * values : { &newer, &older, &again }) {
        n += (int64_t) (values->capacity() * sizeof(int32_t));
    }
    for (const auto * values : { &logits, &key_sim, &key_cos, &value_norm, &dim_sum, &staging }) {
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
        // newest rows first, as ra_alike_compare_new() wants them
        const int32_t n_block = (int32_t) ra_block_rows(n_kv[ih]);
        for (int32_t end = n_kv[ih]; end > n_old[ih] && (needs & RA_FEATURE_KEY_SIM);) {
            const int32_t n_rows = std::min(n_block, end - n_old[ih]);
            jobs.push_back({ JOB_COSINES, ih, end, end - n_rows, n_rows });
            end -= n_rows;
        }
        if (n_kv[ih] > 0 && (needs & (RA_FEATURE_KEY_SIM | RA_FEATURE_KEY_COS))) {
            jobs.push_back({ JOB_COS_SUMS, ih, n_kv[ih], 0, 0 });
        }
        if (n_kv[ih] > 0 && (needs & RA_FEATURE_VALUE_NORM)) {
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
    const int32_t n_block = (int32_t) ra_block_rows(n_kv);
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
    const int64_t n_pad = ra_pad(n) <= t->ne[1] ? ra_pad(n) : n;
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

ra_status ra_scorer::compute_layer(int32_t il, uint32_t needs, int32_t n_obs) {
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
        const int64_t slot = c->obs_pos[o] % c->n_ring;
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
