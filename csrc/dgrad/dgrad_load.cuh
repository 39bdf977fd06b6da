// dgrad_simt.cu: weights, packed in the order in which they are read, and the copies of a slice to shared memory.
#pragma once

#include "common/cp_async.cuh"
#include "common/launch.cuh"
#include "dgrad/dgrad_tile.cuh"

namespace adder2d::dgrad_simt {

// ---- packed weights

// w / 2 as [groups][tiles of channels][phases][slices of filters][taps of the phase][kTileK][kTileC], which is the
// order in which a tile reads them, with zeros where there is no filter or channel; then, as [groups][tiles of
// channels][blocks], NaN where one of the blocks that packed for a tile has met a NaN, else 0.
struct Packed {
  static constexpr int kThreads = 256, kBlockK = 8;  // filters of a block

  float* weights;
  float* marks;
  int32_t slices;  // of filters
  int32_t blocks;  // of filters

  __host__ __device__ Packed(DgradArgs const& a, TileConfig const& config, int32_t tile_c, int32_t tile_k)
      : weights(static_cast<float*>(a.p.workspace)),
        slices(ceil_div(a.Kg, tile_k)),
        blocks(slices * (tile_k / kBlockK)) {
    marks = weights + int64_t{a.p.groups} * config.tiles_k * slices * a.p.R * a.p.S * tile_k * tile_c;
  }
  size_t bytes(DgradArgs const& a, TileConfig const& config) const {
    int64_t const floats = marks - weights + int64_t{a.p.groups} * config.tiles_k * blocks;
    return ceil_div<size_t>(floats * sizeof(float), 16) * 16;
  }
  // Slices before those of the phase with these first taps, of height `taps_h`; `tile` counts groups and tiles of
  // channels.
  __device__ __forceinline__ int32_t phase(DgradArgs const& a, int32_t tile, int32_t before_h, int32_t taps_h,
                                           int32_t before_w) const {
    return ((tile * a.p.R + before_h) * a.p.S + taps_h * before_w) * slices;
  }
};

// A block packs kBlockK filters for one tile of channels.
template <class T>
__global__ void __launch_bounds__(Packed::kThreads)
    adder2d_dgrad_pack_kernel(__grid_constant__ DgradArgs const a, __grid_constant__ DgradConfig const config) {
  launch_dependents();
  Packed const packed(a, config, T::kTileC, T::kTileK);
  int32_t const first_k = blockIdx.x % packed.blocks * Packed::kBlockK, rest = blockIdx.x / packed.blocks;
  int32_t const tile_c = rest % config.tiles_k, group = rest / config.tiles_k, RS = a.p.R * a.p.S;
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
    int32_t const slice = packed.phase(a, rest, taps_before(a.h, first_h), taps_h, taps_before(a.w, first_w)) +
                          (k / T::kTileK * taps_h + tap_h) * taps_w + tap_w;
    packed.weights[(int64_t{slice} * T::kTileK + k % T::kTileK) * T::kTileC + threadIdx.x % T::kTileC] = 0.5f * w;
  }
  nan = __syncthreads_or(nan);
  if (threadIdx.x == 0) packed.marks[blockIdx.x] = nan ? NAN : 0.f;
}

// ---- fill

// The fills of one tile, slice after slice: weights [kTileK][kTileC], then dy [kTileK][kPitchHW].
template <class T, Fill kFill>
struct Loader {
  static constexpr int kFloats = T::kTileK * T::kTileC;  // weights of a slice
  static constexpr int kTerms = T::kTileK / T::kShares;  // filters of a pixel that a thread copies

  DgradArgs const& a;
  Smem<T, kFill>& smem;
  float const* weights;          // that the thread copies first
  Window window[T::kPixels];     // kPixels: of the thread's pixels, at its first filter of the slice
  int64_t first_filter;          // else: bytes from a window's start to that filter
  int32_t filters;               // from the slice's first one on
  int32_t dp, dq, end_p, end_q;  // outputs from a window's start to the slice's tap, at most 0; where the taps end

  __device__ __forceinline__ Loader(DgradArgs const& args, DgradConfig const& config, Smem<T, kFill>& shared,
                                    TileCoord<T> const& coord, int32_t first)
      : a(args), smem(shared), dp(0), dq(0), end_p(-coord.h.taps * args.h.lag), end_q(-coord.w.taps * args.w.lag) {
    int32_t slice = 0;  // of filters
    if (first != 0) {
      int32_t const taps = coord.h.taps * coord.w.taps, tap = first % taps;
      slice = first / taps;
      dp = -(tap / coord.w.taps) * a.h.lag;
      dq = -(tap % coord.w.taps) * a.w.lag;
    }
    filters = a.Kg - slice * T::kTileK;
    Packed const packed(a, config, T::kTileC, T::kTileK);
    int32_t const begin =
        packed.phase(a, coord.group * config.tiles_k + coord.tile_c, coord.h.before, coord.h.taps, coord.w.before) +
        first;
    weights = packed.weights + int64_t{begin} * kFloats + threadIdx.x * 4;

    int32_t const own = kFill == Fill::kFilters ? threadIdx.x % 8 : threadIdx.x / T::kTileHW * kTerms;
    first_filter = int64_t{slice * T::kTileK + own} * a.dy_step[0];
    if constexpr (kFill != Fill::kPixels) {
      for (int i = threadIdx.x; i < T::kTileHW; i += T::kThreads)
        smem.window[i] = make_window(coord, coord.first_pixel + i);
    } else {
#pragma unroll
      for (int i = 0; i < T::kPixels; ++i) {
        window[i] = make_window(coord, coord.first_pixel + i * T::kThreads + threadIdx.x % T::kTileHW);
        window[i].dy += first_filter;
      }
    }
  }

  __device__ __forceinline__ Window make_window(TileCoord<T> const& coord, int32_t m) const {
    int32_t n, i, j;
    bool const present = coord.locate(a, m, &n, &i, &j);
    Window result{nullptr, i + coord.h.start, j + coord.w.start};
    int32_t const size = kFill == Fill::kConvert ? 2 : 4;
    result.dy = static_cast<char const*>(a.p.y) +
                size * (n * a.p.y_stride[0] + int64_t{coord.group} * a.Kg * a.p.y_stride[1]) +
                int64_t{result.p0} * a.dy_step[1] + int64_t{result.q0} * a.dy_step[2];
    if (!present) result.p0 = result.q0 = kNoOutput;
    return result;
  }

  __device__ __forceinline__ void fill_w(float* w_smem) const {
    constexpr int kStep = T::kThreads * 4;
#pragma unroll
    for (int i = 0; i < kFloats; i += kStep)
      if (i + kStep <= kFloats || i + threadIdx.x * 4 < kFloats)
        copy16_async(w_smem + threadIdx.x * 4 + i, weights + i);
  }

  __device__ __forceinline__ uint32_t inside(Window const& at) const {
    return static_cast<uint32_t>(at.p0 + dp) < static_cast<uint32_t>(a.p.P) &
           static_cast<uint32_t>(at.q0 + dq) < static_cast<uint32_t>(a.p.Q);
  }
  __device__ __forceinline__ char const* source(Window const& at) const {
    return at.dy + int64_t{dp} * a.dy_step[1] + int64_t{dq} * a.dy_step[2] +
           (kFill == Fill::kPixels ? 0 : first_filter);
  }

  // Filters after the last one are copied as zeros, so that they add nothing; with kWhole there are none.
  template <bool kWhole>
  __device__ __forceinline__ void fill_dy(float* dy_smem) const {
    if constexpr (kFill == Fill::kFilters) {
      int32_t const row = threadIdx.x / 8, lane = threadIdx.x % 8;
      // Pixels in batches: a read of shared memory before every copy into it would cost three idle instructions each.
      constexpr int kStep = T::kThreads / 8, kBatch = 4 * kStep < T::kTileHW ? 4 : T::kTileHW / kStep;
#pragma unroll
      for (int i = row; i < row + T::kTileHW; i += kBatch * kStep) {
        float const* src[kBatch];
        uint32_t valid[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          Window const at = smem.window[i + b * kStep];
          valid[b] = inside(at);
          src[b] = reinterpret_cast<float const*>(source(at));
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
#pragma unroll
          for (int k = 0; k < T::kTileK; k += 8)
            copy4_async(dy_smem + (k + lane) * T::kPitchHW + i + b * kStep, src[b] + k,
                        valid[b] & (kWhole || k + lane < filters));
      }
      return;
    }
    // Neighbouring threads process neighbouring pixels; with fewer pixels than threads, the filters are shared out.
    int32_t const first = T::kShares == 1 ? 0 : threadIdx.x / T::kTileHW * kTerms, lane = threadIdx.x % T::kTileHW;
#pragma unroll
    for (int i = 0; i < T::kPixels; ++i) {
      Window const at = kFill == Fill::kPixels ? window[i] : smem.window[i * T::kThreads + lane];
      uint32_t const valid = inside(at);
      char const* base = source(at);
      float* const dst = dy_smem + first * T::kPitchHW + i * T::kThreads + lane;
      if constexpr (kFill == Fill::kConvert) {
        auto const* const src = reinterpret_cast<uint16_t const*>(base);
        int64_t const step = a.p.y_stride[1];
#pragma unroll
        for (int begin = 0; begin < kTerms; begin += 8) {
          alignas(16) uint16_t v[8];
          if (a.filter_vectors) {
            uint4 const zero = make_uint4(0, 0, 0, 0);
            *reinterpret_cast<uint4*>(v) =
                valid && first + begin < filters ? __ldg(reinterpret_cast<uint4 const*>(src + begin)) : zero;
          } else {
#pragma unroll
            for (int k = 0; k < 8; ++k)
              v[k] = valid && first + begin + k < filters ? __ldg(src + (begin + k) * step) : uint16_t{0};
          }
#pragma unroll
          for (int k = 0; k < 8; ++k) dst[(begin + k) * T::kPitchHW] = bits_as_float(v[k], a.p.y_type);
        }
      } else {
        constexpr int kUnrolled = kWhole ? kTerms : 1;
#pragma unroll kUnrolled
        for (int k = 0; k < kTerms; ++k, base += a.dy_step[0])
          copy4_async(dst + k * T::kPitchHW, reinterpret_cast<float const*>(base),
                      valid & (kWhole || first + k < filters));
      }
    }
  }

  // Starts the copies of the next slice.
  __device__ __forceinline__ void fill(float* stage) {
    if (kFill != Fill::kConvert && filters >= T::kTileK) {
      fill_w(stage);
      fill_dy<true>(stage + kFloats);
    } else {
      fill_w(stage);
      fill_dy<false>(stage + kFloats);
    }
    weights += kFloats;
    dq -= a.w.lag;
    if (dq != end_q) return;
    dq = 0;
    dp -= a.h.lag;
    if (dp != end_p) return;
    dp = 0;
    filters -= T::kTileK;
    int64_t const step = int64_t{a.dy_step[0]} * T::kTileK;
    if constexpr (kFill != Fill::kPixels) {
      first_filter += step;
    } else {
#pragma unroll
      for (int i = 0; i < T::kPixels; ++i) window[i].dy += step;
    }
  }
};

}  // namespace adder2d::dgrad_simt
