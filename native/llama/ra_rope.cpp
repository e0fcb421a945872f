// ra_rope.cpp - see ra_rope.h
#include "ra_rope.h"

#include "core.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// whether x is its only argument but for its shape, place in memory, or a factor
static bool ra_is_same_rows(const ggml_tensor * x) {
    switch (x->op) {
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_CONT:
        case GGML_OP_SCALE: return ggml_nelements(x) == ggml_nelements(x->src[0]);
        default: return false;
    }
}

// the stock cache's rotation of rows that are quantised (llama_mul_mat_hadamard)
static bool ra_is_hadamard(const ggml_tensor * x) {
    return x->op == GGML_OP_MUL_MAT && strncmp(x->src[0]->name, "attn_inp_k_rot", 14) == 0;
}

// whether rows were rotated anywhere after they were projected
static bool ra_has_rope(const ggml_tensor * x, int32_t depth) {
    if (x == nullptr || x->op == GGML_OP_NONE || x->op == GGML_OP_MUL_MAT || depth == 0) {
        return false;
    }
    return x->op == GGML_OP_ROPE ||
           std::any_of(x->src, x->src + GGML_MAX_SRC,
                       [=](const ggml_tensor * src) { return ra_has_rope(src, depth - 1); });
}

ra_status ra_rope_find(const ggml_tensor * x, ra_rope_op * op) {
    while (ra_is_same_rows(x) || ra_is_hadamard(x)) {
        x = x->src[ra_is_hadamard(x) ? 1 : 0];
    }
    *op          = {};
    op->is_known = true;
    if (x->op != GGML_OP_ROPE) {
        return ra_has_rope(x, 12)
                   ? ra_error(RA_STATUS_UNSUPPORTED,
                              "%s is changed after its rotation by position, which query centres "
                              "cannot follow: use another policy than 'triattention'",
                              x->name)
                   : RA_STATUS_OK;
    }
    int32_t mode = 0;
    memcpy(&op->n_rot, x->op_params + 1, sizeof(int32_t));
    memcpy(&mode, x->op_params + 2, sizeof(int32_t));
    memcpy(&op->n_ctx_orig, x->op_params + 4, sizeof(int32_t));
    memcpy(&op->freq_base, x->op_params + 5, sizeof(float));
    memcpy(&op->freq_scale, x->op_params + 6, sizeof(float));
    memcpy(&op->ext_factor, x->op_params + 7, sizeof(float));
    memcpy(&op->beta_fast, x->op_params + 9, sizeof(float));
    memcpy(&op->beta_slow, x->op_params + 10, sizeof(float));
    memcpy(&op->offset, x->op_params + 15, sizeof(int32_t));
    op->is_neox     = mode == GGML_ROPE_TYPE_NEOX;
    op->freq_factor = x->src[2];
    if ((mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX) || op->offset < 0 ||
        op->n_rot < 0 || op->n_rot % 2 != 0 || op->offset + op->n_rot > x->ne[0]) {
        return ra_error(RA_STATUS_UNSUPPORTED,
                        "%s is rotated by a RoPE of kind %d, which query centres cannot follow: "
                        "use another policy than 'triattention'",
                        x->name, mode);
    }
    return RA_STATUS_OK;
}

std::vector<float> ra_rope_freqs(const ra_rope_op & op) {
    std::vector<float> freqs(size_t(op.n_rot / 2));
    std::vector<float> factors(freqs.size(), 1.0f);
    if (op.freq_factor != nullptr) {
        ggml_backend_tensor_get(op.freq_factor, factors.data(), 0, factors.size() * sizeof(float));
    }
    float ramp[2];
    ggml_rope_yarn_corr_dims(op.n_rot, op.n_ctx_orig, op.freq_base, op.beta_fast, op.beta_slow,
                             ramp);
    // as ggml's op goes from pair to pair, in float
    const float step = powf(op.freq_base, -2.0f / float(op.n_rot));
    float       base = 1.0f;
    for (size_t f = 0; f < freqs.size(); ++f, base *= step) {
        const float extrapolated = base / factors[f];
        const float interpolated = op.freq_scale * extrapolated;
        freqs[f]                 = interpolated;
        if (op.ext_factor != 0.0f) {
            const float y   = (float(f) - ramp[0]) / std::max(0.001f, ramp[1] - ramp[0]);
            const float mix = (1.0f - std::min(1.0f, std::max(0.0f, y))) * op.ext_factor;
            freqs[f]        = interpolated * (1.0f - mix) + extrapolated * mix;
        }
    }
    return freqs;
}

ra_status ra_read_queries(const ggml_tensor * kq, ra_rope * rope, float * freq, int32_t n_freq,
                          float * q, int64_t n_q) {
    if (kq == nullptr || rope == nullptr || freq == nullptr || q == nullptr ||
        kq->op != GGML_OP_MUL_MAT) {
        return ra_error(RA_STATUS_INVALID,
                        "ra_read_queries: an argument is NULL, or kq is no product");
    }
    const ggml_tensor * rows = kq->src[1];
    while (rows->op != GGML_OP_CONT && rows->op != GGML_OP_SCALE && ra_is_same_rows(rows)) {
        rows = rows->src[0];
    }
    if (rows->type != GGML_TYPE_F32 || !ggml_is_contiguous(rows) || rows->buffer == nullptr ||
        ra_is_hadamard(rows)) {
        return ra_error(RA_STATUS_UNSUPPORTED,
                        "the queries %s are not contiguous f32, or the cache is quantised",
                        rows->name);
    }
    ra_rope_op      op;
    const ra_status st = ra_rope_find(rows, &op);
    if (st != RA_STATUS_OK) {
        return st;
    }
    if (ggml_nelements(rows) != n_q || op.n_rot / 2 > n_freq) {
        return ra_error(RA_STATUS_INVALID,
                        "ra_read_queries: there are %lld values and %d frequencies, not %lld and "
                        "at most %d",
                        (long long) ggml_nelements(rows), op.n_rot / 2, (long long) n_q, n_freq);
    }
    const std::vector<float> freqs = ra_rope_freqs(op);
    std::copy(freqs.begin(), freqs.end(), freq);
    *rope = { op.n_rot, op.offset, op.is_neox, freq };
    ggml_backend_tensor_get(rows, q, 0, ggml_nbytes(rows));
    return RA_STATUS_OK;
}
