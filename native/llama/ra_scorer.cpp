// ra_scorer.cpp - see ra_scorer.h
//
// A graph works on the whole pool of a layer where the cost is linear (one cast, one normalisation),
// and per head where it is not. Everything in it is marked as an output: nothing is placed into memory
// that something else has left, so its size is the plain sum that reserve() plans with.
#include "ra_scorer.h"

#include <algorithm>

// of each tensor, so that a sum of sizes holds on every backend
static constexpr size_t RA_SCORE_ALIGN = 256;

// ---------------------------------------------------------------------------------------------
// sizes
// ---------------------------------------------------------------------------------------------

// rows gathered for a product, and their indices
static size_t ra_again_bytes(int64_t dim, int64_t n_rows) {
    return GGML_PAD(size_t(dim * n_rows) * sizeof(float), RA_SCORE_ALIGN) +
           GGML_PAD(size_t(n_rows) * sizeof(int32_t), RA_SCORE_ALIGN);
}

// results of one product of a layer, at most
size_t ra_scorer::most_job_bytes(int32_t il, uint32_t needs) const {
    const ra_cache * c     = mem.state();
    const int64_t    n_kv  = ra_cache_longest_head(c, il);
    const int64_t    n_pad = ra_score_pad(n_kv);
    int64_t          n     = 0;
    if (needs & RA_FEATURE_ATTN_LOGITS) {
        n = n_pad * c->n_ring * (mem.tensors[il].n_head / mem.tensors[il].n_head_kv);
    }
    size_t n_again = 0;
    if (needs & RA_FEATURE_KEY_SIM) {
        const int64_t n_rows = ra_score_block_rows(n_kv);
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
        n = ra_score_pad(j.n_kv) * mem.state()->n_ring * (t.n_head / t.n_head_kv);
    } else if (j.kind == JOB_COSINES || j.kind == JOB_COSINES_AGAIN) {
        n       = ra_score_pad(j.n_kv) * j.n_rows;
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
    repack = std::make_unique<ra_repacker>(mem, sched.get(), measured);
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
    int64_t n = repack->bytes() + (int64_t) meta.capacity();
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
