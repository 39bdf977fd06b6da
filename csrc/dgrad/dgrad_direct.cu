// One thread per element of dx: depth-wise layers and groups of few channels, where an implicit GEMM tile would be
// mostly empty.
#include "common/launch.cuh"
#include "dgrad/dgrad.h"

namespace adder2d {
namespace {

constexpr int kThreads = 256;

// Block x: pixels of one map; y: maps (n, c). Neighbouring threads process neighbouring pixels.
template <bool kFloat32>
__global__ void __launch_bounds__(kThreads) adder2d_dgrad_direct_kernel(__grid_constant__ DgradArgs const a) {
  int64_t const hw = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (hw >= int64_t{a.p.H} * a.p.W) return;
  int32_t const h = a.small_map ? a.div_W.div(static_cast<int32_t>(hw)) : static_cast<int32_t>(hw / a.p.W);
  int32_t const w = static_cast<int32_t>(hw - int64_t{h} * a.p.W);
  for (int64_t map = blockIdx.y; map < int64_t{a.p.N} * a.p.C; map += gridDim.y) {
    int32_t const n = static_cast<int32_t>(map / a.p.C), c = static_cast<int32_t>(map % a.p.C);
    store_from_float(a.dx, dx_index(a, n, c, h, w), a.dx_type, dgrad_exact<kFloat32>(a, n, c, h, w));
  }
}

constexpr char const* kTileNames[] = {"1x1"};

}  // namespace

FamilyNames const kDgradDirect{"direct", kTileNames, 1};

cudaError_t launch_dgrad_direct(DgradArgs const& args, cudaStream_t stream) {
  int64_t const maps = int64_t{args.p.N} * args.p.C, blocks = ceil_div<int64_t>(int64_t{args.p.H} * args.p.W, kThreads);
  dim3 const grid(static_cast<uint32_t>(blocks), static_cast<uint32_t>(maps < 65535 ? maps : 65535));
  bool const float32 =
      args.p.x_type == ADDER2D_FLOAT32 && args.p.w_type == ADDER2D_FLOAT32 && args.p.y_type == ADDER2D_FLOAT32;
  auto const kernel = float32 ? adder2d_dgrad_direct_kernel<true> : adder2d_dgrad_direct_kernel<false>;
  return launch(kernel, grid, dim3(kThreads), 0, stream, args);
}

}  // namespace adder2d
