/* StreamingLLM, arXiv:2309.17453: the sinks (kept by the engine) and the most recent tokens.
 *
 *   Z_j = j     rank in position order
 *
 * score [n_kv] f32 out, higher = keep. Needs no features. */
#include "policy.h"

void ra_policy_streaming_score(const ra_config * cfg, const ra_features * f, float * score) {
    (void) cfg;
    for (int32_t j = 0; j < f->n_kv; ++j) {
        score[j] = (float) j;
    }
}
