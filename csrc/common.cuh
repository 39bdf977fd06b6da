// What all kernels share: division by a run-time constant, asynchronous copies, launches, type conversion.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "adder2d.h"

namespace adder2d {

// n / d for 0 <= n < 2^31 and 1 <= d < 2^31 by one multiplication (Granlund and Montgomery, 1994).
struct FastDiv {
  uint32_t divisor, multiplier, shift;

  FastDiv() = default;
  explicit FastDiv(int64_t d) : divisor(static_cast<uint32_t>(d)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  __device__ __forceinline__ int32_t div(int32_t n) const {
    return static_cast<int32_t>((__umulhi(static_cast<uint32_t>(n), multiplier) + static_cast<uint32_t>(n)) >> shift);
  }
  __device__ __forceinline__ int32_t divmod(int32_t n, int32_t* remainder) const {
    int32_t const quotient = div(n);
    *remainder = n - quotient * static_cast<int32_t>(divisor);
    return quotient;
  }
};

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

__device__ __forceinline__ uint32_t smem_address(void const* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 4 bytes to shared memory, or writes zero where `valid` is zero (`src` is not read then).
__device__ __forceinline__ void copy4_async(float* dst_smem, float const* src, uint32_t valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n  .reg .pred ignore;\n  setp.eq.u32 ignore, %2, 0;\n  cp.async.ca.shared.global [%0], [%1], 4, ignore;\n}\n" ::"r"(
          smem_address(dst_smem)),
      "l"(src), "r"(valid));
#else
  *dst_smem = valid != 0 ? *src : 0.f;
#endif
}

// The same where `absent` is zero, and a zero where it is not.
__device__ __forceinline__ void copy4_async_unless(float* dst_smem, float const* src, uint32_t absent) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n  .reg .pred ignore;\n  setp.ne.u32 ignore, %2, 0;\n  cp.async.ca.shared.global [%0], [%1], 4, ignore;\n}\n" ::"r"(
          smem_address(dst_smem)),
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
      "{\n  .reg .pred ignore;\n  setp.eq.u32 ignore, %2, 0;\n  cp.async.cg.shared.global [%0], [%1], 16, ignore;\n}\n" ::"r"(
          smem_address(dst_smem)),
      "l"(src), "r"(static_cast<uint32_t>(valid)));
#else
  *static_cast<float4*>(dst_smem) = valid ? *static_cast<float4 const*>(src) : float4{};
#endif
}

// Stores at a 16-byte address of global memory. Left to itself, the compiler makes four stores of it behind some conditions.
__device__ __forceinline__ void store16(float* to, float4 const& v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
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

// A kernel that lets the next one on its stream start early (sm_90 on), and that next kernel's wait for its results.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void wait_for_primary() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Launches a kernel; with `dependent`, before the one before it on the stream has finished: it calls wait_for_primary before it
// reads what that wrote. Errors are returned, and not left behind for the next to ask the runtime, nor are theirs taken.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(bool dependent, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                          Args const&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  cudaError_t const error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream, Args const&... args) {
  return launch_kernel(false, kernel, grid, block, smem_bytes, stream, args...);
}
template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                             Args const&... args) {
  return launch_kernel(true, kernel, grid, block, smem_bytes, stream, args...);
}

// Lets launches of a kernel take so much dynamic shared memory: beyond 48 KiB they have to be allowed to.
template <typename... Params>
cudaError_t allow_smem(void (*kernel)(Params...), size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

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
