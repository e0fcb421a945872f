// test_queue.cpp - the backends of the test devices: everything is queued, and done when somebody waits
#include "test_device.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <unordered_map>

namespace {
std::vector<test_queue *> queues;
test_counts               counts[TEST_DEVICES];

struct test_event {
    test_queue * queue = nullptr; // NULL: nothing was recorded
    size_t       n     = 0;       // its jobs until then
};

// a graph as it was when it was queued, with the addresses of the bytes
class test_graph {
  public:
    test_graph(const ggml_cgraph & graph, int device) : device(device) {
        const size_t n_nodes = size_t(graph.n_nodes);
        meta.resize(ggml_graph_overhead_custom(n_nodes, false));
        ctx = ggml_init({ meta.size(), meta.data(), /*.no_alloc =*/true });
        gf  = ggml_new_graph_custom(ctx, n_nodes, false);
        for (int i = 0; i < graph.n_nodes; ++i) {
            const ggml_tensor * node = graph.nodes[i];
            if (ggml_op_is_empty(node->op)) {
                continue; // views, also of what is elsewhere
            }
            ggml_tensor * mine = copy_of(node);
            for (int s = 0; s < GGML_MAX_SRC; ++s) {
                mine->src[s] = node->src[s] == nullptr ? nullptr : copy_of(node->src[s]);
            }
            mine->view_src = node->view_src == nullptr ? nullptr : copy_of(node->view_src);
            gf->nodes[gf->n_nodes++] = mine;
            const size_t at          = ggml_hash_insert(&gf->visited_hash_set, mine);
            gf->use_counts[at]       = uses_of(graph, node);
        }
    }

    ~test_graph() { ggml_free(ctx); }

    test_graph(const test_graph &)             = delete;
    test_graph & operator=(const test_graph &) = delete;

    void compute(ggml_backend_t cpu) const {
        if (ggml_backend_graph_compute(cpu, gf) != GGML_STATUS_SUCCESS) {
            GGML_ABORT("test device: a graph failed");
        }
    }

  private:
    static int32_t uses_of(const ggml_cgraph & graph, const ggml_tensor * node) {
        const size_t at = ggml_hash_find(&graph.visited_hash_set, node);
        return at != GGML_HASHSET_FULL && ggml_bitset_get(graph.visited_hash_set.used, at)
                   ? graph.use_counts[at]
                   : 0;
    }

    ggml_tensor * copy_of(const ggml_tensor * t) {
        std::unique_ptr<ggml_tensor> & copy = copies[t];
        if (copy == nullptr) {
            copy = std::make_unique<ggml_tensor>(*t);
            std::fill_n(copy->src, GGML_MAX_SRC, nullptr); // of nodes they are set later
            copy->view_src = nullptr;
            copy->extra    = nullptr;
            if (!test_is_on(t, device)) {
                GGML_ABORT("test device %d: tensor %s (%s) is elsewhere, in %s", device, t->name,
                           ggml_op_name(t->op),
                           t->buffer == nullptr ? "no buffer"
                                                : ggml_backend_buffer_name(t->buffer));
            }
            copy->data = test_bytes(t);
        }
        return copy.get();
    }

    int                                                                   device;
    std::vector<uint8_t>                                                  meta;
    ggml_context *                                                        ctx = nullptr;
    ggml_cgraph *                                                         gf  = nullptr;
    std::unordered_map<const ggml_tensor *, std::unique_ptr<ggml_tensor>> copies;
};
} // namespace

void test_queue::run_until(size_t n) {
    while (n_done < n) {
        const std::function<void()> job = std::move(jobs.front());
        jobs.erase(jobs.begin());
        ++n_done;
        job();
    }
}

void test_run_all(int device) {
    for (test_queue * q : queues) {
        if (q->device == device) {
            q->run_until(q->n_added());
        }
    }
}

test_counts test_counts_of(int device) {
    return counts[device];
}

static test_queue & queue_of(ggml_backend_t backend) {
    return *static_cast<test_queue *>(backend->context);
}

static void synchronize(ggml_backend_t backend) {
    queue_of(backend).run_until(queue_of(backend).n_added());
}

static void free_backend(ggml_backend_t backend) {
    test_queue * q = &queue_of(backend);
    for (int i = 0; i < TEST_DEVICES; ++i) {
        test_run_all(i); // others may wait for it
    }
    queues.erase(std::find(queues.begin(), queues.end(), q));
    ggml_backend_free(q->cpu);
    delete q;
    delete backend;
}

static void set_async(ggml_backend_t backend, ggml_tensor * t, const void * data, size_t offset,
                      size_t size) {
    const auto * from = static_cast<const uint8_t *>(data);
    uint8_t *    to   = test_bytes(t) + offset;
    queue_of(backend).jobs.emplace_back([to, values = std::vector<uint8_t>(from, from + size)] {
        memcpy(to, values.data(), values.size());
    });
}

static void get_async(ggml_backend_t backend, const ggml_tensor * t, void * data, size_t offset,
                      size_t size) {
    const uint8_t * from = test_bytes(t) + offset;
    queue_of(backend).jobs.emplace_back([=] { memcpy(data, from, size); });
}

// in the queue of the source; the other one waits for it
static bool cpy_async(ggml_backend_t src_backend, ggml_backend_t dst_backend,
                      const ggml_tensor * src, ggml_tensor * dst) {
    if (!test_is_on(src, -1) || !test_is_on(dst, -1) ||
        src_backend->device->reg != dst_backend->device->reg) {
        return false;
    }
    uint8_t *       to   = test_bytes(dst);
    const uint8_t * from = test_bytes(src);
    test_queue *    q    = &queue_of(src_backend);
    q->jobs.emplace_back([=, size = ggml_nbytes(src)] { memcpy(to, from, size); });
    if (src_backend != dst_backend) {
        queue_of(dst_backend).jobs.emplace_back([q, n = q->n_added()] { q->run_until(n); });
    }
    return true;
}

static ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    test_queue &   q = queue_of(backend);
    ggml_backend_t c = q.cpu;
    counts[q.device].n_nodes += graph->n_nodes;
    counts[q.device].n_graphs += 1;
    q.jobs.emplace_back(
        [c, copy = std::make_shared<test_graph>(*graph, q.device)] { copy->compute(c); });
    return GGML_STATUS_SUCCESS;
}

// ---------------------------------------------------------------------------------------------
// events
// ---------------------------------------------------------------------------------------------

static test_event & event_of(ggml_backend_event_t event) {
    return *static_cast<test_event *>(event->context);
}

static void event_record(ggml_backend_t backend, ggml_backend_event_t event) {
    event_of(event) = { &queue_of(backend), queue_of(backend).n_added() };
}

static void event_wait(ggml_backend_t backend, ggml_backend_event_t event) {
    const test_event e = event_of(event);
    if (e.queue != nullptr && e.queue != &queue_of(backend)) {
        queue_of(backend).jobs.emplace_back([e] { e.queue->run_until(e.n); });
    }
}

ggml_backend_event_t test_event_new(ggml_backend_dev_t dev) {
    return new ggml_backend_event{ dev, new test_event };
}

void test_event_free(ggml_backend_dev_t, ggml_backend_event_t event) {
    delete &event_of(event);
    delete event;
}

void test_event_synchronize(ggml_backend_dev_t, ggml_backend_event_t event) {
    const test_event e = event_of(event);
    if (e.queue != nullptr) {
        e.queue->run_until(e.n);
    }
}

static const char * backend_name(ggml_backend_t backend) {
    return ggml_backend_dev_name(backend->device);
}

ggml_backend_t test_backend_init(ggml_backend_dev_t dev, int device) {
    static ggml_guid guid = { 'r', 'a', ' ', 't', 'e', 's', 't' };
    auto *           q    = new test_queue;
    q->device             = device;
    q->cpu                = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    ggml_backend_cpu_set_n_threads(q->cpu, 1);
    queues.push_back(q);
    ggml_backend_i iface   = {};
    iface.get_name         = backend_name;
    iface.free             = free_backend;
    iface.set_tensor_async = set_async;
    iface.get_tensor_async = get_async;
    iface.cpy_tensor_async = cpy_async;
    iface.synchronize      = synchronize;
    iface.graph_compute    = graph_compute;
    iface.event_record     = event_record;
    iface.event_wait       = event_wait;
    return new ggml_backend{ &guid, iface, dev, q };
}
