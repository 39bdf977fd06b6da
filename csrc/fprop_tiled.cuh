// What the tiled kernel families share: where a tile lies in the output, the way that split sums take through the
// workspace, the store of y, and the choice of tile and splits.
#pragma once

#include "fprop.h"

namespace adder2d {

// ---- place of a tile

struct TilePlace {
  int32_t group, first_k, end_k, first_pixel;  // filters first_k .. end_k - 1 of the whole layer, pixels of the batch

  __device__ __forceinline__ TilePlace(FpropArgs const& a, FpropPlan const& plan, int32_t tile, int32_t tile_k, int32_t tile_pq) {
    int32_t const k_tile = tile % plan.tiles_k, rest = tile / plan.tiles_k;
    group = rest / plan.tiles_pq;
    first_k = group * a.Kg + k_tile * tile_k;
    end_k = (group + 1) * a.Kg;
    first_pixel = rest % plan.tiles_pq * tile_pq;
  }
};

// One output pixel: where its window starts. An absent pixel has w0 = kOutside.
struct Pixel {
  int64_t offset;  // elements from x to the window's first tap, channel 0 of the group; may point before x
  int32_t h0, w0;
};
constexpr int32_t kOutside = INT32_MIN;  // h0 + kOutside is no row of the input, for every h0 (W likewise)

__device__ __forceinline__ Pixel make_pixel(FpropArgs const& a, int32_t group, int32_t m) {
  Pixel pixel{0, 0, kOutside};
  if (m < a.NPQ) {
    int32_t pq, q;
    int32_t const n = a.div_PQ.divmod(m, &pq);
    int32_t const p = a.div_Q.divmod(pq, &q);
    pixel.h0 = p * a.p.stride_h - a.p.pad_h;
    pixel.w0 = q * a.p.stride_w - a.p.pad_w;
    pixel.offset = n * a.p.x_stride[0] + int64_t{group} * a.Cg * a.p.x_stride[1] + pixel.h0 * a.p.x_stride[2] +
                   pixel.w0 * a.p.x_stride[3];
  }
  return pixel;
}

__device__ __forceinline__ bool inside(FpropArgs const& a, Pixel const& pixel, int32_t dh, int32_t dw) {
  return static_cast<uint32_t>(pixel.h0 + dh) < static_cast<uint32_t>(a.p.H) &&
         static_cast<uint32_t>(pixel.w0 + dw) < static_cast<uint32_t>(a.p.W);
}

// ---- terms

// A thread's outputs in a tile of T: groups of four filters and four pixels, kTileK / kGroupsK and kTilePQ / kGroupsPQ apart.
template <class T>
struct ThreadPlace {
  int32_t thread_k, thread_pq;  // the first ones

  __device__ __forceinline__ explicit ThreadPlace(int32_t thread) {
    int32_t const warp = thread / 32, lane = thread % 32;
    thread_k = (warp % T::kWarpsK * T::kLanesK + lane / T::kLanesPQ) * 4;
    thread_pq = (warp / T::kWarpsK * T::kLanesPQ + lane % T::kLanesPQ) * 4;
  }
  __device__ __forceinline__ int32_t k(int32_t i) const { return thread_k + i / 4 * (T::kTileK / T::kGroupsK) + i % 4; }
  __device__ __forceinline__ int32_t pq(int32_t j) const { return thread_pq + j / 4 * (T::kTilePQ / T::kGroupsPQ) + j % 4; }
};

// Adds a slice's `terms`, a multiple of kUnroll, to acc[filter][pixel]. `w` and `x` are the thread's first filter and pixel in the
// slice's rows. fill() runs as soon as the first term is on its way.
template <class T, class Fill>
__device__ __forceinline__ void add_terms(float const* w, float const* x, int32_t terms, Fill const& fill,
                                          float (&acc)[T::kThreadK][T::kThreadPQ]) {
  float w_frag[2][T::kThreadK], x_frag[2][T::kThreadPQ];
  auto const load = [&](int32_t term, int buffer) {
#pragma unroll
    for (int i = 0; i < T::kGroupsK; ++i)
      *reinterpret_cast<float4*>(&w_frag[buffer][4 * i]) =
          *reinterpret_cast<float4 const*>(w + term * T::kPitchK + i * (T::kTileK / T::kGroupsK));
#pragma unroll
    for (int i = 0; i < T::kGroupsPQ; ++i)
      *reinterpret_cast<float4*>(&x_frag[buffer][4 * i]) =
          *reinterpret_cast<float4 const*>(x + term * T::kPitchPQ + i * (T::kTilePQ / T::kGroupsPQ));
  };
  load(0, 0);
  fill();
#pragma unroll 1
  for (int c = 0; c < terms; c += T::kUnroll) {
#pragma unroll
    for (int u = 0; u < T::kUnroll; ++u) {
      // The fragments of the next term are on their way while this one is added. The slice's last term is read twice:
      // what lies behind it is being filled.
      load(u + 1 < T::kUnroll || c + T::kUnroll < terms ? u + 1 : u, (u + 1) % 2);
#pragma unroll
      for (int i = 0; i < T::kThreadK; ++i)
#pragma unroll
        for (int j = 0; j < T::kThreadPQ; ++j) acc[i][j] += fabsf(x_frag[u % 2][j] - w_frag[u % 2][i]);
    }
    w += T::kUnroll * T::kPitchK;
    x += T::kUnroll * T::kPitchPQ;
  }
}

// ---- store

// Elements from y to pixel m of filter 0.
__device__ __forceinline__ int64_t output_offset(FpropArgs const& a, int32_t m) {
  if (a.y_linear) return m * a.p.y_stride[3];
  int32_t pq, q;
  int32_t const n = a.div_PQ.divmod(m, &pq);
  int32_t const p = a.div_Q.divmod(pq, &q);
  return n * a.p.y_stride[0] + p * a.p.y_stride[2] + q * a.p.y_stride[3];
}

// Writes y = b - sum for filter k and a pixel.
__device__ __forceinline__ void store1(FpropArgs const& a, int32_t k, int64_t offset, float sum) {
  store_from_float(a.p.y, offset + k * a.p.y_stride[1], a.p.y_type, load_bias(a, k) - sum);
}

// The same for four filters from k on (kFilters), or for four pixels from m on, one by one; `end_k` is the end of the tile's
// filters. Not inlined: kernels would be twice as long.
template <bool kFilters>
__device__ __noinline__ void store4_singly(FpropArgs const& a, int32_t k, int32_t end_k, int32_t m, float4 sum) {
  float const sums[] = {sum.x, sum.y, sum.z, sum.w};
  int64_t const offset = output_offset(a, m);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kFilters && k + i < end_k) store1(a, k + i, offset, sums[i]);
    if (!kFilters && m + i < a.NPQ) store1(a, k, i == 0 ? offset : output_offset(a, m + i), sums[i]);
  }
}

// The same, at once where possible. `offset` is that of pixel m.
template <bool kFilters>
__device__ __forceinline__ void store4(FpropArgs const& a, int32_t k, int32_t end_k, int32_t m, int64_t offset, float4 const& sum) {
  if (k >= end_k || m >= a.NPQ) return;
  if (!a.y_vectors || a.y_filters != kFilters) return store4_singly<kFilters>(a, k, end_k, m, sum);
  float4 b;
  b.x = load_bias(a, k);
  b.y = kFilters ? load_bias(a, k + 1) : b.x;
  b.z = kFilters ? load_bias(a, k + 2) : b.x;
  b.w = kFilters ? load_bias(a, k + 3) : b.x;
  store4_from_float(a.p.y, offset + k * a.p.y_stride[1], a.p.y_type, make_float4(b.x - sum.x, b.y - sum.y, b.z - sum.z, b.w - sum.w));
}

// A tile's sums in shared memory, where they change hands so that a thread gets what lies side by side in y: rows of pixels
// that hold the filters (a.y_filters), or the other way round. Rows are padded for writers that have kLanesK filters and
// kLanesPQ pixels side by side in a warp.
template <int kTileK, int kTilePQ, int kThreads, int kLanesK, int kLanesPQ>
struct Turn {
  static constexpr int kPitchK = kTileK + 4, kPitchPQ = kTilePQ + (kLanesPQ < 4 ? 4 : kLanesPQ);
  static constexpr int kBytes = 4 * (kTilePQ * kPitchK > kTileK * kPitchPQ ? kTilePQ * kPitchK : kTileK * kPitchPQ);
  static constexpr int kItems = kTileK * kTilePQ / (4 * kThreads), kColumns = kTilePQ;

  // First filter and pixel of a thread's item of four, in the tile.
  __device__ __forceinline__ static void place(FpropArgs const& a, int32_t item, int32_t thread, int32_t* k, int32_t* pq) {
    int32_t const index = item * kThreads + thread;
    *k = a.y_filters ? index % (kTileK / 4) * 4 : index / (kTilePQ / 4);
    *pq = a.y_filters ? index / (kTileK / 4) : index % (kTilePQ / 4) * 4;
  }
  __device__ __forceinline__ static int32_t index(FpropArgs const& a, int32_t k, int32_t pq) {
    return a.y_filters ? pq * kPitchK + k : k * kPitchPQ + pq;
  }
  template <class View>
  __device__ __forceinline__ static void store(FpropArgs const& a, View const& view, int32_t item, int32_t thread, float4 const& sum) {
    int32_t k, pq;
    place(a, item, thread, &k, &pq);
    int32_t const m = view.first_pixel + pq;
    int64_t const offset = output_offset(a, m);
    if (a.y_filters) {
      store4<true>(a, view.first_k + k, view.end_k, m, offset, sum);
    } else {
      store4<false>(a, view.first_k + k, view.end_k, m, offset, sum);
    }
  }
};

// ---- splits

// A thread's sums are items of four. View::store writes one item; kItems is their number.
template <class View>
__device__ __forceinline__ float4* partial_sum(FpropArgs const& a, FpropPlan const& plan, int32_t split, int32_t tile,
                                               int32_t item, int32_t thread) {
  int64_t const index = ((int64_t{split} * (plan.tiles - plan.whole) + tile - plan.whole) * View::kItems + item) * View::kThreads + thread;
  return reinterpret_cast<float4*>(static_cast<char*>(a.p.workspace) + plan.packed_bytes) + index;
}

__device__ __forceinline__ void add(float4* sum, float4 const& v) {
  sum->x += v.x;
  sum->y += v.y;
  sum->z += v.z;
  sum->w += v.w;
}

// What a block does: slices first .. last - 1 of a tile. `split` is below 0 for a whole tile.
struct Work {
  int32_t tile, split, first, last;

  __device__ __forceinline__ explicit Work(FpropPlan const& plan)
      : tile(static_cast<int32_t>(blockIdx.x)), split(-1), first(0), last(plan.slices) {
    if (tile < plan.whole) return;
    int32_t const rest = plan.tiles - plan.whole;
    split = (tile - plan.whole) / rest;
    tile -= split * rest;
    first = static_cast<int32_t>(int64_t{plan.slices} * split / plan.splits);
    last = static_cast<int32_t>(int64_t{plan.slices} * (split + 1) / plan.splits);
  }
};

// Hands a tile on whose sums have changed hands: to y, or to the workspace where the reduction is split.
template <class View>
__device__ __forceinline__ void finish_turned(FpropArgs const& a, FpropPlan const& plan, Work const& work, View const& view,
                                              float const* sums) {
  using Turned = typename View::Turned;
  int32_t k, pq;
  auto const sum = [&]() -> float4 const& { return *reinterpret_cast<float4 const*>(&sums[Turned::index(a, k, pq)]); };
  if (work.split >= 0 || a.y_filters) {
#pragma unroll
    for (int item = 0; item < View::kItems; ++item) {
      Turned::place(a, item, threadIdx.x, &k, &pq);
      if (work.split >= 0) {
        *partial_sum<View>(a, plan, work.split, work.tile, item, threadIdx.x) = sum();
      } else {
        int32_t const m = view.first_pixel + pq;
        store4<true>(a, view.first_k + k, view.end_k, m, output_offset(a, m), sum());
      }
    }
    return;
  }
  // Where threads divide the rows of pixels evenly, a thread's pixels are the same in all its filters.
  constexpr bool kEven = View::kThreads % (Turned::kColumns / 4) == 0;
  constexpr int kStep = View::kThreads / (Turned::kColumns / 4);
  int32_t m = 0;
  int64_t offset = 0;
#pragma unroll
  for (int item = 0; item < View::kItems; ++item) {
    if (!kEven || item == 0) {
      Turned::place(a, item, threadIdx.x, &k, &pq);
      m = view.first_pixel + pq;
      offset = output_offset(a, m);
    } else {
      k += kStep;
    }
    store4<false>(a, view.first_k + k, view.end_k, m, offset, sum());
  }
}

// Adds the splits of item blockIdx.y of a tile, always in the same order, so that results repeat exactly. Where
// there are many splits and few tiles, kGroups threads share an output's splits.
template <class View, int kGroups>
__global__ void __launch_bounds__(View::kThreads* kGroups)
    adder2d_fprop_reduce_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ FpropPlan const plan) {
  __shared__ float4 sums[kGroups][View::kThreads];
  int32_t const thread = threadIdx.x % View::kThreads, group = threadIdx.x / View::kThreads;
  int32_t const tile = plan.whole + static_cast<int32_t>(blockIdx.x);
  View const view(a, plan, tile, thread);
  float4 const* const partial = partial_sum<View>(a, plan, 0, tile, blockIdx.y, thread);
  int64_t const step = int64_t{plan.tiles - plan.whole} * View::kItems * View::kThreads;  // from split to split
  wait_for_primary();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
  for (int32_t split = group; split < plan.splits; split += kGroups) add(&sum, partial[split * step]);
  if constexpr (kGroups > 1) {
    sums[group][thread] = sum;
    __syncthreads();
    if (group != 0) return;
#pragma unroll
    for (int i = 1; i < kGroups; ++i) add(&sum, sums[i][thread]);
  }
  view.store(a, plan, blockIdx.y, sum);
}

// Launches the kernel of one tile and, where it splits reductions, the kernel that adds the splits. `after_pack` says
// that the kernel before it on the stream packs its weights, and that it waits for them by itself. `most_smem_bytes` is the same for all
// plans: another thread may be about to launch. Args is FpropArgs or more.
template <class View, class Args>
cudaError_t launch_tiled(void (*kernel)(Args, FpropPlan), size_t smem_bytes, size_t most_smem_bytes, int32_t threads, bool after_pack,
                         Args const& args, FpropPlan const& plan, cudaStream_t stream) {
  cudaError_t error = allow_smem(kernel, most_smem_bytes);
  if (error != cudaSuccess) return error;
  int32_t const rest = plan.tiles - plan.whole;
  dim3 const grid(plan.whole + rest * plan.splits);
  error = launch_kernel(after_pack, kernel, grid, dim3(threads), smem_bytes, stream, args, plan);
  if (error != cudaSuccess || rest == 0) return error;
  dim3 const items(rest, View::kItems);
  constexpr int kGroups = 512 / View::kThreads;
  return plan.splits >= 8 ? launch_dependent(adder2d_fprop_reduce_kernel<View, kGroups>, items, dim3(512), 0, stream, args, plan)
                          : launch_dependent(adder2d_fprop_reduce_kernel<View, 1>, items, dim3(View::kThreads), 0, stream, args, plan);
}

// ---- plan

// 1x1 kernels whose pixels lie in y as in x, four of them at an aligned address.
inline bool is_plane(FpropArgs const& a) {
  Adder2dParams const& p = a.p;
  return p.R == 1 && p.S == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0 && p.x_stride[3] == 1 && p.x_stride[2] == p.W &&
         int64_t{p.H} * p.W % 4 == 0 && p.x_stride[1] % 4 == 0 && p.x_stride[0] % 4 == 0 &&
         reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
}

struct TileSize {
  int32_t k, pq, c;   // filters, pixels, terms of a slice
  int32_t resident;   // blocks that run on a multiprocessor at once
  double rate;        // accumulated terms a cycle and multiprocessor
};

constexpr int32_t kMaxSplits = 64;
constexpr int32_t kMaxSplitBlocks = 8;  // a multiprocessor

// The best tile and number of splits for `slices_of(size)` slices a tile, with split sums in at most `workspace_bytes`. With `some`,
// perhaps of some tiles alone, beside whole ones. Sets all of the plan but packed_bytes and turned.
// *cycles is the prediction.
FpropPlan choose_tile(FpropArgs const& args, TileSize const* sizes, int32_t count, int32_t (*slices_of)(FpropArgs const&, TileSize const&),
                      size_t workspace_bytes, double* cycles, bool some = false);

}  // namespace adder2d
