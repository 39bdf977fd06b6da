// fprop_half.cu: the problem, and the kernel that packs weights and image into vectors of channels.
#pragma once

#include "common/convert.cuh"
#include "common/launch.cuh"
#include "fprop/half_weights.h"
#include "tile/problem.h"

namespace adder2d::fprop_half {

// ---- problem

// The problem as these kernels read it. Channels of a group are filled up with zeros to a multiple of kVector, on both
// sides.
struct HalfArgs : FpropArgs {
  __half const* image;             // [N][H][W][groups][channels], packed or the input itself
  __half const* weights;           // packed, by the caller or in the workspace
  int32_t step_n, step_h, step_w;  // vectors from one image, row and column to the next
  int32_t vectors;                 // of a tap and group
  int32_t pitch;                   // filters of a group in the packed weights, rounded up
  bool packs_image;
  bool exact_halves;  // no conversion rounds
  FastDiv div_vectors, div_HW, div_W;
};

// ---- pack

constexpr int kPackThreads = 256, kPackWarps = kPackThreads / 32;
// Of the image a warp, with one vector of each: two side by side a lane.
constexpr int kPackPixels = 64;
// Vectors of a warp in shared memory: eight warps' lie in different banks.
constexpr int kPackPitch = kPackPixels + 1;
constexpr int kPackFilters = 8;  // of the weights a block, one a warp
static_assert(kPackPixels == 2 * 32 && kPackWarps == 8 && kPackFilters == kPackWarps, "threads are numbered by shifts");

// How blocks share the work. First come those of the weights: columns of vectors, rows of filters, groups. After them,
// warps take the image: the vectors of kPackPixels pixels, then those of the next pixels.
struct PackConfig {
  int32_t slices, weight_blocks;
  int32_t shift;                             // binary logarithm of the vectors of a tap in a block of the weights
  int32_t pitch;                             // vectors from one filter to the next in shared memory
  FastDiv div_columns, div_rows, div_image;  // div_image: by the vectors of a pixel
  bool w_vectors;                            // 16 bytes of the weights may be read at once
  bool x_pairs;                              // so may pixels 2 * i and 2 * i + 1
  bool x_vectors;                            // so may the channels of a vector
};

__device__ __forceinline__ uint32_t half_pair(float low, float high) {
  __half2 const pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t const*>(&pair);
}

// Eight bfloat16 as halves.
__device__ __forceinline__ uint4 to_halves(uint4 const& v) {
  auto const pair = [](uint32_t bits) {
    return half_pair(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  };
  return make_uint4(pair(v.x), pair(v.y), pair(v.z), pair(v.w));
}

// Copies what a warp has of a filter to shared memory, converted, and zeros from `length` to `end`. Loads are started
// in batches: one after the other, they would take longer than all else.
template <class From, class To, class Convert>
__device__ __forceinline__ void copy_filter(From const* from, To* to, int32_t length, int32_t end,
                                            Convert const& convert) {
  constexpr int kBatch = sizeof(From) == 16 ? 4 : 8;
#pragma unroll 1
  for (int32_t i = threadIdx.x % 32; i < end; i += kBatch * 32) {
    From v[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) v[b] = i + b * 32 < length ? __ldg(from + i + b * 32) : From{};
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (i + b * 32 < end) to[i + b * 32] = convert(v[b]);
  }
}

// Weights [K, Cg, R, S] of any type to halves [groups][slices][pitch][kTileC], with zeros where there is nothing.
template <int kTileC>
__device__ __forceinline__ void pack_weights(HalfArgs const& a, PackConfig const& config, uint4* smem) {
  int32_t column, row;
  int32_t const group = config.div_rows.divmod(config.div_columns.divmod(blockIdx.x, &column), &row);
  int32_t const RS = a.p.R * a.p.S, shift = config.shift, first_vector = column << shift, first_k = row * kPackFilters;
  int32_t const warp = threadIdx.x / 32, first_c = first_vector * kVector;
  int32_t const end = kVector * RS << shift,
                length = first_k + warp < a.Kg ? min(kVector << shift, a.Cg - first_c) * RS : 0;
  int64_t const from = ((int64_t{group} * a.Kg + first_k + warp) * a.Cg + first_c) * RS;
  uint4* const filter = smem + warp * config.pitch;  // as in memory, 16 bits each
  if (a.p.w_type == ADDER2D_FLOAT32) {
    auto const* const src = static_cast<float const*>(a.p.w) + from;
    if (config.w_vectors) {
      copy_filter(reinterpret_cast<float4 const*>(src), reinterpret_cast<uint2*>(filter), length / 4, end / 4,
                  [](float4 const& v) { return make_uint2(half_pair(v.x, v.y), half_pair(v.z, v.w)); });
    } else {
      copy_filter(src, reinterpret_cast<__half*>(filter), length, end, [](float v) { return __float2half_rn(v); });
    }
  } else {
    auto const* const src = static_cast<uint16_t const*>(a.p.w) + from;
    if (config.w_vectors) {
      copy_filter(reinterpret_cast<uint4 const*>(src), filter, length / 8, end / 8, [](uint4 const& v) { return v; });
    } else {
      copy_filter(src, reinterpret_cast<uint16_t*>(filter), length, end, [](uint16_t v) { return v; });
    }
  }
  __syncthreads();

  constexpr int kVectors = kTileC / kVector;
  uint4* const to = static_cast<uint4*>(a.p.workspace) + (group * config.slices * a.pitch + first_k) * kVectors;
  auto const store = [&](int32_t k, int32_t vector, uint4 const& v) {  // vector of the whole reduction
    to[(vector / kVectors * a.pitch + k) * kVectors + vector % kVectors] = v;
  };
  // Eight lanes take a slice's four vectors of two filters, a line to store; where RS is odd and above 3, banks hardly
  // conflict.
  int32_t const low = min(shift, 2), part_low = threadIdx.x & ((1 << low) - 1), k_low = threadIdx.x >> low & 1;
#pragma unroll 1
  for (int32_t i = threadIdx.x >> (low + 1); i < kPackFilters / 2 * RS << (shift - low);
       i += kPackThreads >> (low + 1)) {
    int32_t tap;
    int32_t const rest = a.div_RS.divmod(i, &tap), k = rest % (kPackFilters / 2) * 2 + k_low;
    int32_t const part = (rest / (kPackFilters / 2) << low) + part_low;
    if (first_vector + part >= a.vectors) continue;
    auto const* const from_smem =
        reinterpret_cast<uint16_t const*>(smem + k * config.pitch) + part * kVector * RS + tap;
    alignas(16) uint16_t packed[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) packed[e] = from_smem[e * RS];
    uint4 const v = *reinterpret_cast<uint4*>(packed);
    store(k, tap * a.vectors + first_vector + part, a.p.w_type == ADDER2D_BFLOAT16 ? to_halves(v) : v);
  }
  int32_t const vectors = RS * a.vectors;  // after them, the last slice is filled up
  for (int32_t i = threadIdx.x; i < kPackFilters * (config.slices * kVectors - vectors) && first_vector == 0;
       i += kPackThreads)
    store(i % kPackFilters, vectors + i / kPackFilters, uint4{});
}

// The image to [N][H][W][groups * vectors].
__device__ __forceinline__ void pack_image(HalfArgs const& a, PackConfig const& config, uint4* smem) {
  int32_t const warp = threadIdx.x / 32, lane = threadIdx.x % 32, pixels = a.p.N * a.p.H * a.p.W;
  // Counted among the warps that take the image.
  int32_t const first_warp = (static_cast<int32_t>(blockIdx.x) - config.weight_blocks) * kPackWarps;
  auto const* const x = static_cast<uint16_t const*>(a.p.x);
  auto const offset_of = [&](int32_t m) {  // of the first pixel for absent ones
    int32_t hw, w;
    int32_t const n = a.div_HW.divmod(m < pixels ? m : 0, &hw), h = a.div_W.divmod(hw, &w);
    return n * a.p.x_stride[0] + h * a.p.x_stride[2] + w * a.p.x_stride[3];
  };
  // Eight lanes write what the eight warps have of a pixel, mostly vectors side by side, and of the pixel 32 after it.
  int32_t vector, part;
  int32_t const source = threadIdx.x % kPackWarps, pixel = threadIdx.x / kPackWarps;
  int32_t const m = config.div_image.divmod(first_warp + source, &vector) * kPackPixels + pixel;
  uint4 v[2];
  if (a.p.x_stride[1] == 1) {  // channels lie side by side already
    int32_t const group = a.div_vectors.divmod(vector, &part);
    int32_t const c = group * a.Cg + part * kVector;
    uint16_t const* const src[] = {x + offset_of(m) + c, x + offset_of(m + 32) + c};
    if (config.x_vectors) {
#pragma unroll
      for (int j = 0; j < 2; ++j) v[j] = __ldg(reinterpret_cast<uint4 const*>(src[j]));
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        alignas(16) uint16_t bits[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) bits[e] = part * kVector + e < a.Cg ? __ldg(src[j] + e) : uint16_t{0};
        v[j] = *reinterpret_cast<uint4*>(bits);
      }
    }
  } else {
    // A lane reads its warp's vector of two pixels side by side, channel by channel, and leaves them 32 vectors apart.
    int32_t warp_vector;
    int32_t const first_m = config.div_image.divmod(first_warp + warp, &warp_vector) * kPackPixels + 2 * lane;
    int32_t const group = a.div_vectors.divmod(warp_vector, &part), channels = min(kVector, a.Cg - part * kVector);
    int64_t const step = a.p.x_stride[1];
    auto const* src = x + (group * a.Cg + part * kVector) * step + offset_of(first_m);
    uint32_t pairs[kVector];
    if (config.x_pairs) {
#pragma unroll
      for (int e = 0; e < kVector; ++e, src += step)
        pairs[e] = e < channels ? __ldg(reinterpret_cast<uint32_t const*>(src)) : 0;
    } else {
      int64_t const next = offset_of(first_m + 1) - offset_of(first_m);
      uint32_t bits[2][kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e, src += step) {
        bits[0][e] = e < channels ? __ldg(src) : 0u;
        bits[1][e] = e < channels ? __ldg(src + next) : 0u;
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) pairs[e] = __byte_perm(bits[0][e], bits[1][e], 0x5410);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t const select = j == 0 ? 0x5410 : 0x7632;
      smem[warp * kPackPitch + j * 32 + lane] =
          make_uint4(__byte_perm(pairs[0], pairs[1], select), __byte_perm(pairs[2], pairs[3], select),
                     __byte_perm(pairs[4], pairs[5], select), __byte_perm(pairs[6], pairs[7], select));
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 2; ++j) v[j] = smem[source * kPackPitch + pixel % 2 * 32 + pixel / 2 + j * 16];
  }
  if (a.p.x_type == ADDER2D_BFLOAT16) {
#pragma unroll
    for (int j = 0; j < 2; ++j) v[j] = to_halves(v[j]);
  }
  int32_t const row = a.p.groups * a.vectors;
  auto* const to = reinterpret_cast<uint4*>(const_cast<__half*>(a.image)) + m * row + vector;
  if (m < pixels) to[0] = v[0];
  if (m + 32 < pixels) to[32 * row] = v[1];
}

template <int kTileC>
__global__ void __launch_bounds__(kPackThreads)
    adder2d_pack_half_kernel(__grid_constant__ HalfArgs const a, __grid_constant__ PackConfig const config) {
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  launch_dependents();
  auto* const smem = reinterpret_cast<uint4*>(smem_bytes);
  if (blockIdx.x < config.weight_blocks) {
    pack_weights<kTileC>(a, config, smem);
  } else {
    pack_image(a, config, smem);
  }
}

}  // namespace adder2d::fprop_half
