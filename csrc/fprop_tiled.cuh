// What the tiled kernel families share: where a tile lies in the output, the way that split sums take through the
// workspace, the store of y, and the choice of tile and splits.
#pragma once

#include "fprop.h"

namespace adder2d {

constexpr int32_t kMaxSplits = 64;   // of a tile's reduction
constexpr int32_t kMaxJoined = 3;    // that the block that comes last adds up; more of them are a second kernel's work

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

// A thread's outputs in a tile of T: groups of four filters and runs of kRun pixels, with as much of the tile between two groups, or two
// runs, as the other threads take.
template <class T, int kRun = 4>
struct ThreadPlace {
  static constexpr int kStepK = T::kTileK / (T::kThreadK / 4), kStepPQ = T::kTilePQ / (T::kThreadPQ / kRun);
  int32_t thread_k, thread_pq;  // the first ones

  __device__ __forceinline__ explicit ThreadPlace(int32_t thread) {
    int32_t const warp = thread / 32, lane = thread % 32;
    thread_k = (warp % T::kWarpsK * T::kLanesK + lane / T::kLanesPQ) * 4;
    thread_pq = (warp / T::kWarpsK * T::kLanesPQ + lane % T::kLanesPQ) * kRun;
  }
  __device__ __forceinline__ int32_t k(int32_t i) const { return thread_k + i / 4 * kStepK + i % 4; }
  __device__ __forceinline__ int32_t pq(int32_t j) const { return thread_pq + j / kRun * kStepPQ + j % kRun; }
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
// that hold the filters (a.y_filters), or the other way round. Rows are padded for writers that have kLanesPQ pixels side by side in
// a warp.
template <int kTileK_, int kTilePQ_, int kLanesPQ>
struct Turn {
  static constexpr int kTileK = kTileK_, kTilePQ = kTilePQ_;
  static constexpr int kPitchK = kTileK + 4, kPitchPQ = kTilePQ + (kLanesPQ < 4 ? 4 : kLanesPQ);
  static constexpr int kBytes = 4 * (kTilePQ * kPitchK > kTileK * kPitchPQ ? kTilePQ * kPitchK : kTileK * kPitchPQ);

  __device__ __forceinline__ static int32_t index(FpropArgs const& a, int32_t k, int32_t pq) {
    return a.y_filters ? pq * kPitchK + k : k * kPitchPQ + pq;
  }
  // Stores the four sums from float `i` of the tile on, unless they are padding.
  __device__ __forceinline__ static void store(FpropArgs const& a, TilePlace const& place, int32_t i, float4 const& sum) {
    int32_t const pitch = a.y_filters ? kPitchK : kPitchPQ, row = i / pitch, column = i % pitch;
    if (row >= (a.y_filters ? kTilePQ : kTileK) || column >= (a.y_filters ? kTileK : kTilePQ)) return;
    int32_t const k = place.first_k + (a.y_filters ? column : row), m = place.first_pixel + (a.y_filters ? row : column);
    if (a.y_filters) {
      store4<true>(a, k, place.end_k, m, output_offset(a, m), sum);
    } else {
      store4<false>(a, k, place.end_k, m, output_offset(a, m), sum);
    }
  }
};

// Floats that a split of a tile takes in the workspace: whole items of all threads, with the padding of Turn.
__host__ __device__ constexpr int32_t split_floats(int32_t tile_k, int32_t tile_pq) {
  return ceil_div((tile_k + 8) * (tile_pq + 8), 1024) * 1024;
}

// The place in the output of a tile of T whose sums change hands. An item is four floats of the tile as it lies in shared memory.
template <class T, int kLanesPQ = T::kLanesPQ>
struct TurnedTile : TilePlace {
  using Turned = Turn<T::kTileK, T::kTilePQ, kLanesPQ>;
  static constexpr int kThreads = T::kThreads, kItems = ceil_div(Turned::kBytes, 16 * kThreads);
  static constexpr int kSplitFloats = split_floats(T::kTileK, T::kTilePQ);

  __device__ __forceinline__ TurnedTile(FpropArgs const& a, FpropPlan const& plan, int32_t tile, int32_t /* thread */ = 0)
      : TilePlace(a, plan, tile, T::kTileK, T::kTilePQ) {}
  __device__ __forceinline__ void store(FpropArgs const& a, int32_t item, int32_t thread, float4 const& sum) const {
    Turned::store(a, *this, 4 * (item * kThreads + thread), sum);
  }
};

// ---- splits

// What a block does: slices first .. last - 1 of a tile. `split` is below 0 for a whole tile. Blocks side by side have the same split, and
// so the same number of slices: multiprocessors then finish at the same time.
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

// One item, four sums, of a thread: Sums::kItems of Sums::kThreads threads.
template <class Sums>
__device__ __forceinline__ float4* partial_sum(FpropArgs const& a, FpropPlan const& plan, int32_t split, int32_t tile, int32_t item,
                                               int32_t thread) {
  static_assert(4 * Sums::kItems * Sums::kThreads <= Sums::kSplitFloats, "splits find room");
  int64_t const index = (int64_t{tile - plan.whole} * plan.splits + split) * (Sums::kSplitFloats / 4) + item * Sums::kThreads + thread;
  return reinterpret_cast<float4*>(static_cast<char*>(a.p.workspace) + plan.packed_bytes) + index;
}

__device__ __forceinline__ void add(float4* sum, float4 const& v) {
  sum->x += v.x;
  sum->y += v.y;
  sum->z += v.z;
  sum->w += v.w;
}

// Counts the blocks of a tile that have come so far; true for the last one. Nobody clears the counts before a launch: a count holds in
// its upper bits the number of the launch that it belongs to, and any other number there means that none has come. The last block
// takes the number away, because a launch in a CUDA graph has the same one in each replay.
__device__ __forceinline__ bool comes_last(unsigned long long* count, FpropPlan const& plan) {
  unsigned long long expected, seen = 0;
  int32_t arrived;
  __threadfence();
  do {
    expected = seen;
    unsigned long long const before = expected ^ plan.launch;
    arrived = before < kMaxSplits ? static_cast<int32_t>(before) + 1 : 1;
    seen = atomicCAS(count, expected, arrived == plan.splits ? 0 : plan.launch | arrived);
  } while (seen != expected);
  if (arrived < plan.splits) return false;
  __threadfence();
  return true;
}

// Leaves a split's sums, get(item), in the workspace. Where there are few splits, the block of a tile that comes last adds up those of
// all, always in the same order, so that results repeat exactly, and takes them by put(item, sum): true for this one.
template <class Sums, class Get, class Put>
__device__ __forceinline__ bool join_splits(FpropArgs const& a, FpropPlan const& plan, Work const& work, Get const& get, Put const& put) {
#pragma unroll
  for (int item = 0; item < Sums::kItems; ++item) __stcg(partial_sum<Sums>(a, plan, work.split, work.tile, item, threadIdx.x), get(item));
  if (plan.splits > kMaxJoined) return false;
  __syncthreads();
  int64_t const floats = int64_t{plan.tiles - plan.whole} * plan.splits * Sums::kSplitFloats;
  auto* const counts = reinterpret_cast<unsigned long long*>(static_cast<char*>(a.p.workspace) + plan.packed_bytes + floats * sizeof(float));
  if (!__syncthreads_or(threadIdx.x == 0 && comes_last(&counts[work.tile - plan.whole], plan))) return false;
  float4 total[Sums::kItems] = {};
#pragma unroll 1
  for (int32_t split = 0; split < plan.splits; ++split)
#pragma unroll
    for (int item = 0; item < Sums::kItems; ++item) add(&total[item], __ldcg(partial_sum<Sums>(a, plan, split, work.tile, item, threadIdx.x)));
#pragma unroll
  for (int item = 0; item < Sums::kItems; ++item) put(item, total[item]);
  return true;
}

// Adds many splits of item blockIdx.y of a tile, in order. Where there are few tiles, kGroups threads share an output's splits.
template <class Sums, int kGroups>
__global__ void __launch_bounds__(Sums::kThreads* kGroups)
    adder2d_fprop_reduce_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ FpropPlan const plan) {
  __shared__ float4 sums[kGroups][Sums::kThreads];
  int32_t const thread = threadIdx.x % Sums::kThreads, group = threadIdx.x / Sums::kThreads;
  int32_t const tile = plan.whole + static_cast<int32_t>(blockIdx.x);
  float4 const* const partial = partial_sum<Sums>(a, plan, 0, tile, blockIdx.y, thread);
  wait_for_primary();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  constexpr int kBatch = 8;  // loads on their way at once
  for (int32_t first = group; first < plan.splits; first += kBatch * kGroups) {
    float4 v[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      int32_t const split = first + b * kGroups;
      v[b] = split < plan.splits ? partial[split * (Sums::kSplitFloats / 4)] : float4{};
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
  Sums(a, plan, tile, thread).store(a, blockIdx.y, thread, sum);
}

// Stores a tile whose sums have changed hands. Its loops stay loops: unrolled they were half of a kernel's code, and no faster.
template <class View>
__device__ __forceinline__ void finish_turned(FpropArgs const& a, FpropPlan const& plan, Work const& work, View const& view, float* sums) {
  using Turned = typename View::Turned;
  if (work.split >= 0) {
    // As they lie in shared memory, padding included.
    auto const item_at = [&](int32_t item) -> float4& { return reinterpret_cast<float4*>(sums)[item * View::kThreads + threadIdx.x]; };
    if (!join_splits<View>(a, plan, work, item_at, [&](int32_t item, float4 const& sum) { item_at(item) = sum; })) return;
    __syncthreads();
  }
  auto const sum = [&](int32_t k, int32_t pq) -> float4 const& { return *reinterpret_cast<float4 const*>(&sums[Turned::index(a, k, pq)]); };
  int32_t const thread = threadIdx.x;
  if (a.y_filters) {
    constexpr int kQuads = Turned::kTileK / 4;
    int32_t const k = thread % kQuads * 4;
#pragma unroll 1
    for (int32_t pq = thread / kQuads; pq < Turned::kTilePQ; pq += View::kThreads / kQuads) {
      int32_t const m = view.first_pixel + pq;
      store4<true>(a, view.first_k + k, view.end_k, m, output_offset(a, m), sum(k, pq));
    }
  } else {
    constexpr int kQuads = Turned::kTilePQ / 4, kRows = View::kThreads / kQuads;
    if (thread >= kRows * kQuads) return;  // of tiles of 112 pixels
    int32_t const pq = thread % kQuads * 4, m = view.first_pixel + pq;
    int64_t const offset = output_offset(a, m);
#pragma unroll 2
    for (int32_t k = thread / kQuads; k < Turned::kTileK; k += kRows) store4<false>(a, view.first_k + k, view.end_k, m, offset, sum(k, pq));
  }
  static_assert(View::kThreads % (Turned::kTileK / 4) == 0 && View::kThreads >= Turned::kTilePQ / 4, "threads take whole rows of quads");
}

// Launches the kernel of one tile and, where there are many splits, the kernel that adds them. `after_pack` says that the kernel before
// it on the stream packs its weights, and that it waits for them by itself. `most_smem_bytes` is the same for all plans: another thread
// may be about to launch. Args is FpropArgs or more.
template <class Sums, class Args>
cudaError_t launch_tiled(void (*kernel)(Args, FpropPlan), size_t smem_bytes, size_t most_smem_bytes, int32_t threads, bool after_pack,
                         Args const& args, FpropPlan const& plan, cudaStream_t stream) {
  cudaError_t error = allow_smem(kernel, most_smem_bytes);
  if (error != cudaSuccess) return error;
  FpropPlan numbered = plan;
  numbered.launch = launch_number();
  int32_t const rest = plan.tiles - plan.whole;
  error = launch_kernel(after_pack, kernel, dim3(plan.whole + rest * plan.splits), dim3(threads), smem_bytes, stream, args, numbered);
  if (error != cudaSuccess || rest == 0 || plan.splits <= kMaxJoined) return error;
  dim3 const items(rest, Sums::kItems);
  constexpr int kGroups = 512 / Sums::kThreads;
  return plan.splits >= 8 ? launch_dependent(adder2d_fprop_reduce_kernel<Sums, kGroups>, items, dim3(512), 0, stream, args, plan)
                          : launch_dependent(adder2d_fprop_reduce_kernel<Sums, 1>, items, dim3(Sums::kThreads), 0, stream, args, plan);
}

// ---- plan

// 1x1 kernels at stride 1, without padding.
inline bool is_pointwise(Adder2dParams const& p) {
  return p.R == 1 && p.S == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0;
}

// Those whose pixels lie in y as in x, four of them at an aligned address.
inline bool is_plane(FpropArgs const& a) {
  Adder2dParams const& p = a.p;
  return is_pointwise(p) && p.x_stride[3] == 1 && p.x_stride[2] == p.W && int64_t{p.H} * p.W % 4 == 0 && p.x_stride[1] % 4 == 0 &&
         p.x_stride[0] % 4 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
}

struct TileSize {
  int32_t k, pq, c;   // filters, pixels, terms of a slice
  int32_t resident;   // blocks that run on a multiprocessor at once
  double rate;        // accumulated terms a cycle and multiprocessor
};

constexpr int32_t kMaxSplitBlocks = 8;  // a multiprocessor

// The best tile and number of splits for `slices_of(size)` slices a tile, the last of them perhaps a part of one, with split sums in at
// most `workspace_bytes`. `forward` is false for dgrad_simt.cu, which splits all tiles or none, and adds their sums in a kernel of its
// own. Sets all of the plan but packed_bytes and launch. *cycles is the prediction.
FpropPlan choose_tile(FpropArgs const& args, TileSize const* sizes, int32_t count, double (*slices_of)(FpropArgs const&, TileSize const&),
                      size_t workspace_bytes, double* cycles, bool forward);

}  // namespace adder2d
