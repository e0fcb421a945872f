// ra_scratch.cpp - see ra_scratch.h
#include "ra_scratch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

ra_scratch::ra_scratch(ggml_backend_sched_t context_sched, const ra_watch & watch, bool measure)
    : watch(watch) {
    std::vector<ggml_backend_t> backends;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(context_sched); ++i) {
        backends.push_back(ggml_backend_sched_get_backend(context_sched, i));
    }
    sched.reset(ggml_backend_sched_new(backends.data(), nullptr, (int) backends.size(),
                                       RA_SCRATCH_MAX_NODES, false, false));
    if (!sched) {
        throw std::runtime_error("failed to create the scheduler for compressions");
    }
    measured.resize(measure ? backends.size() : 0);
}

void ra_scratch::reserve(ggml_cgraph * gf, const char * what) {
    ggml_backend_sched_reset(sched.get());
    if (measured.empty()) {
        if (!ggml_backend_sched_reserve(sched.get(), gf)) {
            throw std::runtime_error(std::string("failed to reserve the buffers for ") + what);
        }
        return;
    }
    std::vector<size_t> sizes(measured.size());
    ggml_backend_sched_reserve_size(sched.get(), gf, sizes.data());
    for (size_t i = 0; i < sizes.size(); ++i) {
        measured[i] = std::max(measured[i], sizes[i]);
    }
}

bool ra_scratch::alloc(ggml_cgraph * gf) {
    for (int i = 0; watch.cb != nullptr && i < ggml_graph_n_nodes(gf); ++i) {
        watch.cb(watch.user, ggml_graph_node(gf, i));
    }
    ggml_backend_sched_reset(sched.get());
    return ggml_backend_sched_alloc_graph(sched.get(), gf);
}

ggml_status ra_scratch::compute(ggml_cgraph * gf) {
    return ggml_backend_sched_graph_compute(sched.get(), gf);
}

bool ra_scratch::can_run(ggml_cgraph * gf, ggml_backend_buffer_t buf) const {
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched.get()); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched.get(), i);
        bool           can = ggml_backend_supports_buft(backend, ggml_backend_buffer_get_type(buf));
        for (int n = 0; n < ggml_graph_n_nodes(gf) && can; ++n) {
            can = ggml_backend_supports_op(backend, ggml_graph_node(gf, n));
        }
        if (can) {
            return true;
        }
    }
    return false;
}

int64_t ra_scratch::bytes() const {
    int64_t n = 0;
    for (const size_t size : measured) {
        n += (int64_t) size;
    }
    for (int i = 0; measured.empty() && i < ggml_backend_sched_get_n_backends(sched.get()); ++i) {
        n += (int64_t) ggml_backend_sched_get_buffer_size(
            sched.get(), ggml_backend_sched_get_backend(sched.get(), i));
    }
    return n;
}
