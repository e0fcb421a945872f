// test_memory.cpp - memory of the test devices: reserved addresses, with the bytes somewhere else
#include "test_device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

static constexpr size_t TEST_ALIGN   = 128; // of tensors, as on CUDA
static constexpr size_t TEST_ROW_PAD = 512; // values, to which quantised rows are padded there

namespace {
struct test_memory {
    int       device;
    uint8_t * reserved; // what tensors are given; the host may not touch it
    uint8_t * bytes;
    size_t    size;
};

std::vector<const test_memory *> allocated;
} // namespace

static const test_memory & memory_of(ggml_backend_buffer_t buffer) {
    return *static_cast<const test_memory *>(buffer->context);
}

static void * map(size_t size, int protection) {
    void * p = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

static void free_buffer(ggml_backend_buffer_t buffer) {
    const test_memory * m = &memory_of(buffer);
    test_run_all(m->device);
    munmap(m->reserved, m->size);
    munmap(m->bytes, m->size);
    allocated.erase(std::find(allocated.begin(), allocated.end(), m));
    delete m;
}

static void * get_base(ggml_backend_buffer_t buffer) {
    return memory_of(buffer).reserved;
}

static uint8_t * bytes_in(ggml_backend_buffer_t buffer, const ggml_tensor * t) {
    const test_memory & m  = memory_of(buffer);
    const size_t        at = size_t((uint8_t *) t->data - m.reserved);
    GGML_ASSERT((uint8_t *) t->data >= m.reserved && at + ggml_nbytes(t) <= m.size);
    return m.bytes + at;
}

static size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * t) {
    const size_t  size = ggml_nbytes(t);
    const int64_t n    = t->ne[0] % int64_t(TEST_ROW_PAD);
    return ggml_is_quantized(t->type) && n != 0
               ? size + ggml_row_size(t->type, int64_t(TEST_ROW_PAD) - n)
               : size;
}

static ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t) {
    const size_t size = get_alloc_size(buffer->buft, t);
    if (t->view_src == nullptr && size > ggml_nbytes(t)) {
        memset(bytes_in(buffer, t) + ggml_nbytes(t), 0, size - ggml_nbytes(t));
    }
    return GGML_STATUS_SUCCESS;
}

static void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t, uint8_t value,
                          size_t offset, size_t size) {
    memset(bytes_in(buffer, t) + offset, value, size);
}

static void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data,
                       size_t offset, size_t size) {
    memcpy(bytes_in(buffer, t) + offset, data, size);
}

static void get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * t, void * data,
                       size_t offset, size_t size) {
    memcpy(data, bytes_in(buffer, t) + offset, size);
}

static bool cpy_tensor(ggml_backend_buffer_t, const ggml_tensor * src, ggml_tensor * dst) {
    if (!test_is_on(src, -1)) {
        return false;
    }
    memcpy(test_bytes(dst), test_bytes(src), ggml_nbytes(src));
    return true;
}

static void clear(ggml_backend_buffer_t buffer, uint8_t value) {
    memset(memory_of(buffer).bytes, value, memory_of(buffer).size);
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    const int device   = int(reinterpret_cast<intptr_t>(buft->context));
    void *    reserved = map(size, PROT_NONE);
    void *    bytes    = map(size, PROT_READ | PROT_WRITE);
    if (reserved == nullptr || bytes == nullptr) {
        return nullptr;
    }
    memset(bytes, 0xff, size); // NaN of every type
    const auto * memory = new test_memory{ device, (uint8_t *) reserved, (uint8_t *) bytes, size };
    allocated.push_back(memory);
    ggml_backend_buffer_i iface = {};
    iface.free_buffer           = free_buffer;
    iface.get_base              = get_base;
    iface.init_tensor           = init_tensor;
    iface.memset_tensor         = memset_tensor;
    iface.set_tensor            = set_tensor;
    iface.get_tensor            = get_tensor;
    iface.cpy_tensor            = cpy_tensor;
    iface.clear                 = clear;
    return ggml_backend_buffer_init(buft, iface, (void *) memory, size);
}

static const char * get_name(ggml_backend_buffer_type_t buft) {
    static const char * names[TEST_DEVICES] = { "TEST0", "TEST1", "TEST2", "TEST3" };
    return names[reinterpret_cast<intptr_t>(buft->context)];
}

ggml_backend_buffer_type_t test_buffer_type(int device) {
    static ggml_backend_buffer_type types[TEST_DEVICES];
    ggml_backend_buffer_type &      type = types[device];
    type.iface                           = {};
    type.iface.get_name                  = get_name;
    type.iface.alloc_buffer              = alloc_buffer;
    type.iface.get_alignment             = [](ggml_backend_buffer_type_t) {
        return TEST_ALIGN;
    };
    type.iface.get_alloc_size = get_alloc_size;
    type.context              = reinterpret_cast<void *>(intptr_t(device));
    return &type;
}

bool test_is_on(const ggml_tensor * t, int device) {
    return t->buffer != nullptr && t->buffer->buft->iface.alloc_buffer == alloc_buffer &&
           (device < 0 || t->buffer->buft == test_buffer_type(device));
}

uint8_t * test_bytes(const ggml_tensor * t) {
    return t->buffer->size == 0 ? nullptr : bytes_in(t->buffer, t);
}

// sizes of the buffers that a device holds, at most n of them are written; returns how many there are
extern "C" __attribute__((visibility("default"))) size_t test_device_buffers(int      device,
                                                                             size_t * sizes,
                                                                             size_t   n) {
    size_t found = 0;
    for (const test_memory * m : allocated) {
        if (m->device == device && found++ < n) {
            sizes[found - 1] = m->size;
        }
    }
    return found;
}
