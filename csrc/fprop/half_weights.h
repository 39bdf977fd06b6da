// fprop_half.cu: which layers it supports, and its packed weights, which do not depend on the tile:
//
//   halves [groups][slices][filters of a group, rounded up to kMaxTileK][kTileC]
//
// where slices are kTileC terms of the reduction. That runs over vectors of kVector channels, all of one tap, then the
// next tap's; channels of a group are filled up with zeros to whole vectors, and vectors to whole slices.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "adder2d.h"
#include "common/convert.cuh"
#include "common/fast_div.h"

namespace adder2d::fprop_half {

constexpr int kVector = 8;                       // halves of 16 bytes
constexpr int kTileC = 32;                       // halves of a slice, of all tiles
constexpr int kMaxTileK = 64;                    // filters of the largest tile; all others divide it
constexpr int kMinChannels = 3;                  // of a group: vectors would be mostly empty with fewer
constexpr int kPackElements = 4 * kVector * 49;  // of one filter in a block of the packing kernel, at most

// Whether the kernels support the layer, apart from device and workspace.
inline bool has_half_shape(Adder2dParams const& p) {
  return is_16_bit(p.x_type) && p.C / p.groups >= kMinChannels && p.R * p.S <= kPackElements / kVector;
}

// Vectors of a tap and group.
inline int32_t vectors_of(Adder2dParams const& p) { return ceil_div(p.C / p.groups, kVector); }

// Of the reduction.
inline int32_t slices_of(Adder2dParams const& p) { return ceil_div(vectors_of(p) * p.R * p.S, kTileC / kVector); }

// Filters of a group in the packed weights.
inline int32_t pitch_of(Adder2dParams const& p) { return ceil_div(p.K / p.groups, kMaxTileK) * kMaxTileK; }

inline size_t weight_bytes(Adder2dParams const& p) {
  return sizeof(uint16_t) * p.groups * slices_of(p) * kTileC * pitch_of(p);
}

}  // namespace adder2d::fprop_half
