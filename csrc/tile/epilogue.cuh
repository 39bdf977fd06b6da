// From sums to y: the epilogue of all forward kernels, and their stores.
#pragma once

#include "common/convert.cuh"
#include "common/cp_async.cuh"
#include "tile/coord.cuh"

namespace adder2d {

// ---- epilogue

// Makes outputs of sums: y = b[k] - sum, where there is no fused epilogue.
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

// ---- fused epilogue

// y = clamp(scale[k] * (b[k] - sum) + shift[k] + residual, lower, upper). All forward kernels do it here. Kernels that
// store by store4 leave their usual path for it on a test that this path has anyway (stores_plain), so that they are
// the same without it; others are compiled twice, or branch on `fused`.

// What belongs to one filter.
struct FusedFilter {
  float bias, scale, shift;
};
__device__ __forceinline__ FusedFilter fused_filter(FpropArgs const& a, int32_t k) {
  return {Epilogue::filter(a, k).bias, a.epilogue.scale != nullptr ? __ldg(a.epilogue.scale + k) : 1.f,
          a.epilogue.shift != nullptr ? __ldg(a.epilogue.shift + k) : -0.f};
}

__device__ __forceinline__ float fuse(FpropArgs const& a, FusedFilter const& f, float sum, float residual) {
  float const y = fmaf(f.scale, f.bias - sum, f.shift) + residual;
  float const above = y < a.epilogue.lower ? a.epilogue.lower : y;  // a NaN stays one
  return above > a.epilogue.upper ? a.epilogue.upper : above;
}
__device__ __forceinline__ float4 fuse(FpropArgs const& a, FusedFilter const (&f)[4], float4 const& sum,
                                       float4 const& residual) {
  return make_float4(fuse(a, f[0], sum.x, residual.x), fuse(a, f[1], sum.y, residual.y),
                     fuse(a, f[2], sum.z, residual.z), fuse(a, f[3], sum.w, residual.w));
}
// Of four filters from k on (kFilters), or k's four times.
template <bool kFilters>
__device__ __forceinline__ void fused_filters(FpropArgs const& a, int32_t k, FusedFilter (&f)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) f[i] = i == 0 || kFilters ? fused_filter(a, k + i) : f[0];
}

// The residual of filter k and pixel m. It may be y: a thread reads an element before it writes it, and no other does.
// Where it is absent: -0, since x + -0 is x, with its sign of zero.
__device__ __forceinline__ float residual1(FpropArgs const& a, int32_t k, int32_t m) {
  if (a.epilogue.residual == nullptr) return -0.f;
  int64_t const* const stride = a.epilogue.residual_stride;
  int32_t pq, q;
  int32_t const n = a.div_PQ.divmod(m, &pq);
  int32_t const p = a.div_Q.divmod(pq, &q);
  return load_written_as_float(a.epilogue.residual, n * stride[0] + k * stride[1] + p * stride[2] + q * stride[3],
                               a.epilogue.residual_type);
}
// Where residual_as_y: of the output at element `index` of y, of two outputs, the second `next` elements on where it is
// `present`, and of four that may be stored at once.
__device__ __forceinline__ float residual1_at(FpropArgs const& a, int64_t index) {
  if (a.epilogue.residual == nullptr) return -0.f;
  return load_written_as_float(a.epilogue.residual, index, a.epilogue.residual_type);
}
__device__ __forceinline__ float2 residual2_at(FpropArgs const& a, bool pairs, int64_t index, int64_t next,
                                               bool present) {
  if (a.epilogue.residual == nullptr) return make_float2(-0.f, -0.f);
  if (pairs) return load2_written_as_float(a.epilogue.residual, index, a.epilogue.residual_type);
  return make_float2(residual1_at(a, index), present ? residual1_at(a, index + next) : -0.f);
}
__device__ __forceinline__ float4 residual4_at(FpropArgs const& a, int64_t index) {
  if (a.epilogue.residual == nullptr) return make_float4(-0.f, -0.f, -0.f, -0.f);
  return load4_written_as_float(a.epilogue.residual, index, a.epilogue.residual_type);
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

// Writes the output of filter k and pixel m, whose output_offset is `offset`.
__device__ __forceinline__ void store1(FpropArgs const& a, int32_t k, int32_t m, int64_t offset, float sum) {
  float const y =
      a.fused ? fuse(a, fused_filter(a, k), sum, residual1(a, k, m)) : Epilogue::finish(Epilogue::filter(a, k), sum);
  store_from_float(a.p.y, offset + k * a.p.y_stride[1], a.p.y_type, y);
}

// Writes two outputs of type kType, the first of them at element `index` of y: at once (`pairs`), or one by one, the
// second where it is `present` and `next` elements on.
template <int32_t kType>
__device__ __forceinline__ void store2(FpropArgs const& a, bool pairs, int64_t index, int64_t next, bool present,
                                       float2 const& y) {
  if (pairs) {
    store2_from_float<kType>(a.p.y, index, y);
  } else {
    store_from_float(a.p.y, index, kType, y.x);
    if (present) store_from_float(a.p.y, index + next, kType, y.y);
  }
}

// Writes the outputs of four filters from k on (kFilters), or of four pixels from m on, one by one or with a fused
// epilogue; `end_k` is the end of the tile's filters. Not inlined: kernels would be twice as long.
template <bool kFilters>
__device__ __noinline__ void store4_otherwise(FpropArgs const& a, int32_t k, int32_t end_k, int32_t m, float4 sum) {
  float const sums[] = {sum.x, sum.y, sum.z, sum.w};
  int64_t const offset = output_offset(a, m);
  if (a.stores_vectors && a.y_channels_last == kFilters) {
    int64_t const index = offset + k * a.p.y_stride[1];
    float4 const residual = residual4_at(a, index);
    FusedFilter filters[4];
    fused_filters<kFilters>(a, k, filters);
    return store4_from_float(a.p.y, index, a.p.y_type, fuse(a, filters, sum, residual));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kFilters && k + i < end_k) store1(a, k + i, m, offset, sums[i]);
    if (!kFilters && m + i < a.NPQ) store1(a, k, m + i, i == 0 ? offset : output_offset(a, m + i), sums[i]);
  }
}

// The same, at once where possible. `offset` is that of pixel m.
template <bool kFilters>
__device__ __forceinline__ void store4(FpropArgs const& a, int32_t k, int32_t end_k, int32_t m, int64_t offset,
                                       float4 const& sum) {
  if (k >= end_k || m >= a.NPQ) return;
  if (!a.stores_plain || a.y_channels_last != kFilters) return store4_otherwise<kFilters>(a, k, end_k, m, sum);
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
