// Attributes of the current device.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

namespace adder2d {

// `missing` where the device cannot be asked.
inline int device_attribute(cudaDeviceAttr attribute, int missing) {
  int device = 0, value = missing;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int32_t multiprocessor_count() { return device_attribute(cudaDevAttrMultiProcessorCount, 1); }
inline int32_t compute_capability_major() { return device_attribute(cudaDevAttrComputeCapabilityMajor, 0); }
// Bytes of shared memory: that a block can have, that a multiprocessor has.
inline size_t smem_limit() { return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 0)); }
inline int32_t smem_per_multiprocessor() { return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0); }

}  // namespace adder2d
