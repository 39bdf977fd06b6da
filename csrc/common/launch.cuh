// Launches, with or without overlap of the kernel before.
#pragma once

#include <cuda_runtime.h>

namespace adder2d {

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

// Launches a kernel; with `dependent`, before the one before it on the stream has finished: it calls wait_for_primary
// before it reads what that wrote. Errors are returned. The runtime's last error is cleared of
// ours, so that others do not find it, and theirs stays.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(bool dependent, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
                          cudaStream_t stream, Args const&... args) {
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
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                   Args const&... args) {
  return launch_kernel(false, kernel, grid, block, smem_bytes, stream, args...);
}
template <typename... Params, typename... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                             Args const&... args) {
  return launch_kernel(true, kernel, grid, block, smem_bytes, stream, args...);
}

// Allows launches of a kernel to use so much dynamic shared memory: above 48 KiB this must be asked for.
template <typename... Params>
cudaError_t allow_smem(void (*kernel)(Params...), size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  cudaError_t const error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace adder2d
