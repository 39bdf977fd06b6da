// Asynchronous copies to shared memory (plain ones below sm_80), and 16-byte stores.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace adder2d {

__device__ __forceinline__ uint32_t smem_address(void const* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 4 bytes to shared memory, or writes zero where `valid` is zero (`src` is not read then).
__device__ __forceinline__ void copy4_async(float* dst_smem, float const* src, uint32_t valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n  .reg .pred ignore;\n  setp.eq.u32 ignore, %2, 0;\n  cp.async.ca.shared.global [%0], [%1], 4, "
      "ignore;\n}\n" ::"r"(smem_address(dst_smem)),
      "l"(src), "r"(valid));
#else
  *dst_smem = valid != 0 ? *src : 0.f;
#endif
}

// The same where `absent` is zero, and a zero where it is not.
__device__ __forceinline__ void copy4_async_unless(float* dst_smem, float const* src, uint32_t absent) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n  .reg .pred ignore;\n  setp.ne.u32 ignore, %2, 0;\n  cp.async.ca.shared.global [%0], [%1], 4, "
      "ignore;\n}\n" ::"r"(smem_address(dst_smem)),
      "l"(src), "r"(absent));
#else
  *dst_smem = absent == 0 ? *src : 0.f;
#endif
}

// Copies 16 aligned bytes to shared memory, past the first-level cache.
__device__ __forceinline__ void copy16_async(void* dst_smem, void const* src) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(smem_address(dst_smem)), "l"(src));
#else
  *static_cast<float4*>(dst_smem) = *static_cast<float4 const*>(src);
#endif
}

// The same, or zeros where `valid` is false (`src` is not read then).
__device__ __forceinline__ void copy16_async(void* dst_smem, void const* src, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n  .reg .pred ignore;\n  setp.eq.u32 ignore, %2, 0;\n  cp.async.cg.shared.global [%0], [%1], 16, "
      "ignore;\n}\n" ::"r"(smem_address(dst_smem)),
      "l"(src), "r"(static_cast<uint32_t>(valid)));
#else
  *static_cast<float4*>(dst_smem) = valid ? *static_cast<float4 const*>(src) : float4{};
#endif
}

// Stores at a 16-byte address of global memory. Left to itself, the compiler makes four stores of it under some
// conditions.
__device__ __forceinline__ void store16(float* to, float4 const& v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
#else
  *reinterpret_cast<float4*>(to) = v;
#endif
}

__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::);
#endif
}

// Waits until at most kPending committed groups of this thread are unfinished.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending));
#endif
}

}  // namespace adder2d
