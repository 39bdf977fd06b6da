// fprop_simt.cu: the tiles, and the copies of a slice to shared memory.
#pragma once

#include <type_traits>

#include "common/cp_async.cuh"
#include "tile/arch.h"
#include "tile/epilogue.cuh"

namespace adder2d::fprop_simt {

// ---- traits

// How a slice of the reduction is filled. The order of the terms is the fill's own.
enum class Fill {
  kTaps,      // kTileC terms of the flattened (c, r, s), as weights lie in memory; a warp loads neighbouring pixels
  kAny,       // as kTaps for the kernels, strides and types that it does not support; converts while it copies
  kPixels,    // kTileC channels of one tap, from packed weights; a warp loads neighbouring pixels (NCHW)
  kChannels,  // kTileC channels of one tap, from packed weights; a warp loads neighbouring channels (NHWC)
  kPlane,     // as kPixels, four pixels at a time: 1x1 kernels whose pixels lie in y as in x
};
template <Fill kFill>
constexpr bool kIsPacked = kFill == Fill::kPixels || kFill == Fill::kChannels || kFill == Fill::kPlane;
// Where x is in channels_last, y is too as a rule; elsewhere a thread stores four pixels at once as it holds them.
template <Fill kFill>
constexpr bool kIsTransposed = kFill == Fill::kChannels || kFill == Fill::kAny;

template <int kTileK_, int kTilePQ_, int kTileC_, int kStages_, int kThreadK_ = 8, int kThreadPQ_ = 8,
          int kBlocks = kArch.simt_blocks>
struct Tile {
  static constexpr int kTileK = kTileK_, kTilePQ = kTilePQ_;  // outputs of a block: filters, pixels
  static constexpr int kTileC = kTileC_;                      // reduction terms of a slice
  static constexpr int kStages = kStages_;                    // slices in flight
  // Terms of the inner loop; a longer body misses the instruction cache.
  static constexpr int kUnroll = kTileC >= 32 ? 4 : 8;
  static constexpr int kThreadK = kThreadK_, kThreadPQ = kThreadPQ_;  // outputs of a thread, in groups of 4 by 4
  static constexpr int kGroupsK = kThreadK / 4, kGroupsPQ = kThreadPQ / 4;
  static constexpr int kThreads = kTileK * kTilePQ / (kThreadK * kThreadPQ);
  static constexpr int kLanesK = 4, kLanesPQ = 8;  // a warp's threads
  static constexpr int kWarpsK = kTileK / (kLanesK * kThreadK);
  static constexpr int kBlocksPerSM = kBlocks;
  // Filters loaded at once: 8 threads side by side along the reduction.
  static constexpr int kRowsK = kThreads / 8;
  static constexpr int kTermSlices = kThreads / kTileC;  // slices whose terms are made at once, one by each thread
  // Rows of shared memory are padded by 4 floats: loads along the reduction then store to 32 different banks.
  static constexpr int kPitchK = kTileK + 4, kPitchPQ = kTilePQ + 4;
  static constexpr int kStageFloats = kTileC * (kPitchK + kPitchPQ);

  static_assert(kThreads == 128, "the fill loops are laid out for 128 threads");
  static_assert(kTileK % (kLanesK * kThreadK) == 0 && kTilePQ % (kLanesPQ * kThreadPQ) == 0,
                "warps must tile the block");
  static_assert(kTileC % kUnroll == 0 && kUnroll % 2 == 0, "fragments alternate between two buffers");
  static_assert(kTileC % 8 == 0 && kTileK % 16 == 0, "8 lanes load along the reduction, 16 rows at a time");
  static_assert(kTilePQ % kThreads == 0 || kThreads % kTilePQ == 0, "threads must divide the pixels evenly");
};

// One term of a kTaps slice.
struct Tap {
  int32_t offset;  // elements from the window's first tap
  uint32_t place;  // tap_row(r) | tap_column(s); kNoTap for an absent term
};
constexpr int32_t kMaxTapsR = 15, kMaxTapsS = 16;
__device__ __forceinline__ uint32_t tap_row(int32_t r) { return 0x10000u << r; }
__device__ __forceinline__ uint32_t tap_column(int32_t s) { return 1u << s; }
constexpr uint32_t kNoTap = 0x80000000;  // in no pixel's taps
static_assert(16 + kMaxTapsR == 31 && kMaxTapsS == 16, "rows and columns share 31 bits");
// One term of a kAny slice. An absent term has dh = kOutside.
struct Term {
  int64_t offset;
  int32_t dh, dw;
};

template <class T, Fill kFill>
struct Smem {
  static constexpr bool kHasPixels = kFill != Fill::kTaps && kFill != Fill::kPlane, kHasTerms = !kIsPacked<kFill>;
  using TermType = std::conditional_t<kFill == Fill::kTaps, Tap, Term>;
  alignas(16) float stage[T::kStages][T::kStageFloats];
  alignas(16) Pixel pixel[kHasPixels ? T::kTilePQ : 1];
  alignas(16) TermType term[2][kHasTerms ? T::kThreads : 1];  // of the slices being filled, and of those that come next
};

// The tile's place in the output, and the place of a thread in the tile. Unless sums are transposed (kTransposed), an
// item is one of the thread's filters and four of its pixels.
template <class T>
using OutputTile = EpilogueTile<T::kTileK, T::kTilePQ, T::kThreads, T::kLanesPQ>;
template <class T, bool kTransposed>
struct OutputCoord : OutputTile<T>, ThreadCoord<T> {
  static constexpr int kItems = kTransposed ? OutputTile<T>::kItems : T::kThreadK * T::kGroupsPQ;

  __device__ __forceinline__ OutputCoord(FpropArgs const& a, TileConfig const& config, int32_t tile, int32_t thread)
      : OutputTile<T>(a, config, tile), ThreadCoord<T>(thread) {}
  __device__ __forceinline__ void store(FpropArgs const& a, int32_t item, int32_t thread, float4 const& sum) const {
    if constexpr (kTransposed) {
      OutputTile<T>::store(a, item, thread, sum);
    } else {
      int32_t const m = this->first_pixel + this->pq(item % T::kGroupsPQ * 4);
      store4<false>(a, this->first_k + this->k(item / T::kGroupsPQ), this->end_k, m, output_offset(a, m), sum);
    }
  }
};

// ---- fill

// Term j of the flattened (c, r, s).
__device__ __forceinline__ Term make_term(FpropArgs const& a, int32_t j, int32_t* rs) {
  int32_t s;
  int32_t const c = a.div_RS.divmod(j, rs);
  int32_t const r = a.div_S.divmod(*rs, &s);
  Term term{0, r * a.p.dil_h, s * a.p.dil_w};
  term.offset = c * a.p.x_stride[1] + term.dh * a.p.x_stride[2] + term.dw * a.p.x_stride[3];
  return term;
}

// Copies one element, converting unless both sides are float32 (kAny).
template <Fill kFill>
__device__ __forceinline__ void copy_element(float* dst, void const* base, int64_t index, int32_t type, bool valid) {
  if constexpr (kFill == Fill::kAny) {
    *dst = valid ? load_as_float(base, index, type) : 0.f;
  } else {
    copy4_async(dst, static_cast<float const*>(base) + index, valid);
  }
}

// The fills of one tile, slice after slice: weights [kTileC][kPitchK], then pixels [kTileC][kPitchPQ].
template <class T, Fill kFill>
struct Loader {
  FpropArgs const& a;
  Smem<T, kFill>& smem;
  int32_t origin, slice, made;  // the first slice; the next one; the first slice of the term table in use
  int32_t r, s;                 // packed fills: the slice's tap
  int32_t rows_k;               // unpacked weights: filters of the tile from the thread's first one on
  int64_t w_index;              // element of the weights that the thread copies first
  int64_t x_offset;             // packed fills: elements from a window's first tap to the slice's tap and first channel
  // kTaps: the pixels' first taps, and bits for the rows and columns of taps inside the input. kPlane: the first of
  // four pixels, and whether they exist.
  static constexpr int kPixels = T::kThreads > T::kTilePQ || kFill == Fill::kPlane ? 1 : T::kTilePQ / T::kThreads;
  float const* window[kPixels];
  uint32_t taps[kPixels];

  __device__ __forceinline__ Loader(FpropArgs const& args, TileConfig const& config, Smem<T, kFill>& shared,
                                    OutputCoord<T, kIsTransposed<kFill>> const& coord, int32_t first_slice)
      : a(args), smem(shared), origin(first_slice), slice(first_slice), made(first_slice), r(0), s(0) {
    if constexpr (kFill == Fill::kTaps) {
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        Pixel const pixel = make_pixel(a, coord.group, coord.first_pixel + i * T::kThreads + threadIdx.x % T::kTilePQ);
        window[i] = static_cast<float const*>(a.p.x) + pixel.offset;
        taps[i] = 0;
        for (int32_t row = 0; row < a.p.R; ++row)
          if (static_cast<uint32_t>(pixel.h0 + row * a.p.dil_h) < static_cast<uint32_t>(a.p.H)) taps[i] |= tap_row(row);
        for (int32_t column = 0; column < a.p.S; ++column)
          if (static_cast<uint32_t>(pixel.w0 + column * a.p.dil_w) < static_cast<uint32_t>(a.p.W))
            taps[i] |= tap_column(column);
      }
    } else if constexpr (kFill == Fill::kPlane) {
      int32_t const m = coord.first_pixel + 4 * (threadIdx.x % (T::kTilePQ / 4));
      window[0] = static_cast<float const*>(a.p.x) + make_pixel(a, coord.group, m).offset;
      taps[0] = m < a.NPQ;
    } else {
      for (int i = threadIdx.x; i < T::kTilePQ; i += T::kThreads)
        smem.pixel[i] = make_pixel(a, coord.group, coord.first_pixel + i);
    }
    if constexpr (kIsPacked<kFill>) {
      int32_t rs;
      int32_t const c = a.div_RS.divmod(slice, &rs) * T::kTileC;
      r = a.div_S.divmod(rs, &s);
      x_offset = c * a.p.x_stride[1] + r * a.p.dil_h * a.p.x_stride[2] + s * a.p.dil_w * a.p.x_stride[3];
      int32_t const pitch = config.tiles_k * T::kTileK, row = threadIdx.x / (T::kTileK / 4);
      w_index = (int64_t{coord.group} * a.CRS + slice * T::kTileC + row) * pitch + coord.first_k - coord.group * a.Kg +
                4 * (threadIdx.x % (T::kTileK / 4));
    } else {
      int32_t const row = threadIdx.x / 8, lane = threadIdx.x % 8;
      rows_k = coord.end_k - coord.first_k - row;
      w_index = int64_t{coord.first_k + row} * a.CRS + int64_t{slice} * T::kTileC + lane;
      make_terms(slice);
    }
  }

  // Terms of T::kTermSlices slices from `first` on, into the half of the table that is not in use.
  __device__ __forceinline__ void make_terms(int32_t first) const {
    int32_t const j = first * T::kTileC + threadIdx.x;
    int32_t rs = 0;
    Term term{0, kOutside, 0};
    if (j < a.CRS) term = make_term(a, j, &rs);
    auto* const table = smem.term[(first - origin) / T::kTermSlices % 2];
    if constexpr (kFill == Fill::kTaps) {
      int32_t column;
      int32_t const row = a.div_S.divmod(rs, &column);
      table[threadIdx.x] =
          Tap{static_cast<int32_t>(term.offset), j < a.CRS ? tap_row(row) | tap_column(column) : kNoTap};
    } else {
      table[threadIdx.x] = term;
    }
  }

  __device__ __forceinline__ void fill_w(TileConfig const& config, float* w_smem) const {
    if constexpr (kIsPacked<kFill>) {
      constexpr int kLanes = T::kTileK / 4, kRows = T::kThreads / kLanes;
      int32_t const lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes, pitch = config.tiles_k * T::kTileK;
      float const* src = static_cast<float const*>(a.p.workspace) + w_index;  // 16 bytes of a row a thread
#pragma unroll
      for (int j = 0; j < T::kTileC; j += kRows, src += int64_t{kRows} * pitch)
        if (kRows <= T::kTileC || row < T::kTileC) copy16_async(w_smem + (j + row) * T::kPitchK + 4 * lane, src);
    } else {
      int32_t const row = threadIdx.x / 8, lane = threadIdx.x % 8;
      int32_t const terms = a.CRS - slice * T::kTileC - lane;  // from the thread's first one on
      float* const dst = w_smem + lane * T::kPitchK + row;
      int64_t index = w_index;
#pragma unroll
      for (int k = 0; k < T::kTileK; k += T::kRowsK, index += int64_t{T::kRowsK} * a.CRS) {
#pragma unroll
        for (int j = 0; j < T::kTileC; j += 8)
          copy_element<kFill>(dst + j * T::kPitchK + k, a.p.w, index + j, a.p.w_type, k < rows_k && j < terms);
      }
    }
  }

  __device__ __forceinline__ void fill_x(float* x_smem) const {
    int32_t const dh = r * a.p.dil_h, dw = s * a.p.dil_w;
    if constexpr (kFill == Fill::kChannels) {
      int32_t const row = threadIdx.x / 8, lane = threadIdx.x % 8, offset = static_cast<int32_t>(x_offset) + lane;
      // Pixels in batches: a read of shared memory before every copy into it would cost three idle instructions each.
      constexpr int kBatch = T::kTilePQ / T::kRowsK < 4 ? T::kTilePQ / T::kRowsK : 4;
#pragma unroll
      for (int i = 0; i < T::kTilePQ; i += kBatch * T::kRowsK) {
        float const* src[kBatch];
        bool valid[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          Pixel const pixel = smem.pixel[i + b * T::kRowsK + row];
          valid[b] = inside(a, pixel, dh, dw);
          src[b] = static_cast<float const*>(a.p.x) + (static_cast<int32_t>(pixel.offset) + offset);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
#pragma unroll
          for (int j = 0; j < T::kTileC; j += 8)
            copy4_async(x_smem + (j + lane) * T::kPitchPQ + i + b * T::kRowsK + row, src[b] + j, valid[b]);
      }
      return;
    }
    if constexpr (kFill == Fill::kPlane) {
      constexpr int kLanes = T::kTilePQ / 4, kRows = T::kThreads / kLanes;
      int32_t const lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
      float const* src = window[0] + x_offset + row * a.p.x_stride[1];
#pragma unroll
      for (int j = 0; j < T::kTileC; j += kRows, src += kRows * a.p.x_stride[1])
        copy16_async(x_smem + (j + row) * T::kPitchPQ + 4 * lane, taps[0] ? src : static_cast<float const*>(a.p.x));
      return;
    }
    // Neighbouring threads process neighbouring pixels; with fewer pixels than threads, the terms are shared out.
    constexpr int kShares = T::kThreads > T::kTilePQ ? T::kThreads / T::kTilePQ : 1, kTerms = T::kTileC / kShares;
    int32_t const first = kShares == 1 ? 0 : threadIdx.x / T::kTilePQ * kTerms, lane = threadIdx.x % T::kTilePQ;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      float* const dst = x_smem + first * T::kPitchPQ + i * T::kThreads + lane;
      if constexpr (kFill == Fill::kTaps) {
        Tap const* const table = &smem.term[(made - origin) / T::kTermSlices % 2][(slice - made) * T::kTileC + first];
#pragma unroll 8
        for (int j = 0; j < kTerms; j += 2) {
          int4 const two = *reinterpret_cast<int4 const*>(table + j);
          copy4_async_unless(dst + j * T::kPitchPQ, window[i] + two.x, two.y & ~taps[i]);
          copy4_async_unless(dst + (j + 1) * T::kPitchPQ, window[i] + two.z, two.w & ~taps[i]);
        }
      } else {
        Pixel const pixel = smem.pixel[i * T::kThreads + lane];
        if constexpr (kFill == Fill::kPixels) {
          bool const valid = inside(a, pixel, dh, dw);
          float const* src = static_cast<float const*>(a.p.x) + pixel.offset + x_offset + first * a.p.x_stride[1];
#pragma unroll
          for (int j = 0; j < kTerms; ++j, src += a.p.x_stride[1]) copy4_async(dst + j * T::kPitchPQ, src, valid);
        } else {
#pragma unroll
          for (int j = 0; j < kTerms; ++j) {
            Term const term = smem.term[(made - origin) / T::kTermSlices % 2][(slice - made) * T::kTileC + first + j];
            copy_element<kFill>(dst + j * T::kPitchPQ, a.p.x, pixel.offset + term.offset, a.p.x_type,
                                inside(a, pixel, term.dh, term.dw));
          }
        }
      }
    }
  }

  // Starts the copies of the next slice. A barrier lies between two calls.
  __device__ __forceinline__ void fill(TileConfig const& config, float* stage) {
    fill_w(config, stage);
    fill_x(stage + T::kTileC * T::kPitchK);
    if constexpr (kIsPacked<kFill>) {
      w_index += T::kTileC * config.tiles_k * T::kTileK;
      x_offset += a.step_s;
      if (++s == a.p.S) {
        s = 0;
        x_offset += a.step_r;
        if (++r == a.p.R) {
          r = 0;
          x_offset += a.step_c + (T::kTileC - 1) * a.p.x_stride[1];
        }
      }
    } else {
      w_index += T::kTileC;
      if (slice == made) make_terms(made + T::kTermSlices);
      if (slice + 1 == made + T::kTermSlices) made += T::kTermSlices;
    }
    ++slice;
  }
};

}  // namespace adder2d::fprop_simt
