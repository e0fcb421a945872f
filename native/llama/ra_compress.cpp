// ra_compress.cpp - moves rows and computes features; compress.c decides which tokens stay
#include "ra_compress.h"

static bool ra_same_shape(const ra_target & a, const ra_target & b) {
    for (int32_t il = 0; il < a.cache->n_layer; ++il) {
        if (a.cache->layers[il].n_slots != b.cache->layers[il].n_slots) {
            return false;
        }
    }
    return true;
}

ra_compressor::ra_compressor(const std::vector<ra_target> & targets,
                             ggml_backend_sched_t context_sched, const ra_watch & watch,
                             bool gather_always, bool measure)
    : scratch(context_sched, watch, measure), scorer(target, scratch), merger(target),
      repacker(target, scratch, gather_always) {
    for (const ra_target & t : targets) {
        if (target.cache != nullptr && ra_same_shape(t, targets[0])) {
            continue;
        }
        target = t;
        scorer.reserve();
        merger.reserve();
        repacker.reserve();
    }
}

ra_status ra_compressor::run(const ra_target & what, int32_t * n_layers) {
    target = what;
    ra_cache_ops ops;
    ops.user           = this;
    ops.features_begin = [](void * user, uint32_t needs, int32_t il, int32_t n_obs,
                            const int32_t * obs_pos) {
        return static_cast<ra_compressor *>(user)->scorer.begin(needs, il, n_obs, obs_pos);
    };
    ops.features = [](void * user, uint32_t, ra_features * f) {
        static_cast<ra_compressor *>(user)->scorer.features(f);
        return RA_STATUS_OK;
    };
    ops.find_twins = [](void * user, int32_t il, const float * mass, float * twin) {
        return static_cast<ra_compressor *>(user)->scorer.find_twins(il, mass, twin);
    };
    ops.find_targets = [](void * user, int32_t il) {
        return static_cast<ra_compressor *>(user)->scorer.find_targets(il);
    };
    ops.merge_rows = [](void * user, int32_t il) {
        ra_compressor * c = static_cast<ra_compressor *>(user);
        c->merger.run(il);
        c->repacker.begin(il); // what it read before is of before
    };
    ops.move_begin = [](void * user, int32_t il) {
        static_cast<ra_compressor *>(user)->repacker.begin(il);
        return RA_STATUS_OK;
    };
    ops.move = [](void * user, int32_t il, int32_t dst, int32_t src, int32_t n) {
        static_cast<ra_compressor *>(user)->repacker.move(il, dst, src, n);
    };
    ops.move_end = [](void * user, int32_t il) {
        return static_cast<ra_compressor *>(user)->repacker.end(il);
    };
    return ra_cache_compress(target.cache, &ops, n_layers);
}
