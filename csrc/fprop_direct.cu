// One thread per output, or several that share its reduction: depth-wise layers and groups of few filters, where an
// implicit GEMM tile would be mostly empty, and layers so small that the latency of a tile's pipeline would be most of the
// time.
#include "fprop.h"

namespace adder2d {
namespace {

// ---- kernel

constexpr int kThreads = 256;

template <bool kFloat32>
__device__ __forceinline__ float load(void const* base, int64_t index, int32_t type) {
  return kFloat32 ? __ldg(static_cast<float const*>(base) + index) : load_as_float(base, index, type);
}

// Block x: pixels of one map; y: an image and kFilters of its filters, which share what is read of the input. kShares
// threads side by side take every kShares-th term of an output each; their sums meet through shuffles. kKernel x kKernel
// taps are unrolled where it is not 0.
template <bool kFloat32, int kShares, int kFilters, int kKernel>
__global__ void __launch_bounds__(kThreads) adder2d_fprop_direct_kernel(__grid_constant__ FpropArgs const a, FastDiv const div_sets) {
  static_assert(kShares <= 32, "the threads of an output are in one warp");
  constexpr int kPixels = kThreads / kShares;
  int32_t const share = threadIdx.x % kShares, pq = blockIdx.x * kPixels + threadIdx.x / kShares;
  bool const present = pq < a.p.P * a.p.Q;
  int32_t q;
  int32_t const p = a.div_Q.divmod(pq, &q), h0 = p * a.p.stride_h - a.p.pad_h, w0 = q * a.p.stride_w - a.p.pad_w;
  int32_t const sets = a.p.K / kFilters;  // filter sets of an image
  for (int32_t set = blockIdx.y; set < a.p.N * sets; set += gridDim.y) {
    int32_t k;
    int32_t const n = div_sets.divmod(set, &k);
    k *= kFilters;
    int64_t const window = n * a.p.x_stride[0] + int64_t{k / a.Kg} * a.Cg * a.p.x_stride[1] + h0 * a.p.x_stride[2] + w0 * a.p.x_stride[3];
    int64_t const filter = int64_t{k} * a.CRS;
    float sum[kFilters] = {};
    auto const add_term = [&](int32_t j, int64_t offset, int32_t dh, int32_t dw) {
      bool const inside = present && static_cast<uint32_t>(h0 + dh) < static_cast<uint32_t>(a.p.H) &&
                          static_cast<uint32_t>(w0 + dw) < static_cast<uint32_t>(a.p.W);
      float const x = inside ? load<kFloat32>(a.p.x, window + offset, a.p.x_type) : 0.f;  // padding reads 0
#pragma unroll
      for (int f = 0; f < kFilters; ++f) sum[f] += fabsf(x - load<kFloat32>(a.p.w, filter + f * a.CRS + j, a.p.w_type));
    };
    if constexpr (kShares == 1) {  // in order, without a division
      int32_t const R = kKernel > 0 ? kKernel : a.p.R, S = kKernel > 0 ? kKernel : a.p.S;
      int32_t j = 0;
      int64_t offset = 0;
      for (int32_t c = 0; c < a.Cg; ++c, offset += a.step_c) {
#pragma unroll
        for (int32_t r = 0; r < R; ++r, offset += a.step_r) {
#pragma unroll
          for (int32_t s = 0; s < S; ++s, ++j, offset += a.step_s) add_term(j, offset, r * a.p.dil_h, s * a.p.dil_w);
        }
      }
    } else {
#pragma unroll 4
      for (int32_t j = share; j < a.CRS; j += kShares) {
        int32_t rs, s;
        int32_t const c = a.div_RS.divmod(j, &rs), r = a.div_S.divmod(rs, &s);
        int32_t const dh = r * a.p.dil_h, dw = s * a.p.dil_w;
        add_term(j, c * a.p.x_stride[1] + dh * a.p.x_stride[2] + dw * a.p.x_stride[3], dh, dw);
      }
    }
#pragma unroll
    for (int f = 0; f < kFilters; ++f) {
#pragma unroll
      for (int step = kShares / 2; step > 0; step /= 2) sum[f] += __shfl_xor_sync(0xffffffff, sum[f], step);
      if (present && share == 0) {
        float const y = a.p.b != nullptr ? load_as_float(a.p.b, k + f, a.p.w_type) - sum[f] : -sum[f];
        store_from_float(a.p.y, n * a.p.y_stride[0] + (k + f) * a.p.y_stride[1] + p * a.p.y_stride[2] + q * a.p.y_stride[3],
                         a.p.y_type, y);
      }
    }
  }
}

// ---- launcher

template <int kShares, int kFilters, int kKernel = 0>
cudaError_t launch(FpropArgs const& args, cudaStream_t stream) {
  int32_t const sets = args.p.K / kFilters;
  int64_t const rows = int64_t{args.p.N} * sets;
  dim3 const grid(ceil_div(args.p.P * args.p.Q, kThreads / kShares), static_cast<uint32_t>(rows < 65535 ? rows : 65535));
  bool const float32 = args.p.x_type == ADDER2D_FLOAT32 && args.p.w_type == ADDER2D_FLOAT32;
  auto const kernel = float32 ? adder2d_fprop_direct_kernel<true, kShares, kFilters, kKernel>
                              : adder2d_fprop_direct_kernel<false, kShares, kFilters, kKernel>;
  kernel<<<grid, kThreads, 0, stream>>>(args, FastDiv(sets));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fprop_direct(FpropArgs const& args, cudaStream_t stream) {
  // Long reductions are shared out, as long as that does not need more threads than the chip runs at once.
  int64_t const outputs = int64_t{args.NPQ} * args.p.K, threads = int64_t{multiprocessor_count()} * 2048;
  bool const pairs = args.Kg % 2 == 0;
  if (args.CRS >= 128 && outputs * 32 <= threads) return pairs ? launch<32, 2>(args, stream) : launch<32, 1>(args, stream);
  if (args.CRS >= 16 && outputs * 8 <= threads) return launch<8, 1>(args, stream);
  return args.p.R == 3 && args.p.S == 3 ? launch<1, 1, 3>(args, stream) : launch<1, 1>(args, stream);
}

}  // namespace adder2d
