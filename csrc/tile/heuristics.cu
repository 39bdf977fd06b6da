#include "tile/heuristics.h"

#include <algorithm>
#include <cmath>

#include "common/device.h"
#include "tile/arch.h"

namespace adder2d {
namespace {

// Predicted cycles of `blocks` blocks with `slices` slices each.
double predict_blocks(int64_t blocks, double slices, TileSize const& size, int32_t multiprocessors) {
  double const slice = size.k * size.pq * size.c / size.rate;
  int64_t const busiest = ceil_div(blocks, int64_t{multiprocessors});
  // Blocks that share a multiprocessor hide each other's waits; what is left over after full turns hides less.
  int64_t const left = busiest % size.blocks_per_sm;
  double const cost = busiest > left ? kArch.partial_turn : kArch.only_turn;
  double const turns = busiest + (left > 0 ? cost * (size.blocks_per_sm - left) : 0);
  return turns * (slices * slice + kArch.block_start);
}

// Predicted cycles of a kernel. The last of `slices` may be a part of one.
double predict(TileConfig const& config, TileSize const& size, double slices, int32_t multiprocessors,
               SplitReduce reduce) {
  int64_t const rest = config.tiles - config.full_tiles;
  double cycles = predict_blocks(config.full_tiles, slices, size, multiprocessors) + kArch.kernel_start;
  if (rest > 0) {
    cycles += predict_blocks(rest * config.splits, ceil_div(config.slices, config.splits), size, multiprocessors);
    double const bytes = double{sizeof(float)} * config.splits * size.k * size.pq;  // of a tile: written, then read
    cycles += reduce == SplitReduce::kForward && config.splits <= kMaxInKernelSplits
                  ? kArch.last_block_start + bytes / kArch.last_block_bytes
                  : kArch.reduce_start + config.splits * kArch.reduce_split +
                        2 * bytes * rest / (multiprocessors * kArch.reduce_bytes);
  }
  return cycles;
}

}  // namespace

TileConfig choose_tile(TileProblem const& problem, TileSize const* sizes, int32_t count, SplitReduce reduce,
                       size_t workspace_bytes, TileForce const& force, double* cycles) {
  bool const forward = reduce == SplitReduce::kForward;
  int32_t const multiprocessors = multiprocessor_count();
  TileConfig best{};
  *cycles = 0;
  for (int32_t index = 0; index < count; ++index) {
    if (force.tile >= 0 && index != force.tile) continue;
    TileSize const& size = sizes[index];
    TileConfig config{};
    config.tile = index;
    config.tiles_k = ceil_div(problem.rows, size.k);
    config.tiles_pq = ceil_div(problem.columns, size.pq);
    config.tiles = config.tiles_k * config.tiles_pq * problem.groups;
    double const exact = static_cast<double>(problem.reduction) / size.c;
    config.slices = std::max(1, static_cast<int32_t>(std::ceil(exact)));
    double const slices = forward ? exact : config.slices;
    int32_t const slots = multiprocessors * size.blocks_per_sm;
    int32_t const full = force.full_tiles >= 0 ? force.full_tiles : config.tiles / slots * slots;
    for (config.splits = 1; config.splits <= std::min(config.slices, kMaxSplits); ++config.splits) {
      if (force.splits > 0 && config.splits != force.splits) continue;
      bool const both = forward && config.splits > 1 && full > 0 && full < config.tiles;
      for (int32_t choice = 0; choice <= both; ++choice) {
        config.full_tiles = config.splits == 1 ? config.tiles : choice == 1 ? full : 0;
        if (force.full_tiles >= 0 && config.splits > 1 && config.full_tiles != force.full_tiles) continue;
        int64_t const blocks = int64_t{config.tiles - config.full_tiles} * config.splits;
        int32_t const floats = forward ? split_floats(size.k, size.pq) : size.k * size.pq;
        config.workspace_bytes = static_cast<size_t>(blocks) * floats * sizeof(float);
        // A count for each tile.
        if (forward) config.workspace_bytes += (config.tiles - config.full_tiles) * sizeof(uint64_t);
        if (config.workspace_bytes > workspace_bytes) continue;
        if (force.splits == 0 && blocks > int64_t{kArch.max_split_blocks} * multiprocessors) continue;
        double const predicted = predict(config, size, slices, multiprocessors, reduce);
        if (*cycles != 0 && predicted >= *cycles) continue;
        best = config;
        *cycles = predicted;
      }
    }
  }
  return best;
}

}  // namespace adder2d
