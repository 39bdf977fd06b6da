// The forward kernel families: api/fprop.cu picks one of them.
#pragma once

#include <cuda_runtime_api.h>

#include "tile/heuristics.h"
#include "tile/problem.h"

namespace adder2d {

// 1x1 kernels at stride 1, without padding.
inline bool is_pointwise(Adder2dParams const& p) {
  return p.R == 1 && p.S == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0;
}

// Those whose pixels lie in y as in x, four of them at an aligned address.
inline bool is_plane(FpropArgs const& a) {
  Adder2dParams const& p = a.p;
  return is_pointwise(p) && p.x_stride[3] == 1 && p.x_stride[2] == p.W && int64_t{p.H} * p.W % 4 == 0 && p.x_stride[1] % 4 == 0 &&
         p.x_stride[0] % 4 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
}

// ---- fprop_direct.cu: any problem; the path of few filters a group and of very small layers
cudaError_t launch_fprop_direct(FpropArgs const& args, cudaStream_t stream);

// ---- fprop_depthwise.cu: depth-wise layers of the common kernels and strides; fprop_direct.cu hands them on
bool can_implement_fprop_depthwise(FpropArgs const& args);
cudaError_t launch_fprop_depthwise(FpropArgs const& args, cudaStream_t stream);

// ---- fprop_simt.cu: implicit GEMM with float32 arithmetic
TileConfig plan_fprop_simt(FpropArgs const& args, size_t workspace_bytes, double* cycles);
cudaError_t launch_fprop_simt(FpropArgs const& args, TileConfig const& config, cudaStream_t stream);

// ---- fprop_window.cu: 3 x 3 kernels at stride 1, float32
// False for what it does not take. *cycles, here and below, is the predicted time of the config.
bool plan_fprop_window(FpropArgs const& args, size_t workspace_bytes, TileConfig* config, double* cycles);
cudaError_t launch_fprop_window(FpropArgs const& args, TileConfig const& config, cudaStream_t stream);

// ---- fprop_pointwise.cu: 1 x 1 kernels at stride 1, float32, few channels
bool plan_fprop_pointwise(FpropArgs const& args, TileConfig* config, double* cycles);
cudaError_t launch_fprop_pointwise(FpropArgs const& args, TileConfig const& config, cudaStream_t stream);

// ---- fprop_half.cu: implicit GEMM with half pairs
// How many of `images` images to launch at a time, so that their packed copies find room in p's workspace.
int32_t images_of_fprop_half(Adder2dParams const& p, int32_t images);
bool can_implement_fprop_half(FpropArgs const& args, size_t workspace_bytes);
TileConfig plan_fprop_half(FpropArgs const& args, size_t workspace_bytes);
cudaError_t launch_fprop_half(FpropArgs const& args, TileConfig const& config, cudaStream_t stream);

}  // namespace adder2d
