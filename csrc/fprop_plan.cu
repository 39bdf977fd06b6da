// Choice of tile and splits for the tiled forward kernels.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>

#include "fprop_tiled.cuh"

namespace adder2d {
namespace {

// Predicted cycles. The constants are fits to measurements on an H200 (docs/performance.md); they only have to rank.

// Of `blocks` blocks with `slices` slices each.
double predict_blocks(int64_t blocks, double slices, TileSize const& size, int32_t multiprocessors) {
  double const slice = size.k * size.pq * size.c / size.rate;
  int64_t const busiest = ceil_div(blocks, int64_t{multiprocessors});
  // Blocks that share a multiprocessor hide each other's waits; what is left over after full turns hides less.
  int64_t const left = busiest % size.resident;
  double const turns = busiest + (left > 0 ? (busiest > left ? 0.3 : 0.5) * (size.resident - left) : 0);
  return turns * (slices * slice + 700);
}

// `slices` and `forward` as of choose_tile.
double predict(FpropPlan const& plan, TileSize const& size, double slices, int32_t multiprocessors, bool forward) {
  int64_t const rest = plan.tiles - plan.whole;
  double cycles = predict_blocks(plan.whole, slices, size, multiprocessors) + 3000;  // first copies, epilogue
  if (rest > 0) {
    cycles += predict_blocks(rest * plan.splits, ceil_div(plan.slices, plan.splits), size, multiprocessors);
    double const bytes = double{sizeof(float)} * plan.splits * size.k * size.pq;  // of a tile: written, then read
    cycles += forward && plan.splits <= kMaxJoined ? 6000 + bytes / 5 : 3000 + plan.splits * 20 + 2 * bytes * rest / (multiprocessors * 6.0);
  }
  return cycles;
}

}  // namespace

FpropPlan choose_tile(FpropArgs const& args, TileSize const* sizes, int32_t count, double (*slices_of)(FpropArgs const&, TileSize const&),
                      size_t workspace_bytes, double* cycles, bool forward) {
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
    double const slices = slices_of(args, size);
    plan.slices = static_cast<int32_t>(std::ceil(slices));
    int32_t const slots = multiprocessors * size.resident, full = plan.tiles / slots * slots;
    for (plan.splits = 1; plan.splits <= std::min(plan.slices, kMaxSplits); ++plan.splits) {
      bool const both = forward && plan.splits > 1 && full > 0 && full < plan.tiles;
      for (int32_t choice = 0; choice <= both; ++choice) {
        plan.whole = plan.splits == 1 ? plan.tiles : choice == 1 ? full : 0;
        int64_t const blocks = int64_t{plan.tiles - plan.whole} * plan.splits;
        int32_t const floats = forward ? split_floats(size.k, size.pq) : size.k * size.pq;
        plan.workspace_bytes = static_cast<size_t>(blocks) * floats * sizeof(float);
        if (forward) plan.workspace_bytes += (plan.tiles - plan.whole) * sizeof(uint64_t);  // a count for each tile
        if (blocks > int64_t{kMaxSplitBlocks} * multiprocessors || plan.workspace_bytes > workspace_bytes) continue;
        double const predicted = predict(plan, size, slices, multiprocessors, forward);
        if (*cycles != 0 && predicted >= *cycles) continue;
        best = plan;
        *cycles = predicted;
      }
    }
  }
  return best;
}

uint64_t launch_number() {
  static std::atomic<uint64_t> number{static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count())};
  // Numbers side by side become random ones (splitmix64; Steele, Lea and Flood, 2014).
  uint64_t n = number.fetch_add(1, std::memory_order_relaxed) * 0x9e3779b97f4a7c15u;
  n = (n ^ n >> 30) * 0xbf58476d1ce4e5b9u;
  n = (n ^ n >> 27) * 0x94d049bb133111ebu;
  return (n ^ n >> 31) / kMaxSplits * kMaxSplits;
}

}  // namespace adder2d
