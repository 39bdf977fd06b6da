// From sums to y: the epilogue of all forward kernels, and their stores.
#pragma once

#include "common/convert.cuh"
#include "common/cp_async.cuh"
#include "tile/coord.cuh"

namespace adder2d {

// ---- epilogue

// Makes outputs of sums: y = b[k] - sum. All forward kernels do it here, so a scale, a residual, an activation or a
// quantisation of the output belongs here too: its parameters into FpropArgs and the constructor, what depends on the
// filter into Filter, the arithmetic into finish(), and another type of y into common/convert.cuh.
struct Epilogue {
  // Of one filter; kernels that hold a filter's outputs together load it once.
  struct Filter {
    float bias;
  };

  __device__ __forceinline__ static Filter filter(FpropArgs const& a, int32_t k) {
    return {a.p.b != nullptr ? load_as_float(a.p.b, k, a.p.w_type) : -0.f};  // -0 - sum is -sum, with its sign of zero
  }
  // Filters k and k + 1, by one branch.
  __device__ __forceinline__ static void filters(FpropArgs const& a, int32_t k, Filter (&two)[2]) {
    two[0] = two[1] = {-0.f};
    if (a.p.b != nullptr) {
      two[0] = {load_as_float(a.p.b, k, a.p.w_type)};
      two[1] = {load_as_float(a.p.b, k + 1, a.p.w_type)};
    }
  }

  __device__ __forceinline__ static float finish(Filter const& filter, float sum) { return filter.bias - sum; }
  __device__ __forceinline__ static float2 finish(Filter const (&f)[2], float2 const& sum) {
    return make_float2(finish(f[0], sum.x), finish(f[1], sum.y));
  }
  __device__ __forceinline__ static float4 finish(Filter const (&f)[4], float4 const& sum) {
    return make_float4(finish(f[0], sum.x), finish(f[1], sum.y), finish(f[2], sum.z), finish(f[3], sum.w));
  }
};

// ---- store

// Elements from y to pixel m of filter 0.
__device__ __forceinline__ int64_t output_offset(FpropArgs const& a, int32_t m) {
  if (a.y_linear) return m * a.p.y_stride[3];
  int32_t pq, q;
  int32_t const n = a.div_PQ.divmod(m, &pq);
  int32_t const p = a.div_Q.divmod(pq, &q);
  return n * a.p.y_stride[0] + p * a.p.y_stride[2] + q * a.p.y_stride[3];
}

// Writes the output of filter k and a pixel, whose output_offset is `offset`.
__device__ __forceinline__ void store1(FpropArgs const& a, int32_t k, int64_t offset, Epilogue::Filter const& filter,
                                       float sum) {
  store_from_float(a.p.y, offset + k * a.p.y_stride[1], a.p.y_type, Epilogue::finish(filter, sum));
}
__device__ __forceinline__ void store1(FpropArgs const& a, int32_t k, int64_t offset, float sum) {
  store_from_float(a.p.y, offset + k * a.p.y_stride[1], a.p.y_type, Epilogue::finish(Epilogue::filter(a, k), sum));
}

// Writes two outputs of type kType, the first of them at element `index` of y: at once (`pairs`), or one by one, the
// second where it is `present` and `next` elements on.
template <int32_t kType>
__device__ __forceinline__ void store2(FpropArgs const& a, bool pairs, int64_t index, int64_t next, bool present,
                                       Epilogue::Filter const (&filters)[2], float2 const& sum) {
  float2 const y = Epilogue::finish(filters, sum);
  if (pairs) {
    store2_from_float<kType>(a.p.y, index, y);
  } else {
    store_from_float(a.p.y, index, kType, y.x);
    if (present) store_from_float(a.p.y, index + next, kType, y.y);
  }
}

// Writes the outputs of four filters from k on (kFilters), or of four pixels from m on, one by one; `end_k` is the end
// of the tile's filters. Not inlined: kernels would be twice as long.
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
__device__ __forceinline__ void store4(FpropArgs const& a, int32_t k, int32_t end_k, int32_t m, int64_t offset,
                                       float4 const& sum) {
  if (k >= end_k || m >= a.NPQ) return;
  if (!a.y_vectors || a.y_channels_last != kFilters) return store4_singly<kFilters>(a, k, end_k, m, sum);
  Epilogue::Filter const f = Epilogue::filter(a, k);
  Epilogue::Filter const filters[4] = {f, kFilters ? Epilogue::filter(a, k + 1) : f,
                                       kFilters ? Epilogue::filter(a, k + 2) : f,
                                       kFilters ? Epilogue::filter(a, k + 3) : f};
  store4_from_float(a.p.y, offset + k * a.p.y_stride[1], a.p.y_type, Epilogue::finish(filters, sum));
}

// The same for float32, at an address of y. With kForced the compiler may not make four stores of it (store16).
template <bool kForced>
__device__ __forceinline__ void store4_at(float* y, Epilogue::Filter const (&filters)[4], float4 const& sum) {
  if constexpr (kForced) {
    store16(y, Epilogue::finish(filters, sum));
  } else {
    *reinterpret_cast<float4*>(y) = Epilogue::finish(filters, sum);
  }
}

// A tile's sums in shared memory, transposed so that a thread gets what lies side by side in y: rows of
// pixels that hold the filters (a.y_channels_last), or the other way round. Rows are padded for writers that have
// kLanesPQ pixels side by side in a warp.
template <int kTileK_, int kTilePQ_, int kLanesPQ>
struct SmemTranspose {
  static constexpr int kTileK = kTileK_, kTilePQ = kTilePQ_;
  static constexpr int kPitchK = kTileK + 4, kPitchPQ = kTilePQ + (kLanesPQ < 4 ? 4 : kLanesPQ);
  static constexpr int kBytes = 4 * (kTilePQ * kPitchK > kTileK * kPitchPQ ? kTilePQ * kPitchK : kTileK * kPitchPQ);

  __device__ __forceinline__ static int32_t index(FpropArgs const& a, int32_t k, int32_t pq) {
    return a.y_channels_last ? pq * kPitchK + k : k * kPitchPQ + pq;
  }
  // Stores the four sums from float `i` of the tile on, unless they are padding.
  __device__ __forceinline__ static void store(FpropArgs const& a, TileCoord const& tile, int32_t i,
                                               float4 const& sum) {
    int32_t const pitch = a.y_channels_last ? kPitchK : kPitchPQ, row = i / pitch, column = i % pitch;
    if (row >= (a.y_channels_last ? kTilePQ : kTileK) || column >= (a.y_channels_last ? kTileK : kTilePQ)) return;
    int32_t const k = tile.first_k + (a.y_channels_last ? column : row),
                  m = tile.first_pixel + (a.y_channels_last ? row : column);
    if (a.y_channels_last) {
      store4<true>(a, k, tile.end_k, m, output_offset(a, m), sum);
    } else {
      store4<false>(a, k, tile.end_k, m, output_offset(a, m), sum);
    }
  }
};

// The place in the output of a tile whose sums are transposed. An item is four floats of the tile as it lies in
// shared memory.
template <int kTileK, int kTilePQ, int kThreads_, int kLanesPQ>
struct EpilogueTile : TileCoord {
  using Transpose = SmemTranspose<kTileK, kTilePQ, kLanesPQ>;
  static constexpr int kThreads = kThreads_, kItems = ceil_div(Transpose::kBytes, 16 * kThreads);
  static constexpr int kSplitFloats = split_floats(kTileK, kTilePQ);

  __device__ __forceinline__ EpilogueTile(FpropArgs const& a, TileConfig const& config, int32_t tile,
                                          int32_t /* thread */ = 0)
      : TileCoord(a, config, tile, kTileK, kTilePQ) {}
  __device__ __forceinline__ void store(FpropArgs const& a, int32_t item, int32_t thread, float4 const& sum) const {
    Transpose::store(a, *this, 4 * (item * kThreads + thread), sum);
  }
};

}  // namespace adder2d
