// What the choice of kernels assumes of a GPU: the one place for the constants of a generation.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace adder2d {

// Fits to measurements on an H200 (sm_90; docs/performance.md). They serve all generations, since they only have to
// rank: a generation that ranks otherwise gets an Arch of its own, and the plans choose by compute capability. `rate`
// is in accumulated terms a cycle and multiprocessor, `blocks` are those that a multiprocessor runs at once: kernels
// are compiled for them (__launch_bounds__), and predictions count with them.
struct Arch {
  // Tiled kernels in general, in cycles.
  double block_start = 700;        // of a block, beside its slices
  double kernel_start = 3000;      // first copies, epilogue
  double partial_turn = 0.3;       // of a turn that each idle place for a block costs after full turns ...
  double only_turn = 0.5;          // ... and where there is no full turn
  double last_block_start = 6000;  // the last block of a tile adds few splits
  double last_block_bytes = 5;     // a cycle, of a block
  double reduce_start = 3000;      // a second kernel adds many splits
  double reduce_split = 20;
  double reduce_bytes = 6;       // a cycle and multiprocessor
  int32_t max_split_blocks = 8;  // a multiprocessor

  // fprop_simt, dgrad_simt: of 64 terms. Short slices take more copies and barriers a term.
  double simt_rate = 54, simt_rate_short_slices = 52, simt_rate_small = 42;
  double simt_pack_cycles = 60e3;  // a shorter kernel does not earn the packing back
  double dgrad_rate = 52;
  int32_t dgrad_hiding_blocks = 3;  // already hide each other's waits
  // fprop_half: of 128 terms.
  double half_rate = 85, half_rate_thin = 78, half_rate_small = 60;
  // What predict() does not see: a slice takes longer, and a tile beside its slices, of 64 x 128 outputs.
  double half_slice = 1.11, half_tile = 3650;
  double pack_start = 4000, pack_bytes = 6;  // its packing kernel, in cycles; bytes a cycle and multiprocessor
  // fprop_converted: its own kernel, and what it must gain beyond that.
  double convert_start = 4000, convert_bytes = 8, convert_margin = 1.15;
  double simt_any_fill = 2;  // fprop_simt on input and weights that are not both float32
  // fprop_window: of 64 terms; by the run of pixels where a thread has eight filters.
  double window_rate_4 = 57, window_rate_7 = 54, window_rate_2 = 55;
  double window_rate_32 = 54, window_rate_small_less = 7, window_rate_16 = 46;
  // fprop_pointwise, in cycles.
  double pointwise_rate = 56, pointwise_slice = 100, pointwise_tile = 200, pointwise_start = 4000;
  double pointwise_partial_turn = 0.4;

  // Blocks of a multiprocessor.
  int32_t simt_blocks = 3, simt_blocks_16 = 4, simt_blocks_small = 6;
  int32_t half_blocks = 2, half_blocks_thin = 4;
  int32_t window_blocks_64 = 3, window_blocks_32 = 5, window_blocks_16 = 2;
  int32_t pointwise_blocks = 3;
  int32_t dgrad_blocks = 4, dgrad_fewest_blocks = 2;  // by registers, by shared memory

  // Shared memory.
  int32_t smem_reserved = 1024;  // by the driver, of each block
  // The rest is first-level cache, where copies of 4 bytes find the rest of their sectors.
  size_t wgrad_max_smem = 160 << 10;
};
inline constexpr Arch kArch{};

constexpr size_t kMaxWorkspaceBytes = 64 << 20;  // of every pass; int32 reaches all that is packed there

}  // namespace adder2d
