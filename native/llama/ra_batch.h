// ra_batch.h - how a batch is cut into micro-batches
#pragma once

#include "llama-batch.h"
#include "ra_tensors.h"

// The micro-batches of a batch for the sequences `targets`; none, with ra_last_error(), if it is not one for
// a budgeted cache.
//   n_ctx  positions end there
//   equal  all sequences of a micro-batch have as many tokens in it, as recurrent layers want it
std::vector<llama_ubatch> ra_split_batch(llama_batch_allocr &           balloc,
                                         const std::vector<ra_target> & targets, uint32_t n_ubatch,
                                         uint32_t n_ctx, bool equal);
