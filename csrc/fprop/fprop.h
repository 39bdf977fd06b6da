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
  return is_pointwise(p) && p.x_stride[3] == 1 && p.x_stride[2] == p.W && int64_t{p.H} * p.W % 4 == 0 &&
         p.x_stride[1] % 4 == 0 && p.x_stride[0] % 4 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
}

// A family of kernels: what api/fprop.cu chooses from.
struct FpropFamily : FamilyNames {
  // Whether the kernels accept the problem, with so much workspace.
  bool (*can_implement)(FpropArgs const& args, size_t workspace_bytes);
  // Whether they are to be preferred to all families after them in the table, without a prediction. Null: predictions
  // are compared.
  bool (*is_preferred)(FpropArgs const& args);
  // The best config that `force` allows, and its predicted cycles where predictions are compared. False where there is
  // none.
  bool (*plan)(FpropArgs const& args, size_t workspace_bytes, TileForce const& force, TileConfig* config,
               double* cycles);
  cudaError_t (*launch)(FpropArgs const& args, TileConfig const& config, cudaStream_t stream);
};

extern FpropFamily const kFpropShared;     // fprop_direct.cu: very small layers, whose reductions threads share
extern FpropFamily const kFpropDepthwise;  // fprop_depthwise.cu: depth-wise layers of the common kernels and strides
// Fprop_direct.cu: any problem; the path of few filters a group and of small layers.
extern FpropFamily const kFpropDirect;
extern FpropFamily const kFpropHalf;       // fprop_half.cu: implicit GEMM with half pairs
extern FpropFamily const kFpropSimt;       // fprop_simt.cu: implicit GEMM with float32 arithmetic, any problem
extern FpropFamily const kFpropWindow;     // fprop_window.cu: 3 x 3 kernels at stride 1, float32
extern FpropFamily const kFpropPointwise;  // fprop_pointwise.cu: 1 x 1 kernels at stride 1, float32, few channels

// Whether a layer has too few filters a group to fill the short side of a tile, too few terms to fill some slices, or
// too little work to be worth a tiled kernel's pipeline.
bool prefers_direct(FpropArgs const& args);

// fprop_half.cu: how many of `images` images to launch at a time, so that their packed copies find room in p's
// workspace.
int32_t images_of_fprop_half(Adder2dParams const& p, int32_t images);

}  // namespace adder2d
