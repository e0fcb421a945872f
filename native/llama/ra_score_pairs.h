// ra_score_pairs.h - what cosines of keys with one another say: twins, and what takes evicted tokens
#pragma once

#include "ra_score_graph.h"

// rows: results of the job, from the first value wanted on

// RA_JOB_COSINES_ALL, in order: twins of a head, see ra_twin_compare().
//   mass, twin [used] of the head
void ra_pairs_find_twins(const ra_layer & l, const ra_job & j, const float * rows, int32_t n_sink,
                         const float * mass, float * twin);

// The same jobs again, once it is known what goes: targets of a head.
//   closest [used] scratch, from job to job
void ra_pairs_find_targets(const ra_layer & l, const ra_job & j, const float * rows,
                           float * closest);

// RA_JOB_COSINES_GOING: targets of the tokens in list [n_rows].
void ra_pairs_find_targets_of(const ra_layer & l, const ra_job & j, const float * rows,
                              const int32_t * list);

// list [used] <- tokens of head ih that go; returns how many.
int32_t ra_pairs_list_going(const ra_layer & l, int32_t ih, int32_t * list);
