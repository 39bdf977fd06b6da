// What the tiled kernel families share: where a tile lies in the output, the way that split sums take through the
// workspace, the store of y, and the choice of tile and splits.
#pragma once

#include "fprop.h"

namespace adder2d {

// ---- place of a tile

struct TilePlace {
  int32_t group, first_k, end_k, first_pixel;  // filters first_k .. end_k - 1 of the whole layer, pixels of the batch

  __device__ __forceinline__ TilePlace(FpropArgs const& a, FpropPlan const& plan, int32_t tile, int32_t tile_k, int32_t tile_pq) {
    int32_t const k_tile = tile % plan.tiles_k, rest = tile / plan.tiles_k;
    group = rest / plan.tiles_pq;
    first_k = group * a.Kg + k_tile * tile_k;
    end_k = (group + 1) * a.Kg;
    first_pixel = rest % plan.tiles_pq * tile_pq;
  }
};

// One output pixel: where its window starts. An absent pixel has w0 = kOutside.
struct Pixel {
  int64_t offset;  // elements from x to the window's first tap, channel 0 of the group; may point before x
  int32_t h0, w0;
};
constexpr int32_t kOutside = INT32_MIN;  // h0 + kOutside is no row of the input, for every h0 (W likewise)

__device__ __forceinline__ Pixel make_pixel(FpropArgs const& a, int32_t group, int32_t m) {
  Pixel pixel{0, 0, kOutside};
  if (m < a.NPQ) {
    int32_t pq, q;
    int32_t const n = a.div_PQ.divmod(m, &pq);
    int32_t const p = a.div_Q.divmod(pq, &q);
    pixel.h0 = p * a.p.stride_h - a.p.pad_h;
    pixel.w0 = q * a.p.stride_w - a.p.pad_w;
    pixel.offset = n * a.p.x_stride[0] + int64_t{group} * a.Cg * a.p.x_stride[1] + pixel.h0 * a.p.x_stride[2] +
                   pixel.w0 * a.p.x_stride[3];
  }
  return pixel;
}

__device__ __forceinline__ bool inside(FpropArgs const& a, Pixel const& pixel, int32_t dh, int32_t dw) {
  return static_cast<uint32_t>(pixel.h0 + dh) < static_cast<uint32_t>(a.p.H) &&
         static_cast<uint32_t>(pixel.w0 + dw) < static_cast<uint32_t>(a.p.W);
}

// ---- store

__device__ __forceinline__ float load_bias(FpropArgs const& a, int32_t k) {
  return a.p.b != nullptr ? load_as_float(a.p.b, k, a.p.w_type) : -0.f;  // -0 - sum is -sum, with its sign of zero
}

// Writes y = b - sum for filter k and pixel m.
__device__ __forceinline__ void store1(FpropArgs const& a, int32_t k, int32_t m, float sum) {
  if (m >= a.NPQ) return;
  int32_t pq, q;
  int32_t const n = a.div_PQ.divmod(m, &pq);
  int32_t const p = a.div_Q.divmod(pq, &q);
  store_from_float(a.p.y, n * a.p.y_stride[0] + k * a.p.y_stride[1] + p * a.p.y_stride[2] + q * a.p.y_stride[3], a.p.y_type,
                   load_bias(a, k) - sum);
}

// The same for four pixels side by side; 16 bytes at once where they lie side by side in y.
__device__ __forceinline__ void store4(FpropArgs const& a, int32_t k, int32_t m, float4 const& sum) {
  if (a.y_vectors) {
    if (m >= a.NPQ) return;
    int32_t pq;
    int32_t const n = a.div_PQ.divmod(m, &pq);
    float const b = load_bias(a, k);
    *reinterpret_cast<float4*>(static_cast<float*>(a.p.y) + n * a.p.y_stride[0] + k * a.p.y_stride[1] + pq) =
        make_float4(b - sum.x, b - sum.y, b - sum.z, b - sum.w);
    return;
  }
  store1(a, k, m, sum.x);
  store1(a, k, m + 1, sum.y);
  store1(a, k, m + 2, sum.z);
  store1(a, k, m + 3, sum.w);
}

// ---- splits

// A thread's sums are items of four. View::store writes one item; kItems is their number.
template <class View>
__device__ __forceinline__ float4* partial_sum(FpropArgs const& a, FpropPlan const& plan, int32_t split, int32_t tile,
                                               int32_t item, int32_t thread) {
  int64_t const index = ((int64_t{split} * plan.tiles + tile) * View::kItems + item) * View::kThreads + thread;
  return reinterpret_cast<float4*>(static_cast<char*>(a.p.workspace) + plan.packed_bytes) + index;
}

__device__ __forceinline__ void add(float4* sum, float4 const& v) {
  sum->x += v.x;
  sum->y += v.y;
  sum->z += v.z;
  sum->w += v.w;
}

// Hands one item on: to y, or to the workspace where the reduction is split.
template <class View>
__device__ __forceinline__ void finish(FpropArgs const& a, FpropPlan const& plan, View const& view, int32_t item,
                                       float4 const& sum) {
  if (plan.splits > 1) {
    *partial_sum<View>(a, plan, blockIdx.y, blockIdx.x, item, threadIdx.x) = sum;
  } else {
    view.store(a, item, sum);
  }
}

// Adds the splits of item blockIdx.y of tile blockIdx.x, always in the same order, so that results repeat exactly. Where
// there are many splits and few tiles, kGroups threads share an output's splits.
template <class View, int kGroups>
__global__ void __launch_bounds__(View::kThreads* kGroups)
    adder2d_fprop_reduce_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ FpropPlan const plan) {
  __shared__ float4 sums[kGroups][View::kThreads];
  int32_t const thread = threadIdx.x % View::kThreads, group = threadIdx.x / View::kThreads;
  View const view(a, plan, blockIdx.x, thread);
  float4 const* const partial = partial_sum<View>(a, plan, 0, blockIdx.x, blockIdx.y, thread);
  int64_t const step = int64_t{plan.tiles} * View::kItems * View::kThreads;  // from split to split
  wait_for_primary();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
  for (int32_t split = group; split < plan.splits; split += kGroups) add(&sum, partial[split * step]);
  if constexpr (kGroups > 1) {
    sums[group][thread] = sum;
    __syncthreads();
    if (group != 0) return;
#pragma unroll
    for (int i = 1; i < kGroups; ++i) add(&sum, sums[i][thread]);
  }
  view.store(a, blockIdx.y, sum);
}

// Launches the kernel of one tile and, where it splits the reduction, the kernel that adds the splits. `after_pack` says
// that the kernel before it on the stream packs its weights, and that it waits for them by itself.
template <class View>
cudaError_t launch_tiled(void (*kernel)(FpropArgs, FpropPlan), size_t smem_bytes, bool after_pack, FpropArgs const& args,
                         FpropPlan const& plan, cudaStream_t stream) {
  if (smem_bytes > 48 * 1024) {
    cudaError_t const error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
    if (error != cudaSuccess) return error;
  }
  dim3 const grid(plan.tiles, plan.splits), block(View::kThreads);
  cudaError_t error;
  if (after_pack) {
    error = launch_dependent(kernel, grid, block, smem_bytes, stream, args, plan);
  } else {
    kernel<<<grid, block, smem_bytes, stream>>>(args, plan);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess || plan.splits == 1) return error;
  dim3 const items(plan.tiles, View::kItems);
  constexpr int kGroups = 512 / View::kThreads;
  return plan.splits >= 8 ? launch_dependent(adder2d_fprop_reduce_kernel<View, kGroups>, items, dim3(512), 0, stream, args, plan)
                          : launch_dependent(adder2d_fprop_reduce_kernel<View, 1>, items, block, 0, stream, args, plan);
}

// ---- plan

struct TileSize {
  int32_t k, pq, c;   // filters, pixels, terms of a slice
  int32_t resident;   // blocks that run on a multiprocessor at once
  double rate;        // accumulated terms a cycle and multiprocessor
};

constexpr int32_t kMaxSplits = 64;
constexpr int32_t kMaxSplitBlocks = 8;  // a multiprocessor

// The best tile and number of splits for `slices_of(size)` slices a tile, with split sums in at most `workspace_bytes`. Sets
// all of the plan but packed_bytes. *cycles is the prediction.
FpropPlan choose_tile(FpropArgs const& args, TileSize const* sizes, int32_t count, int32_t (*slices_of)(FpropArgs const&, TileSize const&),
                      size_t workspace_bytes, double* cycles);

}  // namespace adder2d
