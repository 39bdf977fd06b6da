// What wgrad.cu, the entry points of the weight gradient, asks of the kernel for layers with few channels.
#pragma once

#include <cuda_runtime_api.h>

#include "adder2d.h"
#include "common/fast_div.h"
#include "tile/heuristics.h"

namespace adder2d {

// How wgrad_simt.cu cuts the work: dw into tiles of filters by channels, the pixels of dy into chunks, which the splits
// of a tile share out.
struct WgradConfig {
  bool taken;                       // else the rest is not set
  int32_t tile;                     // index into the table of tiles
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

// ---- wgrad_convolved.cu
extern FamilyNames const kWgradConvolved;
size_t wgrad_convolved_workspace(Adder2dWgradParams const& params);
// Enqueues dw = convolved - w * sum(dy), scaled where eta asks for it.
cudaError_t launch_wgrad_convolved(Adder2dWgradParams const& params, cudaStream_t stream);
// Enqueues the division of dw to the wanted norm. The workspace begins with `count` sums of squares of dw.
cudaError_t launch_wgrad_scale(Adder2dWgradParams const& params, int64_t count, cudaStream_t stream);

// ---- wgrad_simt.cu
extern FamilyNames const kWgradSimt;
// The plan for sum(dy * x), and for the sum of dy beside it; not taken where a convolution is as fast or the kernel
// cannot do it. With `force`, only the latter counts.
WgradConfig plan_wgrad_simt(Adder2dWgradParams const& params, TileForce const* force = nullptr);

// Enqueues dw = sum(dy * (x - w)). The workspace then begins with config.reduce_blocks sums of squares of dw.
cudaError_t launch_wgrad_simt(Adder2dWgradParams const& params, WgradConfig const& config, cudaStream_t stream);

}  // namespace adder2d
