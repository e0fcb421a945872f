// ra_scorer.h - the features of a layer's tokens that policies need, computed with ggml on the backends
// of the context: one graph per layer, or as many as the scratch asks for
#pragma once

#include "ra_score_graph.h"
#include "ra_scratch.h"

class ra_scorer {
  public:
    // the arguments must outlive it
    ra_scorer(const ra_target & target, ra_scratch & scratch);

    // makes the host arrays, and what its graphs need in the scratch, large enough for the target at hand,
    // too. Throws std::runtime_error.
    void reserve();

    // ra_cache_ops: begin() computes a layer, features() hands out a slice of it
    ra_status begin(uint32_t needs, int32_t il, int32_t n_obs, const int32_t * obs_pos);
    void      features(ra_features * f) const;
    // the same of ra_cache_ops
    ra_status find_twins(int32_t il, const float * mass, float * twin);
    ra_status find_targets(int32_t il);

    // host memory, without the scratch
    int64_t bytes() const;

  private:
    void            reserve(uint32_t needs);
    bool            list_jobs_again(int32_t il, int32_t ih);
    ra_status       run_jobs(int32_t il);
    void            read(int32_t il, const ra_job & j);
    void            set_inputs(int32_t il, size_t begin, size_t end);
    void            read_logits(int32_t il, const ra_job & j);
    void            read_mass(int32_t il, const ra_job & j);
    void            read_cos_sums(int32_t il, const ra_job & j);
    void            read_cosines(const ra_job & j);
    void            read_values(int32_t il, const ra_job & j);
    void            read_keys(int32_t il, const ra_job & j);
    void            place_centres(int32_t il);
    void            place_heads(int32_t il);
    const int32_t * index_of(const ra_job & j) const;
    const float *   fetch_rows(const ra_job & j);
    const float *   fetch(const ggml_tensor * t, int64_t begin, int64_t n);

    const ra_cache &                cache() const { return *target.cache; }
    const std::vector<ra_tensors> & tensors() const { return *target.tensors; }

    const ra_target & target;
    ra_scratch &      scratch;
    ra_score_graph    graph;

    std::vector<ra_job> jobs;      // of the layer at hand
    std::vector<ra_job> jobs_next; // what their results leave to be done

    int32_t         n_obs   = 0;       // queries of the layer at hand
    const int32_t * obs_pos = nullptr; // [n_obs] their positions

    bool          is_whole = false; // the jobs were those of one graph
    int32_t       twins_of = -1;    // layer whose cosines of twins `jobs` still has; -1: none
    const float * mass = nullptr; // [sum of used] of the layer at hand, while twins are looked for
    float *       twin = nullptr; // likewise

    std::vector<float>  logits;    // [n_head_kv][n_obs, n_group, n_kv] of the layer at hand
    std::vector<size_t> logits_at; // [n_head_kv] offset into logits
    std::vector<float>  sinks;     // [n_head] of the layer at hand; empty: it has none

    // [n_slots], head after head; empty where nobody asks
    std::vector<float>  attn_mass;
    std::vector<float>  key_sim;
    std::vector<float>  key_cos;
    std::vector<float>  value_norm;
    std::vector<float>  value_dist;
    std::vector<size_t> tokens_at; // [n_head_kv] offset into these
    std::vector<float>  keys;      // [n_slots, head_dim_k] likewise

    const float *      centres = nullptr; // of the query heads of the layer at hand
    ra_rope            rope    = {};      // of its keys
    std::vector<float> freqs;             // [rope.n_rot / 2]

    std::vector<float>   dim_sum; // [head_dim] scratch: sums and means of rows
    std::vector<int32_t> newer;   // [n_slots] of all heads of a layer, see core/alike.c
    std::vector<int32_t> older;   // [n_slots] likewise
    std::vector<int32_t> again;   // [n_slots] tokens to compare again, head after head
    std::vector<int32_t> going; // [n_slots] tokens that are evicted, head after head; merging only
    std::vector<float>   closest; // [n_slots] likewise: cosines with what takes them
    std::vector<int32_t> n_old;   // [n_head_kv]

    std::vector<int32_t> query_slots; // [n_obs] of the layer at hand

    std::vector<float> staging; // values read back from a device
};
