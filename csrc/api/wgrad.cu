// Entry points of the weight gradient.
#include <algorithm>

#include "wgrad/wgrad.h"

using namespace adder2d;

int32_t adder2d_wgrad_takes(Adder2dWgradParams const* params) {
  return adder2d_wgrad_check(params) == nullptr && plan_wgrad_simt(*params).taken;
}

size_t adder2d_wgrad_workspace(Adder2dWgradParams const* params) {
  if (adder2d_wgrad_check(params) != nullptr) return 0;
  return std::max(wgrad_convolved_workspace(*params), plan_wgrad_simt(*params).workspace_bytes);
}

int32_t adder2d_wgrad(Adder2dWgradParams const* params, void* stream_pointer) {
  if (adder2d_wgrad_check(params) != nullptr) return cudaErrorInvalidValue;
  cudaStream_t const stream = static_cast<cudaStream_t>(stream_pointer);
  if (params->convolved != nullptr) return launch_wgrad_convolved(*params, stream);
  WgradConfig const config = plan_wgrad_simt(*params);
  if (!config.taken || config.workspace_bytes > params->layer.workspace_bytes) return cudaErrorInvalidValue;
  cudaError_t const error = launch_wgrad_simt(*params, config, stream);
  return error != cudaSuccess || params->eta == 0 ? error : launch_wgrad_scale(*params, config.reduce_blocks, stream);
}
