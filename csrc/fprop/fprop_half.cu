// Implicit GEMM on half pairs: float16 and bfloat16 input, Ampere and newer.
//
// Pairs lie along the channels, which therefore lie side by side in memory: a small kernel before the main one packs
// the weights in the order in which they are read, and the image too, unless it is float16 in channels_last already.
//
// For every output, 32 terms are 16 pairs of |x - w|, added in float16 four pairs at a time and then to a float32
// accumulator: no term is rounded more than seven times in float16, however long the sum (the difference, two levels of
// four, three sums of fours, the two halves).
//
// Halves lose what float32 keeps: a difference or a sum beyond 65504, and bits below 2^-24 of inputs that are not
// float16. A tile in which that may have happened is summed again by exact_sum, in float32: slow, and rare.
#include "common/cp_async.cuh"
#include "common/device.h"
#include "common/launch.cuh"
#include "fprop/fprop.h"
#include "fprop/half_pack.cuh"
#include "tile/arch.h"
#include "tile/split_k.cuh"

namespace adder2d {
namespace {

using namespace fprop_half;

// ---- traits

template <int kTileK_, int kTilePQ_, int kThreadK_, int kStages_, int kBlocks>
struct Tile {
  static constexpr int kTileK = kTileK_, kTilePQ = kTilePQ_;                      // outputs of a block: filters, pixels
  static constexpr int kTileC = fprop_half::kTileC, kVectors = kTileC / kVector;  // halves of a slice of the reduction
  static constexpr int kStages = kStages_;                                        // slices in flight
  static constexpr int kThreadK = kThreadK_, kThreadPQ = 4;                       // outputs of a thread
  static constexpr int kThreads = kTileK * kTilePQ / (kThreadK * kThreadPQ);
  // A warp's threads.
  static constexpr int kLanesK = kTileK >= 4 * kThreadK ? 4 : kTileK / kThreadK, kLanesPQ = 32 / kLanesK;
  static constexpr int kWarpsK = kTileK / (kLanesK * kThreadK);
  static constexpr int kStepK = kTileK / kThreadK, kStepPQ = kTilePQ / kThreadPQ;  // between outputs of a thread
  static constexpr int kPitch = kTileC + kVector;    // 80 bytes, so that 8 rows of 16 bytes lie in 32 different banks
  static constexpr int kRows = kThreads / kVectors;  // rows of a slice that are copied at once
  static constexpr int kBlocksPerSM = kBlocks;

  static_assert(kTileC == 32, "two turns of 16 channels, then to float32: what bounds the error");
  static_assert(kThreadK % 4 == 0, "sums are stored four filters at a time");
  static_assert(kTileK % (kLanesK * kThreadK) == 0 && kTilePQ % (kLanesPQ * kThreadPQ) == 0,
                "warps must tile the block");
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
using OutputTile = EpilogueTile<T::kTileK, T::kTilePQ, T::kThreads, T::kLanesPQ>;
template <class T>
struct OutputCoord : OutputTile<T> {
  int32_t thread_k, thread_pq;  // first output that the thread sums; the others lie kStepK, kStepPQ apart

  __device__ __forceinline__ OutputCoord(FpropArgs const& a, TileConfig const& config, int32_t tile, int32_t thread)
      : OutputTile<T>(a, config, tile) {
    int32_t const warp = thread / 32, lane = thread % 32;
    thread_k = warp % T::kWarpsK * T::kLanesK + lane / T::kLanesPQ;
    thread_pq = warp / T::kWarpsK * T::kLanesPQ + lane % T::kLanesPQ;
  }
  __device__ __forceinline__ int32_t k(int32_t i) const { return thread_k + i * T::kStepK; }
  __device__ __forceinline__ int32_t pq(int32_t j) const { return thread_pq + j * T::kStepPQ; }
};

// ---- fill

// The slices of one tile in order. A thread copies the same vector of a slice for some filters and some pixels.
template <class T>
struct Loader {
  HalfArgs const& a;
  Smem<T>& smem;
  __half const* w;  // what the thread copies first of the slice's packed weights
  int32_t thread;
  int32_t vector, dh, dw;  // the thread's vector of the slice: of which tap; after the last tap dh is kOutside
  int32_t offset;          // vectors from a window's first one to this one

  __device__ __forceinline__ Loader(HalfArgs const& args, TileConfig const& config, Smem<T>& shared,
                                    OutputCoord<T> const& coord, int32_t slice)
      : a(args), smem(shared), thread(threadIdx.x) {
    asm volatile("" : "+r"(thread));  // else it is read from the special register for each slice, which takes long
    int32_t s;
    int32_t const rs = a.div_vectors.divmod(slice * T::kVectors + threadIdx.x % T::kVectors, &vector);
    int32_t const r = a.div_S.divmod(rs, &s);
    dh = r < a.p.R ? r * a.p.dil_h : kOutside;
    dw = s * a.p.dil_w;
    offset = vector + r * a.p.dil_h * a.step_h + dw * a.step_w;
    w = a.weights +
        ((int64_t{coord.group} * config.slices + slice) * a.pitch + coord.first_k - coord.group * a.Kg) * T::kTileC +
        threadIdx.x * kVector;
    for (int i = threadIdx.x; i < T::kTilePQ; i += T::kThreads) {
      Window window{0, 0, kOutside, 0};
      int32_t const m = coord.first_pixel + i;
      if (m < a.NPQ) {
        int32_t pq, q;
        int32_t const n = a.div_PQ.divmod(m, &pq), p = a.div_Q.divmod(pq, &q);
        window.h0 = p * a.p.stride_h - a.p.pad_h;
        window.w0 = q * a.p.stride_w - a.p.pad_w;
        window.offset = n * a.step_n + coord.group * a.vectors + window.h0 * a.step_h + window.w0 * a.step_w;
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
__device__ __forceinline__ void accumulate(HalfArgs const& a, TileConfig const& config, OutputCoord<T> const& coord,
                                           int32_t first, int32_t last, Smem<T>& smem,
                                           float (&acc)[T::kThreadPQ][T::kThreadK]) {
  Loader<T> loader(a, config, smem, coord, first);
  wait_for_primary();
  __syncthreads();
  int32_t next = first, fill_stage = 0;
  Window windows[Loader<T>::kPixels];
  auto fill = [&] {
    if (next < last) loader.fill(fill_stage, windows);
    ++next;
    fill_stage = fill_stage + 1 == T::kStages ? 0 : fill_stage + 1;
    copy_commit();  // an empty group keeps the count that copy_wait relies on
  };
  loader.read(windows);
  for (int i = 0; i < T::kStages - 1; ++i) fill();

  int32_t stage = 0;
#pragma unroll 1
  for (int32_t slice = first; slice < last; ++slice) {
    copy_wait<T::kStages - 2>();
    __syncthreads();
    __half const* const w_smem = smem.w[stage][coord.thread_k];
    __half const* const x_smem = smem.x[stage][coord.thread_pq];
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
    __half2 x[T::kThreadPQ][8], pairs[T::kThreadPQ][T::kThreadK];
#pragma unroll
    for (int j = 0; j < T::kThreadPQ; ++j) load16(x[j], x_smem + j * T::kStepPQ * T::kPitch);
    loader.read(windows);
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
__device__ __noinline__ float exact_sum(HalfArgs const& a, int32_t group, int32_t k, int32_t m, int32_t first,
                                        int32_t last) {
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
    adder2d_fprop_half_kernel(__grid_constant__ HalfArgs const a, __grid_constant__ TileConfig const config) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  launch_dependents();
  WorkTile const work(config);
  OutputCoord<T> const coord(a, config, work.tile, threadIdx.x);
  float acc[T::kThreadPQ][T::kThreadK] = {};
  accumulate(a, config, coord, work.first, work.last, *reinterpret_cast<Smem<T>*>(smem_bytes), acc);

  // Overflow and NaN show as such in the sums. What conversion to half rounded away below 2^-24 is at most 2^-25 for
  // either side of a term: 2^-12 of a sum of at least 2^-12 a term.
  float const least = a.exact_halves ? 0.f : (work.last - work.first) * T::kTileC * 0x1p-12f;
  bool exact = true;
#pragma unroll
  for (int j = 0; j < T::kThreadPQ; ++j)
#pragma unroll
    for (int i = 0; i < T::kThreadK; ++i) {
      bool const present = coord.first_pixel + coord.pq(j) < a.NPQ && coord.first_k + coord.k(i) < coord.end_k;
      exact &= isfinite(acc[j][i]) && (acc[j][i] >= least || !present);
    }
  using Transpose = typename OutputCoord<T>::Transpose;
  float* const sums = reinterpret_cast<float*>(smem_bytes);
  if (__syncthreads_or(!exact)) {
#pragma unroll 1
    for (int i = 0; i < T::kThreadPQ * T::kThreadK; ++i) {
      int32_t const k = coord.k(i % T::kThreadK), pq = coord.pq(i / T::kThreadK);
      sums[Transpose::index(a, k, pq)] =
          exact_sum<T>(a, coord.group, coord.first_k + k, coord.first_pixel + pq, work.first, work.last);
    }
  } else {
#pragma unroll
    for (int j = 0; j < T::kThreadPQ; ++j)
#pragma unroll
      for (int i = 0; i < T::kThreadK; ++i) sums[Transpose::index(a, coord.k(i), coord.pq(j))] = acc[j][i];
  }
  __syncthreads();
  store_transposed(a, config, work, coord, sums);
}

// ---- launcher

using Tile64x128 = Tile<64, 128, 8, 3, kArch.half_blocks>;
using Tile32x256 = Tile<32, 256, 8, 3, kArch.half_blocks>;
using Tile16x256 = Tile<16, 256, 8, 2, kArch.half_blocks_thin>;
using Tile32x64 = Tile<32, 64, 4, 3, kArch.half_blocks_thin>;  // small problems: four times as many blocks

template <class T>
constexpr double kRate = T::kThreadK < 8  ? kArch.half_rate_small
                         : T::kTileK < 32 ? kArch.half_rate_thin
                                          : kArch.half_rate;
template <class T>
constexpr TileSize kSizeOf{T::kTileK, T::kTilePQ, T::kTileC, T::kBlocksPerSM, kRate<T>};
// In the order of launch_plan.
constexpr TileSize kTiles[] = {kSizeOf<Tile64x128>, kSizeOf<Tile32x256>, kSizeOf<Tile16x256>, kSizeOf<Tile32x64>};
constexpr int32_t kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);
static_assert(Tile64x128::kTileC == kTileC && Tile64x128::kTileK == kMaxTileK, "half_weights.h packs for these tiles");

// Of workspace for packed weights, whatever the tile: none where the caller has packed them.
size_t workspace_weight_bytes(Adder2dParams const& p) { return p.packed_w != nullptr ? 0 : weight_bytes(p); }

// Vectors can be copied straight from the input.
bool is_packed_image(Adder2dParams const& p) {
  int64_t const reach =
      int64_t{p.N - 1} * p.x_stride[0] + int64_t{p.H - 1} * p.x_stride[2] + int64_t{p.W - 1} * p.x_stride[3];
  return p.x_type == ADDER2D_FLOAT16 && p.x_stride[1] == 1 && p.C / p.groups % kVector == 0 &&
         p.x_stride[0] % kVector == 0 && p.x_stride[2] % kVector == 0 && p.x_stride[3] % kVector == 0 &&
         reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && reach / kVector <= INT32_MAX / 4;
}

// Of workspace for packed images.
size_t image_bytes(Adder2dParams const& p, int32_t images) {
  return is_packed_image(p) ? 0 : sizeof(uint4) * images * p.H * p.W * p.groups * vectors_of(p);
}

HalfArgs make_half_args(FpropArgs const& problem, TileConfig const& config) {
  HalfArgs args{};
  static_cast<FpropArgs&>(args) = problem;
  Adder2dParams const& p = problem.p;
  args.vectors = vectors_of(p);
  bool const has_weights = p.packed_w != nullptr;
  args.weights = static_cast<__half const*>(has_weights ? p.packed_w : p.workspace);
  args.pitch = has_weights ? pitch_of(p) : config.tiles_k * kTiles[config.tile].k;
  args.exact_halves = p.x_type == ADDER2D_FLOAT16 && p.w_type == ADDER2D_FLOAT16;
  args.packs_image = !is_packed_image(p);
  args.div_vectors = FastDiv(args.vectors);
  args.div_HW = FastDiv(int64_t{p.H} * p.W);
  args.div_W = FastDiv(p.W);
  if (args.packs_image) {
    args.image = reinterpret_cast<__half const*>(static_cast<char*>(p.workspace) + workspace_weight_bytes(p));
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

PackConfig make_pack_config(HalfArgs const& args, TileConfig const& config) {
  Adder2dParams const& p = args.p;
  int64_t const* const stride = p.x_stride;
  int32_t const RS = p.R * p.S;
  PackConfig pack{};
  pack.slices = config.slices;
  // A slice's four vectors where they find room, and more while a lane has less than three of them to copy.
  while (kVector * RS << (pack.shift + 1) <= kPackElements && (pack.shift < 2 || RS << (pack.shift + 1) <= 96))
    ++pack.shift;
  pack.pitch = ceil_div((RS << pack.shift) - 4, 8) * 8 + 4;  // so that two filters lie 16 banks apart
  int32_t const columns = ceil_div(args.vectors, 1 << pack.shift), rows = args.pitch / kPackFilters;
  pack.weight_blocks = p.packed_w != nullptr ? 0 : columns * rows * p.groups;
  pack.div_columns = FastDiv(columns);
  pack.div_rows = FastDiv(rows);
  pack.div_image = FastDiv(p.groups * args.vectors);
  pack.w_vectors = int64_t{args.Cg} * RS * type_size(p.w_type) % 16 == 0 && reinterpret_cast<uintptr_t>(p.w) % 16 == 0;
  bool const even_rows = stride[2] == p.W ? int64_t{p.H} * p.W % 2 == 0 : p.W % 2 == 0 && stride[2] % 2 == 0;
  pack.x_pairs = even_rows && stride[3] == 1 && stride[0] % 2 == 0 && stride[1] % 2 == 0 &&
                 reinterpret_cast<uintptr_t>(p.x) % 4 == 0;
  pack.x_vectors = stride[1] == 1 && args.Cg % kVector == 0 && stride[0] % kVector == 0 && stride[2] % kVector == 0 &&
                   stride[3] % kVector == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  return pack;
}

template <class T>
cudaError_t launch_tile(HalfArgs const& args, TileConfig const& config, cudaStream_t stream) {
  static_assert(T::kTileK % kPackFilters == 0, "a block packs filters of one group");
  PackConfig const pack = make_pack_config(args, config);
  int64_t const chunks = args.packs_image ? ceil_div(int64_t{args.p.N} * args.p.H * args.p.W, int64_t{kPackPixels}) : 0;
  int64_t const image_blocks = ceil_div(chunks * args.p.groups * args.vectors, int64_t{kPackWarps});
  dim3 const pack_grid(static_cast<uint32_t>(pack.weight_blocks + image_blocks));
  size_t const pack_smem = sizeof(uint4) * kPackWarps * (pack.pitch > kPackPitch ? pack.pitch : kPackPitch);
  bool const packs = pack_grid.x > 0;
  if (packs) {
    cudaError_t const error =
        launch(adder2d_pack_half_kernel<T::kTileC>, pack_grid, dim3(kPackThreads), pack_smem, stream, args, pack);
    if (error != cudaSuccess) return error;
  }
  static_assert(16 * OutputCoord<T>::kItems * T::kThreads <= sizeof(Smem<T>),
                "sums are transposed where the slices were");
  return launch_tiled<OutputCoord<T>>(adder2d_fprop_half_kernel<T>, sizeof(Smem<T>), sizeof(Smem<T>), T::kThreads,
                                      packs, args, config, stream);
}

constexpr char const* kTileNames[] = {"64x128", "32x256", "16x256", "32x64"};
static_assert(sizeof(kTileNames) / sizeof(kTileNames[0]) == kTileCount, "one name a tile");

bool can_implement(FpropArgs const& args, size_t workspace_bytes) {
  // Weights and image must find room.
  return has_half_shape(args.p) && workspace_weight_bytes(args.p) + image_bytes(args.p, args.p.N) <= workspace_bytes &&
         compute_capability_major() >= 8;
}

bool plan(FpropArgs const& args, size_t workspace_bytes, TileForce const& force, TileConfig* config, double* cycles) {
  size_t const packed_bytes = workspace_weight_bytes(args.p) + image_bytes(args.p, args.p.N);
  if (force.packed >= 0 && force.packed != (packed_bytes > 0)) return false;
  TileProblem const problem{args.Kg, args.NPQ, args.p.groups, slices_of(args.p) * kTileC};
  *config =
      choose_tile(problem, kTiles, kTileCount, SplitReduce::kForward, workspace_bytes - packed_bytes, force, cycles);
  config->packed_bytes = packed_bytes;
  config->workspace_bytes += packed_bytes;
  if (*cycles == 0) return false;
  TileSize const& size = kTiles[config->tile];
  int32_t const multiprocessors = multiprocessor_count(), rest = config->tiles - config->full_tiles;
  double const tiles = ceil_div(config->full_tiles + rest * config->splits, multiprocessors);
  *cycles = *cycles * kArch.half_slice + tiles * kArch.half_tile * (size.k * size.pq) / (64 * 128);
  // Read and written; a conversion reads as much as it writes, about.
  if (packed_bytes > 0) *cycles += kArch.pack_start + 2.0 * packed_bytes / (multiprocessors * kArch.pack_bytes);
  return true;
}

cudaError_t launch_plan(FpropArgs const& problem, TileConfig const& config, cudaStream_t stream) {
  HalfArgs const args = make_half_args(problem, config);
  switch (config.tile) {
    case 0: return launch_tile<Tile64x128>(args, config, stream);
    case 1: return launch_tile<Tile32x256>(args, config, stream);
    case 2: return launch_tile<Tile16x256>(args, config, stream);
    case 3: return launch_tile<Tile32x64>(args, config, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int32_t images_of_fprop_half(Adder2dParams const& p, int32_t images) {
  if (!has_half_shape(p) || is_packed_image(p)) return images;
  size_t const weights = workspace_weight_bytes(p);
  if (p.workspace_bytes <= weights) return images;
  int64_t const room = (p.workspace_bytes - weights) / image_bytes(p, 1);
  if (room == 0 || room >= images) return images;
  return static_cast<int32_t>(ceil_div<int64_t>(images, ceil_div<int64_t>(images, room)));  // of about equal size
}

FpropFamily const kFpropHalf{{"half", kTileNames, kTileCount}, can_implement, nullptr, plan, launch_plan};

}  // namespace adder2d
