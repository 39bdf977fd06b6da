// dgrad_simt.cu: the tiles, and where they and their threads lie in dx.
#pragma once

#include "dgrad/dgrad.h"
#include "tile/arch.h"

namespace adder2d::dgrad_simt {

// ---- traits

// How dy reaches shared memory.
enum class Fill {
  kPixels,   // asynchronous copies, a warp copies neighbouring pixels (NCHW)
  kFilters,  // asynchronous copies, a warp copies neighbouring filters (NHWC)
  kConvert,  // float16 and bfloat16, converted on the way
};

constexpr int kUnroll = 8;  // terms of the inner loop

template <int kTileC_, int kTileHW_, int kTileK_, int kStages_>
struct Tile {
  static constexpr int kTileC = kTileC_, kTileHW = kTileHW_;  // outputs of a block: channels, pixels
  static constexpr int kTileK = kTileK_;                      // filters of a slice, all of one tap
  static constexpr int kStages = kStages_;                    // slices in flight
  static constexpr int kThreadC = 8, kThreadHW = 4;           // outputs of a thread, as 2 x 4 by 4
  static constexpr int kThreads = kTileC * kTileHW / (kThreadC * kThreadHW);
  static constexpr int kLanesC = kTileC >= 32 ? 4 : kTileC / kThreadC, kLanesHW = 32 / kLanesC;  // a warp's threads
  static constexpr int kWarpsC = kTileC / (kLanesC * kThreadC);
  static constexpr int kBlocksPerSM = kArch.dgrad_blocks;
  static constexpr int kRows = kTileC / kThreadC;  // threads that hold the same pixels: each sums some of their dy
  static constexpr int kItems = kThreadC * kThreadHW / 4;
  static constexpr int kPixels = kTileHW > kThreads ? kTileHW / kThreads : 1;  // kPixels: pixels that a thread copies
  static constexpr int kShares = kTileHW < kThreads ? kThreads / kTileHW : 1;  // threads that share a pixel's filters
  // Rows of dy are padded by 4 floats: copies along the filters then store to 32 different banks.
  static constexpr int kPitchC = kTileC, kPitchHW = kTileHW + 4;
  static constexpr int kStageFloats = kTileK * (kPitchC + kPitchHW);

  static_assert(kThreads == 128, "the fill loops are laid out for 128 threads");
  static_assert(kTileC % (kLanesC * kThreadC) == 0 && kTileHW % (kLanesHW * kThreadHW) == 0,
                "warps must tile the block");
  static_assert(kTileK % 8 == 0, "the fills copy filters eight at a time");
  static_assert(kTileK % kUnroll == 0 && kUnroll % 2 == 0, "fragments alternate between two buffers");
  static_assert(kTileK % kRows == 0, "threads must divide the sums of dy evenly");
  static_assert(kWarpsC * kTileHW <= kStageFloats, "sums of dy meet in a stage");
};

// Where an output pixel's taps start. An absent pixel has p0 = q0 = kNoOutput.
struct Window {
  char const* dy;  // what tap 0 of the phase reads, filter 0 of the group; may point outside dy
  int32_t p0, q0;
};
constexpr int32_t kNoOutput = INT32_MAX;  // minus any reach of taps this is not a row or column of dy

template <class T, Fill kFill>
struct Smem {
  alignas(16) float stage[T::kStages][T::kStageFloats];
  alignas(16) Window window[kFill != Fill::kPixels ? T::kTileHW : 1];  // kPixels has them in registers
};

// ---- place of a tile

template <class T>
struct TileCoord {
  // The tile has channels first_c .. end_c - 1 of the whole layer, pixels of the phase.
  int32_t group, tile_c, first_c, end_c, first_pixel;
  int32_t thread_c, thread_hw;  // first output of the thread; the second half of its channels is kTileC / 2 on
  int32_t row;                  // of the threads with the same pixels
  DgradPhase h, w;

  __device__ __forceinline__ TileCoord(DgradArgs const& a, DgradConfig const& config, int32_t tile) {
    int32_t rest = config.div_tiles_c.divmod(tile, &tile_c), index;
    rest = a.w.div_phases.divmod(rest, &index);
    w = make_phase(a.w, index);
    rest = a.h.div_phases.divmod(rest, &index);
    h = make_phase(a.h, index);
    group = config.div_tiles_hw.divmod(rest, &index);
    first_pixel = index * T::kTileHW;
    first_c = group * a.Cg + tile_c * T::kTileC;
    end_c = (group + 1) * a.Cg;
    int32_t const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    row = warp % T::kWarpsC * T::kLanesC + lane / T::kLanesHW;
    thread_c = row * 4;
    thread_hw = (warp / T::kWarpsC * T::kLanesHW + lane % T::kLanesHW) * 4;
  }

  // The thread's channel i of 8 and pixel j of 4.
  __device__ __forceinline__ int32_t channel(int32_t i) const {
    return first_c + thread_c + i / 4 * (T::kTileC / 2) + i % 4;
  }
  __device__ __forceinline__ int32_t pixel(int32_t j) const { return first_pixel + thread_hw + j; }
  // Whether pixel m exists, and its place: image, row and column of the phase.
  __device__ __forceinline__ bool locate(DgradArgs const& a, int32_t m, int32_t* n, int32_t* i, int32_t* j) const {
    int32_t ij;
    *n = a.div_IJ.divmod(m, &ij);
    *i = a.div_J.divmod(ij, j);
    return m < a.NIJ && h.phase + *i * a.h.stride < a.h.size && w.phase + *j * a.w.stride < a.w.size;
  }
  // The same as the element of channel 0 in a tensor of x's shape; where there is no such pixel, that of another one.
  __device__ __forceinline__ bool locate(DgradArgs const& a, int32_t m, int64_t const (&stride)[4],
                                         int64_t* index) const {
    int32_t n, i, j;
    bool const present = locate(a, m, &n, &i, &j);
    n = present ? n : 0;
    int32_t const y = present ? h.phase + i * a.h.stride : 0, x = present ? w.phase + j * a.w.stride : 0;
    *index = n * stride[0] + y * stride[2] + x * stride[3];
    return present;
  }

  // A thread's sums are items of four: those that a vector store takes, else the pixels of channel `item`.
  __device__ __forceinline__ static int32_t item_channel(bool channels, int32_t item, int32_t element) {
    return channels ? item / 4 * 4 + element : item;
  }
  __device__ __forceinline__ static int32_t item_pixel(bool channels, int32_t item, int32_t element) {
    return channels ? item % 4 : element;
  }
};

}  // namespace adder2d::dgrad_simt
