// One thread per output: depth-wise layers and groups of few filters, where an implicit GEMM tile would be mostly empty.
#include "fprop.h"

namespace adder2d {
namespace {

// ---- kernel

constexpr int kDirectThreads = 256;

// Reference loop for one output, in float32. Taps in the padding read 0.
__device__ float direct_sum(FpropArgs const& a, int32_t n, int32_t k, int32_t p, int32_t q) {
  int32_t const group = k / a.Kg;
  int64_t const image = n * a.p.x_stride[0] + int64_t{group} * a.Cg * a.p.x_stride[1];
  int64_t w_index = int64_t{k} * a.CRS;
  float sum = 0.f;
  for (int32_t c = 0; c < a.Cg; ++c) {
    for (int32_t r = 0; r < a.p.R; ++r) {
      int32_t const h = p * a.p.stride_h - a.p.pad_h + r * a.p.dil_h;
      bool const inside_h = static_cast<uint32_t>(h) < static_cast<uint32_t>(a.p.H);
      for (int32_t s = 0; s < a.p.S; ++s, ++w_index) {
        int32_t const w = q * a.p.stride_w - a.p.pad_w + s * a.p.dil_w;
        bool const inside = inside_h && static_cast<uint32_t>(w) < static_cast<uint32_t>(a.p.W);
        int64_t const x_index = image + c * a.p.x_stride[1] + h * a.p.x_stride[2] + w * a.p.x_stride[3];
        float const x = inside ? load_as_float(a.p.x, x_index, a.p.x_type) : 0.f;
        sum += fabsf(x - load_as_float(a.p.w, w_index, a.p.w_type));
      }
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kDirectThreads) adder2d_fprop_direct_kernel(FpropArgs const a) {
  int32_t const pixels = a.p.P * a.p.Q;
  int32_t const pq = blockIdx.x * kDirectThreads + threadIdx.x;
  if (pq >= pixels) return;
  int32_t q;
  int32_t const p = a.div_Q.divmod(pq, &q);
  for (int64_t nk = blockIdx.y; nk < int64_t{a.p.N} * a.p.K; nk += gridDim.y) {
    int32_t const n = static_cast<int32_t>(nk / a.p.K), k = static_cast<int32_t>(nk % a.p.K);
    float const sum = direct_sum(a, n, k, p, q);
    float const y = a.p.b != nullptr ? load_as_float(a.p.b, k, a.p.w_type) - sum : -sum;
    store_from_float(a.p.y, n * a.p.y_stride[0] + k * a.p.y_stride[1] + p * a.p.y_stride[2] + q * a.p.y_stride[3],
                     a.p.y_type, y);
  }
}

}  // namespace

// ---- launcher

cudaError_t launch_fprop_direct(FpropArgs const& args, cudaStream_t stream) {
  int64_t const maps = int64_t{args.p.N} * args.p.K;
  dim3 const grid(ceil_div(args.p.P * args.p.Q, kDirectThreads), static_cast<uint32_t>(maps < 65535 ? maps : 65535));
  adder2d_fprop_direct_kernel<<<grid, kDirectThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace adder2d
