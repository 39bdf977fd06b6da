// Where a tile, a thread of it and a pixel's window lie.
#pragma once

#include "tile/heuristics.h"
#include "tile/problem.h"

namespace adder2d {

struct TileCoord {
  int32_t group, first_k, end_k, first_pixel;  // filters first_k .. end_k - 1 of the whole layer, pixels of the batch

  __device__ __forceinline__ TileCoord(FpropArgs const& a, TileConfig const& config, int32_t tile, int32_t tile_k,
                                       int32_t tile_pq) {
    int32_t const k_tile = tile % config.tiles_k, rest = tile / config.tiles_k;
    group = rest / config.tiles_pq;
    first_k = group * a.Kg + k_tile * tile_k;
    end_k = (group + 1) * a.Kg;
    first_pixel = rest % config.tiles_pq * tile_pq;
  }
};

// One output pixel: where its window starts. An absent pixel has w0 = kOutside.
struct Pixel {
  int64_t offset;  // elements from x to the window's first tap, channel 0 of the group; may point before x
  int32_t h0, w0;
};
constexpr int32_t kOutside = INT32_MIN;  // h0 + kOutside is never a row of the input, whatever h0 (W likewise)

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

// A thread's outputs in a tile of T: groups of four filters and runs of kRun pixels, with as much of the tile between
// two groups, or two runs, as the other threads take.
template <class T, int kRun = 4>
struct ThreadCoord {
  static constexpr int kStepK = T::kTileK / (T::kThreadK / 4), kStepPQ = T::kTilePQ / (T::kThreadPQ / kRun);
  int32_t thread_k, thread_pq;  // the first ones

  __device__ __forceinline__ explicit ThreadCoord(int32_t thread) {
    int32_t const warp = thread / 32, lane = thread % 32;
    thread_k = (warp % T::kWarpsK * T::kLanesK + lane / T::kLanesPQ) * 4;
    thread_pq = (warp / T::kWarpsK * T::kLanesPQ + lane % T::kLanesPQ) * kRun;
  }
  __device__ __forceinline__ int32_t k(int32_t i) const { return thread_k + i / 4 * kStepK + i % 4; }
  __device__ __forceinline__ int32_t pq(int32_t j) const { return thread_pq + j / kRun * kStepPQ + j % kRun; }
};

}  // namespace adder2d
