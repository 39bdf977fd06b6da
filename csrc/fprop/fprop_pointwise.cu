// 1 x 1 kernels at stride 1 of few channels, on float32 arithmetic: blocks that go through many tiles.
//
// A tile of so few channels is short work: in fprop_simt.cu its first copies, its stores and its start cost a seventh
// of the time. Here a block keeps the weights of kTileK filters in shared memory and goes through a range of pixels,
// tile after tile. The ring of image slices runs across their borders: the next tile's first slice is on its way while
// this tile is added up and stored. Neither weights nor image are packed, and sums are stored as the threads hold them,
// four pixels or four filters at once.
#include <algorithm>
#include <type_traits>

#include "common/cp_async.cuh"
#include "common/device.h"
#include "common/launch.cuh"
#include "fprop/fprop.h"
#include "tile/arch.h"
#include "tile/epilogue.cuh"
#include "tile/mainloop.cuh"

namespace adder2d {
namespace {

// ---- traits

// Whose weights let three blocks into 227 KiB; with many more, tiles are long work anyway.
constexpr int32_t kMaxChannels = 128;

template <int kTileK_, int kTilePQ_, int kTileC_>
struct Tile {
  static constexpr int kTileK = kTileK_, kTilePQ = kTilePQ_;  // outputs of a block at a time: filters, pixels
  static constexpr int kTileC = kTileC_;                      // channels of a slice, at most
  static constexpr int kUnroll = 4;                           // channels of the inner loop
  static constexpr int kThreadK = 8, kThreadPQ = 8;           // outputs of a thread, in groups of 4 by 4
  static constexpr int kGroupsK = kThreadK / 4, kGroupsPQ = kThreadPQ / 4;
  static constexpr int kThreads = kTileK * kTilePQ / (kThreadK * kThreadPQ);
  static constexpr int kLanesK = 4, kLanesPQ = 8;  // a warp's threads
  static constexpr int kWarpsK = kTileK / (kLanesK * kThreadK);
  static constexpr int kBlocksPerSM = kArch.pointwise_blocks;
  // Filters, or pixels, copied at once: 8 threads side by side along the channels.
  static constexpr int kRows = kThreads / 8;
  static constexpr int kLanes = kTilePQ / 4;  // where pixels lie side by side: threads along them
  // 8 threads that store 8 channels of a filter, or a pixel, find different banks.
  static constexpr int kPitchK = kTileK + 4, kPitchPQ = kTilePQ + 4;
  static constexpr int kStageFloats = kTileC * kPitchPQ;

  static_assert(kTileK % (kLanesK * kThreadK) == 0 && kTilePQ % (kLanesPQ * kThreadPQ) == 0,
                "warps must tile the block");
  static_assert(kTileC % 8 == 0 && kTileK % kRows == 0 && kTilePQ % kRows == 0, "8 lanes copy along the channels");
  static_assert(kThreads % kLanes == 0 && 8 % (kThreads / kLanes) == 0, "threads copy whole rows of pixels");
};

constexpr int32_t kStages = 2;  // slices in flight

// The stages, the epilogue's filters, the weights.
template <class T, bool kPlain = false>
constexpr size_t smem_size(int32_t channels) {
  return sizeof(float) * (kStages * T::kStageFloats + channels * T::kPitchK) +
         (kPlain ? sizeof(Epilogue::Filter) : sizeof(FusedFilter)) * T::kTileK;
}

// How the output is shared out. Blocks of a range of pixels lie side by side, so that they read the same image at the
// same time; the ranges with one tile more than others come first, so that multiprocessors get the same number of
// tiles.
struct Ranges {
  int32_t tiles_k;
  int32_t count, tiles, longer;  // the first `longer` ranges have a tile more than `tiles`
  int32_t slice;                 // channels of a slice: of all slices of a tile but the last
};
template <class T>
Ranges share_out(FpropArgs const& a) {
  Ranges ranges;
  int32_t const tiles_pq = ceil_div(a.NPQ, T::kTilePQ);
  ranges.tiles_k = ceil_div(a.Kg, T::kTileK);
  ranges.count = std::clamp(multiprocessor_count() * T::kBlocksPerSM / (ranges.tiles_k * a.p.groups), 1, tiles_pq);
  ranges.tiles = tiles_pq / ranges.count;
  ranges.longer = tiles_pq % ranges.count;
  ranges.slice = ceil_div(ceil_div(a.Cg, ceil_div(a.Cg, T::kTileC)), 8) * 8;
  return ranges;
}

// Pixel m of channels_last: `pitch` bytes, of 32 bits, for one multiplication and addition at once.
__device__ __forceinline__ float const* at(float const* first, int32_t m, int32_t pitch) {
  return reinterpret_cast<float const*>(reinterpret_cast<char const*>(first) + int64_t{m} * pitch);
}
__device__ __forceinline__ float* at(float* first, int32_t m, int32_t pitch) {
  return reinterpret_cast<float*>(reinterpret_cast<char*>(first) + int64_t{m} * pitch);
}

// ---- fill

// The fills of a block, slice after slice and tile after tile: the image [kTileC][kPitchPQ]. Pixels after the last one
// are copied from it, and not stored.
template <class T, bool kChannels>
struct Loader {
  FpropArgs const& a;
  int32_t pixel, tiles;    // of the tile being filled: the thread's first pixel; tiles from this one on
  int32_t channel, slice;  // the next slice's first channel; channels of a slice
  int32_t dst;             // where the thread's first copy goes in the stage
  // Where it comes from, in the first channel of pixel 0 (kChannels), or of the thread's pixels.
  float const* x;
  float const* group;

  __device__ __forceinline__ Loader(FpropArgs const& args, Ranges const& ranges, int32_t g, int32_t first_pixel,
                                    int32_t count)
      : a(args), tiles(count), channel(0), slice(ranges.slice) {
    int32_t const lanes = kChannels ? 8 : T::kLanes, lane = threadIdx.x % lanes, row = threadIdx.x / lanes;
    pixel = first_pixel + (kChannels ? row : 4 * lane);
    dst = kChannels ? lane * T::kPitchPQ + row : row * T::kPitchPQ + 4 * lane;
    x = group = static_cast<float const*>(a.p.x) + (int64_t{g} * a.Cg + (kChannels ? lane : row)) * a.p.x_stride[1];
    if constexpr (!kChannels) find_pixels();
  }

  __device__ __forceinline__ void find_pixels() {
    int32_t pq;
    int32_t const n = a.div_PQ.divmod(min(pixel, a.NPQ - 4), &pq);
    x = group + (n * a.p.x_stride[0] + pq);
  }

  // Starts the copies of the next slice, if there is one. A barrier lies between two calls.
  __device__ __forceinline__ void fill(float* stage) {
    if (tiles == 0) return;
    int32_t const channels = min(slice, a.Cg - channel);
    float* const to = stage + dst;
    if constexpr (kChannels) {
      int32_t const pitch = 4 * static_cast<int32_t>(a.p.x_stride[3]);
#pragma unroll
      for (int i = 0; i < T::kTilePQ; i += T::kRows) {
        float const* const src = at(x + channel, min(pixel + i, a.NPQ - 1), pitch);
#pragma unroll
        for (int c = 0; c < T::kTileC; c += 8)
          if (c == 0 || c < channels) copy4_async(to + c * T::kPitchPQ + i, src + c, 1);
      }
    } else {
      constexpr int kRows = T::kThreads / T::kLanes;
      float const* src = x + channel * a.p.x_stride[1];
#pragma unroll
      for (int c = 0; c < T::kTileC; c += kRows, src += kRows * a.p.x_stride[1])
        if (c == 0 || c < channels) copy16_async(to + c * T::kPitchPQ, src);
    }
    channel += slice;
    if (channel >= a.Cg) {
      channel = 0;
      pixel += T::kTilePQ;
      --tiles;
      if constexpr (!kChannels) find_pixels();
    }
  }
};

// ---- kernel

// Stores a thread's outputs where y is of any type, with a fused epilogue: four quads at a time, so that their
// residuals are on their way together. `filters` are those of the tile, in shared memory.
template <class T, bool kChannels>
__device__ __forceinline__ void store_fused(FpropArgs const& a, ThreadCoord<T> const& thread, int32_t first_k,
                                            int32_t end_k, int32_t first_pixel, FusedFilter const* filters,
                                            float const (&acc)[T::kThreadK][T::kThreadPQ]) {
  constexpr int kQuads = T::kThreadK * T::kThreadPQ / 4, kBatch = 4;
#pragma unroll
  for (int first = 0; first < kQuads; first += kBatch) {
    int64_t index[kBatch];
    float4 residual[kBatch];
    bool present[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      int const i = kChannels ? (first + b) % T::kGroupsK * 4 : (first + b) / T::kGroupsPQ;
      int const j = kChannels ? (first + b) / T::kGroupsK : (first + b) % T::kGroupsPQ * 4;
      int32_t const k = first_k + thread.k(i), m = first_pixel + thread.pq(j);
      present[b] = k < end_k && m < a.NPQ;
      index[b] = output_offset(a, m) + k * a.p.y_stride[1];
      if (present[b]) residual[b] = residual4_at(a, index[b]);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      int const i = kChannels ? (first + b) % T::kGroupsK * 4 : (first + b) / T::kGroupsPQ;
      int const j = kChannels ? (first + b) / T::kGroupsK : (first + b) % T::kGroupsPQ * 4;
      if (!present[b]) continue;
      FusedFilter f[4];
      float sums[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        f[e] = filters[thread.k(i) + (kChannels ? e : 0)];
        sums[e] = kChannels ? acc[i + (kChannels ? e : 0)][j] : acc[i][j + (kChannels ? 0 : e)];
      }
      float4 const y = fuse(a, f, make_float4(sums[0], sums[1], sums[2], sums[3]), residual[b]);
      store4_from_float(a.p.y, index[b], a.p.y_type, y);
    }
  }
}

// kChannels: channels lie side by side in x, and filters in y; else pixels do. kPlain: y is float32, and there is no
// fused epilogue.
template <class T, bool kChannels, bool kPlain>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    adder2d_fprop_pointwise_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ Ranges const ranges) {
  extern __shared__ __align__(16) float smem[];
  static_assert(sizeof(Epilogue::Filter) == sizeof(float), "four of them are one read of shared memory");
  using Filter = std::conditional_t<kPlain, Epilogue::Filter, FusedFilter>;
  constexpr int kFilterFloats = T::kTileK * sizeof(Filter) / sizeof(float);
  float* const filters_smem = smem + kStages * T::kStageFloats;
  float* const w_smem = filters_smem + kFilterFloats;
  int32_t const k_tile = blockIdx.x % ranges.tiles_k, rest = blockIdx.x / ranges.tiles_k;
  int32_t const group = rest % a.p.groups, range = rest / a.p.groups;
  int32_t const first_k = group * a.Kg + k_tile * T::kTileK, end_k = (group + 1) * a.Kg;
  int32_t const first_tile = range * ranges.tiles + min(range, ranges.longer);
  int32_t tiles = ranges.tiles + (range < ranges.longer);
  int32_t first_pixel = first_tile * T::kTilePQ;
  ThreadCoord<T> const thread(threadIdx.x);

  Loader<T, kChannels> loader(a, ranges, group, first_pixel, tiles);
  int32_t stage = 0;
  auto const fill = [&] {
    loader.fill(smem + stage);
    copy_commit();
    stage = T::kStageFloats - stage;
  };
  fill();
  int32_t const lane = threadIdx.x % 8, row = threadIdx.x / 8;
  for (int32_t c = lane; c < a.Cg; c += 8) {
#pragma unroll
    for (int k = row; k < row + T::kTileK; k += T::kRows) {
      int32_t const filter = min(first_k + k, end_k - 1);  // those after the last one are not stored
      copy4_async(w_smem + c * T::kPitchK + k, static_cast<float const*>(a.p.w) + (int64_t{filter} * a.Cg + c), 1);
    }
  }
  copy_commit();
  if (threadIdx.x < T::kTileK) {
    int32_t const k = min(first_k + static_cast<int32_t>(threadIdx.x), end_k - 1);
    if constexpr (kPlain) {
      reinterpret_cast<Filter*>(filters_smem)[threadIdx.x] = Epilogue::filter(a, k);
    } else {
      reinterpret_cast<Filter*>(filters_smem)[threadIdx.x] = fused_filter(a, k);
    }
  }

#pragma unroll 1
  for (; tiles > 0; --tiles, first_pixel += T::kTilePQ) {
    float acc[T::kThreadK][T::kThreadPQ] = {};
    int32_t channel = 0, terms = ranges.slice;
#pragma unroll 1
    do {
      copy_wait<0>();
      __syncthreads();
      add_terms<T>(w_smem + channel * T::kPitchK + thread.thread_k, smem + (T::kStageFloats - stage) + thread.thread_pq,
                   terms, fill, acc);
      channel += terms;
      terms = min(terms, a.Cg - channel);
    } while (terms > 0);

    if constexpr (!kPlain) {
      store_fused<T, kChannels>(a, thread, first_k, end_k, first_pixel, reinterpret_cast<Filter*>(filters_smem), acc);
      continue;
    }
    int32_t const count = end_k - first_k - thread.thread_k;  // from the thread's first one on
    alignas(16) Epilogue::Filter f[T::kThreadK];
#pragma unroll
    for (int i = 0; i < T::kThreadK; i += 4)
      *reinterpret_cast<float4*>(&f[i]) = *reinterpret_cast<float4 const*>(filters_smem + thread.k(i));
    if constexpr (kChannels) {
      int32_t const pitch = 4 * static_cast<int32_t>(a.p.y_stride[3]);
#pragma unroll
      for (int j = 0; j < T::kThreadPQ; ++j) {
        int32_t const m = first_pixel + thread.pq(j);
        float* const y = at(static_cast<float*>(a.p.y) + (first_k + thread.thread_k), m, pitch);
#pragma unroll
        for (int i = 0; i < T::kThreadK; i += 4) {
          int32_t const k = thread.k(i) - thread.thread_k;
          if (m < a.NPQ && k < count)
            store4_at<false>(y + k, {f[i], f[i + 1], f[i + 2], f[i + 3]},
                             make_float4(acc[i][j], acc[i + 1][j], acc[i + 2][j], acc[i + 3][j]));
        }
      }
    } else {
      float* y[T::kGroupsPQ];
      int32_t ends[T::kGroupsPQ];
#pragma unroll
      for (int j = 0; j < T::kGroupsPQ; ++j) {
        int32_t const m = first_pixel + thread.pq(4 * j);
        int32_t pq;
        int32_t const n = a.div_PQ.divmod(m, &pq);
        y[j] = static_cast<float*>(a.p.y) + (n * a.p.y_stride[0] + pq + (first_k + thread.thread_k) * a.p.y_stride[1]);
        ends[j] = m < a.NPQ ? count : 0;
      }
#pragma unroll
      for (int i = 0; i < T::kThreadK; ++i) {
        int32_t const k = thread.k(i) - thread.thread_k;
#pragma unroll
        for (int j = 0; j < T::kGroupsPQ; ++j) {
          float const* const sums = &acc[i][4 * j];
          if (k < ends[j])
            store4_at<true>(y[j], {f[i], f[i], f[i], f[i]}, make_float4(sums[0], sums[1], sums[2], sums[3]));
          y[j] += (i % 4 == 3 ? T::kTileK / T::kGroupsK - 3 : 1) * a.p.y_stride[1];
        }
      }
    }
  }
  static_assert(kStages == 2, "a slice is filled while the other one is read");
}

// ---- launcher

template <class T, bool kChannels, bool kPlain>
cudaError_t launch_layout(FpropArgs const& args, cudaStream_t stream) {
  auto const kernel = adder2d_fprop_pointwise_kernel<T, kChannels, kPlain>;
  // The same for all plans: see launch_tiled.
  cudaError_t const error = allow_smem(kernel, std::min(smem_size<T, kPlain>(kMaxChannels), smem_limit()));
  if (error != cudaSuccess) return error;
  Ranges const ranges = share_out<T>(args);
  return launch(kernel, dim3(ranges.tiles_k * args.p.groups * ranges.count), dim3(T::kThreads),
                smem_size<T, kPlain>(args.Cg), stream, args, ranges);
}

template <class T>
cudaError_t launch_tile(FpropArgs const& args, cudaStream_t stream) {
  bool const plain = !args.fused && args.p.y_type == ADDER2D_FLOAT32;
  if (args.y_channels_last)
    return plain ? launch_layout<T, true, true>(args, stream) : launch_layout<T, true, false>(args, stream);
  return plain ? launch_layout<T, false, true>(args, stream) : launch_layout<T, false, false>(args, stream);
}

using Tile64x128 = Tile<64, 128, 32>;
using Tile32x256 = Tile<32, 256, 16>;

// Predicted cycles, to rank beside those of choose_tile; 0 where not all blocks run at once, or find no room.
template <class T>
double predict(FpropArgs const& args) {
  int32_t const multiprocessors = multiprocessor_count();
  Ranges const ranges = share_out<T>(args);
  int64_t const heads = int64_t{ranges.tiles_k} * args.p.groups;
  if (heads > multiprocessors * T::kBlocksPerSM || smem_size<T>(args.Cg) > smem_limit()) return 0;
  // Blocks of the busiest multiprocessor, in turns of which they hide each other's waits: of all ranges, then of the
  // longer ones.
  auto const turns = [&](int64_t blocks) {
    int64_t const sharing = ceil_div(blocks, int64_t{multiprocessors});
    return blocks > 0 ? sharing + kArch.pointwise_partial_turn * (T::kBlocksPerSM - sharing) : 0.0;
  };
  double const tiles = ranges.tiles * turns(heads * ranges.count) + turns(heads * ranges.longer);
  double const tile = args.Cg * (T::kTileK * T::kTilePQ / kArch.pointwise_rate) +
                      kArch.pointwise_slice * ceil_div(args.Cg, ranges.slice) + kArch.pointwise_tile;
  return tiles * tile + kArch.pointwise_start;
}

constexpr char const* kTileNames[] = {"64x128", "32x256"};

bool can_implement(FpropArgs const& args, size_t) {
  Adder2dParams const& p = args.p;
  bool const singles = p.x_type == ADDER2D_FLOAT32 && p.w_type == ADDER2D_FLOAT32;
  if (!is_pointwise(p) || !singles || !args.residual_as_y || args.Cg % 8 != 0 || args.Cg > kMaxChannels ||
      !args.y_vectors)
    return false;
  // x lies as y does: channels side by side, pixels one after the other; or four pixels of a channel at an aligned
  // address.
  int64_t const* const stride = p.x_stride;
  bool const channels = stride[1] == 1 && stride[2] == p.W * stride[3] && stride[0] == p.H * stride[2];
  bool const reach = std::max(stride[3], p.y_stride[3]) <= INT32_MAX / 4;  // of at()
  return args.y_channels_last ? channels && args.y_linear && reach : is_plane(args);
}

bool plan(FpropArgs const& args, size_t, TileForce const& force, TileConfig* config, double* cycles) {
  if (force.splits > 1 || force.packed == 1) return false;
  double const wide = force.tile == 1 ? 0 : predict<Tile64x128>(args),
               narrow = force.tile == 0 ? 0 : predict<Tile32x256>(args);
  *config = {};
  config->tile = wide == 0 || (narrow != 0 && narrow < wide);
  *cycles = config->tile == 0 ? wide : narrow;
  return *cycles != 0;
}

cudaError_t launch_plan(FpropArgs const& args, TileConfig const& config, cudaStream_t stream) {
  return config.tile == 0 ? launch_tile<Tile64x128>(args, stream) : launch_tile<Tile32x256>(args, stream);
}

}  // namespace

FpropFamily const kFpropPointwise{{"pointwise", kTileNames, 2}, can_implement, nullptr, plan, launch_plan};

}  // namespace adder2d
