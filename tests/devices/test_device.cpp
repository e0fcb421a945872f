// test_device.cpp - the devices: what ggml is told about them, and what tests ask
#include "test_device.h"

#include <cstring>

#define TEST_API extern "C" __attribute__((visibility("default")))

static int rules = 0; // refuse what there is no kernel for; 1: in CUDA, 2: in Metal

static int device_of(ggml_backend_dev_t dev) {
    return int(reinterpret_cast<intptr_t>(dev->context));
}

static ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t dev) {
    return test_buffer_type(device_of(dev));
}

static const char * get_name(ggml_backend_dev_t dev) {
    return ggml_backend_buft_name(get_buffer_type(dev));
}

static void get_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = size_t(1) << 30;
}

static void get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    props->name        = get_name(dev);
    props->description = "the CPU, as if it were far away";
    props->type        = GGML_BACKEND_DEVICE_TYPE_GPU;
    props->caps.async  = true;
    props->caps.events = true; // so several devices work as a pipeline
    get_memory(dev, &props->memory_free, &props->memory_total);
}

static bool supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    for (const ggml_tensor * src : op->src) {
        if (src != nullptr && test_is_on(src, -1) && !test_is_on(src, device_of(dev))) {
            return false;
        }
    }
    if (rules == 2 && op->op == GGML_OP_REPEAT_BACK) {
        return false;
    }
    return (rules != 1 || test_cuda_supports(op)) &&
           ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}

static ggml_backend_dev_t get_device(ggml_backend_reg_t reg, size_t i) {
    static ggml_backend_device devices[TEST_DEVICES];
    ggml_backend_device *      dev = &devices[i];
    if (dev->reg != nullptr) {
        return dev;
    }
    dev->reg                   = reg;
    dev->context               = reinterpret_cast<void *>(intptr_t(i));
    dev->iface.get_name        = get_name;
    dev->iface.get_description = get_name;
    dev->iface.get_memory      = get_memory;
    dev->iface.get_type        = [](ggml_backend_dev_t) {
        return GGML_BACKEND_DEVICE_TYPE_GPU;
    };
    dev->iface.get_props    = get_props;
    dev->iface.init_backend = [](ggml_backend_dev_t d, const char *) {
        return test_backend_init(d, device_of(d));
    };
    dev->iface.get_buffer_type = get_buffer_type;
    dev->iface.supports_op     = supports_op;
    dev->iface.supports_buft   = [](ggml_backend_dev_t d, ggml_backend_buffer_type_t buft) {
        return buft == get_buffer_type(d);
    };
    // weights on the host are brought here for large batches, as to any GPU
    dev->iface.offload_op = [](ggml_backend_dev_t, const ggml_tensor * op) {
        return op->op == GGML_OP_MUL_MAT && op->ne[1] >= 32;
    };
    dev->iface.event_new         = test_event_new;
    dev->iface.event_free        = test_event_free;
    dev->iface.event_synchronize = test_event_synchronize;
    get_buffer_type(dev)->device = dev;
    return dev;
}

TEST_API ggml_backend_reg_t ggml_backend_init() {
    static ggml_backend_reg reg;
    reg.api_version    = GGML_BACKEND_API_VERSION;
    reg.iface.get_name = [](ggml_backend_reg_t) {
        return "TEST";
    };
    reg.iface.get_device_count = [](ggml_backend_reg_t) {
        return size_t(TEST_DEVICES);
    };
    reg.iface.get_device       = get_device;
    reg.iface.get_proc_address = [](ggml_backend_reg_t, const char *) -> void * {
        return nullptr;
    };
    return &reg;
}

// from now on: what to refuse, see `rules`
TEST_API void test_device_rules(int number) {
    rules = number;
}

// graphs and nodes computed so far
TEST_API int64_t test_device_counts(int device, int64_t * n_nodes) {
    *n_nodes = test_counts_of(device).n_nodes;
    return test_counts_of(device).n_graphs;
}
