// Elements of the types of Adder2dType in memory, and float32 in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "adder2d.h"

namespace adder2d {

// Every type is named in a branch of its own. The last one is assumed and not compared with, so that loops are
// compiled for each type apart: adder2d_check refuses all other types. Who adds a type starts at the compiler's warning
// in type_size().

inline int32_t type_size(int32_t type) {
  switch (static_cast<Adder2dType>(type)) {
    case ADDER2D_FLOAT32: return 4;
    case ADDER2D_FLOAT16: return 2;
    case ADDER2D_BFLOAT16: return 2;
  }
  return 0;
}
__host__ __device__ constexpr bool is_16_bit(int32_t type) {
  return type == ADDER2D_FLOAT16 || type == ADDER2D_BFLOAT16;
}

template <typename Element>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr int32_t value = ADDER2D_FLOAT32;
};
template <>
struct TypeOf<__half> {
  static constexpr int32_t value = ADDER2D_FLOAT16;
};
template <>
struct TypeOf<__nv_bfloat16> {
  static constexpr int32_t value = ADDER2D_BFLOAT16;
};
template <typename Element>
constexpr int32_t kTypeOf = TypeOf<Element>::value;

// Calls f with a value of the type.
template <typename F>
__device__ __forceinline__ void with_type(int32_t type, F const& f) {
  if (type == ADDER2D_FLOAT32) {
    f(float{});
  } else if (type == ADDER2D_FLOAT16) {
    f(__half{});
  } else {  // ADDER2D_BFLOAT16; here even an assumption changes the machine code
    f(__nv_bfloat16{});
  }
}

// The bits of an element of a 16-bit type.
__device__ __forceinline__ float bits_as_float(uint16_t bits, int32_t type) {
  if (type == ADDER2D_FLOAT16) return __half2float(__ushort_as_half(bits));
  return __uint_as_float(uint32_t{bits} << 16);  // ADDER2D_BFLOAT16; no assumption, as above
}

__device__ __forceinline__ float load_as_float(void const* base, int64_t index, int32_t type) {
  if (type == ADDER2D_FLOAT32) return __ldg(static_cast<float const*>(base) + index);
  if (type == ADDER2D_FLOAT16) return __half2float(static_cast<__half const*>(base)[index]);
  __builtin_assume(type == ADDER2D_BFLOAT16);
  return __bfloat162float(static_cast<__nv_bfloat16 const*>(base)[index]);
}

// The same of memory that this kernel may write to.
__device__ __forceinline__ float load_written_as_float(void const* base, int64_t index, int32_t type) {
  return type == ADDER2D_FLOAT32 ? static_cast<float const*>(base)[index] : load_as_float(base, index, type);
}

// Two and four of these side by side on an address aligned to all of them.
__device__ __forceinline__ float2 load2_written_as_float(void const* base, int64_t index, int32_t type) {
  if (type == ADDER2D_FLOAT32) return *reinterpret_cast<float2 const*>(static_cast<float const*>(base) + index);
  uint32_t const bits = *reinterpret_cast<uint32_t const*>(static_cast<uint16_t const*>(base) + index);
  return make_float2(bits_as_float(static_cast<uint16_t>(bits), type),
                     bits_as_float(static_cast<uint16_t>(bits >> 16), type));
}
__device__ __forceinline__ float4 load4_written_as_float(void const* base, int64_t index, int32_t type) {
  if (type == ADDER2D_FLOAT32) return *reinterpret_cast<float4 const*>(static_cast<float const*>(base) + index);
  uint2 const bits = *reinterpret_cast<uint2 const*>(static_cast<uint16_t const*>(base) + index);
  auto const element = [type](uint32_t two, int shift) {
    return bits_as_float(static_cast<uint16_t>(two >> shift), type);
  };
  return make_float4(element(bits.x, 0), element(bits.x, 16), element(bits.y, 0), element(bits.y, 16));
}

__device__ __forceinline__ void store_from_float(void* base, int64_t index, int32_t type, float value) {
  if (type == ADDER2D_FLOAT32) {
    static_cast<float*>(base)[index] = value;
  } else if (type == ADDER2D_FLOAT16) {
    static_cast<__half*>(base)[index] = __float2half_rn(value);
  } else {
    __builtin_assume(type == ADDER2D_BFLOAT16);
    static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(value);
  }
}

// Two elements side by side on an address aligned to both.
template <int32_t kType>
__device__ __forceinline__ void store2_from_float(void* base, int64_t index, float2 const& v) {
  if constexpr (kType == ADDER2D_FLOAT32) {
    *reinterpret_cast<float2*>(static_cast<float*>(base) + index) = v;
  } else {
    static_assert(is_16_bit(kType), "two elements are 32 bits");
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

}  // namespace adder2d
