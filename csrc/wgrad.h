// What wgrad.cu, the entry points of the weight gradient, asks of the kernel for layers with few channels.
#pragma once

#include "fprop.h"

namespace adder2d {

// How wgrad_simt.cu cuts the work: dw into tiles of filters by channels, the pixels of dy into chunks, which the splits of a
// tile share out.
struct WgradPlan {
  bool taken;  // else the rest is not set
  int32_t tile;  // index into the table of tiles
  int32_t tiles_k, tiles_c, tiles;  // of a group; of all groups
  int32_t images, rows, strip;      // of a chunk: images * rows rows of `strip` pixels of dy
  int32_t x_rows, x_columns;        // that an image of a chunk reads
  int32_t chunks, splits;
  int32_t stage_floats;
  FastDiv div_chunks_q, div_chunks_p, div_rows, div_x_rows;
  size_t smem_bytes;
  int32_t reduce_blocks;
  size_t squares_bytes, partial_bytes, workspace_bytes;
};

// The plan for sum(dy * x), and for the sum of dy beside it; not taken where a convolution is as fast or the kernel does not fit.
WgradPlan plan_wgrad_simt(Adder2dWgradParams const& params);

// Enqueues dw = sum(dy * (x - w)). The workspace then begins with plan.reduce_blocks sums of squares of dw.
cudaError_t launch_wgrad_simt(Adder2dWgradParams const& params, WgradPlan const& plan, cudaStream_t stream);

}  // namespace adder2d
