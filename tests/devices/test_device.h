// test_device.h - a ggml backend of our own with several devices, which tests take for GPUs
//
// What a GPU does to a program that was only ever run on a CPU, without one: tensors in memory of the
// device have addresses that the host cannot touch (a process that reads or writes through tensor->data
// dies), memory is full of NaN until it is written, every device has memory of its own, quantised rows are
// padded, and what is asked of a device is done as late as its rules allow: when somebody waits for it. The
// devices compute with ggml's CPU code, so their results are those of the CPU, bit for bit.
#pragma once

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <cstdint>
#include <functional>
#include <vector>

static constexpr int TEST_DEVICES = 4;

// ---------------------------------------------------------------------------------------------
// memory (test_memory.cpp)
// ---------------------------------------------------------------------------------------------

ggml_backend_buffer_type_t test_buffer_type(int device);

// whether the tensor is in memory of this device (-1: of any)
bool test_is_on(const ggml_tensor * t, int device);

// where its bytes really are
uint8_t * test_bytes(const ggml_tensor * t);

// ---------------------------------------------------------------------------------------------
// queues (test_queue.cpp)
// ---------------------------------------------------------------------------------------------

// what one backend was asked for and has not done
struct test_queue {
    int                                device = 0;
    ggml_backend_t                     cpu    = nullptr;
    std::vector<std::function<void()>> jobs;
    size_t                             n_done = 0; // of all ever added

    size_t n_added() const { return n_done + jobs.size(); }
    void   run_until(size_t n);
};

ggml_backend_t test_backend_init(ggml_backend_dev_t dev, int device);

ggml_backend_event_t test_event_new(ggml_backend_dev_t dev);
void                 test_event_free(ggml_backend_dev_t dev, ggml_backend_event_t event);
void                 test_event_synchronize(ggml_backend_dev_t dev, ggml_backend_event_t event);

// freeing memory waits for the device
void test_run_all(int device);

// nodes computed by a device so far, and graphs
struct test_counts {
    int64_t n_nodes;
    int64_t n_graphs;
};
test_counts test_counts_of(int device);

// ---------------------------------------------------------------------------------------------
// rules (test_rules.cpp)
// ---------------------------------------------------------------------------------------------

// false: CUDA has no kernel for it, of the operations that a budgeted cache brings into a graph
bool test_cuda_supports(const ggml_tensor * op);
