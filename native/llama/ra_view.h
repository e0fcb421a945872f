// ra_view.h - what the model's graph sees of a budgeted cache, for one micro-batch or the worst case
#pragma once

#include "llama-memory.h"
#include "ra_storage.h"

// the cache of one sequence
class ra_view {
  public:
    ra_view(ra_storage * store, bool is_worst_case) : store(store), is_worst_case(is_worst_case) {}

    // rows that head ih of layer il holds before the micro-batch of n_tokens
    int32_t n_used(int32_t il, int32_t ih, int32_t n_tokens) const;
    // rows that its segment can hold
    int32_t n_capacity(int32_t il, int32_t ih) const;
    // rows of the segment that a graph with n_ahead rows for new tokens attends, free ones included
    int32_t n_span(int32_t il, int32_t ih, int32_t n_tokens, int32_t n_ahead) const;

    bool worst_case() const { return is_worst_case; }

    const ra_cache &   cache() const { return *store->cache; }
    const ra_storage & storage() const { return *store; }

    // the tensors of layer il, to write to
    ra_tensors & tensors(int32_t il) const { return store->tensors[il]; }

  private:
    ra_storage * store;
    bool         is_worst_case;
};

// the tokens [first, first + n_tokens) of a micro-batch, of one sequence
struct ra_part {
    ra_view view;
    int32_t first;
    int32_t n_tokens;
};

class ra_batch_view;

// What graphs are given of a batch: the context of a stock memory, which is this as well.
struct ra_stock_context {
    virtual ~ra_stock_context() = default;

    const ra_batch_view * batch = nullptr; // that it is the stock part of
};

class ra_batch_view : public llama_memory_context_i {
  public:
    // stock_part: NULL for a context that no graph is built from
    explicit ra_batch_view(llama_memory_context_ptr stock_part)
        : stock_context(std::move(stock_part)) {
        if (auto * part = dynamic_cast<ra_stock_context *>(stock())) {
            part->batch = this;
        }
    }

    // what graphs see of the layers that are not ours
    llama_memory_context_i * stock() const { return stock_context.get(); }

    // whether layer il is ours
    virtual bool has_layer(int32_t il) const = 0;
    // the parts of the micro-batch at hand, in order; each sequence has one. n_tokens: of the micro-batch,
    // which the worst case takes for parts of its own.
    virtual std::vector<ra_part> parts(int32_t n_tokens) const = 0;

  private:
    llama_memory_context_ptr stock_context;
};
