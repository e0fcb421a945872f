// ra_state.h - saving and restoring a budgeted cache
#pragma once

#include "llama-io.h"
#include "llama.h"
#include "ra_storage.h"

// std::runtime_error (text also in ra_last_error()) if there is no such state of a budgeted cache
//   seq_id  -1: all sequences
void ra_state_check(llama_seq_id seq_id, int32_t n_seq, llama_state_seq_flags flags);

// of one sequence
void ra_state_write(llama_io_write_i & io, const ra_storage & store);

// into an empty cache; n_ctx: positions end there. Throws like above when the state does not belong to
// this kind of cache or is damaged; the cache is empty then.
void ra_state_read(llama_io_read_i & io, ra_storage & store, uint32_t n_ctx);
