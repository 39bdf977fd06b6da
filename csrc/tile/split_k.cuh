// Tiles whose reduction is split among blocks: who does what, and how the sums meet.
#pragma once

#include <atomic>
#include <chrono>

#include "common/launch.cuh"
#include "tile/epilogue.cuh"

namespace adder2d {

// What a block does: slices first .. last - 1 of a tile. `split` is below 0 for a whole tile. Blocks side by side have
// the same split, and so the same number of slices: multiprocessors then finish at the same time.
struct WorkTile {
  int32_t tile, split, first, last;

  __device__ __forceinline__ explicit WorkTile(TileConfig const& config)
      : tile(static_cast<int32_t>(blockIdx.x)), split(-1), first(0), last(config.slices) {
    if (tile < config.full_tiles) return;
    int32_t const rest = config.tiles - config.full_tiles;
    split = (tile - config.full_tiles) / rest;
    tile -= split * rest;
    first = static_cast<int32_t>(int64_t{config.slices} * split / config.splits);
    last = static_cast<int32_t>(int64_t{config.slices} * (split + 1) / config.splits);
  }
};

// One item, four sums, of a thread: Sums::kItems of Sums::kThreads threads.
template <class Sums>
__device__ __forceinline__ float4* partial_sum(FpropArgs const& a, TileConfig const& config, int32_t split,
                                               int32_t tile, int32_t item, int32_t thread) {
  static_assert(4 * Sums::kItems * Sums::kThreads <= Sums::kSplitFloats, "splits find room");
  int64_t const index = (int64_t{tile - config.full_tiles} * config.splits + split) * (Sums::kSplitFloats / 4) +
                        item * Sums::kThreads + thread;
  return reinterpret_cast<float4*>(static_cast<char*>(a.p.workspace) + config.packed_bytes) + index;
}

__device__ __forceinline__ void add(float4* sum, float4 const& v) {
  sum->x += v.x;
  sum->y += v.y;
  sum->z += v.z;
  sum->w += v.w;
}

// Counts the blocks of a tile that have come so far; true for the last one. Nobody clears the counts before a launch: a
// count holds in its upper bits the number of the launch that it belongs to, and any other number there means that none
// has come. The last block clears the number, because a launch in a CUDA graph has the same one in each replay.
__device__ __forceinline__ bool arrive_is_last(unsigned long long* count, TileConfig const& config) {
  unsigned long long expected, seen = 0;
  int32_t arrived;
  __threadfence();
  do {
    expected = seen;
    unsigned long long const before = expected ^ config.launch;
    arrived = before < kMaxSplits ? static_cast<int32_t>(before) + 1 : 1;
    seen = atomicCAS(count, expected, arrived == config.splits ? 0 : config.launch | arrived);
  } while (seen != expected);
  if (arrived < config.splits) return false;
  __threadfence();
  return true;
}

// Leaves a split's sums, get(item), in the workspace. Where there are few splits, the block of a tile that comes last
// adds up those of all, always in the same order, so that results repeat exactly, and receives them by put(item, sum):
// true for this one.
template <class Sums, class Get, class Put>
__device__ __forceinline__ bool reduce_splits(FpropArgs const& a, TileConfig const& config, WorkTile const& work,
                                              Get const& get, Put const& put) {
#pragma unroll
  for (int item = 0; item < Sums::kItems; ++item)
    __stcg(partial_sum<Sums>(a, config, work.split, work.tile, item, threadIdx.x), get(item));
  if (config.splits > kMaxInKernelSplits) return false;
  __syncthreads();
  int64_t const floats = int64_t{config.tiles - config.full_tiles} * config.splits * Sums::kSplitFloats;
  auto* const counts = reinterpret_cast<unsigned long long*>(static_cast<char*>(a.p.workspace) + config.packed_bytes +
                                                             floats * sizeof(float));
  if (!__syncthreads_or(threadIdx.x == 0 && arrive_is_last(&counts[work.tile - config.full_tiles], config)))
    return false;
  float4 total[Sums::kItems] = {};
#pragma unroll 1
  for (int32_t split = 0; split < config.splits; ++split)
#pragma unroll
    for (int item = 0; item < Sums::kItems; ++item)
      add(&total[item], __ldcg(partial_sum<Sums>(a, config, split, work.tile, item, threadIdx.x)));
#pragma unroll
  for (int item = 0; item < Sums::kItems; ++item) put(item, total[item]);
  return true;
}

// Adds many splits of item blockIdx.y of a tile, in order. Where there are few tiles, kGroups threads share an output's
// splits.
template <class Sums, int kGroups>
__global__ void __launch_bounds__(Sums::kThreads* kGroups)
    adder2d_fprop_reduce_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ TileConfig const config) {
  __shared__ float4 sums[kGroups][Sums::kThreads];
  int32_t const thread = threadIdx.x % Sums::kThreads, group = threadIdx.x / Sums::kThreads;
  int32_t const tile = config.full_tiles + static_cast<int32_t>(blockIdx.x);
  float4 const* const partial = partial_sum<Sums>(a, config, 0, tile, blockIdx.y, thread);
  wait_for_primary();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  constexpr int kBatch = 8;  // loads on their way at once
  for (int32_t first = group; first < config.splits; first += kBatch * kGroups) {
    float4 v[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      int32_t const split = first + b * kGroups;
      v[b] = split < config.splits ? partial[split * (Sums::kSplitFloats / 4)] : float4{};
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) add(&sum, v[b]);
  }
  if constexpr (kGroups > 1) {
    sums[group][thread] = sum;
    __syncthreads();
    if (group != 0) return;
#pragma unroll
    for (int i = 1; i < kGroups; ++i) add(&sum, sums[i][thread]);
  }
  Sums(a, config, tile, thread).store(a, blockIdx.y, thread, sum);
}

// Stores a tile of transposed sums with a fused epilogue: four quads of a thread at a time, so that their residuals are
// on their way together. Not inlined, as store4_otherwise: kernels stay as they are without it.
template <class Tile, bool kFilters>
__device__ __noinline__ void store_fused(FpropArgs const& a, int32_t first_k, int32_t end_k, int32_t first_pixel,
                                         float const* sums) {
  using Transpose = typename Tile::Transpose;
  constexpr int kColumns = kFilters ? Transpose::kTileK : Transpose::kTilePQ, kQuads = kColumns / 4;
  constexpr int kRows = kFilters ? Transpose::kTilePQ : Transpose::kTileK, kStep = Tile::kThreads / kQuads, kBatch = 4;
  int32_t const thread = threadIdx.x, column = thread % kQuads * 4;
  if (thread >= kStep * kQuads) return;
  auto const k_of = [&](int32_t row) { return first_k + (kFilters ? column : row); };
  auto const m_of = [&](int32_t row) { return first_pixel + (kFilters ? row : column); };
  auto const is_there = [&](int32_t row) { return row < kRows && k_of(row) < end_k && m_of(row) < a.NPQ; };
  FusedFilter filters[4];
  if (kFilters && first_k + column < end_k) fused_filters<true>(a, first_k + column, filters);
#pragma unroll 1
  for (int32_t first = thread / kQuads; first < kRows; first += kBatch * kStep) {
    int64_t index[kBatch];
    float4 residual[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int32_t const row = first + i * kStep;
      if (!is_there(row)) continue;
      index[i] = output_offset(a, m_of(row)) + k_of(row) * a.p.y_stride[1];
      residual[i] = residual4_at(a, index[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      int32_t const row = first + i * kStep;
      if (!is_there(row)) continue;
      if (!kFilters) fused_filters<false>(a, k_of(row), filters);
      float4 const& sum = *reinterpret_cast<float4 const*>(
          sums + (kFilters ? row * Transpose::kPitchK : row * Transpose::kPitchPQ) + column);
      store4_from_float(a.p.y, index[i], a.p.y_type, fuse(a, filters, sum, residual[i]));
    }
  }
}

// Stores a tile whose sums have changed hands. Its loops stay loops: unrolled they were half of a kernel's code, and no
// faster.
template <class Tile>
__device__ __forceinline__ void store_transposed(FpropArgs const& a, TileConfig const& config, WorkTile const& work,
                                                 Tile const& tile, float* sums) {
  using Transpose = typename Tile::Transpose;
  if (work.split >= 0) {
    // As they lie in shared memory, padding included.
    auto const item_at = [&](int32_t item) -> float4& {
      return reinterpret_cast<float4*>(sums)[item * Tile::kThreads + threadIdx.x];
    };
    if (!reduce_splits<Tile>(a, config, work, item_at, [&](int32_t item, float4 const& sum) { item_at(item) = sum; }))
      return;
    __syncthreads();
  }
  if (a.stores_vectors)
    return a.y_channels_last ? store_fused<Tile, true>(a, tile.first_k, tile.end_k, tile.first_pixel, sums)
                             : store_fused<Tile, false>(a, tile.first_k, tile.end_k, tile.first_pixel, sums);
  auto const sum = [&](int32_t k, int32_t pq) -> float4 const& {
    return *reinterpret_cast<float4 const*>(&sums[Transpose::index(a, k, pq)]);
  };
  int32_t const thread = threadIdx.x;
  if (a.y_channels_last) {
    constexpr int kQuads = Transpose::kTileK / 4;
    int32_t const k = thread % kQuads * 4;
#pragma unroll 1
    for (int32_t pq = thread / kQuads; pq < Transpose::kTilePQ; pq += Tile::kThreads / kQuads) {
      int32_t const m = tile.first_pixel + pq;
      store4<true>(a, tile.first_k + k, tile.end_k, m, output_offset(a, m), sum(k, pq));
    }
  } else {
    constexpr int kQuads = Transpose::kTilePQ / 4, kRows = Tile::kThreads / kQuads;
    if (thread >= kRows * kQuads) return;  // of tiles of 112 pixels
    int32_t const pq = thread % kQuads * 4, m = tile.first_pixel + pq;
    int64_t const offset = output_offset(a, m);
#pragma unroll 2
    for (int32_t k = thread / kQuads; k < Transpose::kTileK; k += kRows)
      store4<false>(a, tile.first_k + k, tile.end_k, m, offset, sum(k, pq));
  }
  static_assert(Tile::kThreads % (Transpose::kTileK / 4) == 0 && Tile::kThreads >= Transpose::kTilePQ / 4,
                "threads take whole rows of quads");
}

// A number that no other launch has, of 58 random bits, a multiple of kMaxSplits: memory that this launch has not
// written holds it by chance once in 2^58 times.
inline uint64_t launch_number() {
  static std::atomic<uint64_t> number{
      static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count())};
  // Numbers side by side become random ones (splitmix64; Steele, Lea and Flood, 2014).
  uint64_t n = number.fetch_add(1, std::memory_order_relaxed) * 0x9e3779b97f4a7c15u;
  n = (n ^ n >> 30) * 0xbf58476d1ce4e5b9u;
  n = (n ^ n >> 27) * 0x94d049bb133111ebu;
  return (n ^ n >> 31) / kMaxSplits * kMaxSplits;
}

// Launches the kernel of one tile and, where there are many splits, the kernel that adds them. `after_pack` says that
// the kernel before it on the stream packs its weights, and that it waits for them by itself. `most_smem_bytes` is the
// same for all plans: another thread may be about to launch. Args is FpropArgs or more.
template <class Sums, class Args>
cudaError_t launch_tiled(void (*kernel)(Args, TileConfig), size_t smem_bytes, size_t most_smem_bytes, int32_t threads,
                         bool after_pack, Args const& args, TileConfig const& config, cudaStream_t stream) {
  cudaError_t error = allow_smem(kernel, most_smem_bytes);
  if (error != cudaSuccess) return error;
  TileConfig numbered = config;
  numbered.launch = launch_number();
  int32_t const rest = config.tiles - config.full_tiles;
  error = launch_kernel(after_pack, kernel, dim3(config.full_tiles + rest * config.splits), dim3(threads), smem_bytes,
                        stream, args, numbered);
  if (error != cudaSuccess || rest == 0 || config.splits <= kMaxInKernelSplits) return error;
  dim3 const items(rest, Sums::kItems);
  constexpr int kGroups = 512 / Sums::kThreads;
  return config.splits >= 8
             ? launch_dependent(adder2d_fprop_reduce_kernel<Sums, kGroups>, items, dim3(512), 0, stream, args, config)
             : launch_dependent(adder2d_fprop_reduce_kernel<Sums, 1>, items, dim3(Sums::kThreads), 0, stream, args,
                                config);
}

}  // namespace adder2d
