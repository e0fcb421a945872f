// ra_scorer.cpp - see ra_scorer.h
#include "ra_scorer.h"

#include "ra_graph_alibi.h"
#include "ra_score_pairs.h"

#include <cmath>

ra_scorer::ra_scorer(const ra_target & target, ra_scratch & scratch)
    : target(target), scratch(scratch), graph(target) {}

// makes v as long as n, if it is shorter
template <typename T> static void ra_grow(std::vector<T> & v, size_t n) {
    v.resize(std::max(v.size(), n));
}

void ra_scorer::reserve() {
    const uint32_t needs =
        ra_cache_needs(&cache()) | (cache().settings.cfg.merge ? RA_NEEDS_TARGETS : 0);
    if (needs != 0) {
        reserve(needs);
    }
}

// host arrays, and on each device what the largest graph takes
void ra_scorer::reserve(uint32_t needs) {
    const bool needs_sum =
        needs & (RA_FEATURE_KEY_SIM | RA_FEATURE_KEY_COS | RA_FEATURE_VALUE_DIST);
    size_t n_logits  = 0;
    size_t n_sinks   = 0;
    size_t n_queries = 0;
    size_t dim       = 0;
    bool   is_host   = true;
    for (int32_t il = 0; il < cache().n_layer; ++il) {
        const ra_layer &   l = cache().layers[il];
        const ra_tensors & t = tensors()[il];
        if (l.n_head_kv == 0) {
            continue;
        }
        n_logits  = std::max(n_logits, size_t(t.n_group()) * cache().n_ring * l.n_slots);
        n_queries = std::max(n_queries, size_t(cache().n_ring) * size_t(t.n_pooled));
        dim       = std::max(dim, size_t(std::max(t.k->ne[0], t.v->ne[0])));
        n_sinks   = t.sinks != nullptr ? std::max(n_sinks, size_t(t.n_head)) : n_sinks;
        is_host   = is_host && ggml_backend_buffer_is_host(t.k->buffer);
    }
    scratch.reserve(graph.build_largest(needs), "scores");

    ra_grow(logits, needs & RA_FEATURE_ATTN_LOGITS ? n_logits : 0);
    ra_grow(attn_mass, needs & RA_FEATURE_ATTN_MASS ? cache().n_slots_max : 0);
    ra_grow(query_slots, needs & RA_FEATURES_OF_QUERIES ? n_queries : 0);
    sinks.reserve(needs & RA_FEATURE_ATTN_LOGITS ? n_sinks : 0);
    ra_grow(key_sim, needs & RA_FEATURE_KEY_SIM ? cache().n_slots_max : 0);
    ra_grow(key_cos, needs & RA_FEATURE_KEY_COS ? cache().n_slots_max : 0);
    ra_grow(value_norm, needs & RA_FEATURE_VALUE_NORM ? cache().n_slots_max : 0);
    ra_grow(value_dist, needs & RA_FEATURE_VALUE_DIST ? cache().n_slots_max : 0);
    ra_grow(keys, needs & RA_FEATURE_KEYS ? size_t(cache().n_slots_max) * dim : 0);
    ra_grow(going, needs & RA_NEEDS_TARGETS ? cache().n_slots_max : 0);
    ra_grow(closest, needs & RA_NEEDS_TARGETS ? cache().n_slots_max : 0);
    ra_grow(newer, key_sim.size());
    ra_grow(older, key_sim.size());
    ra_grow(again, key_sim.size());
    ra_grow(dim_sum, needs_sum ? dim : 0);
    if (!is_host) {
        ra_grow(staging,
                std::max(graph.max_out() / sizeof(float), size_t(cache().n_slots_max) * dim));
    }
}

int64_t ra_scorer::bytes() const {
    int64_t n = graph.bytes();
    for (const auto * values : { &newer, &older, &again, &going, &query_slots }) {
        n += (int64_t) (values->capacity() * sizeof(int32_t));
    }
    for (const auto * values : { &logits, &attn_mass, &sinks, &closest, &key_sim, &key_cos,
                                 &value_norm, &value_dist, &keys, &dim_sum, &staging }) {
        n += (int64_t) (values->capacity() * sizeof(float));
    }
    return n;
}

// ---------------------------------------------------------------------------------------------
// computing a layer
// ---------------------------------------------------------------------------------------------

// compares tokens of head ih again, if that is needed; false: it is not
bool ra_scorer::list_jobs_again(int32_t il, int32_t ih) {
    const int32_t n_kv = cache().layers[il].used[ih];
    const size_t  at   = tokens_at[ih];
    const int32_t n =
        ra_alike_list_unknown(n_old[ih], newer.data() + at, older.data() + at, again.data() + at);
    const int32_t n_block = (int32_t) ra_score_block_rows(n_kv);
    for (int32_t i = 0; i < n; i += n_block) {
        jobs_next.push_back({ RA_JOB_COSINES_AGAIN, ih, n_old[ih], i, std::min(n_block, n - i) });
    }
    if (n > 0) {
        jobs_next.push_back({ RA_JOB_COS_SUMS, ih, n_kv, 0, 0 });
    }
    return n > 0;
}

// where the results of each head are
void ra_scorer::place_heads(int32_t il) {
    const ra_layer & l       = cache().layers[il];
    const size_t     n_query = size_t(tensors()[il].n_group()) * size_t(n_obs);
    logits_at.assign(l.n_head_kv, 0);
    tokens_at.assign(l.n_head_kv, 0);
    for (int32_t ih = 1; ih < l.n_head_kv; ++ih) {
        logits_at[ih] = logits_at[ih - 1] + n_query * size_t(l.used[ih - 1]);
        tokens_at[ih] = tokens_at[ih - 1] + size_t(l.used[ih - 1]);
    }
}

// the query centres of layer il, and how its keys are rotated
void ra_scorer::place_centres(int32_t il) {
    const auto n_values = [&](int32_t i) {
        const ra_tensors & t = tensors()[i];
        return t.k == nullptr ? 0
                              : size_t(t.n_head) * size_t(ra_centre_values((int32_t) t.k->ne[0]));
    };
    centres = cache().settings.cfg.centres;
    for (int32_t i = 0; i < il; ++i) {
        centres += n_values(i);
    }
    const ra_rope_op & op = tensors()[il].rope;
    freqs                 = ra_rope_freqs(op);
    rope                  = { op.n_rot, op.offset, op.is_neox, freqs.data() };
}

ra_status ra_scorer::begin(uint32_t needs, int32_t il, int32_t n_queries, const int32_t * queries) {
    n_obs    = n_queries;
    obs_pos  = queries;
    twins_of = -1;
    place_heads(il);
    if (needs & RA_FEATURE_CENTRES) {
        place_centres(il);
    }
    const ra_tensors & t = tensors()[il];
    sinks.clear();
    if ((needs & RA_FEATURE_ATTN_LOGITS) && t.sinks != nullptr) {
        sinks.resize(size_t(t.n_head));
        ggml_backend_tensor_get(t.sinks, sinks.data(), 0, sinks.size() * sizeof(float));
    }
    const ra_layer & l = cache().layers[il];
    n_old.assign(l.n_head_kv, 0);
    for (int32_t ih = 0; ih < l.n_head_kv && (needs & RA_FEATURE_KEY_SIM); ++ih) {
        n_old[ih] =
            ra_alike_begin(l.used[ih], l.pos + l.offset[ih], l.n_pos_scored, l.alike + l.offset[ih],
                           newer.data() + tokens_at[ih], older.data() + tokens_at[ih]);
    }
    for (int32_t i = 0; i < n_obs * t.n_pooled && (needs & RA_FEATURES_OF_QUERIES); ++i) {
        query_slots[size_t(i)] = queries[i % n_obs] % cache().n_ring + i / n_obs * cache().n_ring;
    }
    std::fill(attn_mass.begin(), attn_mass.end(), 0.0f); // without queries there is none
    ra_list_jobs(jobs, l.used, n_old.data(), l.n_head_kv, n_obs, needs);
    ra_status st = RA_STATUS_OK;
    while (!jobs.empty() && st == RA_STATUS_OK) {
        jobs_next.clear();
        st = run_jobs(il);
        jobs.swap(jobs_next);
    }
    return st;
}

ra_status ra_scorer::find_twins(int32_t il, const float * masses, float * twins) {
    const ra_layer & l = cache().layers[il];
    mass               = masses;
    twin               = twins;
    place_heads(il);
    jobs.clear();
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        ra_list_jobs_all(jobs, ih, l.used[ih]);
    }
    const ra_status st = run_jobs(il);
    twins_of           = st == RA_STATUS_OK && is_whole ? il : -1;
    return st;
}

// Among the cosines that twins were found by, where one graph had room for those of the whole layer: they lie in
// the scratch until the next graph is made. Otherwise what goes is compared anew.
ra_status ra_scorer::find_targets(int32_t il) {
    const ra_layer & l = cache().layers[il];
    place_heads(il);
    if (twins_of == il) {
        for (const ra_job & j : jobs) {
            ra_pairs_find_targets(l, j, fetch_rows(j), closest.data() + tokens_at[j.ih]);
        }
        return RA_STATUS_OK;
    }
    jobs.clear();
    for (int32_t ih = 0; ih < l.n_head_kv; ++ih) {
        const int32_t n_going = ra_pairs_list_going(l, ih, going.data() + tokens_at[ih]);
        ra_list_jobs_going(jobs, ih, l.used[ih], n_going);
    }
    return run_jobs(il);
}

// the list of tokens that a job has as an input
const int32_t * ra_scorer::index_of(const ra_job & j) const {
    const std::vector<int32_t> & list = j.kind == RA_JOB_COSINES_GOING ? going : again;
    return list.data() + tokens_at[j.ih] + size_t(j.row0);
}

// of the graph of jobs [begin, end)
void ra_scorer::set_inputs(int32_t il, size_t begin, size_t end) {
    ggml_tensor * slots = graph.query_slots();
    if (slots != nullptr) {
        ggml_backend_tensor_set(slots, query_slots.data(), 0, ggml_nbytes(slots));
    }
    for (size_t i = begin; i < end; ++i) {
        const ra_job & j = jobs[i];
        if (j.index != nullptr) {
            ggml_backend_tensor_set(j.index, index_of(j), 0, ggml_nbytes(j.index));
        }
        if (j.kind == RA_JOB_MASS) {
            ra_mass_set_inputs(tensors()[il], cache().layers[il], j.mass, obs_pos);
        }
    }
}

ra_status ra_scorer::run_jobs(int32_t il) {
    for (size_t begin = 0; begin < jobs.size();) {
        ggml_cgraph * gf  = nullptr;
        const size_t  end = graph.build(il, jobs, begin, &gf);
        if (!scratch.alloc(gf)) {
            return ra_error(RA_STATUS_NO_MEMORY, "out of memory scoring layer %d", il);
        }
        set_inputs(il, begin, end);
        const ggml_status st = scratch.compute(gf);
        if (st != GGML_STATUS_SUCCESS) {
            return ra_error(RA_STATUS_COMPUTE, "scoring layer %d %s", il,
                            st == GGML_STATUS_ABORTED ? "was aborted" : "failed");
        }
        for (size_t i = begin; i < end; ++i) {
            read(il, jobs[i]);
        }
        is_whole = begin == 0 && end == jobs.size();
        begin    = end;
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

const float * ra_scorer::fetch_rows(const ra_job & j) {
    return fetch(j.out, j.skip, (j.n_rows - 1) * j.stride + j.n_kv);
}

// as the model attends, with its biases
void ra_scorer::read_logits(int32_t il, const ra_job & j) {
    const ra_layer & l = cache().layers[il];
    const float *    bias =
        l.merge != nullptr && l.merge->has_bias ? l.merge->bias + l.offset[j.ih] : nullptr;
    const ra_tensors &   t     = tensors()[il];
    const int32_t        n_own = t.n_own();
    const ra_logit_cap & cap   = t.logit;
    const float *        src   = fetch(j.out, j.skip, ggml_nelements(j.out) - j.skip);
    float *              dst   = logits.data() + logits_at[j.ih];
    for (int32_t o = 0; o < n_obs; ++o) {
        for (int32_t q = 0; q < t.n_group(); ++q, dst += j.n_kv) {
            const int32_t g = q % n_own;
            const float * row =
                src + ((int64_t(g) * t.n_pooled + q / n_own) * n_obs + o) * j.stride;
            std::transform(row, row + j.n_kv, dst, [&](float x) {
                return cap.after * (cap.cap == 0.0f ? x : cap.cap * std::tanh(cap.before * x));
            });
            for (int32_t i = 0; bias != nullptr && i < j.n_kv; ++i) {
                dst[i] += bias[i];
            }
            const float slope = t.max_alibi_bias > 0.0f ? ra_alibi_slope(t, j.ih * n_own + g) : 0;
            for (int32_t i = 0; slope > 0.0f && i < j.n_kv; ++i) {
                dst[i] -= slope * float(obs_pos[o] - l.pos[l.offset[j.ih] + i]);
            }
        }
    }
}

// sums to means over the queries that see a token, and the query heads
void ra_scorer::read_mass(int32_t il, const ra_job & j) {
    const ra_layer & l       = cache().layers[il];
    const float      n_group = float(tensors()[il].n_group());
    float *          dst     = attn_mass.data() + tokens_at[j.ih];
    ra_features      f       = {};
    f.n_kv                   = j.n_kv;
    f.n_obs                  = n_obs;
    f.pos                    = l.pos + l.offset[j.ih];
    f.obs_pos                = obs_pos;
    ra_queries_seen(&f, dst);
    const float * sums = fetch(j.out, j.skip, j.n_kv);
    for (int32_t i = 0; i < j.n_kv; ++i) {
        dst[i] = dst[i] > 0.0f ? sums[i] / (dst[i] * n_group) : 0.0f;
    }
}

void ra_scorer::read_values(int32_t il, const ra_job & j) {
    const int32_t dim  = (int32_t) tensors()[il].v->ne[0];
    const float * rows = fetch(j.out, j.skip, int64_t(j.n_kv) * dim);
    ra_mean_distance(j.n_kv, dim, rows, dim_sum.data(), value_dist.data() + tokens_at[j.ih]);
}

// as the model attends to them: a Hadamard rotation is its own inverse
void ra_scorer::read_keys(int32_t il, const ra_job & j) {
    const ra_tensors & t   = tensors()[il];
    const int64_t      n   = int64_t(j.n_kv) * t.k->ne[0];
    float *            dst = keys.data() + tokens_at[j.ih] * size_t(t.k->ne[0]);
    std::copy_n(fetch(j.out, j.skip, n), n, dst);
    for (int64_t i = 0; t.n_hadamard > 0 && i < n; i += t.n_hadamard) {
        ra_hadamard_transform(t.n_hadamard, dst + i);
    }
}

void ra_scorer::read_cos_sums(int32_t il, const ra_job & j) {
    const int32_t dim  = (int32_t) tensors()[il].k->ne[0];
    const float * unit = fetch(j.out, j.skip, int64_t(j.n_kv) * dim);
    const size_t  at   = tokens_at[j.ih];
    float *       sums = (key_cos.empty() ? key_sim : key_cos).data() + at;
    ra_key_cos_sums(j.n_kv, dim, unit, dim_sum.data(), sums);
    // in the end: the newest look-alike of every token must be known
    if (!key_sim.empty() && !list_jobs_again(il, j.ih)) {
        const ra_layer & l   = cache().layers[il];
        float *          acc = key_sim.data() + at;
        std::copy_n(sums, sums == acc ? 0 : j.n_kv, acc);
        ra_alike_finish(j.n_kv, dim, unit, l.pos + l.offset[j.ih], newer.data() + at,
                        older.data() + at, acc, l.alike + l.offset[j.ih]);
    }
    if (!key_cos.empty()) {
        std::for_each(sums, sums + j.n_kv, [&](float & sum) { sum /= float(j.n_kv); });
    }
}

void ra_scorer::read_cosines(const ra_job & j) {
    const float * rows      = fetch_rows(j);
    const size_t  at        = tokens_at[j.ih];
    const float   threshold = cache().settings.cfg.sim_threshold;
    if (j.kind == RA_JOB_COSINES) {
        ra_alike_compare_new(n_old[j.ih], j.row0, j.n_rows, rows, (int32_t) j.stride, threshold,
                             newer.data() + at, older.data() + at);
        return;
    }
    for (int32_t r = 0; r < j.n_rows; ++r) {
        ra_alike_compare_again(j.n_kv, again[at + size_t(j.row0 + r)], rows + r * j.stride,
                               threshold, newer.data() + at, older.data() + at);
    }
}

void ra_scorer::read(int32_t il, const ra_job & j) {
    const ra_layer & l  = cache().layers[il];
    const size_t     at = tokens_at[j.ih];
    switch (j.kind) {
        case RA_JOB_LOGITS: return read_logits(il, j);
        case RA_JOB_MASS: return read_mass(il, j);
        case RA_JOB_COS_SUMS: return read_cos_sums(il, j);
        case RA_JOB_COSINES:
        case RA_JOB_COSINES_AGAIN: return read_cosines(j);
        case RA_JOB_COSINES_ALL:
            return ra_pairs_find_twins(l, j, fetch_rows(j), cache().settings.cfg.n_sink, mass + at,
                                       twin + at);
        case RA_JOB_COSINES_GOING:
            return ra_pairs_find_targets_of(l, j, fetch_rows(j), index_of(j));
        case RA_JOB_VALUES: return read_values(il, j);
        case RA_JOB_KEYS: return read_keys(il, j);
        case RA_JOB_VALUE_NORMS: {
            std::copy_n(fetch(j.out, j.skip, j.n_kv), j.n_kv, value_norm.data() + at);
            break;
        }
    }
}

void ra_scorer::features(ra_features * f) const {
    f->n_group      = tensors()[f->il].n_group();
    const size_t at = tokens_at[f->ih];
    f->sinks        = sinks.empty() ? nullptr : sinks.data() + size_t(f->ih) * size_t(f->n_group);
    f->attn_logits  = logits.empty() ? nullptr : logits.data() + logits_at[f->ih];
    f->attn_mass    = attn_mass.empty() ? nullptr : attn_mass.data() + at;
    f->key_sim      = key_sim.empty() ? nullptr : key_sim.data() + at;
    f->key_cos      = key_cos.empty() ? nullptr : key_cos.data() + at;
    f->value_norm   = value_norm.empty() ? nullptr : value_norm.data() + at;
    f->value_dist   = value_dist.empty() ? nullptr : value_dist.data() + at;
    if (!keys.empty()) {
        f->head_dim = (int32_t) tensors()[f->il].k->ne[0];
        f->keys     = keys.data() + at * size_t(f->head_dim);
        f->rope     = &rope;
        f->centres =
            centres + size_t(f->ih) * size_t(f->n_group) * size_t(ra_centre_values(f->head_dim));
    }
}
