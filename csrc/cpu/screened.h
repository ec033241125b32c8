// `complete` (search.h) by the 16-bit screen: the same bits, and mostly less work.
#pragma once

#include "search.h"

namespace saemnesia_fast {

// Whether this machine has a screen, and so many searches gain by it.
bool screen_pays(const Encoder<float>& encoder, int64_t tokens, int64_t k);

// Completes the searches that the screen decides, and returns the others as they were: those of tokens with NaN or very
// large numbers, those with so many nearly equal pre-activations that no bound tells them apart, and all if W has such
// rows.
std::vector<Search<float>*> complete_screened(const Encoder<float>& encoder, const Rows& x,
                                              const std::vector<Search<float>*>& searches, int64_t k);

}  // namespace saemnesia_fast
