// ra_compress.cpp - a compression of the cache in a context: scores from the backends, rows moved
#include "llama-context.h"
#include "ra_memory.h"
#include "ra_scorer.h"

// at the first decode, so that a compression allocates nothing; tried again if memory was short
void ra_memory::make_scorer() {
    if (scorer) {
        return;
    }
    try {
        scorer = std::make_unique<ra_scorer>(*this, lctx->get_sched());
    } catch (const std::exception & e) {
        ra_error(RA_STATUS_NO_MEMORY, "no scratch memory for compressions: %s", e.what());
    }
}

int64_t ra_memory::planned_scratch_bytes(ggml_backend_sched_t sched) const {
    return scratch_bytes() + (scorer ? 0 : ra_scorer(*this, sched, true).bytes());
}

void ra_memory::gather_always(bool on) {
    gathers_always = on;
    scorer.reset(); // it is made anew, with the scratch for it
}

ra_status ra_memory::compress() {
    const int64_t t_start = ggml_time_us();
    ra_status     st      = RA_STATUS_OK;
    try {
        if (lctx == nullptr) {
            return RA_STATUS_OK; // nothing was decoded yet
        }
        make_scorer();
        if (!scorer) {
            return RA_STATUS_NO_MEMORY;
        }
        // the rows of the last micro-batch must have been written
        ggml_backend_sched_synchronize(lctx->get_sched());

        ra_cache_ops ops;
        ops.user           = this;
        ops.features_begin = [](void * user, uint32_t needs, int32_t il, int32_t n_obs,
                                const int32_t * obs_pos) {
            return static_cast<ra_memory *>(user)->scorer->features_begin(needs, il, n_obs,
                                                                          obs_pos);
        };
        ops.features = [](void * user, uint32_t, ra_features * f) {
            static_cast<ra_memory *>(user)->scorer->features(f);
            return RA_STATUS_OK;
        };
        ops.move = [](void * user, int32_t il, int32_t dst, int32_t src, int32_t n) {
            static_cast<ra_memory *>(user)->scorer->repacker().move(il, dst, src, n);
        };
        ops.move_begin = [](void * user, int32_t il) {
            static_cast<ra_memory *>(user)->scorer->repacker().begin(il);
            return RA_STATUS_OK;
        };
        ops.move_end = [](void * user, int32_t il) {
            return static_cast<ra_memory *>(user)->scorer->repacker().end(il);
        };
        int32_t n_layers = 0;
        st               = ra_cache_compress(cache.get(), &ops, &n_layers);
        if (scorer->repacker().lost_rows()) {
            scorer.reset();
            clear(true);
        } else if (n_layers > 0) {
            layout_changed();
        }
    } catch (const std::exception & e) {
        st = ra_error(RA_STATUS_NO_MEMORY, "compression failed: %s", e.what());
    }
    compress_us += ggml_time_us() - t_start;
    return st;
}
