/* score.c - a policy's scores from plain arrays: the same code path as a compression, with the
 * products done by loops instead of a backend. For tests and for writing policies. Merging likewise. */
#include "cache.h"

#include <math.h>
#include <string.h>

/* eight running sums, so that compilers may use vector registers */
static float ra_dot_exact(int32_t n, const float * a, const float * b) {
    double  lane[8] = { 0.0 };
    int32_t i       = 0;
    for (; i + 8 <= n; i += 8) {
        for (int32_t k = 0; k < 8; ++k) {
            lane[k] += (double) a[i + k] * (double) b[i + k];
        }
    }
    for (; i < n; ++i) {
        lane[0] += (double) a[i] * (double) b[i];
    }
    return (float) (((lane[0] + lane[4]) + (lane[1] + lane[5])) +
                    ((lane[2] + lane[6]) + (lane[3] + lane[7])));
}

/* unit [n_kv, head_dim] <- rows divided by their norms */
static void ra_unit_rows(int32_t n_kv, int32_t head_dim, const float * k, float * unit) {
    const size_t n = (size_t) head_dim;
    for (int32_t i = 0; i < n_kv; ++i) {
        const float * ki   = k + (size_t) i * n;
        const float   norm = sqrtf(ra_dot_exact(head_dim, ki, ki));
        for (size_t d = 0; d < n; ++d) {
            unit[(size_t) i * n + d] = ki[d] / (norm > 1e-8f ? norm : 1e-8f);
        }
    }
}

/* key_sim and key_cos [n_kv] from unit keys; scratch: row [n_kv], sum [head_dim], alike [2 * n_kv] */
static void ra_key_sim_from_keys(int32_t n_kv, int32_t head_dim, const int32_t * pos,
                                 const float * unit, float threshold, float * row, float * sum,
                                 int32_t * alike, float * key_sim, float * key_cos) {
    const size_t n = (size_t) head_dim;
    ra_key_cos_sums(n_kv, head_dim, unit, sum, key_sim);
    for (int32_t i = 0; i < n_kv; ++i) {
        key_cos[i] = key_sim[i] / (float) n_kv;
    }
    int32_t *     newer = alike;
    int32_t *     older = alike + n_kv;
    const int32_t n_old = ra_alike_begin(n_kv, pos, 0, NULL, newer, older);
    for (int32_t j = n_kv - 1; j >= 0; --j) {
        for (int32_t i = 0; i < j; ++i) {
            row[i] = ra_dot_exact(head_dim, unit + (size_t) j * n, unit + (size_t) i * n);
        }
        ra_alike_compare_new(n_old, j, 1, row, n_kv, threshold, newer, older);
    }
    ra_alike_finish(n_kv, head_dim, unit, pos, newer, older, key_sim, NULL);
}

static bool ra_head_is_ok(const ra_head_arrays * h) {
    if (h->il < 0 || h->ih < 0 || h->n_kv < 1 || h->n_kv > (1 << 20) || h->head_dim_k < 1 ||
        h->head_dim_k > 4096 || h->n_group < 1 || h->n_group > 1024 || h->n_obs < 0 ||
        h->n_obs > h->n_kv || h->n_obs > 4096 || h->k == NULL || (h->q == NULL && h->n_obs > 0) ||
        h->pos == NULL || h->pos[0] < 0 ||
        (h->v != NULL && (h->head_dim_v < 1 || h->head_dim_v > 4096))) {
        return false;
    }
    for (int32_t i = 1; i < h->n_kv; ++i) {
        if (h->pos[i] <= h->pos[i - 1]) {
            return false;
        }
    }
    return true;
}

static bool ra_rope_is_ok(const ra_head_arrays * h) {
    const ra_rope * r = h->rope;
    if (r != NULL &&
        (r->n_rot < 0 || r->n_rot % 2 != 0 || r->n_rot > h->head_dim_k || r->offset < 0 ||
         r->offset > h->head_dim_k - r->n_rot || (r->freq == NULL && r->n_rot > 0))) {
        return false;
    }
    const size_t n = (size_t) h->n_group * (size_t) ra_centre_values(h->head_dim_k);
    return h->n_centres == (h->centres != NULL ? n : 0);
}

static ra_status ra_head_check(const ra_config * cfg, const ra_head_arrays * h) {
    const ra_status st = ra_config_check(cfg);
    if (st != RA_STATUS_OK) {
        return st;
    }
    if (h == NULL || h->size != sizeof(*h) || !ra_head_is_ok(h)) {
        return ra_error(RA_STATUS_INVALID,
                        "a head's arrays: n_kv = %d, head_dim_k = %d, n_group = %d, n_obs = %d, or "
                        "positions that do not ascend",
                        h != NULL ? h->n_kv : 0, h != NULL ? h->head_dim_k : 0,
                        h != NULL ? h->n_group : 0, h != NULL ? h->n_obs : 0);
    }
    if (!ra_rope_is_ok(h)) {
        return ra_error(RA_STATUS_INVALID,
                        "a head's arrays: rope or %zu centres do not go with %d query heads of %d "
                        "values",
                        h->n_centres, h->n_group, h->head_dim_k);
    }
    return RA_STATUS_OK;
}

/* logits [n_obs, n_group, n_kv] */
static void ra_logits_from_keys(const ra_head_arrays * h, float * logits) {
    const size_t dim = (size_t) h->head_dim_k;
    for (int32_t r = 0; r < h->n_obs * h->n_group; ++r) {
        for (int32_t j = 0; j < h->n_kv; ++j) {
            *logits++ = h->kq_scale * ra_dot_exact(h->head_dim_k, h->q + (size_t) r * dim,
                                                   h->k + (size_t) j * dim) +
                        (h->bias != NULL ? h->bias[j] : 0.0f);
        }
    }
}

/* value_norm and value_dist [n_kv]; mean [head_dim_v] scratch */
static void ra_value_features(const ra_head_arrays * h, float * mean, float * value_norm,
                              float * value_dist) {
    if (h->v == NULL) {
        return; /* zeros */
    }
    for (int32_t i = 0; i < h->n_kv; ++i) {
        const float * v = h->v + (size_t) i * (size_t) h->head_dim_v;
        value_norm[i]   = sqrtf(ra_dot_exact(h->head_dim_v, v, v));
    }
    ra_mean_distance(h->n_kv, h->head_dim_v, h->v, mean, value_dist);
}

/* twin [n_kv] from unit keys; cos [n_kv] scratch */
static void ra_twins_from_keys(const ra_config * cfg, const ra_head_arrays * h, const float * mass,
                               const float * unit, float * cos, float * twin) {
    const size_t dim   = (size_t) h->head_dim_k;
    int32_t      first = 0;
    while (first < h->n_kv && h->pos[first] < cfg->n_sink) {
        ++first;
    }
    for (int32_t j = 0; j < h->n_kv; ++j) {
        for (int32_t i = 0; i < j; ++i) {
            cos[i] = ra_dot_exact(h->head_dim_k, unit + (size_t) j * dim, unit + (size_t) i * dim);
        }
        ra_twin_compare(j, first, mass, cos, twin);
    }
}

ra_status ra_policy_score(const ra_config * cfg, const ra_head_arrays * h, float * score,
                          float * state_out, float * mass) {
    const ra_status st = ra_head_check(cfg, h);
    if (st != RA_STATUS_OK) {
        return st;
    }
    if (score == NULL) {
        return ra_error(RA_STATUS_INVALID, "ra_policy_score: score is NULL");
    }
    const ra_policy * policy = ra_policy_find(cfg->policy);
    if ((policy->needs & RA_FEATURE_CENTRES) != 0 && h->centres == NULL) {
        return ra_error(RA_STATUS_INVALID, "policy '%s' needs the query centres of the head",
                        policy->name);
    }
    const size_t n       = (size_t) h->n_kv;
    const size_t n_state = n * (size_t) policy->n_state;
    const size_t n_rows  = (size_t) h->n_obs * (size_t) h->n_group;
    const size_t n_keys  = (n + 1) * (size_t) h->head_dim_k;
    const size_t n_dim_v = h->v != NULL ? (size_t) h->head_dim_v : 0;
    float *      buf = ra_calloc(n * (n_rows + 10) + 2 * n_state + n_keys + n_dim_v, sizeof(*buf));
    int32_t *    alike = ra_calloc(n, 2 * sizeof(*alike));
    if (buf == NULL || alike == NULL) {
        ra_free(buf);
        ra_free(alike);
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory scoring %d tokens", h->n_kv);
    }
    float * key_sim    = buf;
    float * key_cos    = buf + n;
    float * value_norm = buf + 2 * n;
    float * value_dist = buf + 3 * n;
    float * received   = buf + 4 * n;
    float * twin       = buf + 5 * n;
    float * work       = buf + 6 * n;
    float * attended   = buf + 9 * n;
    float * before     = buf + 10 * n;
    float * after      = before + n_state;
    float * logits     = after + n_state;
    float * unit       = logits + n_rows * n;
    float * sum        = unit + n * (size_t) h->head_dim_k;
    ra_logits_from_keys(h, logits);
    ra_unit_rows(h->n_kv, h->head_dim_k, h->k, unit);
    if ((policy->needs & (RA_FEATURE_KEY_SIM | RA_FEATURE_KEY_COS)) != 0) {
        ra_key_sim_from_keys(h->n_kv, h->head_dim_k, h->pos, unit, cfg->sim_threshold, work, sum,
                             alike, key_sim, key_cos);
    }
    ra_value_features(h, sum + h->head_dim_k, value_norm, value_dist);
    for (size_t i = 0; i < n_state; ++i) {
        before[i] = after[i] = h->state != NULL ? h->state[i] : NAN;
    }

    const ra_rope     unrotated = { .n_rot = 0 };
    const ra_features f         = {
                .il          = h->il,
                .ih          = h->ih,
                .n_kv        = h->n_kv,
                .n_window    = cfg->n_window < h->n_kv ? cfg->n_window : h->n_kv,
                .n_obs       = h->n_obs,
                .n_group     = h->n_group,
                .pos         = h->pos,
                .obs_pos     = h->pos + (h->n_kv - h->n_obs),
                .attn_logits = logits,
                .attn_mass   = attended,
                .key_sim     = key_sim,
                .key_cos     = key_cos,
                .value_norm  = value_norm,
                .value_dist  = value_dist,
                .keys        = h->k,
                .head_dim    = h->head_dim_k,
                .rope        = h->rope != NULL ? h->rope : &unrotated,
                .centres     = h->centres,
                .twin        = twin,
                .state       = before,
                .state_out   = after,
                .mass        = received,
                .work        = work,
    };
    ra_attention_mass(&f, attended);
    memcpy(received, attended, n * sizeof(*received));
    if (policy->observe != NULL) {
        policy->observe(cfg, &f);
    }
    if ((policy->needs & RA_FEATURE_TWIN) != 0) {
        ra_twins_from_keys(cfg, h, received, unit, work, twin);
    }
    policy->score(cfg, &f, score);
    ra_score_protect(cfg, cfg->n_protect, &f, score);
    if (state_out != NULL) {
        memcpy(state_out, after, n_state * sizeof(*after));
    }
    if (mass != NULL) {
        memcpy(mass, received, n * sizeof(*received));
    }
    ra_free(buf);
    ra_free(alike);
    return RA_STATUS_OK;
}

ra_status ra_merge_head(const ra_config * cfg, const ra_head_arrays * h, const uint8_t * keep,
                        const uint8_t * can_take, const float * mass, int32_t * target,
                        float * bias_out, float * v_out) {
    const ra_status st = ra_head_check(cfg, h);
    if (st != RA_STATUS_OK) {
        return st;
    }
    if (h->v == NULL || keep == NULL || can_take == NULL || mass == NULL || target == NULL ||
        bias_out == NULL || v_out == NULL) {
        return ra_error(RA_STATUS_INVALID, "ra_merge_head: an array is NULL");
    }
    const size_t n   = (size_t) h->n_kv;
    const size_t dim = (size_t) h->head_dim_k;
    float *      buf = ra_calloc(n * (dim + 3), sizeof(*buf));
    if (buf == NULL) {
        return ra_error(RA_STATUS_NO_MEMORY, "out of memory merging %d tokens", h->n_kv);
    }
    float * unit  = buf;
    float * cos   = unit + n * dim;
    float * share = cos + n;
    float * bias  = share + n;
    ra_unit_rows(h->n_kv, h->head_dim_k, h->k, unit);
    for (size_t j = 0; j < n; ++j) {
        for (size_t i = 0; i < n && !keep[j]; ++i) {
            cos[i] = ra_dot_exact(h->head_dim_k, unit + j * dim, unit + i * dim);
        }
        target[j] = keep[j] ? -1 : ra_merge_find_target(h->n_kv, can_take, cos);
        bias[j]   = h->bias != NULL ? h->bias[j] : 0.0f;
    }
    ra_merge_shares(h->n_kv, target, mass, cfg->bias_max, bias, share, bias_out);
    memcpy(v_out, h->v, n * (size_t) h->head_dim_v * sizeof(*v_out));
    ra_merge_rows(h->n_kv, h->head_dim_v, target, share, v_out);
    ra_free(buf);
    return RA_STATUS_OK;
}
