// What the kernels of the input gradient share, and their launchers. dgrad.cu picks one of them.
#pragma once

#include <cuda_runtime_api.h>

#include "common/convert.cuh"
#include "common/fast_div.h"
#include "tile/heuristics.h"

namespace adder2d {

// One axis of x (written for the rows) as the gradient sees it. Positions h = phase, phase + stride, ... are read by
// the same taps, and through each of them from outputs side by side: position phase + i * stride through tap first + m
// * step from output start + i - m * lag, where there is one.
struct DgradAxis {
  int32_t stride, pad, dilation;
  int32_t size, taps, outputs;  // H, R, P
  int32_t phases;               // min(stride, size)
  int32_t positions;            // of phase 0, which has most
  int32_t step, lag;            // stride and dilation, each divided by their greatest common divisor
  FastDiv div_phases;
};
struct DgradPhase {
  int32_t phase, start;
  int32_t first, taps;  // first tap, number of taps; may be 0
  int32_t before;       // taps of the phases with smaller first ones
};

// Which four elements of x or dx from a multiple of 4 on lie side by side on an aligned address, to be moved at once.
enum class DgradVectors : int32_t { kNone, kPixels, kChannels };

// The problem as kernels read it, passed by value.
struct DgradArgs {
  Adder2dParams p;  // y is dy
  void* dx;
  int64_t dx_stride[4];
  int32_t dx_type;
  int32_t Cg, Kg;  // channels and filters of one group
  DgradAxis h, w;
  int32_t NIJ;     // pixels of one phase in the whole batch; meaningless to the direct kernel
  bool small_map;  // H * W is an int32, and div_W works
  FastDiv div_IJ, div_J, div_W, div_stride_h, div_stride_w, div_RS, div_S, div_step_h, div_step_w;
  bool small_steps;  // the strides of dy are int32 in bytes: dy_step, along K, P and Q
  int32_t dy_step[3];
  // Dy is float16 or bfloat16, and eight filters from a multiple of 8 on are 16 aligned bytes of it.
  bool filter_vectors;
  DgradVectors x_vectors, dx_vectors;
};

// How the tiled kernel cuts the work.
struct DgradConfig : TileConfig {
  int32_t last_terms;  // of the slices with the last filters of a group: their number, or a little more
  FastDiv div_tiles_c, div_tiles_hw;
  int32_t least_smem_bytes;  // that a block allocates, needed or not; 0 for what it needs
  int32_t most_smem_bytes;   // the largest least_smem_bytes of this device's plans
};

// Taps of the phase with this first tap; taps of those with smaller first ones. A tap belongs to exactly one phase.
__device__ __forceinline__ int32_t taps_of(DgradAxis const& axis, int32_t first) {
  return axis.taps / axis.step + (first < axis.taps % axis.step);
}
__device__ __forceinline__ int32_t taps_before(DgradAxis const& axis, int32_t first) {
  return first * (axis.taps / axis.step) + min(first, axis.taps % axis.step);
}

__device__ __forceinline__ DgradPhase make_phase(DgradAxis const& axis, int32_t index) {
  if (axis.stride == 1) return {0, axis.pad, 0, axis.taps, 0};
  DgradPhase phase{index, 0, 0, 0, 0};
  int32_t const candidates = min(axis.taps, axis.step);
  int32_t position = index + axis.pad;
  while (phase.first < candidates && position % axis.stride != 0) {
    ++phase.first;
    position -= axis.dilation;
  }
  if (phase.first < candidates) {
    phase.start = position / axis.stride;
    phase.taps = taps_of(axis, phase.first);
    phase.before = taps_before(axis, phase.first);
  }
  return phase;
}

// dx of one element term by term, NaN and infinity as in the rule. With kFloat32, x, w and dy are float32.
template <bool kFloat32>
__device__ float dgrad_exact(DgradArgs const& a, int32_t n, int32_t c, int32_t h, int32_t w) {
  auto const load = [](void const* base, int64_t index, int32_t type) {
    return kFloat32 ? __ldg(static_cast<float const*>(base) + index) : load_as_float(base, index, type);
  };
  int32_t const group = c / a.Cg;
  int64_t const image = n * a.p.y_stride[0] + int64_t{group} * a.Kg * a.p.y_stride[1];
  int64_t const filter = int64_t{a.Cg} * a.p.R * a.p.S;
  int64_t const channel = group * a.Kg * filter + int64_t{c - group * a.Cg} * a.p.R * a.p.S;
  float const x =
      load(a.p.x, n * a.p.x_stride[0] + c * a.p.x_stride[1] + h * a.p.x_stride[2] + w * a.p.x_stride[3], a.p.x_type);
  float sum = 0.f;
  for (int32_t r = 0, top = h + a.p.pad_h; r < a.p.R && top >= 0; ++r, top -= a.p.dil_h) {
    int32_t remainder;
    int32_t const p = a.div_stride_h.divmod(top, &remainder);
    if (remainder != 0 || p >= a.p.P) continue;
    for (int32_t s = 0, left = w + a.p.pad_w; s < a.p.S && left >= 0; ++s, left -= a.p.dil_w) {
      int32_t const q = a.div_stride_w.divmod(left, &remainder);
      if (remainder != 0 || q >= a.p.Q) continue;
      int64_t dy_index = image + p * a.p.y_stride[2] + q * a.p.y_stride[3], w_index = channel + r * a.p.S + s;
      for (int32_t k = 0; k < a.Kg; ++k, dy_index += a.p.y_stride[1], w_index += filter) {
        float const difference = load(a.p.w, w_index, a.p.w_type) - x;
        float const clamped = difference < -1.f ? -1.f : difference > 1.f ? 1.f : difference;  // keeps NaN
        sum = fmaf(load(a.p.y, dy_index, a.p.y_type), clamped, sum);
      }
    }
  }
  return sum;
}

__device__ __forceinline__ int64_t dx_index(DgradArgs const& a, int32_t n, int32_t c, int32_t h, int32_t w) {
  return n * a.dx_stride[0] + c * a.dx_stride[1] + h * a.dx_stride[2] + w * a.dx_stride[3];
}

// ---- dgrad_direct.cu: one thread per element of dx, any problem; the path of depth-wise layers
extern FamilyNames const kDgradDirect;
cudaError_t launch_dgrad_direct(DgradArgs const& args, cudaStream_t stream);

// ---- dgrad_simt.cu: implicit GEMM with float32 arithmetic
extern FamilyNames const kDgradSimt;
// Sums of splits take at most `split_bytes` of the plan's workspace. A tile is of channels (tiles_k) by pixels of one
// phase. False where no tile fits `force`.
bool plan_dgrad_simt(DgradArgs const& args, size_t split_bytes, TileForce const& force, DgradConfig* config);
cudaError_t launch_dgrad_simt(DgradArgs const& args, DgradConfig const& config, cudaStream_t stream);

}  // namespace adder2d
