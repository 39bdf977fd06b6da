// What the forward kernel families share, and their launchers. fprop.cu picks one of them.
#pragma once

#include <cuda_runtime_api.h>
#include <string.h>

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
  // Elements of x from a tap to the next one along s; then from behind the last s to the next r; then from behind the last
  // r to the next channel.
  int64_t step_s, step_r, step_c;
  // Filters lie side by side in y (channels_last); else pixels do. Four of them from a multiple of 4 on may be stored at once.
  bool y_filters, y_vectors;
  bool y_linear;  // pixel m of the batch lies at m * y_stride[3]
};

// How a tiled kernel cuts the work: one block for each of the first `whole` tiles of the output, then one for each split of
// the reduction of each other tile. Sums of splits go through the workspace: of a few, the block that comes last adds them, of many, a
// second, small kernel; both in order.
struct FpropPlan {
  int32_t tile;              // index into the family's table of tiles
  int32_t tiles_k, tiles_pq;
  int32_t tiles;             // tiles_k * tiles_pq * groups
  int32_t whole;             // all of them where splits is 1
  int32_t slices;            // reduction steps of one tile
  int32_t splits;
  size_t packed_bytes;       // of packed weights and image at the start of the workspace, 0 for none
  size_t workspace_bytes;    // all of it
  uint64_t launch;           // of launch_number(): set by the launcher
};

// make(), or what it gave when it was last called with the same key on this device and thread: choosing a plan takes
// microseconds. Key has no padding.
template <class Plan, class Key, class Make>
Plan cached_plan(Key const& key, Make const& make) {
  struct Entry {
    Key key;
    int device;
    Plan plan;
  };
  constexpr uint32_t kEntries = 64;
  static thread_local Entry entries[kEntries] = {};
  int device = 0;
  cudaGetDevice(&device);
  uint32_t words[sizeof(key) / 4], hash = 2166136261u;  // FNV-1a
  memcpy(words, &key, sizeof(key));
  for (uint32_t const word : words) hash = (hash ^ word) * 16777619u;
  Entry& entry = entries[hash % kEntries];
  if (entry.device != device || memcmp(&entry.key, &key, sizeof(key)) != 0) entry = {key, device, make()};
  return entry.plan;
}

__device__ __forceinline__ float load_bias(FpropArgs const& a, int32_t k) {
  return a.p.b != nullptr ? load_as_float(a.p.b, k, a.p.w_type) : -0.f;  // -0 - sum is -sum, with its sign of zero
}

FpropArgs make_fprop_args(Adder2dParams const& p);
int32_t multiprocessor_count();
size_t smem_limit();  // that a block can have on the current device
// A number that no other launch has, of 58 random bits, a multiple of kMaxSplits: memory that this launch has not written holds it
// by chance once in 2^58 times.
uint64_t launch_number();

// ---- fprop_direct.cu: any problem; the path of few filters a group and of very small layers
cudaError_t launch_fprop_direct(FpropArgs const& args, cudaStream_t stream);

// ---- fprop_depthwise.cu: depth-wise layers of the common kernels and strides; fprop_direct.cu hands them on
bool takes_fprop_depthwise(FpropArgs const& args);
cudaError_t launch_fprop_depthwise(FpropArgs const& args, cudaStream_t stream);

// ---- fprop_simt.cu: implicit GEMM with float32 arithmetic
FpropPlan plan_fprop_simt(FpropArgs const& args, size_t workspace_bytes, double* cycles);
cudaError_t launch_fprop_simt(FpropArgs const& args, FpropPlan const& plan, cudaStream_t stream);

// ---- fprop_window.cu: 3 x 3 kernels at stride 1, float32
// False for what it does not take. *cycles, here and below, is the predicted time of the plan.
bool plan_fprop_window(FpropArgs const& args, size_t workspace_bytes, FpropPlan* plan, double* cycles);
cudaError_t launch_fprop_window(FpropArgs const& args, FpropPlan const& plan, cudaStream_t stream);

// ---- fprop_pointwise.cu: 1 x 1 kernels at stride 1, float32, few channels
bool plan_fprop_pointwise(FpropArgs const& args, FpropPlan* plan, double* cycles);
cudaError_t launch_fprop_pointwise(FpropArgs const& args, FpropPlan const& plan, cudaStream_t stream);

// ---- fprop_half.cu: implicit GEMM with half pairs
// How many of `images` images to launch at a time, so that their packed copies find room in p's workspace.
int32_t images_of_fprop_half(Adder2dParams const& p, int32_t images);
bool takes_fprop_half(FpropArgs const& args, size_t workspace_bytes);
FpropPlan plan_fprop_half(FpropArgs const& args, size_t workspace_bytes);
cudaError_t launch_fprop_half(FpropArgs const& args, FpropPlan const& plan, cudaStream_t stream);

}  // namespace adder2d
