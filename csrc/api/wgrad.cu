// Entry points of the weight gradient.
#include <algorithm>

#include "api/forced.h"
#include "wgrad/wgrad.h"

namespace adder2d {
namespace {

constexpr FamilyNames const* kFamilies[] = {&kWgradConvolved, &kWgradSimt};
constexpr int32_t kFamilyCount = sizeof(kFamilies) / sizeof(kFamilies[0]);

ForcedChoice forced_choice;

// The plan of wgrad_simt.cu, not taken where the other family computes the problem.
WgradConfig plan(Adder2dWgradParams const& params) {
  Forced const forced = forced_choice.get();
  if (forced.family < 0) return plan_wgrad_simt(params);
  bool const simt = kFamilies[forced.family] == &kWgradSimt && forced.tile.splits <= 1 && forced.tile.packed != 1;
  return simt ? plan_wgrad_simt(params, &forced.tile) : WgradConfig{};
}

}  // namespace
}  // namespace adder2d

using namespace adder2d;

int32_t adder2d_wgrad_takes(Adder2dWgradParams const* params) {
  return adder2d_wgrad_check(params) == nullptr && plan(*params).taken;
}

size_t adder2d_wgrad_workspace(Adder2dWgradParams const* params) {
  if (adder2d_wgrad_check(params) != nullptr) return 0;
  return std::max(wgrad_convolved_workspace(*params), plan(*params).workspace_bytes);
}

int32_t adder2d_wgrad(Adder2dWgradParams const* params, void* stream_pointer) {
  if (adder2d_wgrad_check(params) != nullptr) return cudaErrorInvalidValue;
  cudaStream_t const stream = static_cast<cudaStream_t>(stream_pointer);
  if (params->convolved != nullptr) return launch_wgrad_convolved(*params, stream);
  WgradConfig const config = plan(*params);
  if (!config.taken || config.workspace_bytes > params->layer.workspace_bytes) return cudaErrorInvalidValue;
  cudaError_t const error = launch_wgrad_simt(*params, config, stream);
  return error != cudaSuccess || params->eta == 0 ? error : launch_wgrad_scale(*params, config.reduce_blocks, stream);
}

char const* adder2d_wgrad_describe(Adder2dWgradParams const* params) {
  if (adder2d_wgrad_check(params) != nullptr) return nullptr;
  WgradConfig const config = plan(*params);
  TileConfig tile{};
  tile.tile = config.tile;
  return describe_choice(config.taken ? kWgradSimt : kWgradConvolved, tile);
}

char const* adder2d_wgrad_force(char const* choice) { return forced_choice.set(choice, kFamilies, kFamilyCount); }
