// ra_view.h - what the model's graph sees of a budgeted cache, for one micro-batch or the worst case
#pragma once

#include "llama-memory.h"
#include "ra_storage.h"

class ra_view;

// What graphs are given of a batch: the context of a stock memory, which is this as well.
struct ra_stock_context {
    virtual ~ra_stock_context() = default;

    const ra_view * view = nullptr; // that it is the stock part of
};

class ra_view : public llama_memory_context_i {
  public:
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

    // what graphs see of the layers that are not ours; NULL for a context that no graph is built from
    llama_memory_context_i * stock() const { return stock_ctx.get(); }

  protected:
    // store: NULL for a context that no graph is built from
    ra_view(ra_storage * store, bool is_worst_case, llama_memory_context_ptr stock = nullptr)
        : store(store), is_worst_case(is_worst_case), stock_ctx(std::move(stock)) {
        if (auto * part = dynamic_cast<ra_stock_context *>(stock_ctx.get())) {
            part->view = this;
        }
    }

  private:
    ra_storage *             store;
    bool                     is_worst_case;
    llama_memory_context_ptr stock_ctx;
};
