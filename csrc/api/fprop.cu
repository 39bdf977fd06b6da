// Entry points of the forward pass: validation, choice of kernel, batches beyond 2^31 output pixels.
#include "fprop/fprop.h"

#include <algorithm>

#include "common/convert.cuh"
#include "common/device.h"
#include "common/plan_cache.h"
#include "tile/arch.h"

namespace adder2d {

namespace {

FpropArgs make_fprop_args(Adder2dParams const& p) {
  FpropArgs args{};
  args.p = p;
  args.Cg = p.C / p.groups;
  args.Kg = p.K / p.groups;
  args.CRS = args.Cg * p.R * p.S;
  args.NPQ = p.N * p.P * p.Q;
  args.div_PQ = FastDiv(int64_t{p.P} * p.Q);
  args.div_Q = FastDiv(p.Q);
  args.div_RS = FastDiv(int64_t{p.R} * p.S);
  args.div_S = FastDiv(p.S);
  args.step_s = p.dil_w * p.x_stride[3];
  args.step_r = p.dil_h * p.x_stride[2] - p.S * args.step_s;
  args.step_c = p.x_stride[1] - p.dil_h * p.x_stride[2] * p.R;
  int64_t const* const stride = p.y_stride;
  args.y_channels_last = stride[1] == 1 && stride[3] != 1;
  args.y_linear = stride[2] == p.Q * stride[3] && stride[0] == p.P * stride[2];
  bool const aligned = reinterpret_cast<uintptr_t>(p.y) % (4 * type_size(p.y_type)) == 0 && stride[0] % 4 == 0;
  args.y_vectors = aligned && (args.y_channels_last ? args.Kg % 4 == 0 && stride[2] % 4 == 0 && stride[3] % 4 == 0
                                              : stride[3] == 1 && stride[2] == p.Q && int64_t{p.P} * p.Q % 4 == 0 && stride[1] % 4 == 0);
  return args;
}

constexpr int64_t kMaxPixels = 0x7fffffff - 4096;  // pixel indices are int32, and a tile may overhang the end

// Images of one launch: all of them, or as many as keep N * P * Q and N * K an int32, and as find room.
int32_t images_per_launch(Adder2dParams const& p) {
  int64_t const images = kMaxPixels / std::max<int64_t>(int64_t{p.P} * p.Q, p.K);
  return images_of_fprop_half(p, static_cast<int32_t>(std::clamp<int64_t>(images, 1, std::max(p.N, 1))));
}

// A tiled kernel needs enough filters a group to fill the short side of a tile, enough terms to fill some slices, and enough
// work to be worth its pipeline.
bool prefers_direct(Adder2dParams const& p) {
  int64_t const reduction = int64_t{p.C / p.groups} * p.R * p.S, terms = int64_t{p.N} * p.P * p.Q * p.K * reduction;
  return p.K / p.groups < 8 || (reduction <= 32 && p.K / p.groups <= 32) || terms <= int64_t{multiprocessor_count()} * 32768;
}

// A config, and what launches it.
struct Choice {
  cudaError_t (*launch)(FpropArgs const&, TileConfig const&, cudaStream_t);
  TileConfig config;
};

Choice choose(FpropArgs const& args) {
  size_t const bytes = args.p.workspace_bytes;
  if (can_implement_fprop_half(args, bytes)) return {launch_fprop_half, plan_fprop_half(args, bytes)};
  double cycles, other_cycles;
  TileConfig const simt = plan_fprop_simt(args, bytes, &cycles);
  TileConfig other;
  if (plan_fprop_window(args, bytes, &other, &other_cycles) && other_cycles < cycles) return {launch_fprop_window, other};
  if (plan_fprop_pointwise(args, &other, &other_cycles) && other_cycles < cycles) return {launch_fprop_pointwise, other};
  return {launch_fprop_simt, simt};
}

Choice choose_cached(FpropArgs const& args) {
  Adder2dParams key = args.p;
  key.x = reinterpret_cast<void const*>(reinterpret_cast<uintptr_t>(key.x) % 16);  // plans do not depend on other addresses
  key.y = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(key.y) % 16);
  key.w = key.b = key.workspace = nullptr;
  return cached_plan<Choice>(key, [&] { return choose(args); });
}

}  // namespace
}  // namespace adder2d

using namespace adder2d;

size_t adder2d_fprop_workspace(Adder2dParams const* params) {
  if (adder2d_check(params) != nullptr || params->N == 0 || prefers_direct(*params)) return 0;
  Adder2dParams p = *params;
  p.workspace_bytes = kMaxWorkspaceBytes;
  p.N = images_per_launch(p);
  return choose(make_fprop_args(p)).config.workspace_bytes;
}

int32_t adder2d_fprop(Adder2dParams const* params, void* stream_pointer) {
  if (adder2d_check(params) != nullptr) return cudaErrorInvalidValue;
  cudaStream_t const stream = static_cast<cudaStream_t>(stream_pointer);
  Adder2dParams p = *params;
  p.workspace_bytes = std::min(p.workspace_bytes, kMaxWorkspaceBytes);
  int32_t const step = images_per_launch(p);
  for (int64_t n = 0; n < params->N; n += step) {
    p.N = static_cast<int32_t>(std::min<int64_t>(params->N - n, step));
    p.x = static_cast<char const*>(params->x) + n * p.x_stride[0] * type_size(p.x_type);
    p.y = static_cast<char*>(params->y) + n * p.y_stride[0] * type_size(p.y_type);
    FpropArgs const args = make_fprop_args(p);
    cudaError_t error;
    if (prefers_direct(p)) {
      error = launch_fprop_direct(args, stream);
    } else {
      Choice const choice = choose_cached(args);
      error = choice.launch(args, choice.config, stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

char const* adder2d_error_string(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
