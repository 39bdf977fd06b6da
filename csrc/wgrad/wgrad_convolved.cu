// The weight gradient from that of a convolution, in three kernels: sums of dy per filter and chunk; dw = convolved - w
// * sum(dy) and sums of its squares per block; dw divided to the wanted norm, which wgrad_simt.cu uses as well. Every
// sum runs in one fixed order.
#include <algorithm>
#include <cmath>

#include "common/convert.cuh"
#include "common/launch.cuh"
#include "wgrad/wgrad.h"

namespace adder2d {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kBlocks = 1024;     // wanted of a launch: some for each multiprocessor
constexpr int32_t kLoads = 4;         // in flight in a thread
constexpr int32_t kMaxSerial = 64;    // loads that one thread adds up before the tree, ...
constexpr int32_t kMaxChunks = 1024;  // ... unless a filter's dy then has more chunks
constexpr int32_t kMaxLanesK = 32;

int64_t filter_size(Adder2dParams const& p) { return int64_t{p.C / p.groups} * p.R * p.S; }

// ---- sums of dy

// Threads run along the pixels of one filter, or along filters where those lie side by side.
struct SumArgs {
  Adder2dParams p;  // y is dy
  float* sums;      // [K, chunks]
  bool filters;
  int32_t vec;                      // elements of a load
  int32_t lanes_k_log2;             // threads of a block along the filters
  int32_t image_items;              // loads of one filter in one image
  int64_t items, chunk;             // of one filter in all images, in one block
  int32_t chunks, tiles;            // blocks of one filter; tiles of filters
  int32_t step_image, step_pixels;  // from one load of a thread to the next: images, and loads beyond
  FastDiv div_Q;
};

SumArgs make_sum_args(Adder2dParams const& p) {
  SumArgs args{};
  args.p = p;
  int32_t const size = type_size(p.y_type), vec = 16 / size;
  int64_t const* const stride = p.y_stride;
  int64_t const PQ = int64_t{p.P} * p.Q;
  bool const pixels = p.Q > 1 ? stride[3] == 1 : p.P > 1 && stride[2] == 1;
  bool const aligned = reinterpret_cast<uintptr_t>(p.y) % 16 == 0 && (p.N < 2 || stride[0] % vec == 0);
  args.filters = p.K > 1 && stride[1] == 1 && !pixels;
  args.vec = 1;
  if (args.filters) {
    if (aligned && p.K % vec == 0 && (p.P < 2 || stride[2] % vec == 0) && (p.Q < 2 || stride[3] % vec == 0))
      args.vec = vec;
    while (args.lanes_k_log2 < 5 && (args.vec << args.lanes_k_log2) < p.K) ++args.lanes_k_log2;
    static_assert(1 << 5 == kMaxLanesK);
  } else if (pixels && aligned && PQ % vec == 0 && (p.P < 2 || p.Q < 2 || stride[2] == p.Q) &&
             (p.K < 2 || stride[1] % vec == 0)) {
    args.vec = vec;
  }
  int32_t const lanes = kThreads >> args.lanes_k_log2;
  args.tiles = ceil_div(p.K, (args.filters ? args.vec : 1) << args.lanes_k_log2);
  args.image_items = static_cast<int32_t>(args.filters ? PQ : PQ / args.vec);
  args.items = int64_t{p.N} * args.image_items;
  int64_t const wanted = std::min<int64_t>(kBlocks / args.tiles, ceil_div<int64_t>(args.items, lanes * kLoads));
  int64_t const chunks =
      std::clamp<int64_t>(std::max(wanted, ceil_div<int64_t>(args.items, lanes * kMaxSerial)), 1, kMaxChunks);
  args.chunk = std::max<int64_t>(ceil_div(ceil_div(args.items, chunks), int64_t{lanes}), 1) * lanes;
  args.chunks = static_cast<int32_t>(std::max<int64_t>(ceil_div(args.items, args.chunk), 1));
  args.step_image = lanes / args.image_items;
  args.step_pixels = lanes % args.image_items;
  args.div_Q = FastDiv(p.Q);
  return args;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T, int kVec>
__device__ __forceinline__ void load(T const* from, float (&to)[kVec]) {
  T values[kVec];
  if constexpr (kVec == 1) {
    values[0] = *from;
  } else {
    static_assert(sizeof(values) == sizeof(uint4));
    uint4 const bits = __ldg(reinterpret_cast<uint4 const*>(from));
    memcpy(values, &bits, sizeof(bits));
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] = to_float(values[i]);
}

template <typename T, int kVec, bool kFilters>
__global__ void __launch_bounds__(kThreads) adder2d_wgrad_sum_kernel(__grid_constant__ SumArgs const a) {
  constexpr int kSums = kFilters ? kVec : 1;
  __shared__ float smem[kSums][kThreads];
  launch_dependents();
  int32_t const lanes = kThreads >> a.lanes_k_log2, lane = threadIdx.x >> a.lanes_k_log2;
  int32_t const lane_k = threadIdx.x & ((1 << a.lanes_k_log2) - 1);
  int32_t const tile = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
  int64_t const k = ((int64_t{tile} << a.lanes_k_log2) + lane_k) * kSums;
  int64_t const last = min(a.items, (chunk + 1) * a.chunk);
  int64_t item = chunk * a.chunk + lane;
  int64_t n = item / a.image_items;
  int32_t pixel = static_cast<int32_t>(item - n * a.image_items);
  T const* const dy = static_cast<T const*>(a.p.y) + k * a.p.y_stride[1];
  float sum[kSums] = {};
  if (k >= a.p.K) item = last;
  while (item < last) {
    float values[kLoads][kVec] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i, item += lanes) {
      if (item < last) {
        int64_t offset = n * a.p.y_stride[0];
        if constexpr (kVec > 1 && !kFilters) {
          offset += int64_t{pixel} * kVec;
        } else {
          int32_t q;
          int32_t const p = a.div_Q.divmod(pixel, &q);
          offset += p * a.p.y_stride[2] + q * a.p.y_stride[3];
        }
        load<T, kVec>(dy + offset, values[i]);
      }
      n += a.step_image;
      int64_t const next = int64_t{pixel} + a.step_pixels;
      n += next >= a.image_items;
      pixel = static_cast<int32_t>(next >= a.image_items ? next - a.image_items : next);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if constexpr (!kFilters) {
#pragma unroll
        for (int half = kVec / 2; half > 0; half /= 2)
          for (int j = 0; j < half; ++j) values[i][j] += values[i][j + half];
      }
#pragma unroll
      for (int j = 0; j < kSums; ++j) sum[j] += values[i][j];
    }
  }
  for (int32_t half = lanes / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) smem[j][threadIdx.x] = sum[j];
    __syncthreads();
    if (lane < half) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) sum[j] += smem[j][threadIdx.x + (half << a.lanes_k_log2)];
    }
    __syncthreads();
  }
  if (lane == 0 && k < a.p.K) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) a.sums[(k + j) * a.chunks + chunk] = sum[j];
  }
}

template <typename T>
cudaError_t launch_sum(SumArgs const& args, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  auto const kernel =
      args.filters ? (args.vec > 1 ? adder2d_wgrad_sum_kernel<T, kVec, true> : adder2d_wgrad_sum_kernel<T, 1, true>)
                   : (args.vec > 1 ? adder2d_wgrad_sum_kernel<T, kVec, false> : adder2d_wgrad_sum_kernel<T, 1, false>);
  int64_t const blocks = int64_t{args.tiles} * args.chunks;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(kernel, dim3(static_cast<uint32_t>(blocks)), dim3(kThreads), 0, stream, args);
}

// ---- dw

// The sum over the block, in every thread.
__device__ double block_sum(double value) {
  __shared__ double smem[kThreads / 32];
#pragma unroll
  for (int half = 16; half > 0; half /= 2) value += __shfl_xor_sync(0xffffffffu, value, half);
  if (threadIdx.x % 32 == 0) smem[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += smem[i];
  __syncthreads();
  return sum;
}

struct DwArgs {
  Adder2dWgradParams p;
  float const* sums;  // of dy [K, chunks]
  double* squares;    // [K, blocks], or null
  int32_t chunks, blocks;
  int32_t filter, part;  // elements of a filter, of a block
  bool flat;             // convolved lies in memory as w and dw
  FastDiv div_C, div_S, div_RS;
};

DwArgs make_dw_args(Adder2dWgradParams const& params, int32_t chunks) {
  DwArgs args{};
  Adder2dParams const& p = params.layer;
  args.p = params;
  args.chunks = chunks;
  int64_t const filter = filter_size(p);
  int64_t const blocks = std::clamp<int64_t>(kBlocks / p.K, 1, ceil_div<int64_t>(filter, kThreads * kLoads));
  args.filter = static_cast<int32_t>(filter);
  args.part = static_cast<int32_t>(ceil_div(filter, blocks));
  args.blocks = ceil_div(args.filter, args.part);
  int64_t const C = p.C / p.groups, RS = int64_t{p.R} * p.S;
  bool const last = params.channels_last;
  int64_t const expected[4] = {filter, last ? 1 : RS, last ? p.S * C : p.S, last ? C : 1}, size[4] = {p.K, C, p.R, p.S};
  args.flat = true;
  for (int i = 0; i < 4; ++i) args.flat &= size[i] == 1 || params.convolved_stride[i] == expected[i];
  args.div_C = FastDiv(C);
  args.div_S = FastDiv(p.S);
  args.div_RS = FastDiv(RS);
  return args;
}

__device__ __forceinline__ int64_t convolved_index(DwArgs const& a, int32_t k, int32_t i) {
  if (a.flat) return int64_t{k} * a.filter + i;
  int32_t c, s, rs;
  if (a.p.channels_last) {
    rs = a.div_C.divmod(i, &c);
  } else {
    c = a.div_RS.divmod(i, &rs);
  }
  int32_t const r = a.div_S.divmod(rs, &s);
  int64_t const* const stride = a.p.convolved_stride;
  return k * stride[0] + c * stride[1] + r * stride[2] + s * stride[3];
}

__global__ void __launch_bounds__(kThreads) adder2d_wgrad_kernel(__grid_constant__ DwArgs const a) {
  launch_dependents();
  int32_t const k = blockIdx.x / a.blocks, part = blockIdx.x % a.blocks;
  int64_t const last = min(int64_t{a.filter}, (part + int64_t{1}) * a.part);
  wait_for_primary();
  double sum = 0;
  for (int32_t i = threadIdx.x; i < a.chunks; i += kThreads) sum += a.sums[int64_t{k} * a.chunks + i];
  float const total = static_cast<float>(block_sum(sum));
  double squares = 0;
  for (int64_t first = int64_t{part} * a.part + threadIdx.x; first < last; first += kLoads * kThreads) {
    float dw[kLoads];
    // All are read before the first is written: dw may be convolved.
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      int64_t const i = first + j * kThreads;
      if (i >= last) break;
      float const convolved = a.p.convolved[convolved_index(a, k, static_cast<int32_t>(i))];
      dw[j] = fmaf(-load_as_float(a.p.layer.w, int64_t{k} * a.filter + i, a.p.layer.w_type), total, convolved);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      int64_t const i = first + j * kThreads;
      if (i >= last) break;
      a.p.dw[int64_t{k} * a.filter + i] = dw[j];
      squares += static_cast<double>(dw[j]) * dw[j];
    }
  }
  if (a.squares == nullptr) return;
  squares = block_sum(squares);
  if (threadIdx.x == 0) a.squares[blockIdx.x] = squares;
}

// ---- scaling

__global__ void __launch_bounds__(kThreads)
    adder2d_wgrad_scale_kernel(float* dw, int64_t size, double const* squares, int64_t count, double norm) {
  wait_for_primary();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += squares[i];
  double length = sqrt(block_sum(sum));
  if (length < 1e-12) length = 1e-12;  // NaN stays
  float const divisor = static_cast<float>(length / norm);
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += int64_t{gridDim.x} * kThreads)
    dw[i] /= divisor;
}

// The workspace holds the squares, then the sums.
int64_t squares_count(DwArgs const& args) { return args.p.eta > 0 ? int64_t{args.p.layer.K} * args.blocks : 0; }

size_t workspace_bytes(DwArgs const& args) {
  return squares_count(args) * sizeof(double) + int64_t{args.p.layer.K} * args.chunks * sizeof(float);
}

}  // namespace

cudaError_t launch_wgrad_scale(Adder2dWgradParams const& params, int64_t squares, cudaStream_t stream) {
  int64_t const size = params.layer.K * filter_size(params.layer);
  uint32_t const blocks =
      static_cast<uint32_t>(std::min<int64_t>(ceil_div<int64_t>(size, kThreads * kLoads), kBlocks / 4));
  return launch_dependent(adder2d_wgrad_scale_kernel, dim3(blocks), dim3(kThreads), 0, stream, params.dw, size,
                          static_cast<double const*>(params.layer.workspace), squares,
                          params.eta * std::sqrt(static_cast<double>(size)));
}

FamilyNames const kWgradConvolved{"convolved", nullptr, 0};

size_t wgrad_convolved_workspace(Adder2dWgradParams const& params) {
  Adder2dParams either = params.layer;
  int32_t chunks = 0;
  for (uintptr_t address : {0, 1}) {  // dy aligned, and not
    either.y = reinterpret_cast<void*>(address);
    chunks = std::max(chunks, make_sum_args(either).chunks);
  }
  return workspace_bytes(make_dw_args(params, chunks));
}

cudaError_t launch_wgrad_convolved(Adder2dWgradParams const& params, cudaStream_t stream) {
  SumArgs sum = make_sum_args(params.layer);
  DwArgs dw = make_dw_args(params, sum.chunks);
  int64_t const count = squares_count(dw), blocks = int64_t{params.layer.K} * dw.blocks;
  if (workspace_bytes(dw) > params.layer.workspace_bytes || blocks > 0x7fffffff) return cudaErrorInvalidValue;
  dw.squares = count > 0 ? static_cast<double*>(params.layer.workspace) : nullptr;
  dw.sums = sum.sums = reinterpret_cast<float*>(static_cast<double*>(params.layer.workspace) + count);
  cudaError_t error = cudaErrorInvalidValue;
  switch (static_cast<Adder2dType>(params.layer.y_type)) {
    case ADDER2D_FLOAT32: error = launch_sum<float>(sum, stream); break;
    case ADDER2D_FLOAT16: error = launch_sum<__half>(sum, stream); break;
    case ADDER2D_BFLOAT16: error = launch_sum<__nv_bfloat16>(sum, stream); break;
  }
  if (error != cudaSuccess) return error;
  error = launch_dependent(adder2d_wgrad_kernel, dim3(static_cast<uint32_t>(blocks)), dim3(kThreads), 0, stream, dw);
  return error != cudaSuccess || count == 0 ? error : launch_wgrad_scale(params, count, stream);
}

}  // namespace adder2d
