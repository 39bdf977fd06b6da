// float16 and bfloat16 input on float32 arithmetic: one kernel converts input and weights into the workspace, then a
// float32 family has the problem. It pays where fprop_half.cu does little of what it could: its vectors of 8 channels
// are mostly zeros in layers of 3 channels, as at the start of a network.
#include "fprop/fprop_converted.h"

#include <algorithm>

#include "common/convert.cuh"
#include "common/device.h"
#include "common/launch.cuh"
#include "tile/arch.h"

namespace adder2d {
namespace {

// ---- kernel

constexpr int kTensors = 3, kThreads = 256, kElements = 8;  // of a thread: 16 bytes are read, twice 16 written

// The input as [N][C][H][W] or [N][H][W][C], the weights, the bias.
struct ConvertArgs {
  void const* from[kTensors];
  float* to[kTensors];
  int32_t type[kTensors], count[kTensors], first_block[kTensors];
  bool dense[kTensors];  // elements lie side by side, from a multiple of 16 bytes on
  FastDiv size[3];       // of the axes of x after the first, as they follow each other in the copy
  int64_t stride[4];     // of all of them, in x
};

__global__ void __launch_bounds__(kThreads) adder2d_convert_kernel(__grid_constant__ ConvertArgs const a) {
  int32_t block = static_cast<int32_t>(blockIdx.x);
  int const tensor = block < a.first_block[1] ? 0 : block < a.first_block[2] ? 1 : 2;
  block -= a.first_block[tensor];
  int32_t const count = a.count[tensor], type = a.type[tensor];
  void const* const from = a.from[tensor];
  float* const to = a.to[tensor];
  bool const dense = a.dense[tensor];
  if (dense && type != ADDER2D_FLOAT32) {
    int32_t const first = (block * kThreads + static_cast<int32_t>(threadIdx.x)) * kElements;
    if (first + kElements <= count) {
      uint4 const bits = __ldg(reinterpret_cast<uint4 const*>(static_cast<uint16_t const*>(from) + first));
      uint32_t const words[] = {bits.x, bits.y, bits.z, bits.w};
      float values[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        values[i] = bits_as_float(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)), type);
#pragma unroll
      for (int i = 0; i < kElements; i += 4)
        *reinterpret_cast<float4*>(to + first + i) =
            make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    } else {
      for (int32_t i = first; i < count; ++i) to[i] = load_as_float(from, i, type);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    int32_t const index = (block * kElements + i) * kThreads + static_cast<int32_t>(threadIdx.x);
    if (index >= count) return;
    int64_t place = index;
    if (tensor == 0) {
      int32_t i1, i2, i3;
      int32_t const i0 = a.size[0].divmod(a.size[1].divmod(a.size[2].divmod(index, &i3), &i2), &i1);
      place = i0 * a.stride[0] + i1 * a.stride[1] + i2 * a.stride[2] + i3 * a.stride[3];
    }
    to[index] = load_as_float(from, place, type);
  }
}

// ---- problem

bool has_channels_last(Adder2dParams const& p) { return p.x_stride[1] == 1 && p.x_stride[3] != 1; }
int64_t input_elements(Adder2dParams const& p) { return int64_t{p.N} * p.C * p.H * p.W; }
int64_t weight_elements(Adder2dParams const& p) { return int64_t{p.K} * (p.C / p.groups) * p.R * p.S; }

// Of workspace for a tensor: up to a multiple of 256.
size_t copy_bytes(int64_t elements) { return ceil_div<size_t>(sizeof(float) * elements, 256) * 256; }
size_t copies_bytes(Adder2dParams const& p) {
  return copy_bytes(input_elements(p)) + copy_bytes(weight_elements(p)) + copy_bytes(p.K);
}

// The problem of the copies.
FpropArgs converted(FpropArgs const& args) {
  Adder2dParams p = args.p;
  size_t const bytes = copies_bytes(p);
  int64_t const C = p.C, H = p.H, W = p.W;
  bool const last = has_channels_last(p);
  int64_t const stride[] = {C * H * W, last ? 1 : H * W, last ? W * C : W, last ? C : 1};
  std::copy_n(stride, 4, p.x_stride);
  auto* const workspace = static_cast<char*>(p.workspace);
  p.x = workspace;
  p.w = workspace + copy_bytes(input_elements(p));
  if (p.b != nullptr) p.b = workspace + copy_bytes(input_elements(p)) + copy_bytes(weight_elements(p));
  p.workspace = workspace + bytes;
  p.workspace_bytes -= std::min(p.workspace_bytes, bytes);
  p.x_type = p.w_type = ADDER2D_FLOAT32;
  return make_fprop_args(p);
}

cudaError_t launch_conversion(FpropArgs const& args, FpropArgs const& copy, cudaStream_t stream) {
  Adder2dParams const& p = args.p;
  bool const last = has_channels_last(p);
  int const order[] = {0, last ? 2 : 1, last ? 3 : 2, last ? 1 : 3};  // axes as they follow each other in the copy
  int32_t const sizes[] = {p.N, p.C, p.H, p.W};
  ConvertArgs a{};
  void const* const from[] = {p.x, p.w, p.b};
  void const* const to[] = {copy.p.x, copy.p.w, copy.p.b};
  int64_t const counts[] = {input_elements(p), weight_elements(p), p.b != nullptr ? p.K : 0};
  int32_t blocks = 0;
  for (int i = 0; i < kTensors; ++i) {
    a.from[i] = from[i];
    a.to[i] = static_cast<float*>(const_cast<void*>(to[i]));
    a.type[i] = i == 0 ? p.x_type : p.w_type;
    a.count[i] = static_cast<int32_t>(counts[i]);
    a.dense[i] = reinterpret_cast<uintptr_t>(from[i]) % 16 == 0;
    a.first_block[i] = blocks;
    blocks += ceil_div(a.count[i], kThreads * kElements);
  }
  for (int i = 0; i < 4; ++i) {
    a.stride[i] = p.x_stride[order[i]];
    if (i > 0) a.size[i - 1] = FastDiv(sizes[order[i]]);
    if (sizes[i] > 1 && p.x_stride[i] != copy.p.x_stride[i]) a.dense[0] = false;
  }
  return launch(adder2d_convert_kernel, dim3(blocks), dim3(kThreads), 0, stream, a);
}

// ---- family

// Families that have the problem then; TileConfig::tile counts the tiles of all of them.
constexpr FpropFamily const* kFamilies[] = {&kFpropSimt, &kFpropWindow, &kFpropPointwise};
constexpr char const* kTileNames[] = {"simt-64x128",     "simt-128x64",      "simt-32x256",     "simt-16x256",
                                      "simt-32x64",      "window-64x128r4",  "window-32x128r4", "window-32x64r4",
                                      "window-16x512r4", "window-64x112r7",  "window-32x112r7", "window-32x56r7",
                                      "window-16x448r7", "window-64x128r2",  "window-32x128r2", "window-32x64r2",
                                      "window-16x512r2", "pointwise-64x128", "pointwise-32x256"};
constexpr int32_t kTileCount = sizeof(kTileNames) / sizeof(kTileNames[0]);

bool can_implement(FpropArgs const& args, size_t workspace_bytes) {
  return is_16_bit(args.p.x_type) && copies_bytes(args.p) <= workspace_bytes;
}

bool plan(FpropArgs const& args, size_t workspace_bytes, TileForce const& force, TileConfig* config, double* cycles) {
  size_t const bytes = copies_bytes(args.p);
  FpropArgs const copy = converted(args);
  bool found = false;
  int32_t first_tile = 0;
  for (FpropFamily const* const family : kFamilies) {
    TileForce own = force;
    if (force.tile >= 0) own.tile = force.tile - first_tile;
    bool const allowed = force.tile < 0 || (own.tile >= 0 && own.tile < family->tile_count);
    TileConfig candidate{};
    double predicted = 0;
    if (allowed && family->can_implement(copy, workspace_bytes - bytes) &&
        family->plan(copy, workspace_bytes - bytes, own, &candidate, &predicted) && (!found || predicted < *cycles)) {
      *config = candidate;
      config->tile += first_tile;
      *cycles = predicted;
      found = true;
    }
    first_tile += family->tile_count;
  }
  if (!found) return false;
  config->workspace_bytes += bytes;
  double const moved = 6.0 * (input_elements(args.p) + weight_elements(args.p));  // bytes
  *cycles =
      *cycles * kArch.convert_margin + kArch.convert_start + moved / (multiprocessor_count() * kArch.convert_bytes);
  return true;
}

cudaError_t launch_plan(FpropArgs const& args, TileConfig const& config, cudaStream_t stream) {
  FpropArgs const copy = converted(args);
  cudaError_t const error = launch_conversion(args, copy, stream);
  if (error != cudaSuccess) return error;
  TileConfig own = config;
  for (FpropFamily const* const family : kFamilies) {
    if (own.tile < family->tile_count) return family->launch(copy, own, stream);
    own.tile -= family->tile_count;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool is_for_conversion(Adder2dParams const& p) {
  constexpr int32_t kFewChannels = 8;  // a vector of fprop_half.cu
  return is_16_bit(p.x_type) && p.groups == 1 && p.C < kFewChannels;
}

int32_t images_of_fprop_converted(Adder2dParams const& p, int32_t images) {
  constexpr int64_t kPackedPixel = 16;  // bytes of a pixel that fprop_half.cu packs, so that it may be forced
  int64_t const weights = copy_bytes(weight_elements(p)) + copy_bytes(p.K);
  int64_t const pixels = int64_t{p.H} * p.W, copy = sizeof(float) * p.C;
  auto const parts_for = [&](size_t bytes) {  // an eighth is left for split sums and packed weights
    int64_t const room = (static_cast<int64_t>(bytes - bytes / 8) - weights) / (std::max(copy, kPackedPixel) * pixels);
    // Of about equal size.
    return room < 1 || room >= images
               ? images
               : static_cast<int32_t>(ceil_div<int64_t>(images, ceil_div<int64_t>(images, room)));
  };
  int32_t const most = parts_for(kMaxWorkspaceBytes);
  // adder2d_fprop_workspace asks for so much: a caller who gives it gets the same parts.
  Adder2dParams part = p;
  part.N = most;
  return copies_bytes(part) <= p.workspace_bytes ? most : parts_for(p.workspace_bytes);
}

FpropFamily const kFpropConverted{{"converted", kTileNames, kTileCount}, can_implement, nullptr, plan, launch_plan};

}  // namespace adder2d
