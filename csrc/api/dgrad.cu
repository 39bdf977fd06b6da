// Entry points of the input gradient: validation, choice of kernel, batches beyond 2^31 pixels.
#include "dgrad/dgrad.h"

#include <algorithm>
#include <numeric>

#include "api/forced.h"
#include "common/plan_cache.h"
#include "tile/arch.h"

namespace adder2d {
namespace {

constexpr int64_t kMaxPixels = 0x7fffffff - 4096;  // pixel indices are int32, and a tile may overhang the end
constexpr int32_t kMaxPhases = 1024;               // with more, tiles would be mostly empty

DgradAxis make_axis(int32_t size, int32_t taps, int32_t outputs, int32_t stride, int32_t pad, int32_t dilation) {
  int32_t const common = std::gcd(stride, dilation);
  int32_t const phases = std::min(stride, size);
  return {stride,
          pad,
          dilation,
          size,
          taps,
          outputs,
          phases,
          ceil_div(size, stride),
          stride / common,
          dilation / common,
          FastDiv(phases)};
}

bool multiples(int64_t const* stride, int64_t of) {  // along all axes but the channels
  return stride[0] % of == 0 && stride[2] % of == 0 && stride[3] % of == 0;
}

// Of a tensor of x's shape.
DgradVectors make_vectors(DgradArgs const& args, void const* base, int32_t type, int64_t const* stride) {
  Adder2dParams const& p = args.p;
  if (reinterpret_cast<uintptr_t>(base) % (4 * type_size(type)) != 0) return DgradVectors::kNone;
  if (p.stride_h == 1 && p.stride_w == 1 && stride[3] == 1 && stride[2] == p.W && int64_t{p.H} * p.W % 4 == 0 &&
      stride[0] % 4 == 0 && stride[1] % 4 == 0)
    return DgradVectors::kPixels;
  return stride[1] == 1 && args.Cg % 4 == 0 && multiples(stride, 4) ? DgradVectors::kChannels : DgradVectors::kNone;
}

DgradArgs make_args(Adder2dDgradParams const& params) {
  DgradArgs args{};
  Adder2dParams const& p = args.p = params.layer;
  args.dx = params.dx;
  args.dx_type = params.dx_type;
  std::copy_n(params.dx_stride, 4, args.dx_stride);
  args.Cg = p.C / p.groups;
  args.Kg = p.K / p.groups;
  args.h = make_axis(p.H, p.R, p.P, p.stride_h, p.pad_h, p.dil_h);
  args.w = make_axis(p.W, p.S, p.Q, p.stride_w, p.pad_w, p.dil_w);
  int64_t const IJ = int64_t{args.h.positions} * args.w.positions, HW = int64_t{p.H} * p.W;
  args.NIJ = static_cast<int32_t>(std::min(p.N * IJ, kMaxPixels));
  args.small_map = HW <= kMaxPixels;
  args.div_IJ = FastDiv(std::min(IJ, kMaxPixels));
  args.div_J = FastDiv(args.w.positions);
  args.div_W = FastDiv(p.W);
  args.div_stride_h = FastDiv(p.stride_h);
  args.div_stride_w = FastDiv(p.stride_w);
  args.div_RS = FastDiv(int64_t{p.R} * p.S);
  args.div_S = FastDiv(p.S);
  args.div_step_h = FastDiv(args.h.step);
  args.div_step_w = FastDiv(args.w.step);
  args.small_steps = true;
  for (int i = 0; i < 3; ++i) {
    int64_t const bytes = p.y_stride[i + 1] * type_size(p.y_type);
    args.dy_step[i] = static_cast<int32_t>(bytes);
    args.small_steps &= bytes == args.dy_step[i];
  }
  args.filter_vectors = is_16_bit(p.y_type) && p.y_stride[1] == 1 && multiples(p.y_stride, 8) && args.Kg % 8 == 0 &&
                        reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  args.x_vectors = make_vectors(args, p.x, p.x_type, p.x_stride);
  args.dx_vectors = make_vectors(args, args.dx, args.dx_type, args.dx_stride);
  return args;
}

// Images of one launch: all of them, or as many as keep the number of pixels an int32.
int32_t images_per_launch(Adder2dParams const& p) {
  int64_t const IJ = int64_t{ceil_div(p.H, p.stride_h)} * ceil_div(p.W, p.stride_w);
  return static_cast<int32_t>(std::clamp<int64_t>(kMaxPixels / IJ, 1, std::max(p.N, 1)));
}

constexpr FamilyNames const* kFamilies[] = {&kDgradDirect, &kDgradSimt};
constexpr int32_t kFamilyCount = sizeof(kFamilies) / sizeof(kFamilies[0]);

ForcedChoice forced_choice;

// Whether the tiled kernel accepts the problem: it steps through dy by int32 strides, and counts pixels and phases as
// int32.
bool can_implement_simt(DgradArgs const& args) {
  return args.small_steps && int64_t{args.h.phases} * args.w.phases <= kMaxPhases &&
         int64_t{args.h.positions} * args.w.positions <= kMaxPixels;
}

// With fewer channels a group the short side of its tiles would be mostly empty.
bool prefers_direct(DgradArgs const& args) { return args.Cg < 8; }

struct Choice {
  FamilyNames const* family;  // null where the forced one cannot implement the problem
  DgradConfig config;
};

// For the workspace that there is.
Choice choose(DgradArgs const& args, Forced const& forced) {
  Choice const direct{&kDgradDirect, {}};
  bool const forces_direct = forced.family >= 0 && kFamilies[forced.family] == &kDgradDirect;
  bool const forces_simt = forced.family >= 0 && !forces_direct;
  if (forces_direct) return forced.tile.splits > 1 || forced.tile.packed == 1 ? Choice{} : direct;
  if (!can_implement_simt(args) || (prefers_direct(args) && !forces_simt)) return forces_simt ? Choice{} : direct;
  if (forces_simt && forced.tile.packed == 0) return {};
  Choice simt{&kDgradSimt, {}};
  size_t const bytes = args.p.workspace_bytes;
  for (size_t const split_bytes : {kMaxWorkspaceBytes, size_t{0}})  // splits, where there is room for their sums
    if (plan_dgrad_simt(args, split_bytes, forced.tile, &simt.config) && simt.config.workspace_bytes <= bytes)
      return simt;
  return forces_simt ? Choice{} : direct;
}

Choice choose_cached(DgradArgs const& args, Forced const& forced) {
  if (forced.family >= 0) return choose(args, forced);
  // The rest of the arguments follows from it but for addresses, which plans do not depend on.
  Adder2dParams key = args.p;
  key.x = key.w = key.b = key.y = key.workspace = nullptr;
  return cached_plan<Choice>(key, [&] { return choose(args, forced); });
}

// The problem of the first launch of adder2d_dgrad.
DgradArgs first_launch(Adder2dDgradParams const& params, size_t workspace_bytes) {
  Adder2dDgradParams part = params;
  part.layer.N = std::min(part.layer.N, images_per_launch(part.layer));
  part.layer.workspace_bytes = workspace_bytes;
  return make_args(part);
}

}  // namespace
}  // namespace adder2d

using namespace adder2d;

size_t adder2d_dgrad_workspace(Adder2dDgradParams const* params) {
  if (adder2d_dgrad_check(params) != nullptr || params->layer.N == 0) return 0;
  return choose(first_launch(*params, SIZE_MAX), forced_choice.get()).config.workspace_bytes;
}

int32_t adder2d_dgrad(Adder2dDgradParams const* params, void* stream_pointer) {
  if (adder2d_dgrad_check(params) != nullptr) return cudaErrorInvalidValue;
  cudaStream_t const stream = static_cast<cudaStream_t>(stream_pointer);
  Forced const forced = forced_choice.get();
  Adder2dParams const& whole = params->layer;
  int32_t const step = images_per_launch(whole);
  for (int64_t n = 0; n < whole.N; n += step) {
    Adder2dDgradParams part = *params;
    part.layer.N = static_cast<int32_t>(std::min<int64_t>(whole.N - n, step));
    part.layer.x = static_cast<char const*>(whole.x) + n * whole.x_stride[0] * type_size(whole.x_type);
    part.layer.y = static_cast<char*>(whole.y) + n * whole.y_stride[0] * type_size(whole.y_type);
    part.dx = static_cast<char*>(params->dx) + n * params->dx_stride[0] * type_size(params->dx_type);
    DgradArgs const args = make_args(part);
    Choice const choice = choose_cached(args, forced);
    if (choice.family == nullptr) return cudaErrorNotSupported;
    bool const direct = choice.family == &kDgradDirect;
    cudaError_t const error =
        direct ? launch_dgrad_direct(args, stream) : launch_dgrad_simt(args, choice.config, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

char const* adder2d_dgrad_describe(Adder2dDgradParams const* params) {
  if (adder2d_dgrad_check(params) != nullptr || params->layer.N == 0) return nullptr;
  Choice const choice = choose(first_launch(*params, params->layer.workspace_bytes), forced_choice.get());
  return choice.family == nullptr ? nullptr : describe_choice(*choice.family, choice.config);
}

char const* adder2d_dgrad_force(char const* choice) { return forced_choice.set(choice, kFamilies, kFamilyCount); }
