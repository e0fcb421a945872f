// ra_batch.cpp - see ra_batch.h
#include "ra_batch.h"

#include "cache.h"

#include <algorithm>

namespace {
// tokens [begin, end) of a batch, of one sequence
struct ra_run {
    llama_seq_id seq_id;
    int32_t      begin, end;
};
} // namespace

// the tokens of a batch, checked, as runs of one sequence each; false with ra_last_error()
static bool ra_list_runs(const llama_batch & batch, int32_t n_tokens,
                         const std::vector<ra_target> & targets, uint32_t n_ctx,
                         std::vector<ra_run> * runs) {
    std::vector<llama_pos> next; // [n_seq] position that must come, or -1: any
    for (const ra_target & t : targets) {
        next.push_back(t.cache->n_pos > 0 ? t.cache->n_pos : -1);
    }
    for (int32_t i = 0; i < n_tokens; ++i) {
        const llama_seq_id seq_id = batch.seq_id[i][0];
        const llama_pos    pos    = batch.pos[i];
        if (batch.n_seq_id[i] != 1) {
            ra_error(RA_STATUS_UNSUPPORTED,
                     "a token of a batch belongs to %d sequences: a "
                     "budgeted cache shares none, copy the sequence instead",
                     batch.n_seq_id[i]);
            return false;
        }
        if (seq_id < 0 || (size_t) seq_id >= targets.size()) {
            ra_error(RA_STATUS_INVALID,
                     "the batch names sequence %d, the context holds %d: raise n_seq_max", seq_id,
                     (int) targets.size());
            return false;
        }
        if (pos < 0 || (uint32_t) pos >= n_ctx) {
            ra_error(RA_STATUS_INVALID,
                     "position %d is beyond the context of %u tokens: the sequence ends here", pos,
                     n_ctx);
            return false;
        }
        if (next[seq_id] >= 0 && pos != next[seq_id]) {
            ra_error(RA_STATUS_INVALID, "positions must follow one another: expected %d, got %d",
                     next[seq_id], pos);
            return false;
        }
        next[seq_id] = pos + 1;
        if (runs->empty() || runs->back().seq_id != seq_id) {
            runs->push_back({ seq_id, i, i });
        }
        runs->back().end = i + 1;
    }
    return true;
}

// Micro-batches are cut so that a sequence is read in the same pieces whatever comes with it: of at most
// `n_piece` tokens from the beginning of its run. In one micro-batch a sequence has one piece.
static std::vector<int32_t> ra_cut(const std::vector<ra_run> & runs, int32_t n_piece,
                                   int32_t n_most) {
    std::vector<int32_t>      sizes;
    std::vector<llama_seq_id> at_hand;
    int32_t                   n = 0;
    for (const auto & [seq_id, begin, end] : runs) {
        const int32_t n_run = end - begin;
        for (int32_t n_done = 0; n_done < n_run; n_done += n_piece) {
            const int32_t n_next = std::min(n_piece, n_run - n_done);
            const bool is_in = std::find(at_hand.begin(), at_hand.end(), seq_id) != at_hand.end();
            if (n > 0 && (is_in || n + n_next > n_most)) {
                sizes.push_back(n);
                at_hand.clear();
                n = 0;
            }
            at_hand.push_back(seq_id);
            n += n_next;
        }
    }
    if (n > 0) {
        sizes.push_back(n);
    }
    return sizes;
}

// whether the batch is one token of each of several sequences
static bool ra_is_a_step(const std::vector<ra_run> & runs) {
    std::vector<llama_seq_id> ids;
    for (const ra_run & run : runs) {
        if (run.end - run.begin != 1 ||
            std::find(ids.begin(), ids.end(), run.seq_id) != ids.end()) {
            return false;
        }
        ids.push_back(run.seq_id);
    }
    return true;
}

// Recurrent layers want as many tokens of every sequence of a micro-batch: one of each, or a piece of one
// sequence.
static std::vector<llama_ubatch> ra_split_equal(llama_batch_allocr &        balloc,
                                                const std::vector<ra_run> & runs, uint32_t n_piece,
                                                uint32_t n_most) {
    std::vector<llama_ubatch> ubatches;
    const bool                is_a_step = ra_is_a_step(runs) && runs.size() <= n_most;
    while (balloc.get_n_used() < balloc.get_n_tokens()) {
        ubatches.push_back(is_a_step ? balloc.split_equal(n_most, false, 0)
                                     : balloc.split_seq(n_piece));
    }
    return ubatches;
}

std::vector<llama_ubatch> ra_split_batch(llama_batch_allocr &           balloc,
                                         const std::vector<ra_target> & targets, uint32_t n_ubatch,
                                         uint32_t n_ctx, bool equal) {
    std::vector<ra_run>       runs;
    std::vector<llama_ubatch> ubatches;
    if (!ra_list_runs(balloc.get_batch(), (int32_t) balloc.get_n_tokens(), targets, n_ctx, &runs)) {
        return ubatches;
    }
    // a piece must fit the room that a compression leaves
    const int32_t n_piece = std::min((int32_t) n_ubatch, targets[0].cache->settings.cfg.buffer);
    balloc.split_reset();
    if (equal) {
        return ra_split_equal(balloc, runs, (uint32_t) n_piece, n_ubatch);
    }
    for (const int32_t n : ra_cut(runs, n_piece, (int32_t) n_ubatch)) {
        ubatches.push_back(balloc.split_simple((uint32_t) n));
    }
    return ubatches;
}
