// ra_scorer.h - the products that policies need (Q.K of the window, K.K), computed with ggml on the
// backends of the context: one graph per layer, or as many as the scratch asks for. Rows are moved in
// the same scratch afterwards.
#pragma once

#include "ra_memory.h"
#include "ra_repack.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>

// results of one graph (f32): bounds the scratch whatever the budget is
static constexpr int64_t RA_SCORE_VALUES = int64_t(1) << 20;

static constexpr size_t RA_SCORE_MAX_NODES = 512;
static constexpr size_t RA_SCORE_MAX_JOBS  = RA_SCORE_MAX_NODES / 4 - 8;

// products of multiples of 16 rows are the fast ones; what is too much is computed and not read
inline int64_t ra_score_pad(int64_t n) {
    return GGML_PAD(n, 16);
}

// rows of the cosine matrix per product: of n_kv >= 1 new rows eight blocks, so that little more than
// a triangle is computed
inline int64_t ra_score_block_rows(int64_t n_kv) {
    const int64_t most = RA_SCORE_VALUES / ra_score_pad(n_kv) / 16 * 16;
    return std::min(ra_score_pad(std::max<int64_t>(32, n_kv / 8)), std::max<int64_t>(16, most));
}

class ra_scorer {
  public:
    // backends: those of the context's scheduler; all buffers are reserved now, or with `measure` only
    // their sizes taken. Throws std::runtime_error.
    ra_scorer(const ra_memory & mem, ggml_backend_sched_t context_sched, bool measure = false);

    // ra_cache_ops: computes a layer, then hands out slices of it
    ra_status features_begin(uint32_t needs, int32_t il, int32_t n_obs, const int32_t * obs_pos);
    void      features(ra_features * f) const;

    // moves rows, in the same scratch
    ra_repacker & repacker() { return *repack; }

    int64_t bytes() const;

  private:
    // JOB_COSINES: of new keys with all older ones; JOB_COSINES_AGAIN: of those that must be compared
    // once more, with the old ones (core/alike.c)
    enum job_kind { JOB_LOGITS, JOB_COSINES, JOB_COSINES_AGAIN, JOB_COS_SUMS, JOB_VALUE_NORMS };

    // one result for one head
    struct job {
        job_kind kind;
        int32_t  ih;
        int32_t  n_kv; // tokens that it is about: columns of its result
        int32_t  row0; // cosines: rows [row0, row0 + n_rows) of the matrix, or of `again`
        int32_t  n_rows;

        ggml_tensor * out    = nullptr; // f32
        ggml_tensor * index  = nullptr; // I32 [n_rows] of JOB_COSINES_AGAIN: `again` as an input
        int64_t       skip   = 0;       // values of `out` before the first one wanted
        int64_t       stride = 0;       // values of `out` per row
    };

    // what the jobs of a graph share, made when first asked for
    struct shared {
        ggml_tensor * keys        = nullptr; // [head_dim_k, n_slots] f32, until `unit` is made
        ggml_tensor * unit        = nullptr; // the same normalised, in the same memory
        ggml_tensor * queries     = nullptr; // [head_dim_k, n_group, n_ring, n_head_kv] f32
        ggml_tensor * value_norms = nullptr; // [1, n_slots] f32
    };

    void   reserve(uint32_t needs, bool measure);
    size_t most_job_bytes(int32_t il, uint32_t needs) const;
    void list_jobs(const int32_t * n_kv, const int32_t * n_old, int32_t n_head_kv, uint32_t needs);
    bool list_jobs_again(int32_t il, int32_t ih);
    ra_status     run_jobs(int32_t il, int32_t n_obs);
    size_t        job_bytes(int32_t il, const job & j) const;
    ggml_cgraph * new_graph();
    ggml_tensor * keys_of(int32_t il, shared & s);
    ggml_tensor * unit_of(int32_t il, shared & s);
    ggml_tensor * queries_of(int32_t il, shared & s);
    ggml_tensor * value_norms_of(int32_t il, shared & s);
    void          add_job(int32_t il, shared & s, job & j);
    // builds the graph of jobs [begin, return value), as many as fit the scratch
    size_t        build(int32_t il, size_t begin, ggml_cgraph ** gf);
    void          read(int32_t il, const job & j, int32_t n_obs);
    void          read_logits(int32_t il, const job & j, int32_t n_obs);
    void          read_cos_sums(int32_t il, const job & j);
    void          read_cosines(const job & j);
    const float * fetch(const ggml_tensor * t, int64_t begin, int64_t n);

    const ra_memory & mem;

    ggml_backend_sched_ptr sched;
    std::vector<size_t>    measured; // bytes per backend, where nothing was reserved
    std::vector<uint8_t>   meta;     // tensor structs of a graph
    ggml_context_ptr       ctx;
    std::vector<job>       jobs;        // of the layer at hand
    std::vector<job>       jobs_next;   // what their results leave to be done
    size_t                 max_out = 0; // bytes of the results of one graph

    std::vector<float>  logits;            // [n_head_kv][n_obs, n_group, n_kv] of the layer at hand
    std::vector<size_t> logits_at;         // [n_head_kv] offset into logits
    const int32_t *     obs_pos = nullptr; // [n_obs] positions of the queries

    // [n_slots], head after head; empty where nobody asks
    std::vector<float>  key_sim;
    std::vector<float>  key_cos;
    std::vector<float>  value_norm;
    std::vector<size_t> tokens_at; // [n_head_kv] offset into these

    std::vector<float>   dim_sum; // [head_dim_k] scratch of ra_key_cos_sums()
    std::vector<int32_t> newer;   // [n_slots] of all heads of a layer, see core/alike.c
    std::vector<int32_t> older;   // [n_slots] likewise
    std::vector<int32_t> again;   // [n_slots] tokens to compare again, head after head
    std::vector<int32_t> n_old;   // [n_head_kv]

    std::vector<float> staging; // values read back from a device

    std::unique_ptr<ra_repacker> repack;
};
