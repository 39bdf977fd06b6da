// Any problem, without shared tiles: depth-wise layers and groups of few filters, where an implicit GEMM tile would be
// mostly empty, and layers so small that the latency of a tile's pipeline would be most of the time. A thread computes
// a few outputs that share what is read; where there are too few of these to fill the chip, threads share the reduction
// as well.
#include <algorithm>

#include "common/device.h"
#include "common/launch.cuh"
#include "fprop/fprop.h"
#include "tile/epilogue.cuh"

namespace adder2d {
namespace {

// Types of x and w that kernels are compiled for; all others are looked up at every load.
constexpr int32_t kAnyType = -1;

template <int32_t kX, int32_t kW>
struct Types {
  __device__ __forceinline__ static float load_x(FpropArgs const& a, int64_t index) {
    return load_as_float(a.p.x, index, kX == kAnyType ? a.p.x_type : kX);
  }
  __device__ __forceinline__ static float load_w(FpropArgs const& a, int64_t index) {
    return load_as_float(a.p.w, index, kW == kAnyType ? a.p.w_type : kW);
  }
};

// launch(Types<..>{}) for the problem's types.
template <typename Launch>
cudaError_t with_types(Adder2dParams const& p, Launch const& launch) {
  if (p.x_type == ADDER2D_FLOAT32 && p.w_type == ADDER2D_FLOAT32)
    return launch(Types<ADDER2D_FLOAT32, ADDER2D_FLOAT32>{});
  if (p.x_type == ADDER2D_FLOAT16 && p.w_type == ADDER2D_FLOAT16)
    return launch(Types<ADDER2D_FLOAT16, ADDER2D_FLOAT16>{});
  if (p.x_type == ADDER2D_FLOAT16 && p.w_type == ADDER2D_FLOAT32)
    return launch(Types<ADDER2D_FLOAT16, ADDER2D_FLOAT32>{});
  if (p.x_type == ADDER2D_BFLOAT16 && p.w_type == ADDER2D_BFLOAT16)
    return launch(Types<ADDER2D_BFLOAT16, ADDER2D_BFLOAT16>{});
  return launch(Types<kAnyType, kAnyType>{});
}

// A thread's filters are those of a set of kFilters; the last set of a group may lack some, and repeats its last
// filter.
template <int kFilters>
struct FilterSet {
  int32_t group, k, count;

  __device__ __forceinline__ FilterSet(FpropArgs const& a, FastDiv const& div_sets, int32_t set) {
    int32_t rest;
    group = div_sets.divmod(set, &rest);
    k = group * a.Kg + rest * kFilters;
    count = min(kFilters, a.Kg - rest * kFilters);
  }
  __device__ __forceinline__ int64_t weights(FpropArgs const& a, int f) const {
    return int64_t{k + min(f, count - 1)} * a.CRS;
  }
};

// ---- one thread an output

constexpr int kTileThreads = 256;
constexpr int64_t kMaxIndex = 0x7fffffff;

// Where an index of a thread lies: columns, strips of rows, filter sets, images.
struct TileGrid {
  FastDiv div_0, div_1, div_2;  // the axes from the one that changes with every thread on, without images
  FastDiv div_sets;             // filter sets of a group
  bool sets_first;              // filter sets, then columns, then strips; else columns, strips, filter sets
  int32_t threads, first_set;
};

// kRows outputs below each other of kFilters filters.
template <class T, int kRows, int kFilters>
__global__ void __launch_bounds__(kTileThreads, 3)
    adder2d_fprop_direct_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ TileGrid const g) {
  int64_t const thread = int64_t{blockIdx.x} * kTileThreads + threadIdx.x;
  if (thread >= g.threads) return;
  int32_t i0, i1, i2;
  int32_t const n = g.div_2.divmod(g.div_1.divmod(g.div_0.divmod(static_cast<int32_t>(thread), &i0), &i1), &i2);
  int32_t const q = g.sets_first ? i1 : i0, p = (g.sets_first ? i2 : i1) * kRows;
  FilterSet<kFilters> const set(a, g.div_sets, g.first_set + (g.sets_first ? i0 : i2));
  int32_t const h0 = p * a.p.stride_h - a.p.pad_h, w0 = q * a.p.stride_w - a.p.pad_w;
  int32_t const rows = a.p.P - p;  // kRows or, at the end, fewer
  int64_t const below = a.p.stride_h * a.p.x_stride[2];
  int64_t row =
      n * a.p.x_stride[0] + int64_t{set.group} * a.Cg * a.p.x_stride[1] + h0 * a.p.x_stride[2] + w0 * a.p.x_stride[3];
  int64_t w[kFilters];
#pragma unroll
  for (int f = 0; f < kFilters; ++f) w[f] = set.weights(a, f);

  float sum[kRows][kFilters] = {};
  for (int32_t c = 0; c < a.Cg; ++c, row += a.step_c) {
    for (int32_t r = 0; r < a.p.R; ++r, row += a.p.dil_h * a.p.x_stride[2]) {
      bool inside[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        inside[i] =
            i < rows && static_cast<uint32_t>(h0) + i * a.p.stride_h + r * a.p.dil_h < static_cast<uint32_t>(a.p.H);
      int64_t tap = row;
#pragma unroll 3
      for (int32_t s = 0; s < a.p.S; ++s, tap += a.step_s) {
        bool const column_inside = static_cast<uint32_t>(w0 + s * a.p.dil_w) < static_cast<uint32_t>(a.p.W);
        float x[kRows];
#pragma unroll
        // Padding reads 0.
        for (int i = 0; i < kRows; ++i) x[i] = inside[i] && column_inside ? T::load_x(a, tap + i * below) : 0.f;
#pragma unroll
        for (int f = 0; f < kFilters; ++f) {
          float const weight = T::load_w(a, w[f]++);
#pragma unroll
          for (int i = 0; i < kRows; ++i) sum[i][f] += fabsf(x[i] - weight);
        }
      }
    }
  }
  int64_t const y = n * a.p.y_stride[0] + p * a.p.y_stride[2] + q * a.p.y_stride[3];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int f = 0; f < kFilters; ++f)
      if (i < rows && f < set.count)
        store1(a, set.k + f, (n * a.p.P + p + i) * a.p.Q + q, y + i * a.p.y_stride[2], sum[i][f]);
  }
}

template <int kRows, int kFilters>
cudaError_t launch_tile(FpropArgs const& args, cudaStream_t stream) {
  int32_t const group_sets = ceil_div(args.Kg, kFilters), all_sets = args.p.groups * group_sets;
  int32_t const strips = static_cast<int32_t>(ceil_div<int64_t>(args.p.P, kRows));
  // As many sets, and then images, as keep the index of a thread an int32.
  int64_t const per_set = int64_t{strips} * args.p.Q;
  int32_t const max_sets = static_cast<int32_t>(std::min<int64_t>(kMaxIndex / per_set, all_sets));
  int32_t const max_images = static_cast<int32_t>(std::clamp<int64_t>(kMaxIndex / (per_set * all_sets), 1, args.p.N));
  for (int32_t n = 0; n < args.p.N; n += max_images) {
    FpropArgs part = args;
    part.p.N = std::min(args.p.N - n, max_images);
    part.p.x = static_cast<char const*>(args.p.x) + n * args.p.x_stride[0] * type_size(args.p.x_type);
    part.p.y = static_cast<char*>(args.p.y) + n * args.p.y_stride[0] * type_size(args.p.y_type);
    if (args.epilogue.residual != nullptr)
      part.epilogue.residual = static_cast<char const*>(args.epilogue.residual) +
                               n * args.epilogue.residual_stride[0] * type_size(args.epilogue.residual_type);
    for (int64_t first = 0; first < all_sets; first += max_sets) {
      int32_t const sets = static_cast<int32_t>(std::min<int64_t>(all_sets - first, max_sets));
      TileGrid g{};
      g.sets_first = kFilters == 1 && args.y_channels_last;
      g.div_0 = FastDiv(g.sets_first ? sets : args.p.Q);
      g.div_1 = FastDiv(g.sets_first ? args.p.Q : strips);
      g.div_2 = FastDiv(g.sets_first ? strips : sets);
      g.div_sets = FastDiv(group_sets);
      g.threads = static_cast<int32_t>(part.p.N * per_set * sets);
      g.first_set = static_cast<int32_t>(first);
      uint32_t const blocks = static_cast<uint32_t>(ceil_div<int64_t>(g.threads, kTileThreads));
      cudaError_t const error = with_types(args.p, [&](auto types) {
        return launch(adder2d_fprop_direct_kernel<decltype(types), kRows, kFilters>, dim3(blocks), dim3(kTileThreads),
                      0, stream, part, g);
      });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

// ---- several threads an output

constexpr int kSharedThreads = 128;

// Adds kShares neighbouring threads' sums of kValues outputs, halving the outputs at each step while there are several.
// A thread is left with the sum of value (threadIdx.x % kShares) / (kShares / kValues).
template <int kValues, int kShares>
__device__ __forceinline__ float add_shares(float (&sum)[kValues]) {
  static_assert(kValues <= kShares && kShares <= 32, "a warp adds, and every value is left to some thread");
#pragma unroll
  for (int step = kShares / 2, left = kValues / 2; step > 0; step /= 2, left /= 2) {
    bool const upper = (threadIdx.x & step) != 0;
#pragma unroll
    for (int i = 0; i < (left > 0 ? left : 1); ++i) {
      float const other = left > 0 && !upper ? sum[i + left] : sum[i];
      float const mine = left > 0 && upper ? sum[i + left] : sum[i];
      sum[i] = mine + __shfl_xor_sync(0xffffffff, other, step);
    }
  }
  return sum[0];
}

// kShares threads take every kShares-th term of kPixels x kFilters outputs each. One image spans less than 2^31
// elements.
template <class T, int kShares, int kPixels, int kFilters>
__global__ void __launch_bounds__(kSharedThreads, 4)
    adder2d_fprop_shared_kernel(__grid_constant__ FpropArgs const a, FastDiv const div_all_sets, FastDiv const div_sets,
                                int32_t tiles) {
  constexpr int kValues = kPixels * kFilters, kUnroll = 4, kLanes = kShares < 32 ? kShares : 32;
  int32_t const share = threadIdx.x % kShares, index = (blockIdx.x * kSharedThreads + threadIdx.x) / kShares;
  int32_t const tile = min(index, tiles - 1);  // all threads take part in the sums; only present tiles are stored
  int32_t rest;
  int32_t const first = div_all_sets.divmod(tile, &rest) * kPixels;
  FilterSet<kFilters> const set(a, div_sets, rest);
  int64_t windows[kPixels], outputs[kPixels], weights[kFilters];
  int32_t h0[kPixels], w0[kPixels];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    int32_t pq, q;
    int32_t const n = a.div_PQ.divmod(min(first + i, a.NPQ - 1), &pq), p = a.div_Q.divmod(pq, &q);
    h0[i] = p * a.p.stride_h - a.p.pad_h;
    w0[i] = q * a.p.stride_w - a.p.pad_w;
    windows[i] = n * a.p.x_stride[0] + int64_t{set.group} * a.Cg * a.p.x_stride[1] + h0[i] * a.p.x_stride[2] +
                 w0[i] * a.p.x_stride[3];
    outputs[i] = n * a.p.y_stride[0] + p * a.p.y_stride[2] + q * a.p.y_stride[3];
  }
#pragma unroll
  for (int f = 0; f < kFilters; ++f) weights[f] = set.weights(a, f);

  int32_t const stride_c = static_cast<int32_t>(a.p.x_stride[1]), stride_h = static_cast<int32_t>(a.p.x_stride[2]),
                stride_w = static_cast<int32_t>(a.p.x_stride[3]);
  float sum[kValues] = {};
  for (int32_t start = share; start < a.CRS; start += kUnroll * kShares) {
    float x[kUnroll][kPixels], w[kUnroll][kFilters];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int32_t const j = start + u * kShares;
      bool const present = j < a.CRS;  // absent terms are |0 - 0|
      int32_t rs, s;
      int32_t const c = a.div_RS.divmod(present ? j : 0, &rs), r = a.div_S.divmod(rs, &s);
      int32_t const dh = r * a.p.dil_h, dw = s * a.p.dil_w, offset = c * stride_c + dh * stride_h + dw * stride_w;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        bool const inside = static_cast<uint32_t>(h0[i] + dh) < static_cast<uint32_t>(a.p.H) &&
                            static_cast<uint32_t>(w0[i] + dw) < static_cast<uint32_t>(a.p.W);
        x[u][i] = present && inside ? T::load_x(a, windows[i] + offset) : 0.f;  // padding reads 0
      }
#pragma unroll
      for (int f = 0; f < kFilters; ++f) w[u][f] = present ? T::load_w(a, weights[f] + j) : 0.f;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) sum[i] += fabsf(x[u][i / kFilters] - w[u][i % kFilters]);
    }
  }

  float total = add_shares<kValues, kLanes>(sum);
  int value = threadIdx.x % kLanes / (kLanes / kValues);
  bool stores = threadIdx.x % (kLanes / kValues) == 0;
  if constexpr (kShares > 32) {
    static_assert(kShares == kSharedThreads, "the warps of a block meet in shared memory");
    __shared__ float totals[kShares / 32][kValues];
    if (stores) totals[threadIdx.x / 32][value] = total;
    __syncthreads();
    stores = threadIdx.x < kValues;
    value = threadIdx.x % kValues;
    total = 0.f;
#pragma unroll
    for (int warp = 0; warp < kShares / 32; ++warp) total += totals[warp][value];
  }
  int32_t const pixel = value / kFilters, f = value % kFilters;
  if (!stores || index >= tiles || first + pixel >= a.NPQ || f >= set.count) return;
  int64_t output = outputs[0];
#pragma unroll
  for (int i = 1; i < kPixels; ++i) output = pixel == i ? outputs[i] : output;
  store1(a, set.k + f, first + pixel, output, total);
}

template <int kShares, int kPixels, int kFilters>
cudaError_t launch_shared(FpropArgs const& args, cudaStream_t stream) {
  int32_t const group_sets = ceil_div(args.Kg, kFilters), sets = args.p.groups * group_sets;
  int32_t const tiles = ceil_div(args.NPQ, kPixels) * sets;
  return with_types(args.p, [&](auto types) {
    return launch(adder2d_fprop_shared_kernel<decltype(types), kShares, kPixels, kFilters>,
                  dim3(ceil_div(tiles, kSharedThreads / kShares)), dim3(kSharedThreads), 0, stream, args, FastDiv(sets),
                  FastDiv(group_sets), tiles);
  });
}

// Offsets in one image, including those of taps outside, are 32 bits.
bool has_small_image(Adder2dParams const& p) {
  auto const span = [](int64_t size, int64_t stride) { return size * (stride < 0 ? -stride : stride); };
  return span(p.C / p.groups, p.x_stride[1]) + span(int64_t{p.R} * p.dil_h, p.x_stride[2]) +
             span(int64_t{p.S} * p.dil_w, p.x_stride[3]) <=
         0x7fffffff;
}

// ---- families

constexpr char const* kDirectNames[] = {"2x4", "4x1"};                            // rows x filters
constexpr char const* kSharedNames[] = {"128x2x4", "128x4x1", "8x1x2", "8x1x1"};  // threads x pixels x filters

bool can_implement_direct(FpropArgs const&, size_t) { return true; }

bool plan_direct(FpropArgs const& args, size_t, TileForce const& force, TileConfig* config, double*) {
  *config = {};
  config->tile = force.tile >= 0 ? force.tile : args.Kg > 2 ? 0 : 1;
  return force.splits <= 1 && force.packed != 1;
}

cudaError_t launch_direct(FpropArgs const& args, TileConfig const& config, cudaStream_t stream) {
  return config.tile == 0 ? launch_tile<2, 4>(args, stream) : launch_tile<4, 1>(args, stream);
}

// The index of a thread is an int32, whatever the tile.
bool can_implement_shared(FpropArgs const& args, size_t) {
  return has_small_image(args.p) && int64_t{args.NPQ} * args.p.K <= kMaxIndex / kSharedThreads;
}

// Reductions are shared out, as long as that does not need more threads than the chip runs at once.
bool plan_shared(FpropArgs const& args, size_t, TileForce const& force, TileConfig* config, double*) {
  *config = {};
  if (force.splits > 1 || force.packed == 1) return false;
  int64_t const outputs = int64_t{args.NPQ} * args.p.K, threads = int64_t{multiprocessor_count()} * 2048;
  int32_t tile = force.tile;
  if (tile < 0 && args.CRS >= 128 && outputs * 16 <= threads) tile = args.Kg > 2 ? 0 : 1;
  if (tile < 0 && args.CRS >= 16 && outputs * (args.Kg > 1 ? 4 : 8) <= threads) tile = args.Kg > 1 ? 2 : 3;
  config->tile = tile;
  return tile >= 0;
}

cudaError_t launch_shared_plan(FpropArgs const& args, TileConfig const& config, cudaStream_t stream) {
  switch (config.tile) {
    case 0: return launch_shared<128, 2, 4>(args, stream);
    case 1: return launch_shared<128, 4, 1>(args, stream);
    case 2: return launch_shared<8, 1, 2>(args, stream);
    case 3: return launch_shared<8, 1, 1>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool prefers_direct(FpropArgs const& args) {
  int64_t const reduction = args.CRS, terms = int64_t{args.NPQ} * args.p.K * reduction;
  return args.Kg < 8 || (reduction <= 32 && args.Kg <= 32) || terms <= int64_t{multiprocessor_count()} * 32768;
}

FpropFamily const kFpropShared{
    {"shared", kSharedNames, 4}, can_implement_shared, prefers_direct, plan_shared, launch_shared_plan};
FpropFamily const kFpropDirect{
    {"direct", kDirectNames, 2}, can_implement_direct, prefers_direct, plan_direct, launch_direct};

}  // namespace adder2d
