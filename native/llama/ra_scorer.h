// ra_scorer.h - the products that policies need (Q.K of the window, K.K), computed with ggml on the
// backends of the context, one layer at a time
#pragma once

#include "ra_memory.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

class ra_scorer {
  public:
    // backends: those of the context's scheduler; all buffers are reserved now, or with `measure` only
    // their sizes taken. Throws std::runtime_error.
    ra_scorer(const ra_memory & mem, ggml_backend_sched_t context_sched, bool measure = false);

    // ra_cache_ops.features: computes the layer when ih == 0, then hands out slices
    ra_status features(uint32_t needs, ra_features * f);

    int64_t bytes() const;

  private:
    enum job_kind { JOB_LOGITS, JOB_COSINES, JOB_VALUE_NORMS };

    // one product of one head; of the cosine matrix a block of rows
    struct job {
        job_kind      kind;
        int32_t       ih;
        int32_t       row0;
        int32_t       n_rows;
        ggml_tensor * out;
    };

    ra_status compute_layer(int32_t il, uint32_t needs, int32_t n_obs);
    void      list_jobs(int32_t il, uint32_t needs, std::vector<job> & jobs) const;
    // builds the graph of jobs [begin, return value), as many as fit the scratch
    size_t        build(int32_t il, std::vector<job> & jobs, size_t begin, ggml_cgraph ** gf);
    void          read(int32_t il, const job & j, int32_t n_obs);
    void          read_logits(int32_t il, const job & j, int32_t n_obs);
    void          read_cosines(int32_t il, const job & j);
    const float * fetch(const ggml_tensor * t);

    const ra_memory & mem;

    bool one_by_one = false; // a graph holds the jobs of one head only

    ggml_backend_sched_ptr sched;
    std::vector<size_t>    measured; // bytes per backend, where nothing was reserved
    std::vector<uint8_t>   meta;     // tensor structs of a graph
    ggml_context_ptr       ctx;

    std::vector<float>  logits;    // [n_head_kv][n_obs, n_group, n_kv] of the layer at hand
    std::vector<size_t> logits_at; // [n_head_kv] offset into logits

    // [n_slots], head after head; empty where nobody asks
    std::vector<float>  key_sim;
    std::vector<float>  key_cos;
    std::vector<float>  value_norm;
    std::vector<size_t> tokens_at; // [n_head_kv] offset into these

    std::vector<float> staging; // rows read back from a device
};
