// ra_score_mass.cpp - see ra_score_mass.h
//
// The softmax runs on all threads of the backend, or on a device, and a number per token comes back in the
// place of one per query and token.
#include "ra_score_mass.h"

#include "ggml-cpp.h"
#include "ra_graph_alibi.h"

#include <algorithm>
#include <cmath>

// Sums of columns are one operation, which not every device has (Metal has not): those sum the rows of the
// transpose.
static bool ra_sums_in_place(const ra_tensors & t) {
    const ggml_backend_dev_t dev =
        ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t.k->buffer));
    if (dev == nullptr || ggml_backend_buffer_is_host(t.k->buffer)) {
        return ggml_backend_buffer_is_host(t.k->buffer);
    }
    const ggml_context_ptr ctx(ggml_init({ 4 * ggml_tensor_overhead(), nullptr, true }));
    ggml_tensor *          rows = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 64, 2);
    ggml_tensor *          sum  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 64);
    return ggml_backend_dev_supports_op(dev, ggml_repeat_back(ctx.get(), rows, sum));
}

static ggml_tensor * ra_sum_columns(ggml_context * ctx, const ra_tensors & t, ggml_tensor * kq,
                                    int64_t n_pad, ggml_tensor * mask) {
    if (ra_sums_in_place(t)) {
        return ggml_repeat_back(ctx, kq, ggml_view_1d(ctx, mask, n_pad, 0));
    }
    kq = ggml_reshape_2d(ctx, kq, n_pad, ggml_nelements(kq) / n_pad);
    kq = ggml_cont(ctx, ggml_transpose(ctx, kq));
    ggml_set_output(kq);
    return ggml_sum_rows(ctx, kq);
}

size_t ra_mass_values(const ra_tensors & t, int64_t n_pad, int64_t n_obs) {
    const size_t  n_align = 4 * 64; // each of them may begin at a multiple of 256 bytes
    const int64_t n_more  = ra_sums_in_place(t) ? 0 : n_obs * t.n_own();
    return size_t(n_pad) * size_t(n_obs + 1 + n_more + (t.max_alibi_bias > 0.0f ? t.n_own() : 0)) +
           n_align;
}

static ggml_tensor * ra_input(ggml_context * ctx, int64_t ne0, int64_t ne1, int64_t ne2) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne1, ne2);
    ggml_set_input(t);
    ggml_set_output(t);
    return t;
}

ggml_tensor * ra_mass_build(ggml_context * ctx, const ra_tensors & t, ra_mass_job & j,
                            ggml_tensor * kq) {
    const ra_logit_cap & cap   = t.logit;
    float                scale = cap.after;

    kq = ggml_reshape_3d(ctx, kq, j.n_pad, j.n_obs, j.n_group);
    if (cap.cap != 0.0f) {
        kq    = ggml_tanh_inplace(ctx, ggml_scale_inplace(ctx, kq, cap.before));
        scale = cap.after * cap.cap;
    }
    if (t.max_alibi_bias > 0.0f) {
        j.alibi = ra_input(ctx, j.n_pad, 1, j.n_group);
        kq      = ggml_add_inplace(ctx, ggml_scale_inplace(ctx, kq, scale), j.alibi);
        scale   = 1.0f;
    }
    j.mask = ra_input(ctx, j.n_pad, j.n_obs, 1);
    kq     = ggml_soft_max_ext_inplace(ctx, kq, j.mask, scale, 0.0f);
    if (t.sinks != nullptr) {
        ggml_soft_max_add_sinks(kq, ggml_view_1d(ctx, t.sinks, j.n_group,
                                                 size_t(j.ih) * size_t(j.n_group) * sizeof(float)));
    }
    return ra_sum_columns(ctx, t, kq, j.n_pad, j.mask);
}

static float * ra_input_data(ggml_tensor * t) {
    GGML_ASSERT(ggml_backend_buffer_is_host(t->buffer));
    return (float *) t->data;
}

void ra_mass_set_inputs(const ra_tensors & t, const ra_layer & l, const ra_mass_job & j,
                        const int32_t * obs_pos) {
    const int32_t * pos  = l.pos + l.offset[j.ih];
    const int32_t   n_kv = l.used[j.ih];
    const float *   bias =
        l.merge != nullptr && l.merge->has_bias ? l.merge->bias + l.offset[j.ih] : nullptr;
    float *       row   = ra_input_data(j.mask);
    const int32_t n_obs = j.n_obs / t.n_pooled; // of one layer
    for (int32_t o = 0; o < j.n_obs; ++o, row += j.n_pad) {
        const int64_t n_seen = std::upper_bound(pos, pos + n_kv, obs_pos[o % n_obs]) - pos;
        float *       seen   = row + j.skip;
        std::fill(row, seen, -INFINITY);
        if (bias != nullptr) {
            std::copy_n(bias, n_seen, seen);
        } else {
            std::fill_n(seen, n_seen, 0.0f);
        }
        std::fill(seen + n_seen, row + j.n_pad, -INFINITY);
    }
    // counted from the newest query: adding the same to all logits of a query changes nothing
    row = j.alibi != nullptr ? ra_input_data(j.alibi) : nullptr;
    for (int32_t g = 0; row != nullptr && g < j.n_group; ++g, row += j.n_pad) {
        const float slope = ra_alibi_slope(t, j.ih * j.n_group + g);
        std::fill_n(row, j.n_pad, 0.0f);
        for (int32_t i = 0; i < n_kv; ++i) {
            row[j.skip + i] = slope * float(pos[i] - obs_pos[n_obs - 1]);
        }
    }
}
