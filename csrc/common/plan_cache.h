// Plans of the last problems.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>
#include <string.h>

namespace adder2d {

// make(), or what it gave when it was last called with the same key on this device and thread: choosing a plan takes
// microseconds. Key has no padding.
template <class Plan, class Key, class Make>
Plan cached_plan(Key const& key, Make const& make) {
  struct Entry {
    Key key;
    int device;
    Plan plan;
  };
  constexpr uint32_t kEntries = 64;
  static thread_local Entry entries[kEntries] = {};
  int device = 0;
  cudaGetDevice(&device);
  uint32_t words[sizeof(key) / 4], hash = 2166136261u;  // FNV-1a
  memcpy(words, &key, sizeof(key));
  for (uint32_t const word : words) hash = (hash ^ word) * 16777619u;
  Entry& entry = entries[hash % kEntries];
  if (entry.device != device || memcmp(&entry.key, &key, sizeof(key)) != 0) entry = {key, device, make()};
  return entry.plan;
}

}  // namespace adder2d
