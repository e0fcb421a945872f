// ra_score_graph.h - the graphs of the products that policies need (Q.K of the window, K.K)
#pragma once

#include "cache.h"
#include "ggml-cpp.h"
#include "ra_score_mass.h"
#include "ra_tensors.h"

#include <algorithm>
#include <vector>

// results of one graph (f32): bounds the scratch whatever the budget is
static constexpr int64_t RA_SCORE_VALUES = int64_t(1) << 20;

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

// beside RA_FEATURE_*: the cosines by which merging finds its targets
static constexpr uint32_t RA_NEEDS_TARGETS = uint32_t(1) << 31;

// RA_JOB_COSINES: of new keys with all older ones; RA_JOB_COSINES_AGAIN: of those that must be compared
// once more, with the old ones (core/alike.c); RA_JOB_COSINES_ALL: of all keys with those before;
// RA_JOB_COSINES_GOING: of those that are evicted, with all
enum ra_job_kind {
    RA_JOB_LOGITS,
    RA_JOB_MASS,
    RA_JOB_COSINES,
    RA_JOB_COSINES_AGAIN,
    RA_JOB_COSINES_ALL,
    RA_JOB_COSINES_GOING,
    RA_JOB_COS_SUMS,
    RA_JOB_VALUE_NORMS,
    RA_JOB_VALUES,
    RA_JOB_KEYS
};

// one result for one head
struct ra_job {
    ra_job_kind kind;
    int32_t     ih;
    int32_t     n_kv; // tokens that it is about: columns of its result
    int32_t row0;   // cosines: rows [row0, row0 + n_rows) of the matrix, or of the list to do again
    int32_t n_rows; // logits and masses: queries

    ggml_tensor * out = nullptr; // f32
    ggml_tensor * index =
        nullptr;        // I32 [n_rows] of RA_JOB_COSINES_AGAIN and _GOING: that list as an input
    int64_t skip   = 0; // values of `out` before the first one wanted
    int64_t stride = 0; // values of `out` per row

    ra_mass_job mass = {}; // of RA_JOB_MASS
};

class ra_score_graph {
  public:
    // the target must outlive it
    ra_score_graph(const ra_target & target);

    // The graph that needs the most scratch, of any that `needs` may lead to, with as many results as one graph may have (max_out()): of
    // the largest layer on each device. To be called before build(); of several targets results are as many
    // as the largest had.
    ggml_cgraph * build_largest(uint32_t needs);

    // Builds the graph of jobs [begin, return value) of layer il, as many as fit the scratch, and sets
    // their tensors. It is valid until the next one is built.
    size_t build(int32_t il, std::vector<ra_job> & jobs, size_t begin, ggml_cgraph ** gf);

    // I32 input of the graph built last: slots of the queries; NULL: it has none
    ggml_tensor * query_slots() const { return slots; }

    size_t  max_out() const { return n_out; } // bytes of the results of one graph
    int64_t bytes() const { return (int64_t) meta.capacity(); }

  private:
    // what the jobs of a graph share, made when first asked for
    struct shared {
        ggml_tensor * keys        = nullptr; // [head_dim_k, n_slots] f32, until `unit` is made
        ggml_tensor * unit        = nullptr; // the same normalised, in the same memory
        ggml_tensor * queries     = nullptr; // [head_dim_k, n_obs * n_pooled, n_own, n_head_kv] f32
        ggml_tensor * value_norms = nullptr; // [1, n_slots] f32
        ggml_tensor * values      = nullptr; // [head_dim_v, n_slots] f32
        ggml_tensor * raw_keys    = nullptr; // [head_dim_k, n_slots] f32, never normalised
    };

    size_t        most_job_bytes(int32_t il, uint32_t needs) const;
    size_t        most_layer_bytes(int32_t il, uint32_t needs) const;
    size_t        job_bytes(int32_t il, const ra_job & j) const;
    ggml_cgraph * new_graph();
    ggml_tensor * keys_of(int32_t il, shared & s);
    ggml_tensor * unit_of(int32_t il, shared & s);
    ggml_tensor * queries_of(int32_t il, shared & s, int64_t n_obs);
    ggml_tensor * value_norms_of(int32_t il, shared & s);
    ggml_tensor * values_of(int32_t il, shared & s);
    ggml_tensor * raw_keys_of(int32_t il, shared & s);
    void          add_job(int32_t il, shared & s, ra_job & j);
    void          add_largest(ggml_cgraph * gf, int32_t il, uint32_t needs);

    const ra_cache &                cache() const { return *target.cache; }
    const std::vector<ra_tensors> & tensors() const { return *target.tensors; }

    const ra_target & target;

    std::vector<uint8_t> meta; // tensor structs of a graph
    ggml_context_ptr     ctx;
    ggml_tensor *        slots = nullptr;
    size_t               n_out = 0;
};

// Lists the jobs of a layer: what `needs` asks for of heads of n_kv [n_head_kv] tokens, of which
// n_old [n_head_kv] were compared with each other before, and of n_obs queries.
void ra_list_jobs(std::vector<ra_job> & jobs, const int32_t * n_kv, const int32_t * n_old,
                  int32_t n_head_kv, int32_t n_obs, uint32_t needs);

// Adds the jobs that compare all n_kv tokens of head ih with those before them, oldest rows first.
void ra_list_jobs_all(std::vector<ra_job> & jobs, int32_t ih, int32_t n_kv);

// Adds the jobs that compare n_going tokens of head ih, a list, with all of its n_kv.
void ra_list_jobs_going(std::vector<ra_job> & jobs, int32_t ih, int32_t n_kv, int32_t n_going);
