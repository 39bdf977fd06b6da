// The part of plugin_fuzz that calls the C functions: CPU kernels against their definitions, and hostile params.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "adder2d.h"
#include "fuzz_random.h"
#include "plugin_host.h"

namespace {

float random_value(Random& random, bool finite) {
  float const odd[] = {0.f, -0.f, 1e-40f, -1e-45f, INFINITY, -INFINITY, NAN};
  if (random.one_in(99)) return odd[random.below(finite ? 4 : 7)];
  return static_cast<float>(random.between(-4096, 4096)) / 1024.f;
}

// A tensor of exactly its elements, so that a sanitizer sees every read past them, in a random order of axes.
struct Tensor {
  std::vector<float> data;
  int64_t stride[4];

  Tensor(Random& random, std::initializer_list<int64_t> extents, bool contiguous) {
    int32_t order[4] = {3, 2, 1, 0};
    for (int32_t i = 3; i > 0 && !contiguous; --i) std::swap(order[i], order[random.between(0, i)]);
    int64_t size = 1;
    for (int32_t axis : order) stride[axis] = size, size *= extents.begin()[axis];
    bool const finite = random.one_in(2);
    for (int64_t i = 0; i < size; ++i) data.push_back(random_value(random, finite));
    data.shrink_to_fit();
  }
  double at(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return data[a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]];
  }
};

// An output, the sum of its terms and the sum of their magnitudes: equal up to rounding, or the same infinity, or NaN.
void check_close(float actual, double expected, double magnitude, int64_t terms) {
  double const eps = std::ldexp(1., -23), tiny = 1e-40;  // tiny: products of denormals
  bool const close = std::isfinite(expected)
                         ? std::fabs(actual - expected) <= (eps + 2 * eps * std::sqrt(double(terms))) * magnitude + tiny
                     : std::isnan(expected) ? std::isnan(actual)
                                            : actual == expected;
  if (!close) printf("got %g, expected %.9g\n", actual, expected);
  CHECK(close);
}

struct Operands {
  Tensor x, w, y, dx;
  std::vector<float> b;
  Operands(Random& random, Layer const& p)
      : x(random, {p.N, p.C(), p.H, p.W}, false),
        w(random, {p.K(), p.group_C, p.R, p.S}, true),
        y(random, {p.N, p.K(), output_size(p, 0), output_size(p, 1)}, false),
        dx(random, {p.N, p.C(), p.H, p.W}, false) {
    for (int32_t k = 0; k < p.K(); ++k) b.push_back(random_value(random, true));
  }
};

Adder2dDgradParams params_of(Layer const& p, Operands& operands, bool bias) {
  Adder2dDgradParams params{};
  Adder2dParams& layer = params.layer;
  layer.N = p.N, layer.C = p.C(), layer.H = p.H, layer.W = p.W, layer.K = p.K(), layer.R = p.R, layer.S = p.S;
  layer.P = static_cast<int32_t>(output_size(p, 0)), layer.Q = static_cast<int32_t>(output_size(p, 1));
  layer.stride_h = p.stride[0], layer.stride_w = p.stride[1], layer.pad_h = p.padding[0], layer.pad_w = p.padding[1];
  layer.dil_h = p.dilation[0], layer.dil_w = p.dilation[1], layer.groups = p.groups;
  std::copy_n(operands.x.stride, 4, layer.x_stride);
  std::copy_n(operands.y.stride, 4, layer.y_stride);
  std::copy_n(operands.dx.stride, 4, params.dx_stride);
  layer.x = operands.x.data.data(), layer.w = operands.w.data.data(), layer.b = bias ? operands.b.data() : nullptr;
  layer.y = operands.y.data.data(), params.dx = operands.dx.data.data();
  return params;
}

// Calls visit(n, k, c of the group, r, s, p, q, h, w) for every tap, in the padding too.
template <typename Visit>
void for_taps(Layer const& a, int64_t n, int64_t k, int64_t p, int64_t q, Visit const& visit) {
  for (int64_t c = 0; c < a.group_C; ++c)
    for (int64_t r = 0; r < a.R; ++r)
      for (int64_t s = 0; s < a.S; ++s) {
        int64_t const h = p * a.stride[0] - a.padding[0] + r * a.dilation[0],
                      w = q * a.stride[1] - a.padding[1] + s * a.dilation[1];
        visit(c, r, s, h, w, h >= 0 && h < a.H && w >= 0 && w < a.W, k / a.group_K * a.group_C + c, n);
      }
}

template <typename Visit>
void for_outputs(Layer const& a, Visit const& visit) {
  for (int64_t n = 0; n < a.N; ++n)
    for (int64_t k = 0; k < a.K(); ++k)
      for (int64_t p = 0; p < output_size(a, 0); ++p)
        for (int64_t q = 0; q < output_size(a, 1); ++q) visit(n, k, p, q);
}

// The CPU kernels against the definitions of adder2d.h, in double.
void check_cpu(Random& random, Layer const& layer, Operands& operands, bool bias) {
  Adder2dDgradParams const params = params_of(layer, operands, bias);
  int32_t const threads = random.one_in(3) ? random.hostile32() : random.between(1, 3);
  Tensor const dy = operands.y;
  REQUIRE(adder2d_dgrad_cpu(&params, threads) == 0);
  std::vector<double> sums(operands.dx.data.size()), magnitudes(sums.size());
  for_outputs(layer, [&](int64_t n, int64_t k, int64_t p, int64_t q) {
    for_taps(layer, n, k, p, q,
             [&](int64_t c, int64_t r, int64_t s, int64_t h, int64_t w, bool inside, int64_t channel, int64_t) {
               if (!inside) return;
               float const difference =
                   static_cast<float>(operands.w.at(k, c, r, s)) - static_cast<float>(operands.x.at(n, channel, h, w));
               double const term = dy.at(n, k, p, q) * (difference < -1 ? -1 : difference > 1 ? 1 : difference);
               int64_t const* const stride = operands.dx.stride;
               int64_t const at = n * stride[0] + channel * stride[1] + h * stride[2] + w * stride[3];
               sums[at] += term, magnitudes[at] += std::fabs(term);
             });
  });
  for (size_t i = 0; i < sums.size(); ++i)
    check_close(operands.dx.data[i], sums[i], magnitudes[i], int64_t{layer.group_K} * layer.R * layer.S);

  REQUIRE(adder2d_fprop_cpu(&params.layer, threads) == 0);
  for_outputs(layer, [&](int64_t n, int64_t k, int64_t p, int64_t q) {
    double sum = 0;
    for_taps(layer, n, k, p, q,
             [&](int64_t c, int64_t r, int64_t s, int64_t h, int64_t w, bool inside, int64_t channel, int64_t) {
               sum += std::fabs((inside ? operands.x.at(n, channel, h, w) : 0) - operands.w.at(k, c, r, s));
             });
    double const b = bias ? operands.b[k] : 0;
    check_close(static_cast<float>(operands.y.at(n, k, p, q)), b - sum, sum + std::fabs(b),
                int64_t{layer.group_C} * layer.R * layer.S);
  });
}

}  // namespace

void fuzz_functions(Random& random) {
  Layer const layer = random_layer(random);
  Operands operands(random, layer);
  bool const bias = random.one_in(2);
  if (random.one_in(2)) return check_cpu(random, layer, operands, bias);
  Adder2dDgradParams dgrad = params_of(layer, operands, bias);
  Adder2dParams& params = dgrad.layer;
  int32_t* const fields = &params.N;  // to `reserved`, all int32
  for (int32_t i = random.between(1, 3); i > 0; --i) fields[random.below(20)] = random.hostile32();
  if (random.one_in(4)) (random.one_in(2) ? params.x_stride : dgrad.dx_stride)[random.below(4)] = random.hostile64();
  if (random.one_in(2)) {  // sizes of the output that the rest gives
    if (params.stride_h > 0)
      params.P =
          static_cast<int32_t>(adder2d_output_size(params.H, params.R, params.stride_h, params.pad_h, params.dil_h));
    if (params.stride_w > 0)
      params.Q =
          static_cast<int32_t>(adder2d_output_size(params.W, params.S, params.stride_w, params.pad_w, params.dil_w));
  }
  Adder2dWgradParams wgrad{};
  wgrad.layer = params, wgrad.dw = static_cast<float*>(params.y);
  if (random.one_in(4)) wgrad.convolved_stride[random.below(4)] = random.hostile64();
  if (random.one_in(4)) wgrad.channels_last = random.hostile32();
  if (random.one_in(4)) wgrad.eta = random_value(random, false);
  bool const good = adder2d_check(&params) == nullptr;
  CHECK(good || (adder2d_dgrad_check(&dgrad) != nullptr && adder2d_wgrad_check(&wgrad) != nullptr));
  if (!good) {
    CHECK(adder2d_fprop_cpu(&params, random.hostile32()) == 1 && adder2d_dgrad_cpu(&dgrad, random.hostile32()) == 1);
    CHECK(adder2d_fprop(&params, nullptr) == 1 && adder2d_dgrad(&dgrad, nullptr) == 1 &&
          adder2d_wgrad(&wgrad, nullptr) == 1);
  }
  CHECK(good ||
        adder2d_fprop_workspace(&params) + adder2d_dgrad_workspace(&dgrad) + adder2d_wgrad_workspace(&wgrad) == 0);
  if (good) {
    adder2d_fprop_workspace(&params), adder2d_dgrad_workspace(&dgrad), adder2d_wgrad_workspace(&wgrad),
        adder2d_wgrad_takes(&wgrad);
    CHECK(adder2d_fprop(&params, nullptr) != 0 || params.N == 0);
    CHECK(adder2d_dgrad(&dgrad, nullptr) != 0 || params.N == 0);
    CHECK(adder2d_wgrad(&wgrad, nullptr) != 0);
  }
}
