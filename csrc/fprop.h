// What the forward kernel families share, and their launchers. fprop.cu picks one of them.
#pragma once

#include <cuda_runtime_api.h>

#include "adder2d.h"
#include "common.cuh"

namespace adder2d {

// The problem as kernels read it, passed by value.
struct FpropArgs {
  Adder2dParams p;
  int32_t Cg, Kg;   // channels and filters of one group
  int32_t CRS;      // reduction length: Cg * R * S
  int32_t NPQ;      // output pixels of the whole batch
  FastDiv div_PQ, div_Q, div_RS, div_S;
};

// How the tiled kernels cut the work: `ctas` thread blocks take equal shares of tiles * iterations steps. A share may end
// inside a tile; the sums of such tiles go through the workspace and a second, small kernel ("stream-K").
struct FpropPlan {
  int32_t tile;             // index into the family's table of tiles
  int32_t tiles_k, tiles_pq;
  int32_t iterations;       // reduction steps of one tile
  int32_t tiles;            // tiles_k * tiles_pq * groups
  int32_t ctas;
  size_t workspace_bytes;
};

FpropArgs make_fprop_args(Adder2dParams const& p);
int32_t multiprocessor_count();

// ---- fprop_direct.cu: one thread per output, any problem; the path of depth-wise layers
cudaError_t launch_fprop_direct(FpropArgs const& args, cudaStream_t stream);

// ---- fprop_simt.cu: implicit GEMM with float32 arithmetic
FpropPlan plan_fprop_simt(FpropArgs const& args);
cudaError_t launch_fprop_simt(FpropArgs const& args, FpropPlan const& plan, cudaStream_t stream);

}  // namespace adder2d
