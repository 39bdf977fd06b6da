// Implicit GEMM for the input gradient on float32 arithmetic: channels by input pixels, reduced over taps and filters.
//
// With w' = w / 2 and x' = x / 2 - 1 / 2, clamp(w - x, -1, 1) = 2 * sat(w' - x') - 1, where sat clamps to [0, 1] as a free
// modifier of an addition. So dx = 2 * sum(dy * sat(w' - x')) - sum(dy): two instructions a term, and the second sum
// is one for all channels of a pixel. Rounding: w' is exact; x' is rounded once, by at most 2^-24 * (|x| + 1) / 2, and the
// difference once more, by at most 2^-25 where it is not clamped, so that a term is off by at most
// 2^-23 * (1 + |x| / 2) * |dy|; and the terms of both sums are at most |dy| each, which bounds what their cancelling costs.
//
// A block owns a tile of kTileC channels by kTileHW pixels of one phase (dgrad.h), so that strides leave no idle taps,
// and steps through the reduction kTileK filters of one tap at a time: asynchronous copies fill a ring of kStages slices in
// shared memory, of packed weights and of dy, while a thread accumulates its 8 x 4 outputs, whose x' it keeps in registers.
//
// sat turns NaN into 0. Outputs that the rule may want NaN or infinite come out as NaN here: x is added to them times zero,
// weights with a NaN mark the tiles that read them, and sums of infinite dy are NaN. These few are computed again by the rule.
#include <algorithm>

#include "dgrad.h"

namespace adder2d {
namespace {

// ---- traits

// How dy reaches shared memory.
enum class Fill {
  kPixels,   // asynchronous copies, a warp takes neighbouring pixels (NCHW)
  kFilters,  // asynchronous copies, a warp takes neighbouring filters (NHWC)
  kConvert,  // float16 and bfloat16, converted on the way
};

template <int kTileC_, int kTileHW_, int kTileK_, int kStages_>
struct Tile {
  static constexpr int kTileC = kTileC_, kTileHW = kTileHW_;  // outputs of a block: channels, pixels
  static constexpr int kTileK = kTileK_;                      // filters of a slice, all of one tap
  static constexpr int kStages = kStages_;                    // slices in flight
  static constexpr int kUnroll = 8;                           // terms of the inner loop
  static constexpr int kThreadC = 8, kThreadHW = 4;           // outputs of a thread, as 2 x 4 by 4
  static constexpr int kThreads = kTileC * kTileHW / (kThreadC * kThreadHW);
  static constexpr int kLanesC = kTileC >= 32 ? 4 : kTileC / kThreadC, kLanesHW = 32 / kLanesC;  // a warp's threads
  static constexpr int kWarpsC = kTileC / (kLanesC * kThreadC);
  static constexpr int kBlocksPerSM = 4;
  static constexpr int kRows = kTileC / kThreadC;  // threads that hold the same pixels: each sums some of their dy
  static constexpr int kPixels = kTileHW > kThreads ? kTileHW / kThreads : 1;  // kPixels: pixels that a thread copies
  static constexpr int kShares = kTileHW < kThreads ? kThreads / kTileHW : 1;  // threads that share a pixel's filters
  // Rows of dy are padded by 4 floats: copies along the filters then store to 32 different banks.
  static constexpr int kPitchC = kTileC, kPitchHW = kTileHW + 4;
  static constexpr int kStageFloats = kTileK * (kPitchC + kPitchHW);

  static_assert(kThreads == 128, "the fill loops are laid out for 128 threads");
  static_assert(kTileC % (kLanesC * kThreadC) == 0 && kTileHW % (kLanesHW * kThreadHW) == 0, "warps must tile the block");
  static_assert(kTileK % 8 == 0, "the fills take filters eight at a time");
  static_assert(kTileK % kUnroll == 0 && kUnroll % 2 == 0, "fragments alternate between two buffers");
  static_assert(kTileK % kRows == 0, "threads must divide the sums of dy evenly");
  static_assert(kRows * kTileHW <= kStageFloats, "sums of dy meet in a stage");
};

// Where an output pixel's taps start. An absent pixel has p0 = q0 = kOutside.
struct Window {
  char const* dy;  // what tap 0 of the phase reads, filter 0 of the group; may point outside dy
  int32_t p0, q0;
};
constexpr int32_t kOutside = INT32_MAX;  // less any reach of taps this is no row of dy, nor a column

template <class T>
struct Smem {
  alignas(16) float stage[T::kStages][T::kStageFloats];
  alignas(16) Window window[T::kTileHW];
};

// float16 or bfloat16 bits.
__device__ __forceinline__ float half_as_float(uint16_t bits, int32_t type) {
  return type == ADDER2D_FLOAT16 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(uint32_t{bits} << 16);
}

// ---- place of a tile

template <class T>
struct View {
  static constexpr int kItems = T::kThreadC * T::kThreadHW / 4;
  int32_t group, tile_c, first_c, end_c, first_pixel;  // channels first_c .. end_c - 1 of the whole layer, pixels of the phase
  int32_t thread_c, thread_hw;  // first output of the thread; the second half of its channels is kTileC / 2 on
  int32_t row;                  // of the threads with the same pixels
  DgradPhase h, w;

  __device__ __forceinline__ View(DgradArgs const& a, FpropPlan const& plan, int32_t tile) {
    int32_t rest = tile / plan.tiles_k;
    tile_c = tile % plan.tiles_k;
    w = make_phase(a.w, rest % a.w.phases);
    rest /= a.w.phases;
    h = make_phase(a.h, rest % a.h.phases);
    rest /= a.h.phases;
    first_pixel = rest % plan.tiles_pq * T::kTileHW;
    group = rest / plan.tiles_pq;
    first_c = group * a.Cg + tile_c * T::kTileC;
    end_c = (group + 1) * a.Cg;
    int32_t const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    row = warp % T::kWarpsC * T::kLanesC + lane / T::kLanesHW;
    thread_c = row * 4;
    thread_hw = (warp / T::kWarpsC * T::kLanesHW + lane % T::kLanesHW) * 4;
  }

  // The thread's channel i of 8 and pixel j of 4.
  __device__ __forceinline__ int32_t channel(int32_t i) const { return first_c + thread_c + i / 4 * (T::kTileC / 2) + i % 4; }
  __device__ __forceinline__ int32_t pixel(int32_t j) const { return first_pixel + thread_hw + j; }
  // Whether pixel m exists, and its place.
  __device__ __forceinline__ bool locate(DgradArgs const& a, int32_t m, int32_t* n, int32_t* y, int32_t* x) const {
    if (m >= a.NIJ) return false;
    int32_t ij, j;
    *n = a.div_IJ.divmod(m, &ij);
    int32_t const i = a.div_J.divmod(ij, &j);
    *y = h.phase + i * a.h.stride;
    *x = w.phase + j * a.w.stride;
    return *y < a.h.size && *x < a.w.size;
  }

  // A thread's sums are items of four: those that a vector store takes, else the pixels of channel `item`.
  __device__ __forceinline__ static int32_t item_channel(DgradArgs const& a, int32_t item, int32_t element) {
    return a.channel_vectors ? item / 4 * 4 + element : item;
  }
  __device__ __forceinline__ static int32_t item_pixel(DgradArgs const& a, int32_t item, int32_t element) {
    return a.channel_vectors ? item % 4 : element;
  }

  __device__ __forceinline__ void store(DgradArgs const& a, int32_t item, float4 const& v) const {
    int32_t const c = channel(item_channel(a, item, 0));
    if (c >= end_c) return;
    int32_t n, y, x;
    if (a.pixel_vectors || a.channel_vectors) {
      if (!locate(a, pixel(item_pixel(a, item, 0)), &n, &y, &x)) return;
      int64_t const index = dx_index(a, n, c, y, x);
      if (a.dx_type == ADDER2D_FLOAT32) {
        *reinterpret_cast<float4*>(static_cast<float*>(a.dx) + index) = v;
        return;
      }
      uint16_t halves[4];
      float const values[] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) store_from_float(halves, e, a.dx_type, values[e]);
      uint2 const packed = make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(a.dx) + index) = packed;
      return;
    }
    float const values[] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (locate(a, pixel(j), &n, &y, &x)) store_from_float(a.dx, dx_index(a, n, c, y, x), a.dx_type, values[j]);
  }

  // Computes one element by the rule and stores it.
  __device__ __forceinline__ void repair(DgradArgs const& a, int32_t item, int32_t element) const {
    int32_t const c = channel(item_channel(a, item, element));
    int32_t n, y, x;
    if (c < end_c && locate(a, pixel(item_pixel(a, item, element)), &n, &y, &x))
      store_from_float(a.dx, dx_index(a, n, c, y, x), a.dx_type, dgrad_by_rule<false>(a, n, c, y, x));
  }
};

// Four bits: which of the four are NaN or infinite.
__device__ __forceinline__ uint32_t non_finite(float4 const& v) {
  return !isfinite(v.x) | !isfinite(v.y) << 1 | !isfinite(v.z) << 2 | !isfinite(v.w) << 3;
}

// ---- packed weights

// w / 2 as [groups][phases][slices of filters][taps of the phase][kTileK][pitch], which is the order in which a tile reads
// them, with zeros where there is no filter or channel; then, as [groups][tiles of channels][blocks], NaN where one of the
// blocks that packed for a tile has met a NaN, else 0.
struct Packed {
  static constexpr int kThreads = 256, kBlockK = 8;  // filters of a block

  float* weights;
  float* marks;
  int32_t slices, pitch;  // slices of filters
  int32_t blocks;         // of filters

  __host__ __device__ Packed(DgradArgs const& a, FpropPlan const& plan, int32_t tile_c, int32_t tile_k)
      : weights(static_cast<float*>(a.p.workspace)), slices(ceil_div(a.Kg, tile_k)), pitch(plan.tiles_k * tile_c),
        blocks(slices * (tile_k / kBlockK)) {
    marks = weights + int64_t{a.p.groups} * slices * a.p.R * a.p.S * tile_k * pitch;
  }
  size_t bytes(DgradArgs const& a, FpropPlan const& plan) const {
    int64_t const floats = marks - weights + int64_t{a.p.groups} * plan.tiles_k * blocks;
    return ceil_div<size_t>(floats * sizeof(float), 16) * 16;
  }
  // Slices of the whole reduction before those of the phase with these first taps, of height `taps_h`.
  __device__ __forceinline__ int32_t phase(DgradArgs const& a, int32_t group, int32_t before_h, int32_t taps_h, int32_t before_w) const {
    return ((group * a.p.R + before_h) * a.p.S + taps_h * before_w) * slices;
  }
};

// A block packs kBlockK filters for one tile of channels.
template <class T>
__global__ void __launch_bounds__(Packed::kThreads)
    adder2d_dgrad_pack_kernel(__grid_constant__ DgradArgs const a, __grid_constant__ FpropPlan const plan) {
  launch_dependents();
  Packed const packed(a, plan, T::kTileC, T::kTileK);
  int32_t const first_k = blockIdx.x % packed.blocks * Packed::kBlockK, rest = blockIdx.x / packed.blocks;
  int32_t const tile_c = rest % plan.tiles_k, group = rest / plan.tiles_k, RS = a.p.R * a.p.S;
  int32_t const c = tile_c * T::kTileC + threadIdx.x % T::kTileC;
  bool nan = false;
  // Turns take one tap after the other of the same filters, whose weights lie side by side.
#pragma unroll 4
  for (int32_t turn = threadIdx.x / T::kTileC; turn < Packed::kBlockK * RS; turn += Packed::kThreads / T::kTileC) {
    int32_t rs, s, first_h, first_w;
    int32_t const k = first_k + a.div_RS.divmod(turn, &rs), r = a.div_S.divmod(rs, &s);
    int32_t const tap_h = a.div_step_h.divmod(r, &first_h), tap_w = a.div_step_w.divmod(s, &first_w);
    int32_t const taps_h = taps_of(a.h, first_h), taps_w = taps_of(a.w, first_w);
    bool const present = k < a.Kg && c < a.Cg;
    int64_t const index = ((int64_t{group} * a.Kg + k) * a.Cg + c) * RS + rs;
    float const w = present ? load_as_float(a.p.w, index, a.p.w_type) : 0.f;
    nan |= w != w;
    int32_t const slice = packed.phase(a, group, taps_before(a.h, first_h), taps_h, taps_before(a.w, first_w)) +
                          (k / T::kTileK * taps_h + tap_h) * taps_w + tap_w;
    packed.weights[(int64_t{slice} * T::kTileK + k % T::kTileK) * packed.pitch + c] = 0.5f * w;
  }
  nan = __syncthreads_or(nan);
  if (threadIdx.x == 0) packed.marks[blockIdx.x] = nan ? NAN : 0.f;
}

// ---- fill

// The fills of one tile, slice after slice: weights [kTileK][kPitchC], then dy [kTileK][kPitchHW].
template <class T, Fill kFill>
struct Filler {
  static constexpr int kLanes = T::kTileC / 4, kCopies = T::kTileK * kLanes;  // of weights: 16 bytes of a row each
  static constexpr int kTerms = T::kTileK / T::kShares;                       // filters of a pixel that a thread copies

  DgradArgs const& a;
  Smem<T>& smem;
  float const* weights;  // that the thread copies first
  int64_t offset;        // bytes from a window's start to what the thread copies first of it
  int32_t pitch;
  int32_t filters;               // from the slice's first one on
  int32_t dp, dq, end_p, end_q;  // outputs from a window's start back to the slice's tap; where the taps end

  __device__ __forceinline__ Filler(DgradArgs const& args, FpropPlan const& plan, Smem<T>& shared, View<T> const& view, int32_t first)
      : a(args), smem(shared) {
    int32_t const taps = max(view.h.taps * view.w.taps, 1), slice = first / taps;
    end_p = view.h.taps * a.h.lag;
    end_q = view.w.taps * a.w.lag;
    dp = view.w.taps == 0 ? 0 : first % taps / view.w.taps * a.h.lag;
    dq = view.w.taps == 0 ? 0 : first % taps % view.w.taps * a.w.lag;
    filters = a.Kg - slice * T::kTileK;
    Packed const packed(a, plan, T::kTileC, T::kTileK);
    pitch = packed.pitch;
    int32_t const begin = packed.phase(a, view.group, view.h.before, view.h.taps, view.w.before) + first;
    weights = packed.weights + (int64_t{begin} * T::kTileK + threadIdx.x / kLanes) * pitch + view.tile_c * T::kTileC + threadIdx.x % kLanes * 4;

    int64_t const size = type_bytes();
    int32_t const own = kFill == Fill::kFilters ? threadIdx.x % 8 : threadIdx.x / T::kTileHW * kTerms;
    offset = (slice * T::kTileK + own) * a.p.y_stride[1] - dp * a.p.y_stride[2] - dq * a.p.y_stride[3];
    offset *= size;
    for (int i = threadIdx.x; i < T::kTileHW; i += T::kThreads) {
      Window window{nullptr, kOutside, kOutside};
      int32_t n, y, x;
      if (view.locate(a, view.first_pixel + i, &n, &y, &x)) {
        window.p0 = (y - view.h.phase) / a.h.stride + view.h.start;
        window.q0 = (x - view.w.phase) / a.w.stride + view.w.start;
        window.dy = static_cast<char const*>(a.p.y) +
                    size * (n * a.p.y_stride[0] + int64_t{view.group} * a.Kg * a.p.y_stride[1] + window.p0 * a.p.y_stride[2] +
                            window.q0 * a.p.y_stride[3]);
      }
      smem.window[i] = window;
    }
  }

  __device__ __forceinline__ static constexpr int32_t type_bytes() { return kFill == Fill::kConvert ? 2 : 4; }

  __device__ __forceinline__ void fill_w(float* w_smem) const {
    float const* src = weights;
    float* const dst = w_smem + threadIdx.x * 4;
#pragma unroll
    for (int i = 0; i < kCopies; i += T::kThreads, src += T::kThreads / kLanes * pitch)
      if (kCopies % T::kThreads == 0 || i + threadIdx.x < kCopies) copy16_async(dst + i * 4, src);
  }

  __device__ __forceinline__ bool inside(Window const& window) const {
    return static_cast<uint32_t>(window.p0 - dp) < static_cast<uint32_t>(a.p.P) &&
           static_cast<uint32_t>(window.q0 - dq) < static_cast<uint32_t>(a.p.Q);
  }

  // Filters behind the last one are copied as zeros, so that they add nothing.
  __device__ __forceinline__ void fill_dy(float* dy_smem) const {
    int64_t const step = a.p.y_stride[1];
    if constexpr (kFill == Fill::kFilters) {
      int32_t const row = threadIdx.x / 8, lane = threadIdx.x % 8;
#pragma unroll
      for (int i = 0; i < T::kTileHW; i += T::kThreads / 8) {
        Window const window = smem.window[i + row];
        bool const valid = inside(window);
        float const* const src = reinterpret_cast<float const*>(window.dy + offset);
#pragma unroll
        for (int k = 0; k < T::kTileK; k += 8)
          copy4_async(dy_smem + (k + lane) * T::kPitchHW + i + row, src + k, valid && k + lane < filters);
      }
      return;
    }
    // Threads side by side take pixels side by side; with fewer pixels than threads, the filters are shared out.
    int32_t const first = T::kShares == 1 ? 0 : threadIdx.x / T::kTileHW * kTerms, lane = threadIdx.x % T::kTileHW;
#pragma unroll
    for (int i = 0; i < T::kPixels; ++i) {
      Window const window = smem.window[i * T::kThreads + lane];
      bool const valid = inside(window);
      char const* const base = window.dy + offset;
      float* const dst = dy_smem + first * T::kPitchHW + i * T::kThreads + lane;
      if constexpr (kFill == Fill::kConvert) {
        auto const* const src = reinterpret_cast<uint16_t const*>(base);
#pragma unroll
        for (int begin = 0; begin < kTerms; begin += 8) {
          alignas(16) uint16_t v[8];
          if (a.filter_vectors) {
            uint4 const zero = make_uint4(0, 0, 0, 0);
            *reinterpret_cast<uint4*>(v) =
                valid && first + begin < filters ? __ldg(reinterpret_cast<uint4 const*>(src + begin)) : zero;
          } else {
#pragma unroll
            for (int k = 0; k < 8; ++k) v[k] = valid && first + begin + k < filters ? __ldg(src + (begin + k) * step) : uint16_t{0};
          }
#pragma unroll
          for (int k = 0; k < 8; ++k) dst[(begin + k) * T::kPitchHW] = half_as_float(v[k], a.p.y_type);
        }
      } else {
        float const* src = reinterpret_cast<float const*>(base);
        if (filters >= T::kTileK) {
#pragma unroll
          for (int k = 0; k < kTerms; ++k, src += step) copy4_async(dst + k * T::kPitchHW, src, valid);
        } else {
#pragma unroll
          for (int k = 0; k < kTerms; ++k, src += step) copy4_async(dst + k * T::kPitchHW, src, valid && first + k < filters);
        }
      }
    }
  }

  // Starts the copies of the next slice. A barrier lies between two calls.
  __device__ __forceinline__ void fill(float* stage) {
    fill_w(stage);
    fill_dy(stage + T::kTileK * T::kPitchC);
    weights += T::kTileK * pitch;
    int32_t const size = type_bytes();
    dq += a.w.lag;
    offset -= a.w.lag * size * a.p.y_stride[3];
    if (dq == end_q) {
      dq = 0;
      dp += a.h.lag;
      offset += (end_q * a.p.y_stride[3] - a.h.lag * a.p.y_stride[2]) * size;
      if (dp == end_p) {
        dp = 0;
        offset += (end_p * a.p.y_stride[2] + T::kTileK * a.p.y_stride[1]) * size;
        filters -= T::kTileK;
      }
    }
  }
};

// ---- tile

// x' of the thread's outputs.
template <class T, typename Load>
__device__ __forceinline__ void load_x(DgradArgs const& a, View<T> const& view, float (&x)[T::kThreadC][T::kThreadHW], Load const& load) {
#pragma unroll
  for (int j = 0; j < T::kThreadHW; ++j) {
    int32_t n = 0, row = 0, column = 0;
    bool const present = view.locate(a, view.pixel(j), &n, &row, &column);
    int64_t const index = n * a.p.x_stride[0] + row * a.p.x_stride[2] + column * a.p.x_stride[3];
#pragma unroll
    for (int i = 0; i < T::kThreadC; ++i) {
      int32_t const c = view.channel(i);
      x[i][j] = present && c < view.end_c ? load(index + c * a.p.x_stride[1]) : 0.f;
    }
  }
#pragma unroll
  for (int i = 0; i < T::kThreadC; ++i)
#pragma unroll
    for (int j = 0; j < T::kThreadHW; ++j) x[i][j] = fmaf(0.5f, x[i][j], -0.5f);
}

// Accumulates slices first .. last - 1 of one tile: acc[channel][pixel] = sum(dy * sat(w' - x')), dy_sum[pixel] = sum(dy).
template <class T, Fill kFill>
__device__ __forceinline__ void accumulate(DgradArgs const& a, FpropPlan const& plan, View<T> const& view, int32_t first,
                                           int32_t last, Smem<T>& smem, float (&x)[T::kThreadC][T::kThreadHW],
                                           float (&acc)[T::kThreadC][T::kThreadHW], float (&dy_sum)[T::kThreadHW]) {
  Filler<T, kFill> filler(a, plan, smem, view, first);
  int32_t fill_stage = 0, filled = first;
  auto fill = [&] {
    if (filled < last) filler.fill(smem.stage[fill_stage]);
    ++filled;
    fill_stage = fill_stage + 1 == T::kStages ? 0 : fill_stage + 1;
    copy_commit();  // an empty group keeps the count that copy_wait relies on
  };
  __syncthreads();
  for (int i = 0; i < T::kStages - 1; ++i) fill();
  if (a.p.x_type == ADDER2D_FLOAT32) {
    load_x<T>(a, view, x, [&](int64_t index) { return __ldg(static_cast<float const*>(a.p.x) + index); });
  } else {
    load_x<T>(a, view, x, [&](int64_t index) { return half_as_float(__ldg(static_cast<uint16_t const*>(a.p.x) + index), a.p.x_type); });
  }

  float w_frag[2][T::kThreadC], dy_frag[2][T::kThreadHW];
  auto load = [&](float const* w_smem, float const* dy_smem, int buffer) {
    *reinterpret_cast<float4*>(&w_frag[buffer][0]) = *reinterpret_cast<float4 const*>(w_smem);
    *reinterpret_cast<float4*>(&w_frag[buffer][4]) = *reinterpret_cast<float4 const*>(w_smem + T::kTileC / 2);
    *reinterpret_cast<float4*>(&dy_frag[buffer][0]) = *reinterpret_cast<float4 const*>(dy_smem);
  };
  // Terms of the last slices of filters, which may have few; a multiple of kUnroll.
  int32_t const filters = a.Kg - (ceil_div(a.Kg, T::kTileK) - 1) * T::kTileK;
  int32_t const last_terms = ceil_div(filters, T::kUnroll) * T::kUnroll;
  int32_t const last_slices = (ceil_div(a.Kg, T::kTileK) - 1) * view.h.taps * view.w.taps;

  int32_t stage = 0;
  for (int32_t slice = first; slice < last; ++slice) {
    copy_wait<T::kStages - 2>();
    __syncthreads();
    float const* w_smem = smem.stage[stage] + view.thread_c;
    float const* dy_smem = smem.stage[stage] + T::kTileK * T::kPitchC + view.thread_hw;
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
    load(w_smem, dy_smem, 0);
    fill();
#pragma unroll
    for (int i = 0; i < T::kTileK / T::kRows; ++i) {  // the thread's share
      float4 const v = *reinterpret_cast<float4 const*>(dy_smem + (view.row * (T::kTileK / T::kRows) + i) * T::kPitchHW);
      dy_sum[0] += v.x;
      dy_sum[1] += v.y;
      dy_sum[2] += v.z;
      dy_sum[3] += v.w;
    }
    int32_t const terms = slice >= last_slices ? last_terms : T::kTileK;
#pragma unroll 1
    for (int32_t k = 0; k < terms; k += T::kUnroll) {
#pragma unroll
      for (int u = 0; u < T::kUnroll; ++u) {
        // The fragments of the next term are on their way while this one is added. The slice's last term is read twice:
        // what lies behind it is being filled.
        int32_t const next = u + 1 < T::kUnroll || k + T::kUnroll < T::kTileK ? u + 1 : u;
        load(w_smem + next * T::kPitchC, dy_smem + next * T::kPitchHW, (u + 1) % 2);
#pragma unroll
        for (int i = 0; i < T::kThreadC; ++i)
#pragma unroll
          for (int j = 0; j < T::kThreadHW; ++j)
            acc[i][j] = fmaf(dy_frag[u % 2][j], __saturatef(w_frag[u % 2][i] - x[i][j]), acc[i][j]);
      }
      w_smem += T::kUnroll * T::kPitchC;
      dy_smem += T::kUnroll * T::kPitchHW;
    }
  }

  // The shares of the sums of dy meet, and are added in order.
  copy_wait<0>();
  __syncthreads();
  float* const rows = smem.stage[0];
  *reinterpret_cast<float4*>(rows + view.row * T::kTileHW + view.thread_hw) = make_float4(dy_sum[0], dy_sum[1], dy_sum[2], dy_sum[3]);
  __syncthreads();
#pragma unroll
  for (int j = 0; j < T::kThreadHW; ++j) dy_sum[j] = 0.f;
#pragma unroll
  for (int row = 0; row < T::kRows; ++row) {
    float4 const v = *reinterpret_cast<float4 const*>(rows + row * T::kTileHW + view.thread_hw);
    dy_sum[0] += v.x;
    dy_sum[1] += v.y;
    dy_sum[2] += v.z;
    dy_sum[3] += v.w;
  }
}

// ---- kernels

template <class T>
__device__ __forceinline__ float4* partial_sum(DgradArgs const& a, FpropPlan const& plan, int32_t split, int32_t item) {
  int64_t const index = ((int64_t{split} * plan.tiles + blockIdx.x) * View<T>::kItems + item) * T::kThreads + threadIdx.x;
  return reinterpret_cast<float4*>(static_cast<char*>(a.p.workspace) + plan.packed_bytes) + index;
}

template <class T, Fill kFill>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    adder2d_dgrad_simt_kernel(__grid_constant__ DgradArgs const a, __grid_constant__ FpropPlan const plan) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  launch_dependents();
  View<T> const view(a, plan, blockIdx.x);
  int64_t const slices = int64_t{ceil_div(a.Kg, T::kTileK)} * view.h.taps * view.w.taps;
  int32_t const first = static_cast<int32_t>(slices * blockIdx.y / plan.splits);
  int32_t const last = static_cast<int32_t>(slices * (blockIdx.y + 1) / plan.splits);

  float x[T::kThreadC][T::kThreadHW], acc[T::kThreadC][T::kThreadHW] = {}, dy_sum[T::kThreadHW] = {};

  wait_for_primary();
  accumulate<T, kFill>(a, plan, view, first, last, *reinterpret_cast<Smem<T>*>(smem_bytes), x, acc, dy_sum);
  Packed const packed(a, plan, T::kTileC, T::kTileK);
  float const* const marks = packed.marks + (int64_t{view.group} * plan.tiles_k + view.tile_c) * packed.blocks;
  float mark = 0.f;
  for (int32_t i = threadIdx.x; i < packed.blocks; i += T::kThreads) mark += marks[i];
  mark = __syncthreads_or(mark != 0.f) ? NAN : 0.f;
#pragma unroll
  for (int i = 0; i < T::kThreadC; ++i)
#pragma unroll
    for (int j = 0; j < T::kThreadHW; ++j)
      acc[i][j] = fmaf(0.f, x[i][j], fmaf(2.f, acc[i][j], -dy_sum[j])) + mark;

  uint32_t repairs = 0;  // four bits an item
  auto finish = [&](int32_t item, float4 const& v) {
    if (plan.splits > 1) {
      *partial_sum<T>(a, plan, blockIdx.y, item) = v;
    } else {
      view.store(a, item, v);
      repairs |= non_finite(v) << 4 * item;
    }
  };
  if (a.channel_vectors) {
#pragma unroll
    for (int item = 0; item < View<T>::kItems; ++item) {
      int const i = item / 4 * 4, j = item % 4;
      finish(item, make_float4(acc[i][j], acc[i + 1][j], acc[i + 2][j], acc[i + 3][j]));
    }
  } else {
#pragma unroll
    for (int item = 0; item < View<T>::kItems; ++item)
      finish(item, make_float4(acc[item][0], acc[item][1], acc[item][2], acc[item][3]));
  }
  for (; repairs != 0; repairs &= repairs - 1) {
    int32_t const bit = __ffs(repairs) - 1;
    view.repair(a, bit / 4, bit % 4);
  }
}

// Adds the splits of item blockIdx.y of tile blockIdx.x, in order, so that results repeat exactly.
template <class T>
__global__ void __launch_bounds__(T::kThreads)
    adder2d_dgrad_reduce_kernel(__grid_constant__ DgradArgs const a, __grid_constant__ FpropPlan const plan) {
  View<T> const view(a, plan, blockIdx.x);
  wait_for_primary();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
  for (int32_t split = 0; split < plan.splits; ++split) {
    float4 const v = *partial_sum<T>(a, plan, split, blockIdx.y);
    sum.x += v.x;
    sum.y += v.y;
    sum.z += v.z;
    sum.w += v.w;
  }
  view.store(a, blockIdx.y, sum);
  for (uint32_t repairs = non_finite(sum); repairs != 0; repairs &= repairs - 1) view.repair(a, blockIdx.y, __ffs(repairs) - 1);
}

// ---- launcher

template <class T, Fill kFill>
cudaError_t launch_tile(DgradArgs const& args, FpropPlan const& plan, cudaStream_t stream) {
  auto const kernel = adder2d_dgrad_simt_kernel<T, kFill>;
  constexpr size_t kSmemBytes = sizeof(Smem<T>);
  if (kSmemBytes > 48 * 1024) {
    cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSmemBytes));
    if (error != cudaSuccess) return error;
  }
  int32_t const pack_blocks = Packed(args, plan, T::kTileC, T::kTileK).blocks * plan.tiles_k * args.p.groups;
  adder2d_dgrad_pack_kernel<T><<<pack_blocks, Packed::kThreads, 0, stream>>>(args, plan);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  error = launch_dependent(kernel, dim3(plan.tiles, plan.splits), dim3(T::kThreads), kSmemBytes, stream, args, plan);
  if (error != cudaSuccess || plan.splits == 1) return error;
  return launch_dependent(adder2d_dgrad_reduce_kernel<T>, dim3(plan.tiles, View<T>::kItems), dim3(T::kThreads), 0, stream, args, plan);
}

using Tile128x32 = Tile<128, 32, 32, 2>;
using Tile64x64 = Tile<64, 64, 32, 2>;
using Tile32x128 = Tile<32, 128, 32, 2>;
using Tile16x256 = Tile<16, 256, 16, 2>;

constexpr double kRate = 52;  // accumulated terms a cycle and multiprocessor, of 64
template <class T>
constexpr TileSize kSizeOf{T::kTileC, T::kTileHW, T::kTileK, 3, kRate};  // three blocks already hide each other's waits
// In the order of launch_dgrad_simt.
constexpr TileSize kTiles[] = {kSizeOf<Tile64x64>, kSizeOf<Tile128x32>, kSizeOf<Tile32x128>, kSizeOf<Tile16x256>};
constexpr int32_t kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

template <class T>
cudaError_t launch_any_fill(DgradArgs const& args, FpropPlan const& plan, cudaStream_t stream) {
  if (args.p.y_type != ADDER2D_FLOAT32) return launch_tile<T, Fill::kConvert>(args, plan, stream);
  bool const filters = args.p.y_stride[1] == 1 && args.p.y_stride[3] != 1;
  return filters ? launch_tile<T, Fill::kFilters>(args, plan, stream) : launch_tile<T, Fill::kPixels>(args, plan, stream);
}

}  // namespace

FpropPlan plan_dgrad_simt(DgradArgs const& args, size_t split_bytes) {
  // For the choice of a tile this is a forward pass whose filters are the channels, whose pixels are those of a phase, with
  // a group for each phase; a phase's share of the taps is taken to be the average.
  FpropArgs like{};
  int32_t const phases = args.h.phases * args.w.phases;
  like.Kg = args.Cg;
  like.NPQ = args.NIJ;
  like.p.groups = args.p.groups * phases;
  like.CRS = static_cast<int32_t>(int64_t{args.Kg} * args.p.R * args.p.S / phases);
  auto const slices_of = [](FpropArgs const& a, TileSize const& size) { return std::max(1, ceil_div(a.CRS, size.c)); };
  double cycles;
  FpropPlan plan = choose_tile(like, kTiles, kTileCount, slices_of, split_bytes, &cycles);
  plan.packed_bytes = Packed(args, plan, kTiles[plan.tile].k, kTiles[plan.tile].c).bytes(args, plan);
  plan.workspace_bytes += plan.packed_bytes;
  return plan;
}

cudaError_t launch_dgrad_simt(DgradArgs const& args, FpropPlan const& plan, cudaStream_t stream) {
  switch (plan.tile) {
    case 0: return launch_any_fill<Tile64x64>(args, plan, stream);
    case 1: return launch_any_fill<Tile128x32>(args, plan, stream);
    case 2: return launch_any_fill<Tile32x128>(args, plan, stream);
    case 3: return launch_any_fill<Tile16x256>(args, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace adder2d
