// wgrad_simt.cu: the tiles, and the copies of a chunk to shared memory.
#pragma once

#include "common/convert.cuh"
#include "common/cp_async.cuh"
#include "wgrad/wgrad.h"

namespace adder2d::wgrad_simt {

// ---- traits

constexpr int kTaps = 3;    // along each axis
constexpr int kStages = 3;  // chunks in the ring
constexpr int kUnroll = 4;  // pixels of the inner loop; strips are multiples of it

template <int kTileK_, int kTileC_>
struct Tile {
  static constexpr int kTileK = kTileK_, kTileC = kTileC_;  // sums of a block, for each tap
  // Sums of a thread, for each tap of its row; filters as 2 x 4.
  static constexpr int kThreadK = 8, kThreadC = 4;
  static constexpr int kThreads = 384, kWarps = kThreads / 32;
  static constexpr int kLanesK = kTileK / kThreadK, kLanesC = kTileC / kThreadC;
  static constexpr int kGroups = kThreads / (kTaps * kLanesK * kLanesC);
  // The four floats of padding send what a warp copies, 8 pixels of 4 channels, to 32 different banks.
  static constexpr int kPitchK = kTileK + 4, kPitchC = kTileC + 4;
  static constexpr int kSums = kTileK * kTileC;                // of one tap
  static constexpr int kTurnFloats = kGroups * kTaps * kSums;  // sums that meet in shared memory at a time

  static_assert(32 % kLanesC == 0 && kThreads / kTaps % (kLanesK * kLanesC) == 0, "warps hold one row of the kernel");
  static_assert(32 % (kTileK / 4) == 0 && 32 % (kTileC / 4) == 0,
                "warps copy whole pixels; threads add dy of four filters");
  static_assert(kPitchK % 32 == 4 || kPitchK % 32 == 20, "banks");
  static_assert(kPitchC % 32 == 4 || kPitchC % 32 == 20, "banks");
  static_assert(kTurnFloats * sizeof(float) <= 48 << 10, "what every device has");
};

using Tile16x16 = Tile<16, 16>;
using Tile32x16 = Tile<32, 16>;
using Tile32x32 = Tile<32, 32>;

struct ChunkTileSize {
  int32_t k, c, groups;
};
template <class T>
constexpr ChunkTileSize kSizeOf{T::kTileK, T::kTileC, T::kGroups};
// In the order of launch_wgrad_simt.
constexpr ChunkTileSize kTiles[] = {kSizeOf<Tile16x16>, kSizeOf<Tile32x16>, kSizeOf<Tile32x32>};
constexpr int32_t kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);
constexpr char const* kTileNames[] = {"16x16", "32x16", "32x32"};  // filters x channels
static_assert(sizeof(kTileNames) / sizeof(kTileNames[0]) == kTileCount, "one name a tile");
constexpr int32_t kWarps = Tile16x16::kWarps;
constexpr size_t kTurnBytes = Tile16x16::kTurnFloats * sizeof(float);
static_assert(Tile32x16::kTurnFloats == Tile16x16::kTurnFloats && Tile32x32::kTurnFloats == Tile16x16::kTurnFloats,
              "kTurnBytes");

// Of a block that adds splits: weights, threads that share a weight's splits.
constexpr int kReduceLanes = 32, kReduceParts = 8;

// x or dy.
struct Source {
  void const* data;
  int64_t stride[4];
  int32_t type;
  int32_t images, rows, columns;
  bool vectors;  // four channels from a multiple of 4 on lie side by side on an aligned address
};

// The problem as kernels read it, passed by value.
struct Args {
  Adder2dWgradParams p;
  Source x, dy;
  int32_t Cg, Kg;   // channels and filters of one group
  double* squares;  // [reduce_blocks], or null
  float* partial;   // [splits][tiles][kTaps s][kTaps r][kTileK][kTileC]
  float* sums;      // of dy: [splits][groups * tiles_k][kTileK]
};

// ---- fill

__device__ __forceinline__ void copy1(float* dst, float const* src, bool valid, int32_t) {
  copy4_async(dst, src, valid);
}
__device__ __forceinline__ void copy1(float* dst, uint16_t const* src, bool valid, int32_t type) {
  *dst = bits_as_float(valid ? __ldg(src) : uint16_t{0}, type);
}
__device__ __forceinline__ void copy4(float* dst, float const* src, bool valid, int32_t) {
  copy16_async(dst, src, valid);
}
__device__ __forceinline__ void copy4(float* dst, uint16_t const* src, bool valid, int32_t type) {
  uint2 const v = valid ? __ldg(reinterpret_cast<uint2 const*>(src)) : uint2{};
  *reinterpret_cast<float4*>(dst) = make_float4(bits_as_float(v.x & 0xffff, type), bits_as_float(v.x >> 16, type),
                                                bits_as_float(v.y & 0xffff, type), bits_as_float(v.y >> 16, type));
}

// A warp copies a row of pixels with kTile channels each, of which `channels` exist. Zeros go where there is no
// element.
template <int kTile, bool kVectors, typename Element>
__device__ __forceinline__ void fill_row(Source const& source, Element const* src, int32_t channels, int32_t column,
                                         int32_t columns, float* dst) {
  // Neighbours in a warp take four channels at once (channels_last), else 8 pixels of one channel: whole sectors of
  // NCHW.
  constexpr int kLanes = kVectors ? kTile / 4 : 4, kPixels = 32 / kLanes, kPitch = kTile + 4;
  int32_t const lane = threadIdx.x % 32;
  int32_t const pixel = kVectors ? lane / kLanes : lane % kPixels,
                channel = kVectors ? lane % kLanes * 4 : lane / kPixels;
  int64_t const step = source.stride[1] * 4;
  src += channel * source.stride[1] + pixel * source.stride[3];
  dst += pixel * kPitch + channel;
  channels -= channel;
#pragma unroll 1
  for (int32_t i = pixel; i < columns; i += kPixels, src += kPixels * source.stride[3], dst += kPixels * kPitch) {
    int32_t const left = static_cast<uint32_t>(column + i) < static_cast<uint32_t>(source.columns) ? channels : 0;
    if constexpr (kVectors) {
      copy4(dst, src, left > 0, source.type);
    } else {
      Element const* from = src;
#pragma unroll
      for (int c = 0; c < kTile; c += 4, from += step) copy1(dst + c, from, left > c, source.type);
    }
  }
}

template <int kTile>
__device__ __forceinline__ void fill_row(Source const& source, int32_t n, int32_t row, int32_t column, int32_t columns,
                                         int32_t first_channel, int32_t channels, float* dst) {
  if (n >= source.images || static_cast<uint32_t>(row) >= static_cast<uint32_t>(source.rows)) channels = 0;
  int64_t const offset =
      n * source.stride[0] + first_channel * source.stride[1] + row * source.stride[2] + column * source.stride[3];
  if (source.type == ADDER2D_FLOAT32) {
    float const* const src = static_cast<float const*>(source.data) + offset;
    if (source.vectors) {
      fill_row<kTile, true>(source, src, channels, column, columns, dst);
    } else {
      fill_row<kTile, false>(source, src, channels, column, columns, dst);
    }
  } else {
    uint16_t const* const src = static_cast<uint16_t const*>(source.data) + offset;
    if (source.vectors) {
      fill_row<kTile, true>(source, src, channels, column, columns, dst);
    } else {
      fill_row<kTile, false>(source, src, channels, column, columns, dst);
    }
  }
}

// ---- tile

struct TileCoord {
  int32_t group, tile_k, tile_c;

  __device__ __forceinline__ TileCoord(WgradConfig const& config, int32_t tile) {
    tile_c = tile % config.tiles_c;
    int32_t const rest = tile / config.tiles_c;
    tile_k = rest % config.tiles_k;
    group = rest / config.tiles_k;
  }
};

// Starts the copies of a chunk: the patch of x, then dy, a row at a time and warp.
template <class T>
__device__ __forceinline__ void fill(Args const& a, WgradConfig const& config, TileCoord const& coord, int32_t chunk,
                                     float* stage) {
  int32_t block_q, block_p;
  int32_t const rest = config.div_chunks_q.divmod(chunk, &block_q);
  int32_t const n = config.div_chunks_p.divmod(rest, &block_p) * config.images;
  int32_t const p = block_p * config.rows, q = block_q * config.strip;
  Adder2dParams const& layer = a.p.layer;
  int32_t const x_rows = config.images * config.x_rows, dy_rows = config.images * config.rows;
  int32_t i = threadIdx.x / 32;
#pragma unroll 1
  for (; i < x_rows; i += T::kWarps) {
    int32_t row;
    int32_t const image = config.div_x_rows.divmod(i, &row), c = coord.tile_c * T::kTileC;
    fill_row<T::kTileC>(a.x, n + image, p * layer.stride_h - layer.pad_h + row, q * layer.stride_w - layer.pad_w,
                        config.x_columns, coord.group * a.Cg + c, a.Cg - c, stage + i * config.x_columns * T::kPitchC);
  }
  stage += x_rows * config.x_columns * T::kPitchC;
#pragma unroll 1
  for (i -= x_rows; i < dy_rows; i += T::kWarps) {
    int32_t row;
    int32_t const image = config.div_rows.divmod(i, &row), k = coord.tile_k * T::kTileK;
    fill_row<T::kTileK>(a.dy, n + image, p + row, q, config.strip, coord.group * a.Kg + k, a.Kg - k,
                        stage + i * config.strip * T::kPitchK);
  }
}

}  // namespace adder2d::wgrad_simt
