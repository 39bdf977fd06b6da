// Choice of tile and splits for the tiled forward kernels.
#include <algorithm>

#include "fprop_tiled.cuh"

namespace adder2d {
namespace {

// Predicted cycles. The constants are fits to measurements on an H200 (docs/performance.md); they only have to rank.
double predict(int64_t tiles, int32_t splits, int32_t slices, TileSize const& size, int32_t multiprocessors) {
  double const slice = size.k * size.pq * size.c / size.rate;
  int64_t const blocks = ceil_div(tiles * splits, int64_t{multiprocessors});  // of the busiest multiprocessor
  // Blocks that share a multiprocessor hide each other's waits; what is left over after full turns hides less.
  int64_t const left = blocks % size.resident;
  double const turns = blocks + (left > 0 ? (blocks > left ? 0.3 : 0.5) * (size.resident - left) : 0);
  double cycles = turns * (ceil_div(slices, splits) * slice + 700) + 3000;  // first copies, epilogue
  if (splits > 1) {
    double const bytes = 2.0 * sizeof(float) * splits * tiles * size.k * size.pq;  // written, then read
    cycles += 3000 + splits * 20 + bytes / (multiprocessors * 6.0);
  }
  return cycles;
}

}  // namespace

FpropPlan choose_tile(FpropArgs const& args, TileSize const* sizes, int32_t count, int32_t (*slices_of)(FpropArgs const&, TileSize const&),
                      size_t workspace_bytes, double* cycles) {
  int32_t const multiprocessors = multiprocessor_count();
  FpropPlan best{};
  *cycles = 0;
  for (int32_t index = 0; index < count; ++index) {
    TileSize const& size = sizes[index];
    FpropPlan plan{};
    plan.tile = index;
    plan.tiles_k = ceil_div(args.Kg, size.k);
    plan.tiles_pq = ceil_div(args.NPQ, size.pq);
    plan.tiles = plan.tiles_k * plan.tiles_pq * args.p.groups;
    plan.slices = slices_of(args, size);
    for (plan.splits = 1; plan.splits <= std::min(plan.slices, kMaxSplits); ++plan.splits) {
      int64_t const blocks = int64_t{plan.tiles} * plan.splits;
      plan.workspace_bytes = plan.splits > 1 ? static_cast<size_t>(blocks) * size.k * size.pq * sizeof(float) : 0;
      if (plan.splits > 1 && (blocks > int64_t{kMaxSplitBlocks} * multiprocessors || plan.workspace_bytes > workspace_bytes)) break;
      double const predicted = predict(plan.tiles, plan.splits, plan.slices, size, multiprocessors);
      if (*cycles != 0 && predicted >= *cycles) continue;
      best = plan;
      *cycles = predicted;
    }
  }
  return best;
}

}  // namespace adder2d
