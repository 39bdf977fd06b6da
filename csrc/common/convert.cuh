// Elements of the types of Adder2dType in memory, and float32 in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "adder2d.h"

namespace adder2d {

__device__ __forceinline__ float load_as_float(void const* base, int64_t index, int32_t type) {
  if (type == ADDER2D_FLOAT32) return __ldg(static_cast<float const*>(base) + index);
  if (type == ADDER2D_FLOAT16) return __half2float(static_cast<__half const*>(base)[index]);
  return __bfloat162float(static_cast<__nv_bfloat16 const*>(base)[index]);
}

__device__ __forceinline__ void store_from_float(void* base, int64_t index, int32_t type, float value) {
  if (type == ADDER2D_FLOAT32) {
    static_cast<float*>(base)[index] = value;
  } else if (type == ADDER2D_FLOAT16) {
    static_cast<__half*>(base)[index] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(value);
  }
}

// Two elements side by side on an address aligned to both.
template <int32_t kType>
__device__ __forceinline__ void store2_from_float(void* base, int64_t index, float2 const& v) {
  if constexpr (kType == ADDER2D_FLOAT32) {
    *reinterpret_cast<float2*>(static_cast<float*>(base) + index) = v;
  } else {
    alignas(4) uint16_t halves[2];
    store_from_float(halves, 0, kType, v.x);
    store_from_float(halves, 1, kType, v.y);
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(base) + index) = *reinterpret_cast<uint32_t*>(halves);
  }
}

// Four elements side by side on an address aligned to all of them.
__device__ __forceinline__ void store4_from_float(void* base, int64_t index, int32_t type, float4 const& v) {
  if (type == ADDER2D_FLOAT32) {
    *reinterpret_cast<float4*>(static_cast<float*>(base) + index) = v;
    return;
  }
  alignas(8) uint16_t halves[4];
  store_from_float(halves, 0, type, v.x);
  store_from_float(halves, 1, type, v.y);
  store_from_float(halves, 2, type, v.z);
  store_from_float(halves, 3, type, v.w);
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + index) = *reinterpret_cast<uint2*>(halves);
}

inline int32_t type_size(int32_t type) { return type == ADDER2D_FLOAT32 ? 4 : 2; }

}  // namespace adder2d
