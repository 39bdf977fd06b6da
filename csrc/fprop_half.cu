// Implicit GEMM on half pairs: float16 and bfloat16 input, Ampere and newer.
//
// Pairs lie along the channels, which therefore lie side by side in memory: a small kernel before the main one packs the
// weights in the order in which they are read, and the image too, unless it is float16 in channels_last already.
//
// For every output, 32 terms are 16 pairs of |x - w|, added in float16 four pairs at a time and then to a float32
// accumulator: no term is rounded more than seven times in float16, however long the sum (the difference, two levels of
// four, three sums of fours, the two halves).
//
// Halves lose what float32 keeps: a difference or a sum beyond 65504, and bits below 2^-24 of inputs that are not float16.
// A tile in which that may have happened is summed again by exact_sum, in float32: slow, and rare.
#include "fprop_tiled.cuh"

namespace adder2d {
namespace {

constexpr int kVector = 8;       // halves of 16 bytes
constexpr int kMinChannels = 3;  // of a group: vectors would be mostly empty with fewer

// ---- problem

// The problem as these kernels read it. The reduction runs over vectors of kVector channels: all of one tap, then the next
// tap's. Channels of a group are filled up with zeros to a multiple of kVector, on both sides.
struct HalfArgs : FpropArgs {
  __half const* image;            // [N][H][W][groups][channels], packed or the input itself
  int32_t step_n, step_h, step_w;  // vectors from one image, row and column to the next
  int32_t vectors;                // of a tap and group
  int32_t pitch;                  // filters of a group in the packed weights, rounded up
  bool packs_image;
  bool exact_halves;              // no conversion rounds
  FastDiv div_vectors, div_HW, div_W;
};

// ---- traits

template <int kTileK_, int kTilePQ_, int kThreadK_, int kStages_, int kBlocks>
struct Tile {
  static constexpr int kTileK = kTileK_, kTilePQ = kTilePQ_;       // outputs of a block: filters, pixels
  static constexpr int kTileC = 32, kVectors = kTileC / kVector;   // halves of a slice of the reduction
  static constexpr int kStages = kStages_;                         // slices in flight
  static constexpr int kThreadK = kThreadK_, kThreadPQ = 4;        // outputs of a thread
  static constexpr int kThreads = kTileK * kTilePQ / (kThreadK * kThreadPQ);
  static constexpr int kLanesK = kTileK >= 4 * kThreadK ? 4 : kTileK / kThreadK, kLanesPQ = 32 / kLanesK;  // a warp's threads
  static constexpr int kWarpsK = kTileK / (kLanesK * kThreadK);
  static constexpr int kStepK = kTileK / kThreadK, kStepPQ = kTilePQ / kThreadPQ;  // between outputs of a thread
  static constexpr int kPitch = kTileC + kVector;  // 80 bytes, so that 8 rows of 16 bytes lie in 32 different banks
  static constexpr int kRows = kThreads / kVectors;  // rows of a slice that are copied at once
  static constexpr int kBlocksPerSM = kBlocks;

  static_assert(kTileC == 32, "two turns of 16 channels, then to float32: what bounds the error");
  static_assert(kThreadK % 4 == 0, "sums are stored four filters at a time");
  static_assert(kTileK % (kLanesK * kThreadK) == 0 && kTilePQ % (kLanesPQ * kThreadPQ) == 0, "warps must tile the block");
  static_assert(kTilePQ % kRows == 0 && (kTileK % kRows == 0 || kTileK < kRows), "copies must tile the slice");
};

// An output pixel: where its window starts, in vectors from the image's first. An absent pixel has w0 = kOutside.
struct alignas(16) Window {
  int32_t offset, h0, w0, unused;
};

template <class T>
struct Smem {
  alignas(16) __half w[T::kStages][T::kTileK][T::kPitch];
  alignas(16) __half x[T::kStages][T::kTilePQ][T::kPitch];
  Window window[T::kTilePQ];
};

template <class T>
struct View : TilePlace {
  using Turned = Turn<T::kTileK, T::kTilePQ, T::kLanesK, T::kLanesPQ>;
  static constexpr int kThreads = T::kThreads, kItems = ceil_div(Turned::kBytes, 16 * kThreads);
  static constexpr int kSplitFloats = split_floats(T::kTileK, T::kTilePQ);
  int32_t thread_k, thread_pq;  // first output that the thread sums; the others lie kStepK, kStepPQ apart

  __device__ __forceinline__ View(FpropArgs const& a, FpropPlan const& plan, int32_t tile, int32_t thread)
      : TilePlace(a, plan, tile, T::kTileK, T::kTilePQ) {
    int32_t const warp = thread / 32, lane = thread % 32;
    thread_k = warp % T::kWarpsK * T::kLanesK + lane / T::kLanesPQ;
    thread_pq = warp / T::kWarpsK * T::kLanesPQ + lane % T::kLanesPQ;
  }
  __device__ __forceinline__ int32_t k(int32_t i) const { return thread_k + i * T::kStepK; }
  __device__ __forceinline__ int32_t pq(int32_t j) const { return thread_pq + j * T::kStepPQ; }
  __device__ __forceinline__ void store(FpropArgs const& a, int32_t item, int32_t thread, float4 const& sum) const {
    Turned::store(a, *this, 4 * (item * kThreads + thread), sum);
  }
};

// ---- pack

// 16 bits of either type as a half.
__device__ __forceinline__ uint16_t to_half(uint16_t bits, int32_t type) {
  if (type == ADDER2D_FLOAT16) return bits;
  return __half_as_ushort(__float2half_rn(__uint_as_float(uint32_t{bits} << 16)));
}

constexpr int kPackThreads = 256;
constexpr int kPackPixels = 64, kPackVectors = 4;    // of the image a block
constexpr int kPackFilters = 8;                      // of the weights a block, one a warp
constexpr int kPackElements = kPackVectors * kVector * 49;  // of one filter in a block

// Binary logarithm of the vectors of a filter in a block: fewer for large kernels, so that they find room.
__host__ __device__ inline int32_t pack_shift(int32_t RS) { return RS * kPackVectors * kVector <= kPackElements ? 2 : 0; }
static_assert(kPackVectors == 1 << 2 && kPackFilters == 1 << 3 && kPackThreads == 32 * kPackFilters, "threads are numbered by shifts");

// Weights [K, Cg, R, S] of any type to halves [groups][slices][pitch][kTileC], with zeros where there is nothing. The image to
// [N][H][W][groups * vectors]; its blocks come behind those of the weights.
template <int kTileC>
__global__ void __launch_bounds__(kPackThreads)
    adder2d_pack_half_kernel(__grid_constant__ HalfArgs const a, int32_t slices, int32_t weight_blocks) {
  __shared__ union {
    __half w[kPackFilters][kPackElements + 2];  // as in memory
    uint16_t x[kPackVectors * kVector][kPackPixels + 2];  // rows of 33 banks: writing and reading are free of conflicts
  } turned;
  launch_dependents();
  alignas(16) uint16_t packed[kVector];
  if (blockIdx.x < weight_blocks) {
    int32_t const RS = a.p.R * a.p.S, shift = pack_shift(RS), columns = ceil_div(a.vectors, 1 << shift);
    int32_t const first_vector = blockIdx.x % columns << shift, rows = a.pitch / kPackFilters;
    int32_t const first_k = blockIdx.x / columns % rows * kPackFilters, group = blockIdx.x / columns / rows;
    int32_t const warp = threadIdx.x / 32, first_c = first_vector * kVector;
    int32_t const length = first_k + warp < a.Kg ? min(kVector << shift, a.Cg - first_c) * RS : 0;
    int64_t const from = ((int64_t{group} * a.Kg + first_k + warp) * a.Cg + first_c) * RS;
#pragma unroll 4
    for (int32_t i = threadIdx.x % 32; i < kVector * RS << shift; i += 32)
      turned.w[warp][i] = __float2half_rn(i < length ? load_as_float(a.p.w, from + i, a.p.w_type) : 0.f);
    __syncthreads();
    auto* const to = static_cast<uint4*>(a.p.workspace) + (int64_t{group} * slices * a.pitch + first_k) * (kTileC / kVector);
    auto const store = [&](int32_t k, int32_t vector, uint4 const& v) {  // vector of the whole reduction
      int32_t const slice = vector / (kTileC / kVector), lane = vector % (kTileC / kVector);
      to[(int64_t{slice} * a.pitch + k) * (kTileC / kVector) + lane] = v;
    };
    int32_t const part = threadIdx.x & ((1 << shift) - 1), k = threadIdx.x >> shift & (kPackFilters - 1);
    if (first_vector + part < a.vectors) {
      for (int32_t tap = threadIdx.x >> shift >> 3; tap < RS; tap += kPackThreads >> shift >> 3) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) packed[e] = __half_as_ushort(turned.w[k][(part * kVector + e) * RS + tap]);
        store(k, tap * a.vectors + first_vector + part, *reinterpret_cast<uint4*>(packed));
      }
    }
    int32_t const vectors = RS * a.vectors;  // behind them, the last slice is filled up
    for (int32_t i = threadIdx.x; i < kPackFilters * (slices * (kTileC / kVector) - vectors) && first_vector == 0; i += kPackThreads)
      store(i % kPackFilters, vectors + i / kPackFilters, make_uint4(0, 0, 0, 0));
    return;
  }

  int32_t const vectors = a.p.groups * a.vectors, block = static_cast<int32_t>(blockIdx.x) - weight_blocks;
  int32_t const columns_x = ceil_div(vectors, kPackVectors), pixels = a.p.N * a.p.H * a.p.W;
  int32_t const first_vector = block % columns_x * kPackVectors, first_pixel = block / columns_x * kPackPixels;
  auto const* const x = static_cast<uint16_t const*>(a.p.x);
  auto const offset_of = [&](int32_t m) {
    int32_t hw, w;
    int32_t const n = a.div_HW.divmod(m, &hw), h = a.div_W.divmod(hw, &w);
    return n * a.p.x_stride[0] + h * a.p.x_stride[2] + w * a.p.x_stride[3];
  };
  int32_t const m = first_pixel + threadIdx.x / kPackVectors, vector = first_vector + threadIdx.x % kPackVectors;
  static_assert(kPackThreads == kPackPixels * kPackVectors, "one vector a thread");
  if (a.p.x_stride[1] == 1) {  // channels lie side by side already
    if (m >= pixels || vector >= vectors) return;
    int32_t part;
    int32_t const group = a.div_vectors.divmod(vector, &part);
    uint16_t const* const src = x + offset_of(m) + group * a.Cg;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      int32_t const c = part * kVector + e;
      packed[e] = c < a.Cg ? to_half(__ldg(src + c), a.p.x_type) : uint16_t{0};
    }
  } else {
    // A warp reads pixels side by side, and the block turns them over.
    int32_t const pixel = first_pixel + threadIdx.x % kPackPixels, row = threadIdx.x / kPackPixels;
    constexpr int kStep = kPackThreads / kPackPixels;
    uint16_t const* const src = x + (pixel < pixels ? offset_of(pixel) : 0);
    bool const padded = a.Cg % kVector != 0;
    uint16_t bits[kPackVectors * kVector / kStep];
#pragma unroll
    for (int i = 0; i < kPackVectors * kVector / kStep; ++i) {
      int32_t c = first_vector * kVector + row + i * kStep;  // of the packed channels; with padding not of those in x
      bool present = pixel < pixels && c < vectors * kVector;
      if (padded) {
        int32_t part;
        int32_t const group = a.div_vectors.divmod(c / kVector, &part), within = part * kVector + c % kVector;
        present = present && within < a.Cg;
        c = group * a.Cg + within;
      }
      bits[i] = present ? __ldg(src + c * a.p.x_stride[1]) : uint16_t{0};
    }
#pragma unroll
    for (int i = 0; i < kPackVectors * kVector / kStep; ++i)
      turned.x[row + i * kStep][threadIdx.x % kPackPixels] = to_half(bits[i], a.p.x_type);
    __syncthreads();
    if (m >= pixels || vector >= vectors) return;
#pragma unroll
    for (int e = 0; e < kVector; ++e) packed[e] = turned.x[threadIdx.x % kPackVectors * kVector + e][threadIdx.x / kPackVectors];
  }
  reinterpret_cast<uint4*>(const_cast<__half*>(a.image))[int64_t{m} * vectors + vector] = *reinterpret_cast<uint4*>(packed);
}

// ---- fill

// The slices of one tile in order. A thread copies the same vector of a slice for some filters and some pixels.
template <class T>
struct Filler {
  HalfArgs const& a;
  Smem<T>& smem;
  __half const* w;          // what the thread copies first of the slice's packed weights
  int32_t thread;
  int32_t vector, dh, dw;   // the thread's vector of the slice: of which tap; behind the last tap dh is kOutside
  int32_t offset;           // vectors from a window's first one to this one

  __device__ __forceinline__ Filler(HalfArgs const& args, FpropPlan const& plan, Smem<T>& shared, View<T> const& view,
                                    int32_t slice)
      : a(args), smem(shared), thread(threadIdx.x) {
    asm volatile("" : "+r"(thread));  // else it is read from the special register for each slice, which takes long
    int32_t s;
    int32_t const rs = a.div_vectors.divmod(slice * T::kVectors + threadIdx.x % T::kVectors, &vector);
    int32_t const r = a.div_S.divmod(rs, &s);
    dh = r < a.p.R ? r * a.p.dil_h : kOutside;
    dw = s * a.p.dil_w;
    offset = vector + r * a.p.dil_h * a.step_h + dw * a.step_w;
    w = static_cast<__half const*>(a.p.workspace) +
        ((int64_t{view.group} * plan.slices + slice) * a.pitch + view.first_k - view.group * a.Kg) * T::kTileC +
        threadIdx.x * kVector;
    for (int i = threadIdx.x; i < T::kTilePQ; i += T::kThreads) {
      Window window{0, 0, kOutside, 0};
      int32_t const m = view.first_pixel + i;
      if (m < a.NPQ) {
        int32_t pq, q;
        int32_t const n = a.div_PQ.divmod(m, &pq), p = a.div_Q.divmod(pq, &q);
        window.h0 = p * a.p.stride_h - a.p.pad_h;
        window.w0 = q * a.p.stride_w - a.p.pad_w;
        window.offset = n * a.step_n + view.group * a.vectors + window.h0 * a.step_h + window.w0 * a.step_w;
      }
      smem.window[i] = window;
    }
  }

  // The windows of the pixels that the thread copies.
  static constexpr int kPixels = T::kTilePQ / T::kRows;
  __device__ __forceinline__ void read(Window (&windows)[kPixels]) const {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) windows[i] = smem.window[i * T::kRows + thread / T::kVectors];
  }

  // Starts the copies of the next slice.
  __device__ __forceinline__ void fill(int32_t stage, Window const (&windows)[kPixels]) {
    int32_t const row = thread / T::kVectors, column = thread % T::kVectors * kVector;
#pragma unroll
    for (int k = 0; k < T::kTileK; k += T::kRows)
      if (T::kTileK >= T::kRows || row < T::kTileK) copy16_async(&smem.w[stage][k + row][column], w + k * T::kTileC);
    auto const* const image = reinterpret_cast<uint4 const*>(a.image);
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      bool const valid = static_cast<uint32_t>(windows[i].h0 + dh) < static_cast<uint32_t>(a.p.H) &&
                         static_cast<uint32_t>(windows[i].w0 + dw) < static_cast<uint32_t>(a.p.W);
      copy16_async(&smem.x[stage][i * T::kRows + row][column], image + (windows[i].offset + offset), valid);
    }
    w += a.pitch * T::kTileC;
    vector += T::kVectors;
    offset += T::kVectors;
    while (vector >= a.vectors) {
      vector -= a.vectors;
      offset += a.p.dil_w * a.step_w - a.vectors;
      dw += a.p.dil_w;
      if (dw == a.p.S * a.p.dil_w) {
        offset += a.p.dil_h * a.step_h - dw * a.step_w;
        dw = 0;
        dh += a.p.dil_h;
        if (dh == a.p.R * a.p.dil_h) dh = kOutside;
      }
    }
  }
};

// ---- accumulate

__device__ __forceinline__ void load16(__half2 (&fragment)[8], __half const* smem) {
  *reinterpret_cast<uint4*>(fragment) = *reinterpret_cast<uint4 const*>(smem);
  *reinterpret_cast<uint4*>(fragment + 4) = *reinterpret_cast<uint4 const*>(smem + kVector);
}

// |x - w| of four pairs, added as a tree.
__device__ __forceinline__ __half2 add_four(__half2 const* x, __half2 const* w) {
  __half2 const low = __hadd2(__habs2(__hsub2(x[0], w[0])), __habs2(__hsub2(x[1], w[1])));
  __half2 const high = __hadd2(__habs2(__hsub2(x[2], w[2])), __habs2(__hsub2(x[3], w[3])));
  return __hadd2(low, high);
}

// Accumulates slices first .. last - 1 into acc[pixel][filter].
template <class T>
__device__ __forceinline__ void accumulate(HalfArgs const& a, FpropPlan const& plan, View<T> const& view, int32_t first,
                                           int32_t last, Smem<T>& smem, float (&acc)[T::kThreadPQ][T::kThreadK]) {
  Filler<T> filler(a, plan, smem, view, first);
  wait_for_primary();
  __syncthreads();
  int32_t next = first, fill_stage = 0;
  Window windows[Filler<T>::kPixels];
  auto fill = [&] {
    if (next < last) filler.fill(fill_stage, windows);
    ++next;
    fill_stage = fill_stage + 1 == T::kStages ? 0 : fill_stage + 1;
    copy_commit();  // an empty group keeps the count that copy_wait relies on
  };
  filler.read(windows);
  for (int i = 0; i < T::kStages - 1; ++i) fill();

  int32_t stage = 0;
#pragma unroll 1
  for (int32_t slice = first; slice < last; ++slice) {
    copy_wait<T::kStages - 2>();
    __syncthreads();
    __half const* const w_smem = smem.w[stage][view.thread_k];
    __half const* const x_smem = smem.x[stage][view.thread_pq];
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
    __half2 x[T::kThreadPQ][8], pairs[T::kThreadPQ][T::kThreadK];
#pragma unroll
    for (int j = 0; j < T::kThreadPQ; ++j) load16(x[j], x_smem + j * T::kStepPQ * T::kPitch);
    filler.read(windows);
#pragma unroll
    for (int i = 0; i < T::kThreadK; ++i) {
      __half2 w[8];
      load16(w, w_smem + i * T::kStepK * T::kPitch);
#pragma unroll
      for (int j = 0; j < T::kThreadPQ; ++j) pairs[j][i] = __hadd2(add_four(x[j], w), add_four(x[j] + 4, w + 4));
      if (i == 0) fill();  // not before: it would wait for the windows
    }
#pragma unroll
    for (int j = 0; j < T::kThreadPQ; ++j) load16(x[j], x_smem + j * T::kStepPQ * T::kPitch + 16);
#pragma unroll
    for (int i = 0; i < T::kThreadK; ++i) {
      __half2 w[8];
      load16(w, w_smem + i * T::kStepK * T::kPitch + 16);
#pragma unroll
      for (int j = 0; j < T::kThreadPQ; ++j) {
        __half2 const sum = __hadd2(__hadd2(pairs[j][i], add_four(x[j], w)), add_four(x[j] + 4, w + 4));
        acc[j][i] += __half2float(__hadd(__low2half(sum), __high2half(sum)));
      }
    }
  }
}

// Sum over the same slices for one output, in float32 from memory.
template <class T>
__device__ __noinline__ float exact_sum(HalfArgs const& a, int32_t group, int32_t k, int32_t m, int32_t first, int32_t last) {
  if (m >= a.NPQ || k >= (group + 1) * a.Kg) return 0.f;
  Pixel const pixel = make_pixel(a, group, m);
  float sum = 0.f;
  int32_t const end = min(last * T::kVectors, a.p.R * a.p.S * a.vectors);
  for (int32_t i = first * T::kVectors; i < end; ++i) {
    int32_t vector, s;
    int32_t const rs = a.div_vectors.divmod(i, &vector), r = a.div_S.divmod(rs, &s);
    bool const valid = inside(a, pixel, r * a.p.dil_h, s * a.p.dil_w);
    int64_t const offset = pixel.offset + r * a.p.dil_h * a.p.x_stride[2] + s * a.p.dil_w * a.p.x_stride[3];
    for (int32_t c = vector * kVector; c < min((vector + 1) * kVector, a.Cg); ++c) {
      float const x = valid ? load_as_float(a.p.x, offset + c * a.p.x_stride[1], a.p.x_type) : 0.f;
      sum += fabsf(x - load_as_float(a.p.w, (int64_t{k} * a.Cg + c) * a.p.R * a.p.S + rs, a.p.w_type));
    }
  }
  return sum;
}

// ---- kernel

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    adder2d_fprop_half_kernel(__grid_constant__ HalfArgs const a, __grid_constant__ FpropPlan const plan) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  launch_dependents();
  Work const work(plan);
  View<T> const view(a, plan, work.tile, threadIdx.x);
  float acc[T::kThreadPQ][T::kThreadK] = {};
  accumulate(a, plan, view, work.first, work.last, *reinterpret_cast<Smem<T>*>(smem_bytes), acc);

  // Overflow and NaN show as such in the sums. What conversion to half rounded away below 2^-24 is at most 2^-25 for either
  // side of a term: 2^-12 of a sum of at least 2^-12 a term.
  float const least = a.exact_halves ? 0.f : (work.last - work.first) * T::kTileC * 0x1p-12f;
  bool exact = true;
#pragma unroll
  for (int j = 0; j < T::kThreadPQ; ++j)
#pragma unroll
    for (int i = 0; i < T::kThreadK; ++i) {
      bool const present = view.first_pixel + view.pq(j) < a.NPQ && view.first_k + view.k(i) < view.end_k;
      exact &= isfinite(acc[j][i]) && (acc[j][i] >= least || !present);
    }
  using Turned = typename View<T>::Turned;
  float* const sums = reinterpret_cast<float*>(smem_bytes);
  if (__syncthreads_or(!exact)) {
#pragma unroll 1
    for (int i = 0; i < T::kThreadPQ * T::kThreadK; ++i) {
      int32_t const k = view.k(i % T::kThreadK), pq = view.pq(i / T::kThreadK);
      sums[Turned::index(a, k, pq)] = exact_sum<T>(a, view.group, view.first_k + k, view.first_pixel + pq, work.first, work.last);
    }
  } else {
#pragma unroll
    for (int j = 0; j < T::kThreadPQ; ++j)
#pragma unroll
      for (int i = 0; i < T::kThreadK; ++i) sums[Turned::index(a, view.k(i), view.pq(j))] = acc[j][i];
  }
  __syncthreads();
  finish_turned(a, plan, work, view, sums);
}

// ---- launcher

using Tile64x128 = Tile<64, 128, 8, 3, 2>;
using Tile32x256 = Tile<32, 256, 8, 3, 2>;
using Tile16x256 = Tile<16, 256, 8, 2, 4>;
using Tile32x64 = Tile<32, 64, 4, 3, 4>;  // small problems: four times as many blocks

// Accumulated terms a cycle and multiprocessor, of 128.
template <class T>
constexpr double kRate = T::kThreadK == 8 ? 85 : 60;
template <class T>
constexpr TileSize kSizeOf{T::kTileK, T::kTilePQ, T::kTileC, T::kBlocksPerSM, kRate<T>};
// In the order of launch_fprop_half.
constexpr TileSize kTiles[] = {kSizeOf<Tile64x128>, kSizeOf<Tile32x256>, kSizeOf<Tile16x256>, kSizeOf<Tile32x64>};
constexpr int32_t kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);
constexpr int32_t kTileC = Tile64x128::kTileC;
constexpr int32_t kMaxTileK = 64;

// Whether these kernels take the layer, device and workspace aside.
bool suits_half(Adder2dParams const& p) {
  return p.x_type != ADDER2D_FLOAT32 && p.C / p.groups >= kMinChannels && p.R * p.S <= kPackElements / kVector;
}

// Vectors of a tap and group.
int32_t vectors_of(Adder2dParams const& p) { return ceil_div(p.C / p.groups, kVector); }

// Of the reduction, whatever the tile.
int32_t slices_of(Adder2dParams const& p) { return ceil_div(vectors_of(p) * p.R * p.S, kTileC / kVector); }

// Of workspace for packed weights, whatever the tile.
size_t weight_bytes(Adder2dParams const& p) {
  return sizeof(__half) * p.groups * slices_of(p) * kTileC * ceil_div(p.K / p.groups, kMaxTileK) * kMaxTileK;
}

// Vectors can be copied straight from the input.
bool is_packed_image(Adder2dParams const& p) {
  int64_t const reach = int64_t{p.N - 1} * p.x_stride[0] + int64_t{p.H - 1} * p.x_stride[2] + int64_t{p.W - 1} * p.x_stride[3];
  return p.x_type == ADDER2D_FLOAT16 && p.x_stride[1] == 1 && p.C / p.groups % kVector == 0 && p.x_stride[0] % kVector == 0 &&
         p.x_stride[2] % kVector == 0 && p.x_stride[3] % kVector == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
         reach / kVector <= INT32_MAX / 4;
}

// Of workspace for packed images.
size_t image_bytes(Adder2dParams const& p, int32_t images) {
  return is_packed_image(p) ? 0 : sizeof(uint4) * images * p.H * p.W * p.groups * vectors_of(p);
}

HalfArgs make_half_args(FpropArgs const& problem, FpropPlan const& plan) {
  HalfArgs args{};
  static_cast<FpropArgs&>(args) = problem;
  Adder2dParams const& p = problem.p;
  args.vectors = vectors_of(p);
  args.pitch = plan.tiles_k * kTiles[plan.tile].k;
  args.exact_halves = p.x_type == ADDER2D_FLOAT16 && p.w_type == ADDER2D_FLOAT16;
  args.packs_image = !is_packed_image(p);
  args.div_vectors = FastDiv(args.vectors);
  args.div_HW = FastDiv(int64_t{p.H} * p.W);
  args.div_W = FastDiv(p.W);
  if (args.packs_image) {
    args.image = reinterpret_cast<__half const*>(static_cast<char*>(p.workspace) + weight_bytes(p));
    args.step_w = p.groups * args.vectors;
    args.step_h = p.W * args.step_w;
    args.step_n = p.H * args.step_h;
  } else {
    args.image = static_cast<__half const*>(p.x);
    args.step_w = static_cast<int32_t>(p.x_stride[3] / kVector);
    args.step_h = static_cast<int32_t>(p.x_stride[2] / kVector);
    args.step_n = static_cast<int32_t>(p.x_stride[0] / kVector);
  }
  return args;
}

template <class T>
cudaError_t launch_tile(HalfArgs const& args, FpropPlan const& plan, cudaStream_t stream) {
  int64_t const weight_blocks = int64_t{args.p.groups} * (args.pitch / kPackFilters) * ceil_div(args.vectors, 1 << pack_shift(args.p.R * args.p.S));
  int64_t const pixels = int64_t{args.p.N} * args.p.H * args.p.W;
  int64_t const image_blocks =
      args.packs_image ? ceil_div(pixels, int64_t{kPackPixels}) * ceil_div(args.p.groups * args.vectors, kPackVectors) : 0;
  static_assert(T::kTileK % kPackFilters == 0, "a block packs filters of one group");
  dim3 const pack_grid(static_cast<uint32_t>(weight_blocks + image_blocks));
  cudaError_t const error = launch(adder2d_pack_half_kernel<T::kTileC>, pack_grid, dim3(kPackThreads), 0, stream, args, plan.slices,
                                   static_cast<int32_t>(weight_blocks));
  if (error != cudaSuccess) return error;
  static_assert(16 * View<T>::kItems * T::kThreads <= sizeof(Smem<T>), "sums change hands where the slices were");
  return launch_tiled<View<T>>(adder2d_fprop_half_kernel<T>, sizeof(Smem<T>), sizeof(Smem<T>), T::kThreads, true, args, plan, stream);
}

}  // namespace

int32_t images_of_fprop_half(Adder2dParams const& p, int32_t images) {
  if (!suits_half(p) || is_packed_image(p)) return images;
  size_t const weights = weight_bytes(p);
  if (p.workspace_bytes <= weights) return images;
  int64_t const room = (p.workspace_bytes - weights) / image_bytes(p, 1);
  if (room == 0 || room >= images) return images;
  return static_cast<int32_t>(ceil_div<int64_t>(images, ceil_div<int64_t>(images, room)));  // of about equal size
}

bool takes_fprop_half(FpropArgs const& args, size_t workspace_bytes) {
  // Weights and image must find room.
  if (!suits_half(args.p) || weight_bytes(args.p) + image_bytes(args.p, args.p.N) > workspace_bytes) return false;
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 8;
}

FpropPlan plan_fprop_half(FpropArgs const& args, size_t workspace_bytes) {
  size_t const packed_bytes = weight_bytes(args.p) + image_bytes(args.p, args.p.N);
  auto const slices = [](FpropArgs const& a, TileSize const&) { return slices_of(a.p); };
  double cycles;
  FpropPlan plan = choose_tile(args, kTiles, kTileCount, slices, workspace_bytes - packed_bytes, &cycles, true);
  plan.packed_bytes = packed_bytes;
  plan.workspace_bytes += packed_bytes;
  return plan;
}

cudaError_t launch_fprop_half(FpropArgs const& problem, FpropPlan const& plan, cudaStream_t stream) {
  HalfArgs const args = make_half_args(problem, plan);
  switch (plan.tile) {
    case 0: return launch_tile<Tile64x128>(args, plan, stream);
    case 1: return launch_tile<Tile32x256>(args, plan, stream);
    case 2: return launch_tile<Tile16x256>(args, plan, stream);
    case 3: return launch_tile<Tile32x64>(args, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace adder2d
