// Choice of tile and splits for the tiled kernels of all passes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/fast_div.h"

namespace adder2d {

constexpr int32_t kMaxSplits = 64;  // of a tile's reduction
// The last block of a tile adds up so many splits at most; a second kernel adds more.
constexpr int32_t kMaxInKernelSplits = 3;

// How a tiled kernel cuts the work: one block for each of the first `full_tiles` tiles of the output, then one for each
// split of the reduction of each other tile. Sums of splits go through the workspace: of a few, the block that comes
// last adds them, of many, a second, small kernel; both in order. The two axes of a tile are filters and pixels
// (fprop), or channels and pixels (dgrad).
struct TileConfig {
  int32_t tile;  // index into the family's table of tiles
  int32_t tiles_k, tiles_pq;
  int32_t tiles;       // tiles_k * tiles_pq * groups
  int32_t full_tiles;  // all of them where splits is 1
  int32_t slices;      // reduction steps of one tile
  int32_t splits;
  size_t packed_bytes;     // of packed weights and image at the start of the workspace, 0 for none
  size_t workspace_bytes;  // all of it
  uint64_t launch;         // of launch_number(): set by the launcher
};

struct TileSize {
  int32_t k, pq, c;       // filters, pixels, terms of a slice
  int32_t blocks_per_sm;  // that run at once
  double rate;            // accumulated terms a cycle and multiprocessor
};

// What tiles are cut out of.
struct TileProblem {
  int32_t rows, columns, groups;  // outputs of a group along k and pq
  int32_t reduction;              // terms of an output
};

// What a kernel family is called, and its tiles in the order of TileConfig::tile.
struct FamilyNames {
  char const* name;
  char const* const* tiles;
  int32_t tile_count;
};

// What of a TileConfig is fixed, for tests and measurements; the rest is chosen.
struct TileForce {
  int32_t tile = -1;        // below 0 for any
  int32_t splits = 0;       // 0 for any
  int32_t full_tiles = -1;  // below 0 for any; of a forced number of splits above 1
  int32_t packed = -1;      // 0 or 1: without or with packed weights; below 0 for either
};

// How the sums of splits meet.
enum class SplitReduce {
  // As in tile/split_k.cuh: any number of tiles is split; sums are padded, and each tile has a count in the workspace.
  kForward,
  // All tiles are split or none, and a second kernel adds all sums; the last slice takes as long as the others.
  kAllOrNone,
};

// Floats that a split of a tile takes in the workspace: whole items of all threads, with the padding of SmemTranspose.
__host__ __device__ constexpr int32_t split_floats(int32_t tile_k, int32_t tile_pq) {
  return ceil_div((tile_k + 8) * (tile_pq + 8), 1024) * 1024;
}

// The best tile and number of splits that `force` allows, with split sums in at most `workspace_bytes`. Sets all of the
// config but packed_bytes and launch. *cycles is the prediction, 0 where nothing fits.
TileConfig choose_tile(TileProblem const& problem, TileSize const* sizes, int32_t count, SplitReduce reduce,
                       size_t workspace_bytes, TileForce const& force, double* cycles);

}  // namespace adder2d
