// Random values and layers for plugin_fuzz: both depend on the number of a case only.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "adder2d.h"

// SplitMix64 (Steele, Lea and Flood, 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : mState(seed) {}
  uint64_t next() {
    uint64_t z = mState += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int32_t below(int32_t count) { return static_cast<int32_t>(next() % static_cast<uint64_t>(count)); }
  int32_t between(int32_t low, int32_t high) { return low + below(high - low + 1); }
  bool one_in(int32_t count) { return below(count) == 0; }
  int32_t hostile32() {
    int32_t const values[] = {0,   1,     2,     3,       8,          -1,         -2,
                              255, 46341, 65536, 1 << 30, 0x7fffffff, 0x7ffffffe, -0x7fffffff - 1};
    return one_in(4) ? static_cast<int32_t>(next()) : values[below(static_cast<int32_t>(std::size(values)))];
  }
  int64_t hostile64() {
    int64_t const values[] = {INT64_MAX,        INT64_MIN,        INT64_MIN + 1,
                              int64_t{1} << 58, int64_t{1} << 32, -(int64_t{1} << 31)};
    return one_in(3) ? values[below(static_cast<int32_t>(std::size(values)))] : hostile32();
  }

 private:
  uint64_t mState;
};

// The attributes and sizes of a layer, which is valid when it is made.
struct Layer {
  int32_t N, H, W, R, S, groups, group_C, group_K;
  int32_t stride[2], padding[2], dilation[2], output_type, scale, residual;
  float lower, upper;
  int32_t nb_inputs() const { return 3 + 2 * scale + residual; }
  int32_t C() const { return groups * group_C; }
  int32_t K() const { return groups * group_K; }
};

inline Layer random_layer(Random& random) {
  Layer layer{};
  layer.N = random.between(1, 3), layer.groups = random.between(1, 3);
  layer.group_C = random.between(1, 5), layer.group_K = random.between(1, 6);
  int32_t *const sizes[] = {&layer.H, &layer.W}, *const taps[] = {&layer.R, &layer.S};
  for (int32_t axis = 0; axis < 2; ++axis) {
    layer.stride[axis] = random.between(1, 4), layer.padding[axis] = random.between(0, 3);
    layer.dilation[axis] = random.between(1, 3), *taps[axis] = random.between(1, 4);
    int32_t const least = layer.dilation[axis] * (*taps[axis] - 1) + 1 - 2 * layer.padding[axis];
    *sizes[axis] = random.between(std::max(least, 1), std::max(least, 1) + 9);
  }
  layer.output_type = random.below(2), layer.scale = random.below(2), layer.residual = random.below(2);
  layer.lower = random.one_in(2) ? 0 : -INFINITY, layer.upper = random.one_in(4) ? 6 : INFINITY;
  return layer;
}

inline int64_t output_size(Layer const& layer, int32_t axis) {
  return adder2d_output_size(axis ? layer.W : layer.H, axis ? layer.S : layer.R, layer.stride[axis],
                             layer.padding[axis], layer.dilation[axis]);
}

// Calls the C functions of adder2d.h with valid and with hostile params.
void fuzz_functions(Random& random);
