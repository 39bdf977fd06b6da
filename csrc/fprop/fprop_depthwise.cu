// Depth-wise layers of the common kernels and strides, whose bound is memory: a thread takes a strip of kRows x 2
// outputs and reads each row of its window once, several rows ahead. The two are neighbours along the width, or along
// the channels where these lie side by side (channels_last), so that they are one load. fprop_direct.cu has all other
// layers.
#include "common/launch.cuh"
#include "fprop/fprop.h"
#include "tile/epilogue.cuh"

namespace adder2d {
namespace {

constexpr int kRows = 7;  // outputs of a strip along the height: maps of 7, 14, 28, 56, 112 rows divide evenly
constexpr int kMaxThreads = 256;

// ---- elements

template <int32_t kType>
struct Element {  // 16 bits
  using One = uint16_t;
  using Two = uint32_t;

  static_assert(is_16_bit(kType), "two elements are 32 bits");
  __device__ __forceinline__ static float to_float(uint16_t bits) { return bits_as_float(bits, kType); }
  __device__ __forceinline__ static float2 to_floats(uint32_t bits) {
    if (kType == ADDER2D_BFLOAT16) return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
    return make_float2(to_float(static_cast<uint16_t>(bits)), to_float(static_cast<uint16_t>(bits >> 16)));
  }
};

template <>
struct Element<ADDER2D_FLOAT32> {
  using One = float;
  using Two = float2;

  __device__ __forceinline__ static float to_float(float v) { return v; }
  __device__ __forceinline__ static float2 to_floats(float2 v) { return v; }
};

// *pointer, or zero where `valid` is false.
template <typename T, typename Pointer>
__device__ __forceinline__ T load_if(bool valid, Pointer const* pointer) {
  T v{};
  if (valid) v = __ldg(reinterpret_cast<T const*>(pointer));
  return v;
}

// ---- strip

// What the kernels know of the launch beyond FpropArgs.
struct Strips {
  FastDiv div_columns, div_strips, div_K, div_Kg;  // columns: of pairs (width), or of blocks (channels)
  int32_t threads;                                 // width: of all blocks
  FastDiv div_chunks;                              // channels: blocks side by side along the channels
  bool y_pairs;                                    // the two outputs may be stored at once
};

// Whether the row or column `offset` after `start` is one of `size`.
__device__ __forceinline__ bool inside(int32_t start, int offset, int32_t size) {
  return static_cast<uint32_t>(start) + offset < static_cast<uint32_t>(size);
}

__device__ __forceinline__ void add_term(float* sum, float x, float w) { *sum += fabsf(x - w); }

// The strip's geometry for a kernel of kKernel x kKernel. Rows are loaded kAhead rows before they are used.
template <int kKernel, int kStride>
struct Strip {
  static constexpr int kTall = (kRows - 1) * kStride + kKernel;
  static constexpr int kWide = kStride + kKernel;  // of two outputs side by side
  static constexpr int kTaps = kKernel * kKernel;
  static constexpr int kPad = kKernel / 2;  // width: padding is as even as this one
};

// Where the strip's outputs lie: pairs at element `index` of y and in the rows after it.
struct Place {
  bool pairs, second;   // they may be stored at once; the second one exists
  int64_t index, next;  // elements to the second one
};

// What makes outputs of sums. kFilters: a pair is of filters k and k + 1, else both are of filter k.
template <int32_t kType, bool kFused, bool kFilters>
struct Outputs {
  Epilogue::Filter filters[2];

  __device__ __forceinline__ Outputs(FpropArgs const& a, int32_t k) {
    if (kFilters) {
      Epilogue::filters(a, k, filters);
    } else {
      filters[0] = filters[1] = Epilogue::filter(a, k);
    }
  }
  __device__ __forceinline__ void read_residuals(FpropArgs const&, Place const&, int32_t) {}
  __device__ __forceinline__ void store(FpropArgs const& a, Place const& place, int row, float2 const& sum) const {
    store2<kType>(a, place.pairs, place.index + row * a.p.y_stride[2], place.next, place.second,
                  Epilogue::finish(filters, sum));
  }
};

// With a fused epilogue: residuals are read long before they are used.
template <int32_t kType, bool kFilters>
struct Outputs<kType, true, kFilters> {
  FusedFilter filters[2];
  float2 residual[kRows];

  __device__ __forceinline__ Outputs(FpropArgs const& a, int32_t k) {
    filters[0] = fused_filter(a, k);
    filters[1] = kFilters ? fused_filter(a, k + 1) : filters[0];
  }
  __device__ __forceinline__ void read_residuals(FpropArgs const& a, Place const& place, int32_t rows) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (i < rows)
        residual[i] = residual2_at(a, place.pairs, place.index + i * a.p.y_stride[2], place.next, place.second);
  }
  __device__ __forceinline__ void store(FpropArgs const& a, Place const& place, int row, float2 const& sum) const {
    store2<kType>(
        a, place.pairs, place.index + row * a.p.y_stride[2], place.next, place.second,
        make_float2(fuse(a, filters[0], sum.x, residual[row].x), fuse(a, filters[1], sum.y, residual[row].y)));
  }
};

// ---- pairs along the width

// Neighbouring threads process neighbouring pairs, then strips below each other, then maps.
template <int32_t kType, int kKernel, int kStride, bool kFused>
__global__ void __launch_bounds__(128)
    adder2d_fprop_depthwise_width_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ Strips const g) {
  using E = Element<kType>;
  using One = typename E::One;
  using Two = typename E::Two;
  using S = Strip<kKernel, kStride>;
  constexpr int kFirst = S::kPad % 2, kPairs = (S::kWide - kFirst) / 2, kLast = (S::kWide - kFirst) % 2;
  constexpr int kAhead = kKernel == 3 ? 9 : 7;

  int32_t const index = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (index >= g.threads) return;
  int32_t pair, strip, k;
  int32_t const map = g.div_strips.divmod(g.div_columns.divmod(index, &pair), &strip), n = g.div_K.divmod(map, &k);
  int32_t const p = strip * kRows, q = 2 * pair, h0 = p * kStride - a.p.pad_h, w0 = q * kStride - a.p.pad_w;
  One const* const x = static_cast<One const*>(a.p.x) + n * a.p.x_stride[0] + g.div_Kg.div(k) * a.p.x_stride[1] +
                       h0 * a.p.x_stride[2] + w0;

  bool const first_inside = inside(w0, 0, a.p.W), last_inside = inside(w0, S::kWide - 1, a.p.W);
  bool pair_inside[kPairs];  // both or neither: the first is even, as W is
#pragma unroll
  for (int t = 0; t < kPairs; ++t) pair_inside[t] = inside(w0, kFirst + 2 * t, a.p.W);

  One first[S::kTall], last[S::kTall];
  Two pairs[S::kTall][kPairs];
  auto const load_row = [&](int row) {
    One const* const start = x + row * a.p.x_stride[2];
    bool const row_inside = inside(h0, row, a.p.H);
    if (kFirst > 0) first[row] = load_if<One>(row_inside && first_inside, start);
#pragma unroll
    for (int t = 0; t < kPairs; ++t) pairs[row][t] = load_if<Two>(row_inside && pair_inside[t], start + kFirst + 2 * t);
    if (kLast > 0) last[row] = load_if<One>(row_inside && last_inside, start + S::kWide - 1);
  };
#pragma unroll
  for (int row = 0; row < kAhead; ++row) load_row(row);

  float w[S::kTaps];
  auto const load_weights = [&](int32_t type) {
#pragma unroll
    for (int j = 0; j < S::kTaps; ++j) w[j] = load_as_float(a.p.w, int64_t{k} * S::kTaps + j, type);
  };
  if (a.p.w_type == ADDER2D_FLOAT32) {
    load_weights(ADDER2D_FLOAT32);
  } else if (a.p.w_type == ADDER2D_FLOAT16) {
    load_weights(ADDER2D_FLOAT16);
  } else if (a.p.w_type == ADDER2D_BFLOAT16) {
    load_weights(ADDER2D_BFLOAT16);
  } else {
    __builtin_unreachable();
  }
  Outputs<kType, kFused, false> outputs(a, k);
  int64_t const y = n * a.p.y_stride[0] + k * a.p.y_stride[1] + p * a.p.y_stride[2] + q * a.p.y_stride[3];
  Place const place{g.y_pairs, q + 1 < a.p.Q, y, a.p.y_stride[3]};
  outputs.read_residuals(a, place, a.p.P - p);

  float sum[kRows][2] = {};
#pragma unroll
  for (int row = 0; row < S::kTall; ++row) {
    if (row + kAhead < S::kTall) load_row(row + kAhead);
    float x_row[S::kWide];
    if (kFirst > 0) x_row[0] = E::to_float(first[row]);
#pragma unroll
    for (int t = 0; t < kPairs; ++t) {
      float2 const v = E::to_floats(pairs[row][t]);
      x_row[kFirst + 2 * t] = v.x;
      x_row[kFirst + 2 * t + 1] = v.y;
    }
    if (kLast > 0) x_row[S::kWide - 1] = E::to_float(last[row]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int const r = row - i * kStride;
      if (r < 0 || r >= kKernel) continue;
#pragma unroll
      for (int s = 0; s < kKernel; ++s) {
        add_term(&sum[i][0], x_row[s], w[r * kKernel + s]);
        add_term(&sum[i][1], x_row[kStride + s], w[r * kKernel + s]);
      }
      if (r == kKernel - 1 && p + i < a.p.P) outputs.store(a, place, i, make_float2(sum[i][0], sum[i][1]));
    }
  }
}

// ---- pairs along the channels

// A block takes blockDim.x pairs of channels and blockDim.y columns, so that columns side by side share what they read.
// As many filters as channels.
template <int32_t kType, int kKernel, int kStride, bool kFused>
__global__ void __launch_bounds__(kMaxThreads)
    adder2d_fprop_depthwise_channels_kernel(__grid_constant__ FpropArgs const a, __grid_constant__ Strips const g) {
  using E = Element<kType>;
  using Two = typename E::Two;
  using S = Strip<kKernel, kStride>;
  constexpr int kAhead = kType == ADDER2D_FLOAT32 ? 6 : kKernel == 3 ? 9 : 7;
  constexpr int kPitch = 33;  // float2 from tap to tap: 33 pairs spread a channel's taps over the banks
  __shared__ float2 w_smem[S::kTaps][kPitch];

  int32_t chunk, column, strip;
  int32_t const n = g.div_strips.divmod(g.div_columns.divmod(g.div_chunks.divmod(blockIdx.x, &chunk), &column), &strip);
  int32_t const c0 = 2 * chunk * blockDim.x, c = c0 + 2 * threadIdx.x, q = column * blockDim.y + threadIdx.y;
  int32_t const p = strip * kRows, h0 = p * kStride - a.p.pad_h, w0 = q * kStride - a.p.pad_w;
  bool const present = c < a.p.C && q < a.p.Q;
  using One = typename E::One;
  One const* const x =
      static_cast<One const*>(a.p.x) + n * a.p.x_stride[0] + c + h0 * a.p.x_stride[2] + w0 * a.p.x_stride[3];

  bool column_inside[kKernel];
#pragma unroll
  for (int s = 0; s < kKernel; ++s) column_inside[s] = present && inside(w0, s, a.p.W);
  Two pairs[S::kTall][kKernel];
  auto const load_row = [&](int row) {
    bool const row_inside = inside(h0, row, a.p.H);
#pragma unroll
    for (int s = 0; s < kKernel; ++s)
      pairs[row][s] = load_if<Two>(row_inside && column_inside[s], x + row * a.p.x_stride[2] + s * a.p.x_stride[3]);
  };
#pragma unroll
  for (int row = 0; row < kAhead; ++row) load_row(row);

  // The weights of the block's channels lie side by side, channel by channel; threads want them tap by tap.
  int32_t const channels = min(2 * static_cast<int32_t>(blockDim.x), a.p.C - c0);
  for (int32_t j = threadIdx.y * blockDim.x + threadIdx.x; j < channels * S::kTaps; j += blockDim.x * blockDim.y)
    reinterpret_cast<float*>(w_smem[j % S::kTaps])[j / S::kTaps] =
        load_as_float(a.p.w, int64_t{c0} * S::kTaps + j, a.p.w_type);
  __syncthreads();
  if (!present) return;
  float2 w[S::kTaps];
#pragma unroll
  for (int j = 0; j < S::kTaps; ++j) w[j] = w_smem[j][threadIdx.x];
  Outputs<kType, kFused, true> outputs(a, c);
  int64_t const y = n * a.p.y_stride[0] + c * a.p.y_stride[1] + p * a.p.y_stride[2] + q * a.p.y_stride[3];
  Place const place{g.y_pairs, true, y, a.p.y_stride[1]};
  outputs.read_residuals(a, place, a.p.P - p);

  float sum[kRows][2] = {};
#pragma unroll
  for (int row = 0; row < S::kTall; ++row) {
    if (row + kAhead < S::kTall) load_row(row + kAhead);
    float2 x_row[kKernel];
#pragma unroll
    for (int s = 0; s < kKernel; ++s) x_row[s] = E::to_floats(pairs[row][s]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int const r = row - i * kStride;
      if (r < 0 || r >= kKernel) continue;
#pragma unroll
      for (int s = 0; s < kKernel; ++s) {
        add_term(&sum[i][0], x_row[s].x, w[r * kKernel + s].x);
        add_term(&sum[i][1], x_row[s].y, w[r * kKernel + s].y);
      }
      if (r == kKernel - 1 && p + i < a.p.P) outputs.store(a, place, i, make_float2(sum[i][0], sum[i][1]));
    }
  }
}

// ---- launcher

// Pairs from even places of axis `axis` on are whole vectors of memory.
bool has_pairs(void const* base, int32_t type, int64_t const (&stride)[4], int axis) {
  bool even = reinterpret_cast<uintptr_t>(base) % (2 * type_size(type)) == 0 && stride[axis] == 1;
  for (int i = 0; i < 4; ++i) even = even && (i == axis || stride[i] % 2 == 0);
  return even;
}

constexpr int kChannelAxis = 1, kWidthAxis = 3;

bool can_pair_channels(Adder2dParams const& p) {
  return p.K == p.C && p.C % 2 == 0 && p.C >= 16 && has_pairs(p.x, p.x_type, p.x_stride, kChannelAxis);
}

bool can_pair_width(Adder2dParams const& p) {
  return p.W % 2 == 0 && p.pad_w % 2 == p.R / 2 % 2 && has_pairs(p.x, p.x_type, p.x_stride, kWidthAxis);
}

// Threads or blocks of a launch, before the last block of threads is filled up.
int64_t width_threads(Adder2dParams const& p) {
  return int64_t{p.N} * p.K * ceil_div<int64_t>(p.P, kRows) * ceil_div<int64_t>(p.Q, 2);
}

template <int32_t kType, int kKernel, int kStride, bool kFused>
cudaError_t launch_kernel_of(FpropArgs const& args, cudaStream_t stream) {
  Adder2dParams const& p = args.p;
  Strips g{};
  int32_t const strips = static_cast<int32_t>(ceil_div<int64_t>(p.P, kRows));
  g.div_strips = FastDiv(strips);
  if (can_pair_channels(p)) {
    g.y_pairs = has_pairs(p.y, p.y_type, p.y_stride, kChannelAxis);
    int32_t const pairs = p.C / 2, lanes = pairs > 16 ? 32 : pairs > 8 ? 16 : 8, chunks = ceil_div(pairs, lanes);
    int32_t const blocks = ceil_div(p.Q, kMaxThreads / lanes), columns = ceil_div(p.Q, blocks);
    g.div_chunks = FastDiv(chunks);
    g.div_columns = FastDiv(blocks);
    dim3 const grid(p.N * strips * blocks * chunks);
    return launch(adder2d_fprop_depthwise_channels_kernel<kType, kKernel, kStride, kFused>, grid, dim3(lanes, columns),
                  0, stream, args, g);
  } else {
    g.y_pairs = p.Q % 2 == 0 && has_pairs(p.y, p.y_type, p.y_stride, kWidthAxis);
    g.div_columns = FastDiv(ceil_div(p.Q, 2));
    g.div_K = FastDiv(p.K);
    g.div_Kg = FastDiv(args.Kg);
    g.threads = static_cast<int32_t>(width_threads(p));
    constexpr int kThreads = 128;
    return launch(adder2d_fprop_depthwise_width_kernel<kType, kKernel, kStride, kFused>,
                  dim3(ceil_div(g.threads, kThreads)), dim3(kThreads), 0, stream, args, g);
  }
}

template <int32_t kType, int kKernel, int kStride>
cudaError_t launch_strips(FpropArgs const& args, cudaStream_t stream) {
  return args.fused ? launch_kernel_of<kType, kKernel, kStride, true>(args, stream)
                    : launch_kernel_of<kType, kKernel, kStride, false>(args, stream);
}

template <int32_t kType>
cudaError_t launch_strips(FpropArgs const& args, cudaStream_t stream) {
  bool const one = args.p.stride_h == 1;
  if (args.p.R == 3) return one ? launch_strips<kType, 3, 1>(args, stream) : launch_strips<kType, 3, 2>(args, stream);
  return one ? launch_strips<kType, 5, 1>(args, stream) : launch_strips<kType, 5, 2>(args, stream);
}

constexpr char const* kTileNames[] = {"7x2"};

bool can_implement(FpropArgs const& args, size_t) {
  Adder2dParams const& p = args.p;
  bool const square = p.R == p.S && (p.R == 3 || p.R == 5) && p.stride_h == p.stride_w && p.stride_h <= 2;
  constexpr int64_t kMaxIndex = 0x7fffffff - kMaxThreads;  // the index of a thread, or of a block, is an int32
  return args.Cg == 1 && square && p.dil_h == 1 && p.dil_w == 1 && p.x_type == p.y_type && args.residual_as_y &&
         width_threads(p) <= kMaxIndex && (can_pair_channels(p) || can_pair_width(p));
}

bool plan(FpropArgs const&, size_t, TileForce const& force, TileConfig* config, double*) {
  *config = {};
  return force.splits <= 1 && force.packed != 1;
}

cudaError_t launch_plan(FpropArgs const& args, TileConfig const&, cudaStream_t stream) {
  switch (static_cast<Adder2dType>(args.p.x_type)) {
    case ADDER2D_FLOAT32: return launch_strips<ADDER2D_FLOAT32>(args, stream);
    case ADDER2D_FLOAT16: return launch_strips<ADDER2D_FLOAT16>(args, stream);
    case ADDER2D_BFLOAT16: return launch_strips<ADDER2D_BFLOAT16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

FpropFamily const kFpropDepthwise{{"depthwise", kTileNames, 1}, can_implement, prefers_direct, plan, launch_plan};

}  // namespace adder2d
