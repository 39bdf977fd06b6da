// From sums to y: the epilogue of all forward kernels, and their stores.
#pragma once

#include "common/convert.cuh"
#include "tile/coord.cuh"

namespace adder2d {

__device__ __forceinline__ float load_bias(FpropArgs const& a, int32_t k) {
  return a.p.b != nullptr ? load_as_float(a.p.b, k, a.p.w_type) : -0.f;  // -0 - sum is -sum, with its sign of zero
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
  if (!a.y_vectors || a.y_channels_last != kFilters) return store4_singly<kFilters>(a, k, end_k, m, sum);
  float4 b;
  b.x = load_bias(a, k);
  b.y = kFilters ? load_bias(a, k + 1) : b.x;
  b.z = kFilters ? load_bias(a, k + 2) : b.x;
  b.w = kFilters ? load_bias(a, k + 3) : b.x;
  store4_from_float(a.p.y, offset + k * a.p.y_stride[1], a.p.y_type, make_float4(b.x - sum.x, b.y - sum.y, b.z - sum.z, b.w - sum.w));
}

// A tile's sums in shared memory, where they change hands so that a thread gets what lies side by side in y: rows of pixels
// that hold the filters (a.y_channels_last), or the other way round. Rows are padded for writers that have kLanesPQ pixels side by side in
// a warp.
template <int kTileK_, int kTilePQ_, int kLanesPQ>
struct SmemTranspose {
  static constexpr int kTileK = kTileK_, kTilePQ = kTilePQ_;
  static constexpr int kPitchK = kTileK + 4, kPitchPQ = kTilePQ + (kLanesPQ < 4 ? 4 : kLanesPQ);
  static constexpr int kBytes = 4 * (kTilePQ * kPitchK > kTileK * kPitchPQ ? kTilePQ * kPitchK : kTileK * kPitchPQ);

  __device__ __forceinline__ static int32_t index(FpropArgs const& a, int32_t k, int32_t pq) {
    return a.y_channels_last ? pq * kPitchK + k : k * kPitchPQ + pq;
  }
  // Stores the four sums from float `i` of the tile on, unless they are padding.
  __device__ __forceinline__ static void store(FpropArgs const& a, TileCoord const& tile, int32_t i, float4 const& sum) {
    int32_t const pitch = a.y_channels_last ? kPitchK : kPitchPQ, row = i / pitch, column = i % pitch;
    if (row >= (a.y_channels_last ? kTilePQ : kTileK) || column >= (a.y_channels_last ? kTileK : kTilePQ)) return;
    int32_t const k = tile.first_k + (a.y_channels_last ? column : row), m = tile.first_pixel + (a.y_channels_last ? row : column);
    if (a.y_channels_last) {
      store4<true>(a, k, tile.end_k, m, output_offset(a, m), sum);
    } else {
      store4<false>(a, k, tile.end_k, m, output_offset(a, m), sum);
    }
  }
};

// The place in the output of a tile of T whose sums change hands. An item is four floats of the tile as it lies in shared memory.
template <class T, int kLanesPQ = T::kLanesPQ>
struct EpilogueTile : TileCoord {
  using Transpose = SmemTranspose<T::kTileK, T::kTilePQ, kLanesPQ>;
  static constexpr int kThreads = T::kThreads, kItems = ceil_div(Transpose::kBytes, 16 * kThreads);
  static constexpr int kSplitFloats = split_floats(T::kTileK, T::kTilePQ);

  __device__ __forceinline__ EpilogueTile(FpropArgs const& a, TileConfig const& config, int32_t tile, int32_t /* thread */ = 0)
      : TileCoord(a, config, tile, T::kTileK, T::kTilePQ) {}
  __device__ __forceinline__ void store(FpropArgs const& a, int32_t item, int32_t thread, float4 const& sum) const {
    Transpose::store(a, *this, 4 * (item * kThreads + thread), sum);
  }
};

}  // namespace adder2d
