// Validation of the params structs, shared by the CUDA launchers, the CPU kernel and the plugin.
#include "adder2d.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include <algorithm>
#include <initializer_list>

namespace {

constexpr int64_t kInt32Max = 0x7fffffff;

// The largest number of elements of a tensor, and the largest distance along one of its axes. A tensor has four axes
// and an element at most 8 bytes, so every offset, in elements and in bytes, stays within 63 bits.
constexpr int64_t kMaxElements = int64_t{1} << 58;
constexpr int64_t kMaxTerms = int64_t{1} << 62;  // |x - w| of a whole layer; the kernels count them

// One sentence per thread; valid until the next call on that thread.
char const* sentence(char const* format, ...) __attribute__((format(printf, 1, 2)));
char const* sentence(char const* format, ...) {
  static thread_local char text[256];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  return text;
}

// Whether a product passes `limit`. All factors are at least 0, and a factor 0 counts as 1: an empty batch has strides
// too.
bool exceeds(int64_t limit, std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (int64_t const factor : factors)
    if (factor > 1 && (__builtin_mul_overflow(product, factor, &product) || product > limit)) return true;
  return false;
}

// Whether `steps` steps along some axis, each of `stride` elements, pass kMaxElements.
bool strides_exceed(std::initializer_list<int64_t> steps, int64_t const* stride) {
  for (int64_t const count : steps) {
    if (*stride < -kMaxElements || *stride > kMaxElements ||
        exceeds(kMaxElements, {count, *stride < 0 ? -*stride : *stride}))
      return true;
    ++stride;
  }
  return false;
}

char const* strides_sentence(char const* tensor, int64_t const* stride) {
  return sentence("the strides of %s must reach fewer than 2^58 elements on each axis, got (%lld, %lld, %lld, %lld)",
                  tensor, static_cast<long long>(stride[0]), static_cast<long long>(stride[1]),
                  static_cast<long long>(stride[2]), static_cast<long long>(stride[3]));
}

bool is_type(int32_t type) { return type == ADDER2D_FLOAT32 || type == ADDER2D_FLOAT16 || type == ADDER2D_BFLOAT16; }

// Why the epilogue of a valid problem `p` is not valid, or null.
char const* check_epilogue(Adder2dParams const& p) {
  Adder2dEpilogue const& e = *p.epilogue;
  if (e.reserved != 0) return sentence("the epilogue's reserved must be 0, got %d", e.reserved);
  if (!is_type(e.residual_type))
    return sentence("residual_type must be float32 (0), float16 (1) or bfloat16 (2), got %d", e.residual_type);
  if (!(e.lower <= e.upper))
    return sentence("the epilogue's limits must be numbers with lower <= upper, got lower %g and upper %g",
                    static_cast<double>(e.lower), static_cast<double>(e.upper));
  if (e.residual != nullptr && strides_exceed({p.N, p.K, p.P, p.Q}, e.residual_stride))
    return strides_sentence("the residual", e.residual_stride);
  return nullptr;
}

}  // namespace

size_t adder2d_params_size(void) { return sizeof(Adder2dParams); }

char const* adder2d_check(Adder2dParams const* p) {
  if (p == nullptr) return "params is null";
  if (p->N < 0 || p->C < 1 || p->H < 1 || p->W < 1)
    return sentence("input must be [N >= 0, C >= 1, H >= 1, W >= 1], got [%d, %d, %d, %d]", p->N, p->C, p->H, p->W);
  if (p->K < 1 || p->R < 1 || p->S < 1)
    return sentence("weight must have K, R, S >= 1, got K %d, R %d, S %d", p->K, p->R, p->S);
  if (p->stride_h < 1 || p->stride_w < 1)
    return sentence("stride must be >= 1, got (%d, %d)", p->stride_h, p->stride_w);
  if (p->dil_h < 1 || p->dil_w < 1) return sentence("dilation must be >= 1, got (%d, %d)", p->dil_h, p->dil_w);
  if (p->pad_h < 0 || p->pad_w < 0) return sentence("padding must be >= 0, got (%d, %d)", p->pad_h, p->pad_w);
  if (p->groups < 1 || p->C % p->groups != 0 || p->K % p->groups != 0)
    return sentence("groups must divide the %d input channels and the %d filters, got %d", p->C, p->K, p->groups);
  if (!is_type(p->x_type) || !is_type(p->w_type) || !is_type(p->y_type))
    return sentence("types must be float32 (0), float16 (1) or bfloat16 (2), got x %d, w %d, y %d", p->x_type,
                    p->w_type, p->y_type);
  if (p->reserved != 0) return sentence("reserved must be 0, got %d", p->reserved);
  if (int64_t{p->H} + 2 * int64_t{p->pad_h} > kInt32Max || int64_t{p->W} + 2 * int64_t{p->pad_w} > kInt32Max)
    return sentence("the padded input must be below 2^31 on each axis, got padding (%d, %d)", p->pad_h, p->pad_w);
  if (int64_t{p->H} + 2 * int64_t{p->pad_h} + p->stride_h > kInt32Max ||
      int64_t{p->W} + 2 * int64_t{p->pad_w} + p->stride_w > kInt32Max)
    return sentence("the padded input and the stride must sum to less than 2^31 on each axis, got stride (%d, %d)",
                    p->stride_h, p->stride_w);
  int64_t const P = adder2d_output_size(p->H, p->R, p->stride_h, p->pad_h, p->dil_h);
  int64_t const Q = adder2d_output_size(p->W, p->S, p->stride_w, p->pad_w, p->dil_w);
  if (P < 1 || Q < 1)
    return sentence("the %dx%d kernel with dilation (%d, %d) does not fit the %dx%d input with padding (%d, %d)", p->R,
                    p->S, p->dil_h, p->dil_w, p->H, p->W, p->pad_h, p->pad_w);
  if (int64_t{p->R} * p->dil_h > kInt32Max || int64_t{p->S} * p->dil_w > kInt32Max)
    return sentence(
        "kernel size times dilation must be below 2^31 on each axis, got kernel %dx%d and dilation (%d, %d)", p->R,
        p->S, p->dil_h, p->dil_w);
  if (p->P != P || p->Q != Q)
    return sentence("the output must be %lldx%lld, got %dx%d", static_cast<long long>(P), static_cast<long long>(Q),
                    p->P, p->Q);
  if (P * Q > kInt32Max) return sentence("one output map must be below 2^31 elements, got %dx%d", p->P, p->Q);
  if (int64_t{p->R} * p->S > kInt32Max || int64_t{p->C} / p->groups * (int64_t{p->R} * p->S) > kInt32Max)
    return sentence("one filter must be below 2^31 elements, got %dx%dx%d", p->C / p->groups, p->R, p->S);
  if (exceeds(kMaxElements, {p->N, p->C, p->H, p->W}))
    return sentence("the input must have fewer than 2^58 elements, got [%d, %d, %d, %d]", p->N, p->C, p->H, p->W);
  if (exceeds(kMaxElements, {p->N, p->K, p->P, p->Q}))
    return sentence("the output must have fewer than 2^58 elements, got [%d, %d, %d, %d]", p->N, p->K, p->P, p->Q);
  int64_t const filter = int64_t{p->C} / p->groups * (int64_t{p->R} * p->S);
  if (exceeds(kMaxElements, {p->K, filter}))
    return sentence("weight must have fewer than 2^58 elements, got [%d, %d, %d, %d]", p->K, p->C / p->groups, p->R,
                    p->S);
  if (exceeds(kMaxTerms, {p->N, p->K, P * Q, filter}))
    return sentence(
        "a layer must have fewer than 2^62 terms |x - w|, got an output [%d, %d, %d, %d] of %lld terms each", p->N,
        p->K, p->P, p->Q, static_cast<long long>(filter));
  // Kernels step through the padding and through all taps too, though they read the input only.
  int64_t const rows = std::max(int64_t{p->H} + 2 * int64_t{p->pad_h}, int64_t{p->R} * p->dil_h);
  int64_t const columns = std::max(int64_t{p->W} + 2 * int64_t{p->pad_w}, int64_t{p->S} * p->dil_w);
  if (strides_exceed({p->N, p->C, rows, columns}, p->x_stride)) return strides_sentence("x", p->x_stride);
  if (strides_exceed({p->N, p->K, p->P, p->Q}, p->y_stride)) return strides_sentence("y", p->y_stride);
  return p->epilogue != nullptr ? check_epilogue(*p) : nullptr;
}

size_t adder2d_dgrad_params_size(void) { return sizeof(Adder2dDgradParams); }

char const* adder2d_dgrad_check(Adder2dDgradParams const* params) {
  if (params == nullptr) return "params is null";
  if (char const* const reason = adder2d_check(&params->layer)) return reason;
  if (params->layer.epilogue != nullptr) return "epilogue must be null: the gradients do not support one";
  if (!is_type(params->dx_type))
    return sentence("dx_type must be float32 (0), float16 (1) or bfloat16 (2), got %d", params->dx_type);
  if (params->reserved != 0) return sentence("reserved must be 0, got %d", params->reserved);
  Adder2dParams const& p = params->layer;
  if (strides_exceed({p.N, p.C, p.H, p.W}, params->dx_stride)) return strides_sentence("dx", params->dx_stride);
  return nullptr;
}

size_t adder2d_wgrad_params_size(void) { return sizeof(Adder2dWgradParams); }

char const* adder2d_wgrad_check(Adder2dWgradParams const* params) {
  if (params == nullptr) return "params is null";
  if (char const* const reason = adder2d_check(&params->layer)) return reason;
  if (params->layer.epilogue != nullptr) return "epilogue must be null: the gradients do not support one";
  if (params->channels_last != 0 && params->channels_last != 1)
    return sentence("channels_last must be 0 or 1, got %d", params->channels_last);
  if (params->reserved != 0) return sentence("reserved must be 0, got %d", params->reserved);
  if (!(params->eta >= 0) || params->eta == HUGE_VAL)
    return sentence("eta must be finite and not below 0, got %g", params->eta);
  Adder2dParams const& p = params->layer;
  if (strides_exceed({p.K, p.C / p.groups, p.R, p.S}, params->convolved_stride))
    return strides_sentence("convolved", params->convolved_stride);
  return nullptr;
}
