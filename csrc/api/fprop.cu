// Entry points of the forward pass: validation, choice of kernel, batches beyond 2^31 output pixels.
#include "fprop/fprop_converted.h"

#include <math.h>

#include <algorithm>

#include "api/forced.h"
#include "common/convert.cuh"
#include "common/device.h"
#include "common/plan_cache.h"
#include "tile/arch.h"

namespace adder2d {

namespace {

// Copies the epilogue into the args, and finds out how it may be read.
void set_epilogue(Adder2dEpilogue const& epilogue, FpropArgs* args) {
  Adder2dParams const& p = args->p;
  Adder2dEpilogue& e = args->epilogue;
  args->fused = true;
  e = epilogue;
  if (e.residual == nullptr) return;
  int32_t const sizes[] = {p.N, p.K, p.P, p.Q};
  for (int i = 0; i < 4; ++i)
    if (sizes[i] == 1) e.residual_stride[i] = p.y_stride[i];  // a stride that nothing steps by
  args->residual_as_y = std::equal(p.y_stride, p.y_stride + 4, e.residual_stride) &&
                        reinterpret_cast<uintptr_t>(e.residual) % (4 * type_size(e.residual_type)) == 0;
}

}  // namespace

FpropArgs make_fprop_args(Adder2dParams const& p) {
  FpropArgs args{};
  args.p = p;
  args.Cg = p.C / p.groups;
  args.Kg = p.K / p.groups;
  args.CRS = args.Cg * p.R * p.S;
  args.NPQ = p.N * p.P * p.Q;
  args.div_PQ = FastDiv(int64_t{p.P} * p.Q);
  args.div_Q = FastDiv(p.Q);
  args.div_RS = FastDiv(int64_t{p.R} * p.S);
  args.div_S = FastDiv(p.S);
  args.step_s = p.dil_w * p.x_stride[3];
  args.step_r = p.dil_h * p.x_stride[2] - p.S * args.step_s;
  args.step_c = p.x_stride[1] - p.dil_h * p.x_stride[2] * p.R;
  int64_t const* const stride = p.y_stride;
  args.y_channels_last = stride[1] == 1 && stride[3] != 1;
  args.y_linear = stride[2] == p.Q * stride[3] && stride[0] == p.P * stride[2];
  bool const aligned = reinterpret_cast<uintptr_t>(p.y) % (4 * type_size(p.y_type)) == 0 && stride[0] % 4 == 0;
  args.y_vectors = aligned && (args.y_channels_last ? args.Kg % 4 == 0 && stride[2] % 4 == 0 && stride[3] % 4 == 0
                                                    : stride[3] == 1 && stride[2] == p.Q &&
                                                          int64_t{p.P} * p.Q % 4 == 0 && stride[1] % 4 == 0);
  args.epilogue.lower = -INFINITY;
  args.epilogue.upper = INFINITY;
  args.residual_as_y = true;
  if (p.epilogue != nullptr) set_epilogue(*p.epilogue, &args);
  args.stores_plain = args.y_vectors && !args.fused;
  args.stores_vectors = args.y_vectors && args.fused && args.residual_as_y;
  return args;
}

namespace {

constexpr int64_t kMaxPixels = 0x7fffffff - 4096;  // pixel indices are int32, and a tile may overhang the end

// Images of one launch: all of them, or as many as keep N * P * Q and N * K an int32, and as find room.
int32_t images_per_launch(Adder2dParams const& p) {
  int64_t const most = kMaxPixels / std::max<int64_t>(int64_t{p.P} * p.Q, p.K);
  int32_t const images = static_cast<int32_t>(std::clamp<int64_t>(most, 1, std::max(p.N, 1)));
  return is_for_conversion(p) ? images_of_fprop_converted(p, images) : images_of_fprop_half(p, images);
}

// In the order of preference; those without is_preferred are compared by their predictions, and the first of equal ones
// is taken.
constexpr FpropFamily const* kFamilies[] = {&kFpropShared, &kFpropDepthwise, &kFpropDirect,    &kFpropHalf,
                                            &kFpropSimt,   &kFpropWindow,    &kFpropPointwise, &kFpropConverted};
constexpr int32_t kFamilyCount = sizeof(kFamilies) / sizeof(kFamilies[0]);
constexpr FamilyNames const* kNames[] = {&kFpropShared, &kFpropDepthwise, &kFpropDirect,    &kFpropHalf,
                                         &kFpropSimt,   &kFpropWindow,    &kFpropPointwise, &kFpropConverted};

ForcedChoice forced_choice;

struct Choice {
  FpropFamily const* family;  // null where the forced one cannot implement the problem
  TileConfig config;
};

Choice choose(FpropArgs const& args, Forced const& forced) {
  size_t const bytes = args.p.workspace_bytes;
  Choice best{};
  double best_cycles = 0;
  for (int32_t i = 0; i < kFamilyCount; ++i) {
    FpropFamily const* const family = kFamilies[i];
    bool const is_forced = i == forced.family;
    if (forced.family >= 0 && !is_forced) continue;
    if (!is_forced && family->is_preferred != nullptr && !family->is_preferred(args)) continue;
    TileConfig config;
    double cycles = 0;
    if (!family->can_implement(args, bytes) || !family->plan(args, bytes, forced.tile, &config, &cycles)) continue;
    if (is_forced || family->is_preferred != nullptr) return {family, config};
    if (best.family != nullptr && cycles >= best_cycles) continue;
    best = {family, config};
    best_cycles = cycles;
  }
  return best;
}

Choice choose_cached(FpropArgs const& args, Forced const& forced) {
  if (forced.family >= 0) return choose(args, forced);
  Adder2dParams key = args.p;
  // Plans do not depend on other addresses.
  key.x = reinterpret_cast<void const*>(reinterpret_cast<uintptr_t>(key.x) % 16);
  key.y = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(key.y) % 16);
  key.w = key.b = key.workspace = nullptr;
  if (key.epilogue != nullptr)
    key.epilogue = reinterpret_cast<Adder2dEpilogue const*>(uintptr_t{args.residual_as_y ? 1u : 2u});
  if (key.packed_w != nullptr) key.packed_w = reinterpret_cast<void const*>(uintptr_t{1});
  return cached_plan<Choice>(key, [&] { return choose(args, forced); });
}

// Image n of a tensor.
void const* images_from(void const* tensor, int64_t n, int64_t stride, int32_t type) {
  return static_cast<char const*>(tensor) + n * stride * type_size(type);
}

// The problem of the first launch of adder2d_fprop.
Adder2dParams first_launch(Adder2dParams const& params, size_t workspace_bytes) {
  Adder2dParams p = params;
  p.workspace_bytes = workspace_bytes;
  p.N = std::min(p.N, images_per_launch(p));
  return p;
}

}  // namespace
}  // namespace adder2d

using namespace adder2d;

size_t adder2d_fprop_workspace(Adder2dParams const* params) {
  if (adder2d_check(params) != nullptr || params->N == 0) return 0;
  return choose(make_fprop_args(first_launch(*params, kMaxWorkspaceBytes)), forced_choice.get()).config.workspace_bytes;
}

int32_t adder2d_fprop(Adder2dParams const* params, void* stream_pointer) {
  if (adder2d_check(params) != nullptr) return cudaErrorInvalidValue;
  cudaStream_t const stream = static_cast<cudaStream_t>(stream_pointer);
  Forced const forced = forced_choice.get();
  Adder2dParams p = *params;
  p.workspace_bytes = std::min(p.workspace_bytes, kMaxWorkspaceBytes);
  int32_t const step = images_per_launch(p);
  for (int64_t n = 0; n < params->N; n += step) {
    p.N = static_cast<int32_t>(std::min<int64_t>(params->N - n, step));
    p.x = images_from(params->x, n, p.x_stride[0], p.x_type);
    p.y = static_cast<char*>(params->y) + n * p.y_stride[0] * type_size(p.y_type);
    Adder2dEpilogue epilogue{};
    if (p.epilogue != nullptr) {
      epilogue = *params->epilogue;
      if (epilogue.residual != nullptr)
        epilogue.residual = images_from(epilogue.residual, n, epilogue.residual_stride[0], epilogue.residual_type);
      p.epilogue = &epilogue;
    }
    FpropArgs const args = make_fprop_args(p);
    Choice const choice = choose_cached(args, forced);
    if (choice.family == nullptr) return cudaErrorNotSupported;
    cudaError_t const error = choice.family->launch(args, choice.config, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

char const* adder2d_fprop_describe(Adder2dParams const* params) {
  if (adder2d_check(params) != nullptr || params->N == 0) return nullptr;
  size_t const bytes = std::min(params->workspace_bytes, kMaxWorkspaceBytes);
  Choice const choice = choose(make_fprop_args(first_launch(*params, bytes)), forced_choice.get());
  return choice.family == nullptr ? nullptr : describe_choice(*choice.family, choice.config);
}

char const* adder2d_fprop_force(char const* choice) { return forced_choice.set(choice, kNames, kFamilyCount); }

char const* adder2d_error_string(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
