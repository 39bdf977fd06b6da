// Implicit GEMM on half pairs: float16 and bfloat16 input, Ampere and newer.
//
// Pairs lie along the channels. For every output, 32 terms are 16 pairs of |x - w|, added in float16 four pairs at a time
// and then to a float32 accumulator: no term is rounded more than seven times in float16, however long the sum (the
// difference, two levels of four, three sums of fours, the two halves).
//
// Halves lose what float32 keeps: a difference or a sum beyond 65504, and bits below 2^-24 of inputs that are not float16.
// A tile in which that may have happened is summed again by exact_sum, in float32: slow, and rare.
#include "fprop_tiled.cuh"

namespace adder2d {
namespace {

// ---- traits

enum class Source { kPixels, kChannels };  // neighbours that a thread or warp loads together: NCHW, NHWC

template <int kTileK_, int kTilePQ_>
struct Tile {
  static constexpr int kTileK = kTileK_, kTilePQ = kTilePQ_;  // outputs of a block: filters, pixels
  static constexpr int kTileC = 16;                           // channels of a slice, all of one tap
  static constexpr int kThreadK = 8, kThreadPQ = 4;           // outputs of a thread
  static constexpr int kThreads = kTileK * kTilePQ / (kThreadK * kThreadPQ);
  static constexpr int kLanesK = 4, kLanesPQ = 8;             // a warp's threads
  static constexpr int kWarpsK = kTileK / (kLanesK * kThreadK);
  static constexpr int kStepK = kTileK / kThreadK, kStepPQ = kTilePQ / kThreadPQ;  // between outputs of a thread
  static constexpr int kPitch = kTileC + 8;  // halves; 48 bytes, so that 8 rows of 16 bytes lie in 32 different banks
  static constexpr int kPixels = kTilePQ > kThreads ? kTilePQ / kThreads : 1;   // kPixels: pixels that a thread loads
  static constexpr int kShares = kTilePQ < kThreads ? kThreads / kTilePQ : 1;   // threads that share a pixel's channels
  static constexpr int kLoads = kTileC / kShares;                               // channels that a thread loads of a pixel
  static constexpr int kBlocksPerSM = 2;

  static_assert(kThreads == 256, "16 warps on a multiprocessor, of 128 registers a thread");
  static_assert(kTileK % (kLanesK * kThreadK) == 0 && kTilePQ % (kLanesPQ * kThreadPQ) == 0, "warps must tile the block");
  static_assert(kLoads % 8 == 0, "a thread stores 8 halves at once");
};

template <class T>
struct Smem {
  alignas(16) __half w[2][T::kTileK][T::kPitch];
  alignas(16) __half x[2][T::kTilePQ][T::kPitch];
  alignas(16) Pixel pixel[T::kTilePQ];
};

template <class T>
struct View : TilePlace {
  static constexpr int kThreads = T::kThreads, kItems = T::kThreadK * T::kThreadPQ / 4;
  int32_t thread_k, thread_pq;  // first output of the thread; the others lie kStepK, kStepPQ apart

  __device__ __forceinline__ View(FpropArgs const& a, FpropPlan const& plan, int32_t tile, int32_t thread)
      : TilePlace(a, plan, tile, T::kTileK, T::kTilePQ) {
    int32_t const warp = thread / 32, lane = thread % 32;
    thread_k = warp % T::kWarpsK * T::kLanesK + lane / T::kLanesPQ;
    thread_pq = warp / T::kWarpsK * T::kLanesPQ + lane % T::kLanesPQ;
  }
  __device__ __forceinline__ int32_t k(int32_t i) const { return first_k + thread_k + i * T::kStepK; }
  __device__ __forceinline__ int32_t pixel(int32_t j) const { return first_pixel + thread_pq + j * T::kStepPQ; }
  static __device__ __forceinline__ constexpr int32_t row(int32_t half, int32_t e) { return half * 4 + e; }
  // Item i: pixel i / 2 of the thread, the first or second four of its filter rows.
  __device__ __forceinline__ void store(FpropArgs const& a, int32_t item, float4 const& sum) const {
    int32_t const m = pixel(item / 2), half = item % 2;
    if (k(row(half, 0)) < end_k) store1(a, k(row(half, 0)), m, sum.x);
    if (k(row(half, 1)) < end_k) store1(a, k(row(half, 1)), m, sum.y);
    if (k(row(half, 2)) < end_k) store1(a, k(row(half, 2)), m, sum.z);
    if (k(row(half, 3)) < end_k) store1(a, k(row(half, 3)), m, sum.w);
  }
};

// ---- fill

__device__ __forceinline__ uint32_t bits(__half2 h) { return *reinterpret_cast<uint32_t*>(&h); }

// Two neighbouring inputs of 16 bits as a half pair.
template <bool kBfloat16>
__device__ __forceinline__ uint32_t half_pair(uint32_t low, uint32_t high) {
  if constexpr (!kBfloat16) return low | high << 16;
  return bits(__floats2half2_rn(__uint_as_float(low << 16), __uint_as_float(high << 16)));
}

// The slices of one tile in order: kTileC channels of one tap after another. Packed weights lie in that order.
template <class T, bool kBfloat16, Source kSource>
struct Filler {
  using Bits = uint16_t;
  FpropArgs const& a;
  Smem<T>& smem;
  int32_t c, r, s;
  int64_t x_offset;   // elements from a window's first tap to the slice's tap and first channel
  __half const* w;    // the thread's part of the slice's packed weights
  uint32_t staged[T::kPixels][T::kLoads];  // kPixels: one input each; kChannels: the first half of them, a pair each

  __device__ __forceinline__ Filler(FpropArgs const& args, FpropPlan const& plan, Smem<T>& shared, View<T> const& view,
                                    int32_t slice)
      : a(args), smem(shared) {
    int32_t rs;
    c = a.div_RS.divmod(slice, &rs) * T::kTileC;
    r = a.div_S.divmod(rs, &s);
    x_offset = c * a.p.x_stride[1] + r * a.p.dil_h * a.p.x_stride[2] + s * a.p.dil_w * a.p.x_stride[3];
    int32_t const pitch = plan.tiles_k * T::kTileK;
    w = static_cast<__half const*>(a.p.workspace) +
        ((int64_t{view.group} * plan.slices + slice) * pitch + view.first_k - view.group * a.Kg) * T::kTileC;
    for (int i = threadIdx.x; i < T::kTilePQ; i += T::kThreads)
      smem.pixel[i] = make_pixel(a, view.group, view.first_pixel + i);
  }

  // Starts the copies of the slice: weights straight to shared memory, inputs to registers.
  __device__ __forceinline__ void load(int32_t stage) {
    constexpr int kCopies = T::kTileK * T::kTileC / 8;  // of 8 halves
    static_assert(kCopies <= T::kThreads, "one copy a thread");
    if (threadIdx.x < kCopies) copy16_async(&smem.w[stage][threadIdx.x / 2][threadIdx.x % 2 * 8], w + threadIdx.x * 8);
    copy_commit();
    int32_t const dh = r * a.p.dil_h, dw = s * a.p.dil_w;
    int32_t const first = T::kShares == 1 ? 0 : threadIdx.x / T::kTilePQ * T::kLoads;
    int32_t const channels = min(T::kLoads, a.Cg - c - first);
    Bits const* const x = static_cast<Bits const*>(a.p.x) + x_offset + first * a.p.x_stride[1];
#pragma unroll
    for (int i = 0; i < T::kPixels; ++i) {
      Pixel const pixel = smem.pixel[i * T::kThreads + threadIdx.x % T::kTilePQ];
      bool const valid = inside(a, pixel, dh, dw);
      Bits const* src = x + pixel.offset;
      if constexpr (kSource == Source::kChannels) {
#pragma unroll
        for (int j = 0; j < T::kLoads / 8; ++j) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (valid && j * 8 < channels) v = __ldg(reinterpret_cast<uint4 const*>(src + j * 8));
          staged[i][j * 4] = v.x, staged[i][j * 4 + 1] = v.y, staged[i][j * 4 + 2] = v.z, staged[i][j * 4 + 3] = v.w;
        }
      } else if (valid && channels == T::kLoads) {
#pragma unroll
        for (int j = 0; j < T::kLoads; ++j, src += a.p.x_stride[1]) staged[i][j] = __ldg(src);
      } else {
#pragma unroll
        for (int j = 0; j < T::kLoads; ++j, src += a.p.x_stride[1]) staged[i][j] = valid && j < channels ? __ldg(src) : 0;
      }
    }
    w += int64_t{a.packed_pitch} * T::kTileC;
    x_offset += a.step_s;
    if (++s == a.p.S) {
      s = 0;
      x_offset += a.step_r;
      if (++r == a.p.R) {
        r = 0;
        c += T::kTileC;
        x_offset += a.step_c + (T::kTileC - 1) * a.p.x_stride[1];
      }
    }
  }

  // Inputs from registers to shared memory; waits for the weights.
  __device__ __forceinline__ void store(int32_t stage) {
    int32_t const first = T::kShares == 1 ? 0 : threadIdx.x / T::kTilePQ * T::kLoads;
#pragma unroll
    for (int i = 0; i < T::kPixels; ++i) {
      __half* const dst = &smem.x[stage][i * T::kThreads + threadIdx.x % T::kTilePQ][first];
#pragma unroll
      for (int j = 0; j < T::kLoads / 8; ++j) {
        uint32_t pair[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (kSource == Source::kChannels) {
            uint32_t const both = staged[i][j * 4 + e];
            pair[e] = kBfloat16 ? half_pair<true>(both & 0xffff, both >> 16) : both;
          } else {
            pair[e] = half_pair<kBfloat16>(staged[i][j * 8 + e * 2], staged[i][j * 8 + e * 2 + 1]);
          }
        }
        *reinterpret_cast<uint4*>(dst + j * 8) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
      }
    }
    copy_wait<0>();
  }
};

// ---- accumulate

__device__ __forceinline__ void load16(__half2 (&fragment)[8], __half const* smem) {
  *reinterpret_cast<uint4*>(fragment) = *reinterpret_cast<uint4 const*>(smem);
  *reinterpret_cast<uint4*>(fragment + 4) = *reinterpret_cast<uint4 const*>(smem + 8);
}

// *sum += |x - w| for eight pairs, four at a time as a tree.
__device__ __forceinline__ void add_pairs(__half2 const (&x)[8], __half2 const (&w)[8], __half2* sum) {
#pragma unroll
  for (int e = 0; e < 8; e += 4) {
    __half2 const low = __hadd2(__habs2(__hsub2(x[e], w[e])), __habs2(__hsub2(x[e + 1], w[e + 1])));
    __half2 const high = __hadd2(__habs2(__hsub2(x[e + 2], w[e + 2])), __habs2(__hsub2(x[e + 3], w[e + 3])));
    *sum = __hadd2(*sum, __hadd2(low, high));
  }
}

// Accumulates slices first .. last - 1 into acc[pixel][half of the filter rows][row].
template <class T, bool kBfloat16, Source kSource>
__device__ __forceinline__ void accumulate(FpropArgs const& a, FpropPlan const& plan, View<T> const& view, int32_t first,
                                           int32_t last, Smem<T>& smem, float (&acc)[T::kThreadPQ][2][4]) {
  __half2 const zero = __half2half2(__ushort_as_half(0));
  __half2 pairs[T::kThreadPQ][T::kThreadK];
#pragma unroll
  for (int j = 0; j < T::kThreadPQ; ++j)
#pragma unroll
    for (int i = 0; i < T::kThreadK; ++i) pairs[j][i] = zero;

  Filler<T, kBfloat16, kSource> filler(a, plan, smem, view, first);
  wait_for_primary();
  __syncthreads();
  filler.load(0);
  filler.store(0);
  for (int32_t slice = first; slice < last; ++slice) {
    int32_t const stage = (slice - first) % 2;
    __syncthreads();
    if (slice + 1 < last) filler.load(stage ^ 1);
    __half2 x[T::kThreadPQ][8];
#pragma unroll
    for (int j = 0; j < T::kThreadPQ; ++j) load16(x[j], smem.x[stage][view.thread_pq + j * T::kStepPQ]);
#pragma unroll
    for (int i = 0; i < T::kThreadK; ++i) {
      __half2 w[8];
      load16(w, smem.w[stage][view.thread_k + i * T::kStepK]);
#pragma unroll
      for (int j = 0; j < T::kThreadPQ; ++j) add_pairs(x[j], w, &pairs[j][i]);
    }
    if (stage == 1 || slice + 1 == last) {  // every second slice
#pragma unroll
      for (int j = 0; j < T::kThreadPQ; ++j)
#pragma unroll
        for (int i = 0; i < T::kThreadK; ++i) {
          acc[j][i / 4][i % 4] += __half2float(__hadd(__low2half(pairs[j][i]), __high2half(pairs[j][i])));
          pairs[j][i] = zero;
        }
    }
    if (slice + 1 < last) filler.store(stage ^ 1);
  }
}

// Sum over the same slices for one output, in float32 from memory.
template <class T>
__device__ __noinline__ float exact_sum(FpropArgs const& a, int32_t group, int32_t k, int32_t m, int32_t first, int32_t last) {
  if (m >= a.NPQ || k >= (group + 1) * a.Kg) return 0.f;
  Pixel const pixel = make_pixel(a, group, m);
  float sum = 0.f;
  for (int32_t slice = first; slice < last; ++slice) {
    int32_t rs, s;
    int32_t const c0 = a.div_RS.divmod(slice, &rs) * T::kTileC, r = a.div_S.divmod(rs, &s);
    bool const valid = inside(a, pixel, r * a.p.dil_h, s * a.p.dil_w);
    int64_t const offset = pixel.offset + r * a.p.dil_h * a.p.x_stride[2] + s * a.p.dil_w * a.p.x_stride[3];
    for (int32_t c = c0; c < min(c0 + T::kTileC, a.Cg); ++c) {
      float const x = valid ? load_as_float(a.p.x, offset + c * a.p.x_stride[1], a.p.x_type) : 0.f;
      sum += fabsf(x - load_as_float(a.p.w, (int64_t{k} * a.Cg + c) * a.p.R * a.p.S + rs, a.p.w_type));
    }
  }
  return sum;
}

// ---- kernels

// Weights [K, Cg, R, S] of any type to halves [groups][slices][pitch][kTileC], zeros behind the filters of a group and the
// channels: in the order of the slices. A thread writes the 16 channels of one filter and tap.
template <int kTileC>
__global__ void __launch_bounds__(128) adder2d_pack_half_kernel(__grid_constant__ FpropArgs const a, int32_t slices) {
  launch_dependents();
  int64_t const index = int64_t{blockIdx.x} * 128 + threadIdx.x;
  int32_t const k = static_cast<int32_t>(index % a.packed_pitch);
  int64_t const rest = index / a.packed_pitch;
  int32_t const slice = static_cast<int32_t>(rest % slices), group = static_cast<int32_t>(rest / slices);
  if (group >= a.p.groups) return;
  int32_t rs;
  int32_t const c = a.div_RS.divmod(slice, &rs) * kTileC;
  __half packed[kTileC];
#pragma unroll
  for (int j = 0; j < kTileC; ++j) {
    bool const present = k < a.Kg && c + j < a.Cg;
    int64_t const from = ((int64_t{group} * a.Kg + k) * a.Cg + c + j) * a.p.R * a.p.S + rs;
    packed[j] = __float2half_rn(present ? load_as_float(a.p.w, from, a.p.w_type) : 0.f);
  }
  uint4* const to = reinterpret_cast<uint4*>(static_cast<__half*>(a.p.workspace) + index * kTileC);
  to[0] = *reinterpret_cast<uint4*>(packed);
  to[1] = *reinterpret_cast<uint4*>(packed + 8);
}

template <class T, bool kBfloat16, Source kSource>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    adder2d_fprop_half_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ FpropPlan const plan) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  launch_dependents();
  View<T> const view(a, plan, blockIdx.x, threadIdx.x);
  int32_t const first = plan.slices * blockIdx.y / plan.splits, last = plan.slices * (blockIdx.y + 1) / plan.splits;
  float acc[T::kThreadPQ][2][4] = {};
  accumulate<T, kBfloat16, kSource>(a, plan, view, first, last, *reinterpret_cast<Smem<T>*>(smem_bytes), acc);

  // Overflow and NaN show as such in the sums. What conversion to half rounded away below 2^-24 is at most 2^-25 for either
  // side of a term: 2^-12 of a sum of at least 2^-12 a term.
  float const least = a.exact_halves ? 0.f : (last - first) * T::kTileC * 0x1p-12f;
  bool exact = true;
#pragma unroll
  for (int item = 0; item < View<T>::kItems; ++item) {
    float const* const v = acc[item / 2][item % 2];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      bool const present = view.pixel(item / 2) < a.NPQ && view.k(View<T>::row(item % 2, e)) < view.end_k;
      exact &= isfinite(v[e]) && (v[e] >= least || !present);
    }
  }
  bool const redo = __syncthreads_or(!exact);
#pragma unroll
  for (int item = 0; item < View<T>::kItems; ++item) {
    float* const v = acc[item / 2][item % 2];
    if (redo) {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        float const sum = exact_sum<T>(a, view.group, view.k(View<T>::row(item % 2, e)), view.pixel(item / 2), first, last);
        if (e == 0) v[0] = sum;
        if (e == 1) v[1] = sum;
        if (e == 2) v[2] = sum;
        if (e == 3) v[3] = sum;
      }
    }
    finish(a, plan, view, item, make_float4(v[0], v[1], v[2], v[3]));
  }
}

// ---- launcher

template <class T, bool kBfloat16, Source kSource>
cudaError_t launch_tile(FpropArgs const& args, FpropPlan const& plan, cudaStream_t stream) {
  int64_t const rows = int64_t{args.p.groups} * plan.slices * args.packed_pitch;
  adder2d_pack_half_kernel<T::kTileC><<<static_cast<uint32_t>(ceil_div(rows, int64_t{128})), 128, 0, stream>>>(args, plan.slices);
  cudaError_t const error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return launch_tiled<View<T>>(adder2d_fprop_half_kernel<T, kBfloat16, kSource>, sizeof(Smem<T>), true, args, plan, stream);
}

using Tile64x128 = Tile<64, 128>;

constexpr double kRate = 60;  // accumulated terms a cycle and multiprocessor

template <class T>
constexpr TileSize kSizeOf{T::kTileK, T::kTilePQ, T::kTileC, T::kBlocksPerSM, kRate};
// In the order of launch_fprop_half.
constexpr TileSize kTiles[] = {kSizeOf<Tile64x128>};
constexpr int32_t kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

// Bytes of the packed weights for tiles of tile_k filters.
size_t packed_weights(FpropArgs const& a, int32_t tile_k) {
  return size_t{2} * a.p.groups * ceil_div(a.Cg, 16) * 16 * a.p.R * a.p.S * ceil_div(a.Kg, tile_k) * tile_k;
}

// 8 channels of a pixel in one aligned load.
bool has_channel_vectors(FpropArgs const& a) {
  return a.p.x_stride[1] == 1 && a.Cg % 8 == 0 && a.p.x_stride[0] % 8 == 0 && a.p.x_stride[2] % 8 == 0 &&
         a.p.x_stride[3] % 8 == 0 && reinterpret_cast<uintptr_t>(a.p.x) % 16 == 0;
}

template <class T>
cudaError_t launch_any_source(FpropArgs const& args, FpropPlan const& plan, cudaStream_t stream) {
  bool const bfloat16 = args.p.x_type == ADDER2D_BFLOAT16;
  if (has_channel_vectors(args))
    return bfloat16 ? launch_tile<T, true, Source::kChannels>(args, plan, stream)
                    : launch_tile<T, false, Source::kChannels>(args, plan, stream);
  return bfloat16 ? launch_tile<T, true, Source::kPixels>(args, plan, stream)
                  : launch_tile<T, false, Source::kPixels>(args, plan, stream);
}

}  // namespace

bool takes_fprop_half(FpropArgs const& args, size_t workspace_bytes) {
  // Slices of 16 channels would be mostly empty below 8. The weights must find room.
  if (args.p.x_type == ADDER2D_FLOAT32 || args.Cg < 8 || packed_weights(args, 64) > workspace_bytes) return false;
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 8;
}

FpropPlan plan_fprop_half(FpropArgs const& args, size_t workspace_bytes) {
  auto const slices_of = [](FpropArgs const& a, TileSize const& size) { return ceil_div(a.Cg, size.c) * a.p.R * a.p.S; };
  double cycles;
  FpropPlan plan =
      choose_tile(args, kTiles, kTileCount, slices_of, workspace_bytes - packed_weights(args, 64), &cycles);
  plan.packed_bytes = packed_weights(args, kTiles[plan.tile].k);
  plan.workspace_bytes += plan.packed_bytes;
  return plan;
}

cudaError_t launch_fprop_half(FpropArgs const& problem, FpropPlan const& plan, cudaStream_t stream) {
  FpropArgs args = problem;
  args.packed_pitch = plan.tiles_k * kTiles[plan.tile].k;
  args.exact_halves = args.p.x_type == ADDER2D_FLOAT16 && args.p.w_type == ADDER2D_FLOAT16;
  switch (plan.tile) {
    case 0: return launch_any_source<Tile64x128>(args, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace adder2d
