// Kernel families by name, and the choice of one that tests and measurements force.
#pragma once

#include <stdint.h>

#include <atomic>

#include "tile/heuristics.h"

namespace adder2d {

// One family, and what else is fixed.
struct Forced {
  int32_t family = -1;  // index into the pass's table; below 0 where nothing is forced
  TileForce tile;
};

// The forced choice of one pass. It is read on every call: one relaxed load.
class ForcedChoice {
 public:
  Forced get() const;
  // Reads "family[:tile[:splits[:full_tiles[:packed]]]]", or null or "" for no choice, and stores it. Returns null, or
  // why it could not: one sentence that lives until the next call on the same thread, in which case nothing is changed.
  char const* set(char const* text, FamilyNames const* const* families, int32_t count);

 private:
  std::atomic<uint64_t> bits_{0};
};

// The same text for a choice that was made; it lives until the next call on the same thread.
char const* describe_choice(FamilyNames const& family, TileConfig const& config);

}  // namespace adder2d
