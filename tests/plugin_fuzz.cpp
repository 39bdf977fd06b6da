// Seeded random cases for the plugin and the C functions: hostile fields, ranks, extents, types, counts, pointers, bytes and
// orders of calls. The host code is compiled into this program, to run under sanitizers; kernels come from the library.
//
//   plugin_fuzz SEED COUNT    the cases SEED to SEED + COUNT - 1; a case depends on its number only
//
// Build: g++ -std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -rdynamic -I csrc -I tests
//        tests/plugin_fuzz.cpp csrc/cpu.cpp csrc/problem.cpp csrc/tensorrt/{attributes,plugin_v2,plugin_v3}.cpp
//        torch2trt_adder/libtorch2trt_adder.so -ldl -pthread -o plugin_fuzz
//
// It hides all GPUs, so that a launch always fails: what must hold is that every call returns, and returns what it should.
#include <string.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "adder2d.h"
#include "plugin_host.h"
#include "tensorrt/plugins.h"

using namespace nvinfer1;

namespace {

// ---- random values

// SplitMix64 (Steele, Lea and Flood, 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : mState(seed) {}
  uint64_t next() {
    uint64_t z = mState += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int32_t below(int32_t count) { return static_cast<int32_t>(next() % static_cast<uint64_t>(count)); }
  int32_t between(int32_t low, int32_t high) { return low + below(high - low + 1); }
  bool one_in(int32_t count) { return below(count) == 0; }
  int32_t hostile32() {
    int32_t const values[] = {0, 1, 2, 3, 8, -1, -2, 255, 46341, 65536, 1 << 30, 0x7fffffff, 0x7ffffffe, -0x7fffffff - 1};
    return one_in(4) ? static_cast<int32_t>(next()) : values[below(static_cast<int32_t>(std::size(values)))];
  }
  int64_t hostile64() {
    int64_t const values[] = {INT64_MAX, INT64_MIN, INT64_MIN + 1, int64_t{1} << 58, int64_t{1} << 32, -(int64_t{1} << 31)};
    return one_in(3) ? values[below(static_cast<int32_t>(std::size(values)))] : hostile32();
  }

 private:
  uint64_t mState;
};

// The attributes and sizes of a layer. Every problem is valid when made; `spoil` changes some of it.
struct Layer {
  int32_t N, H, W, R, S, groups, group_C, group_K;
  int32_t stride[2], padding[2], dilation[2], output_type;
  int32_t C() const { return groups * group_C; }
  int32_t K() const { return groups * group_K; }
};

Layer random_layer(Random& random) {
  Layer layer{};
  layer.N = random.between(1, 3), layer.groups = random.between(1, 3);
  layer.group_C = random.between(1, 5), layer.group_K = random.between(1, 6);
  int32_t* const sizes[] = {&layer.H, &layer.W}, *const taps[] = {&layer.R, &layer.S};
  for (int32_t axis = 0; axis < 2; ++axis) {
    layer.stride[axis] = random.between(1, 4), layer.padding[axis] = random.between(0, 3);
    layer.dilation[axis] = random.between(1, 3), *taps[axis] = random.between(1, 4);
    int32_t const least = layer.dilation[axis] * (*taps[axis] - 1) + 1 - 2 * layer.padding[axis];
    *sizes[axis] = random.between(std::max(least, 1), std::max(least, 1) + 9);
  }
  layer.output_type = random.below(2);
  return layer;
}

int64_t output_size(Layer const& layer, int32_t axis) {
  return adder2d_output_size(axis ? layer.W : layer.H, axis ? layer.S : layer.R, layer.stride[axis], layer.padding[axis],
                             layer.dilation[axis]);
}

// ---- fields

// A field collection, and whether a creator must refuse it (values aside).
struct Fields {
  int32_t values[8];
  std::vector<PluginField> list;
  PluginFieldCollection collection{};
  bool malformed = false;

  Fields(Random& random, Layer const& layer) {
    int32_t const good[8] = {layer.stride[0], layer.stride[1], layer.padding[0], layer.padding[1],
                             layer.dilation[0], layer.dilation[1], layer.groups, layer.output_type};
    std::copy_n(good, 8, values);
    auto const type = PluginFieldType::kINT32;
    list = {{"stride", values, type, 2}, {"padding", values + 2, type, 2}, {"dilation", values + 4, type, 2},
            {"groups", values + 6, type, 1}, {"output_type", values + 7, type, 1}};
    for (int32_t i = random.one_in(2) ? random.between(1, 3) : 0; i > 0; --i) spoil(random);
    for (int32_t i = static_cast<int32_t>(list.size()) - 1; i > 0; --i) std::swap(list[i], list[random.between(0, i)]);
    collection = {static_cast<int32_t>(list.size()), list.data()};
    if (random.one_in(20)) collection.nbFields = random.one_in(2) ? -random.between(1, 99) : 65 + random.below(1 << 30), malformed = true;
    if (random.one_in(20)) collection.fields = nullptr, malformed |= collection.nbFields != 0;
  }

 private:
  void spoil(Random& random) {
    PluginField& field = list[random.below(static_cast<int32_t>(list.size()))];
    bool const known = field.name != nullptr && strncmp(field.name, "plugin_", 7) != 0;
    switch (random.below(9)) {
      case 0: values[random.below(8)] = random.hostile32(); break;
      case 1: field.name = nullptr, malformed = true; break;
      case 2: field.name = random.one_in(2) ? "strides" : "", malformed = true; break;
      case 3: list.push_back(field), malformed |= known; break;
      case 4: field.data = nullptr, malformed |= known; break;
      case 5: field.length = random.one_in(2) ? random.between(3, 1 << 20) : -random.below(9), malformed |= known; break;
      case 6: field.type = static_cast<PluginFieldType>(random.between(6, 12)), malformed |= known; break;
      case 7: list.push_back({"plugin_version", "1", static_cast<PluginFieldType>(6), 1}); break;
      case 8: field.length = malformed ? field.length : 1; break;
    }
  }
};

// Both generations read fields alike, and neither takes a malformed collection.
struct Plugins {
  struct Destroy {
    void operator()(IPluginV2* plugin) const { plugin->destroy(); }
  };
  std::unique_ptr<IPluginV2DynamicExt, Destroy> v2;
  std::unique_ptr<v_1_0::IPluginV3> v3;

  explicit Plugins(PluginFieldCollection const* fc)
      : v2(static_cast<IPluginV2DynamicExt*>(adder2d::plugin_v2_creator().createPlugin("layer", fc))),
        v3(adder2d::plugin_v3_creator().createPlugin("layer", fc, TensorRTPhase::kBUILD)) {
    CHECK((v2 != nullptr) == (v3 != nullptr));
  }
  template <typename Capability>
  Capability* capability(PluginCapabilityType type) const {
    return static_cast<Capability*>(v3->getCapabilityInterface(type));
  }
  v_1_0::IPluginV3OneBuild* build() const { return capability<v_1_0::IPluginV3OneBuild>(PluginCapabilityType::kBUILD); }
  v_1_0::IPluginV3OneRuntime* runtime() const { return capability<v_1_0::IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME); }
};

std::vector<char> stored(IPluginV2DynamicExt const& plugin) {
  std::vector<char> bytes(plugin.getSerializationSize());
  plugin.serialize(bytes.data());
  return bytes;
}

// ---- descriptions

// Extents of x, weight, bias and y, with ranks.
struct Shape {
  int32_t rank;
  int64_t extents[8];
};

std::vector<Shape> shapes_of(Layer const& p) {
  return {{4, {p.N, p.C(), p.H, p.W}}, {4, {p.K(), p.group_C, p.R, p.S}}, {1, {p.K()}}, {4, {p.N, p.K(), output_size(p, 0), output_size(p, 1)}}};
}

// Whether anything was changed.
bool spoil(Random& random, std::vector<Shape>& shapes) {
  int32_t const count = random.one_in(2) ? random.between(1, 3) : 0;
  for (int32_t i = 0; i < count; ++i) {
    Shape& shape = shapes[random.below(4)];
    int32_t const ranks[] = {-1, 0, 1, 2, 3, 4, 5, 8, 9, -0x7fffffff - 1, 0x7fffffff};
    if (random.one_in(3)) shape.rank = ranks[random.below(static_cast<int32_t>(std::size(ranks)))];
    else shape.extents[random.below(5)] = random.hostile64();
  }
  return count > 0;
}

DataType random_type(Random& random, int32_t usual) {
  return static_cast<DataType>(random.one_in(8) ? random.between(-1, 12) : usual);
}

template <typename Desc>
std::vector<Desc> descriptions(Random& random, std::vector<Shape> const& shapes, int32_t output_type) {
  std::vector<Desc> result;
  for (size_t i = 0; i < shapes.size(); ++i) {
    Desc desc{};
    desc.dims.nbDims = shapes[i].rank;
    for (int32_t j = 0; j < 8; ++j) desc.dims.d[j] = static_cast<std::decay_t<decltype(desc.dims.d[0])>>(shapes[i].extents[j]);
    desc.type = random_type(random, i == 0 ? random.below(2) : i == 3 ? output_type : 0);
    desc.format = static_cast<TensorFormat>(random.one_in(20) ? random.between(-1, 12) : 0);
    result.push_back(desc);
  }
  return result;
}

template <typename Extent>
std::vector<DimsExprsOf<Extent>> expressions(Random& random, Calculator<Extent>& calculator, std::vector<Shape> const& shapes) {
  std::vector<DimsExprsOf<Extent>> result;
  for (int32_t i = 0; i < 3; ++i) {
    DimsExprsOf<Extent> exprs{shapes[i].rank, {}};
    for (int32_t j = 0; j < 8; ++j)
      exprs.d[j] = random.one_in(99) ? nullptr : calculator.extent(static_cast<Extent>(shapes[i].extents[j]), !random.one_in(5));
    result.push_back(exprs);
  }
  return result;
}

// What a plugin that gave a shape must have given, of a layer whose attributes and shapes nothing has spoilt.
template <typename Extent>
void check_shape(DimsExprsOf<Extent> const& y, bool given, bool good, Layer const& layer) {
  if (given) {
    CHECK(y.nbDims == 4);
    for (int32_t i = 0; i < 4; ++i) CHECK(y.d[i] != nullptr);
  }
  if (!good) return;
  CHECK(given);
  int64_t const expected[4] = {layer.N, layer.K(), output_size(layer, 0), output_size(layer, 1)};
  for (int32_t i = 0; given && i < 4; ++i) CHECK(Calculator<Extent>::value(*y.d[i]) == expected[i]);
}

// ---- calls in random order

// Pointers that enqueue gets: to memory of the host, which no kernel will ever read, or to null.
struct Pointers {
  char memory[16];
  void const* inputs[3];
  void* outputs[1];
  void const* const* in;
  void* const* out;
  explicit Pointers(Random& random) : in(random.one_in(30) ? nullptr : inputs), out(random.one_in(30) ? nullptr : outputs) {
    for (void const*& input : inputs) input = random.one_in(30) ? nullptr : memory;
    outputs[0] = random.one_in(30) ? nullptr : memory;
  }
};

int32_t random_count(Random& random, int32_t usual) { return random.one_in(15) ? random.hostile32() : usual; }

void call_v2(Random& random, IPluginV2DynamicExt& plugin, Layer const& layer, bool sane) {
  std::vector<Shape> shapes = shapes_of(layer);
  bool const good = !spoil(random, shapes) && sane;
  auto const descs = descriptions<trt8::PluginTensorDesc>(random, shapes, layer.output_type);
  auto const* in = random.one_in(30) ? nullptr : descs.data();
  int32_t const nbInputs = random_count(random, 3), nbOutputs = random_count(random, 1);
  switch (random.below(6)) {
    case 0: {
      Calculator<int32_t> calculator;
      auto const exprs = expressions(random, calculator, shapes);
      bool const whole = std::all_of(exprs.begin(), exprs.end(), [](auto const& e) { return std::count(e.d, e.d + 8, nullptr) == 0; });
      auto const y = plugin.getOutputDimensions(random.hostile32(), random.one_in(30) ? nullptr : exprs.data(), nbInputs, calculator);
      check_shape(y, y.nbDims != 0, false, layer);
      if (nbInputs == 3) {
        auto const again = plugin.getOutputDimensions(0, exprs.data(), 3, calculator);
        check_shape(again, again.nbDims != 0, good && whole, layer);
      }
      break;
    }
    case 1: {
      int32_t const pos = random.one_in(4) ? random.hostile32() : random.below(4);
      bool const supported = plugin.supportsFormatCombination(pos, in, nbInputs, nbOutputs);
      CHECK(!supported || (pos >= 0 && pos < 4 && in != nullptr && nbInputs == 3 && nbOutputs == 1));
      CHECK(!supported || (static_cast<int32_t>(descs[pos].format) == 0 && static_cast<uint32_t>(descs[pos].type) < 2));
      break;
    }
    case 2: plugin.configurePlugin(nullptr, nbInputs, nullptr, nbOutputs); break;
    case 3: CHECK(plugin.getWorkspaceSize(in, nbInputs, nullptr, nbOutputs) > 0); break;
    case 4: {
      Pointers const pointers(random);
      auto const* const out = random.one_in(30) ? nullptr : &descs[3];
      int32_t const error = plugin.enqueue(in, out, pointers.in, pointers.out, nullptr, nullptr);
      CHECK(error != 0 || shapes[0].extents[0] % (int64_t{1} << 32) == 0);  // only an empty batch needs no GPU
      break;
    }
    case 5: CHECK(static_cast<int32_t>(plugin.getOutputDataType(random.hostile32(), nullptr, nbInputs)) == layer.output_type || !sane); break;
  }
}

void call_v3(Random& random, Plugins const& plugins, Layer const& layer, bool sane) {
  std::vector<Shape> shapes = shapes_of(layer);
  bool const good = !spoil(random, shapes) && sane;
  auto const now = descriptions<trt10::PluginTensorDesc>(random, shapes, layer.output_type);
  std::vector<trt10::DynamicPluginTensorDesc> dynamic;
  for (auto const& desc : now) dynamic.push_back({desc, desc.dims, desc.dims, desc.dims});
  if (random.one_in(4)) dynamic[random.below(4)].max.d[random.below(8)] = random.hostile64();
  auto const* in = random.one_in(30) ? nullptr : now.data();
  auto const* profile = random.one_in(30) ? nullptr : dynamic.data();
  int32_t const nbInputs = random_count(random, 3), nbOutputs = random_count(random, 1);
  bool const counts = nbInputs == 3 && nbOutputs == 1;
  switch (random.below(7)) {
    case 0: {
      Calculator<int64_t> calculator;
      auto const exprs = expressions(random, calculator, shapes);
      bool const whole = std::all_of(exprs.begin(), exprs.end(), [](auto const& e) { return std::count(e.d, e.d + 8, nullptr) == 0; });
      trt10::DimsExprs y{};
      bool const fails = random.one_in(10);
      if (fails) calculator.fail_after(random.below(10));
      bool const given = plugins.build()->getOutputShapes(exprs.data(), nbInputs, nullptr, random.hostile32(), random.one_in(30) ? nullptr : &y, nbOutputs, calculator) == 0;
      CHECK(!given || (counts && !fails));
      if (given) check_shape(y, true, good && whole, layer);
      break;
    }
    case 1: {
      int32_t const pos = random.one_in(4) ? random.hostile32() : random.below(4);
      bool const supported = plugins.build()->supportsFormatCombination(pos, profile, nbInputs, nbOutputs);
      CHECK(!supported || (pos >= 0 && pos < 4 && profile != nullptr && counts));
      CHECK(!supported || (static_cast<int32_t>(now[pos].format) == 0 && static_cast<uint32_t>(now[pos].type) < 2));
      break;
    }
    case 2: CHECK(plugins.build()->configurePlugin(profile, nbInputs, nullptr, nbOutputs) != 0 || (counts && profile != nullptr)); break;
    case 3: CHECK(plugins.build()->getWorkspaceSize(profile, nbInputs, nullptr, nbOutputs) > 0); break;
    case 4: CHECK(plugins.runtime()->onShapeChange(in, nbInputs, nullptr, nbOutputs) != 0 || (counts && in != nullptr)); break;
    case 5: {
      Pointers const pointers(random);
      auto const* const out = random.one_in(30) ? nullptr : &now[3];
      CHECK(plugins.runtime()->enqueue(in, out, pointers.in, pointers.out, nullptr, nullptr) != 0 || shapes[0].extents[0] == 0);
      break;
    }
    case 6: {
      DataType type = static_cast<DataType>(-1);
      bool const given = plugins.build()->getOutputDataTypes(random.one_in(9) ? nullptr : &type, nbOutputs, nullptr, nbInputs) == 0;
      CHECK(!given || (nbOutputs == 1 && (static_cast<int32_t>(type) == layer.output_type || !sane)));
      CHECK(plugins.v3->getCapabilityInterface(static_cast<PluginCapabilityType>(random.between(3, 99))) == nullptr);
      break;
    }
  }
}

// Copies that outlive their originals, and bytes that were changed on the way.
void store_and_restore(Random& random, Plugins& plugins) {
  IPluginCreator& creator = adder2d::plugin_v2_creator();
  std::vector<char> const bytes = stored(*plugins.v2);
  std::vector<char> changed = bytes;
  for (int32_t i = random.below(3); i > 0; --i) changed[random.below(static_cast<int32_t>(changed.size()))] ^= static_cast<char>(1 << random.below(8));
  if (random.one_in(5)) changed.resize(random.below(99));
  Plugins restored(nullptr);
  restored.v2.reset(static_cast<IPluginV2DynamicExt*>(creator.deserializePlugin("layer", changed.data(), changed.size())));
  CHECK(restored.v2 != nullptr || changed != bytes);
  CHECK(restored.v2 == nullptr || stored(*restored.v2) == changed);
  if (restored.v2 && random.one_in(2)) {
    restored.v2.reset(restored.v2->clone());
    CHECK(stored(*restored.v2) == changed);
  }
  plugins.v3.reset(random.one_in(2) ? plugins.v3->clone() : plugins.runtime()->attachToContext(nullptr));
  Plugins const again(plugins.runtime()->getFieldsToSerialize());
  CHECK(again.v2 != nullptr && stored(*again.v2) == bytes);
}

void fuzz_plugin(Random& random) {
  Layer const layer = random_layer(random);
  Fields const fields(random, layer);
  bool const absent = random.one_in(50);
  Plugins plugins(absent ? nullptr : &fields.collection);
  CHECK(absent || !fields.malformed || !plugins.v2);
  if (!plugins.v2 || !plugins.v3) return;
  int32_t const expected[8] = {layer.stride[0], layer.stride[1], layer.padding[0], layer.padding[1],
                               layer.dilation[0], layer.dilation[1], layer.groups, layer.output_type};
  bool const sane = memcmp(stored(*plugins.v2).data() + 8, expected, sizeof(expected)) == 0;
  for (int32_t call = random.between(1, 12); call > 0; --call) {
    if (random.one_in(8)) store_and_restore(random, plugins);
    if (random.one_in(2)) call_v2(random, *plugins.v2, layer, sane);
    else call_v3(random, plugins, layer, sane);
  }
}

// ---- the C functions

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
  bool const close = std::isfinite(expected) ? std::fabs(actual - expected) <= (eps + 2 * eps * std::sqrt(double(terms))) * magnitude + tiny
                     : std::isnan(expected)  ? std::isnan(actual)
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
        int64_t const h = p * a.stride[0] - a.padding[0] + r * a.dilation[0], w = q * a.stride[1] - a.padding[1] + s * a.dilation[1];
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
    for_taps(layer, n, k, p, q, [&](int64_t c, int64_t r, int64_t s, int64_t h, int64_t w, bool inside, int64_t channel, int64_t) {
      if (!inside) return;
      float const difference = static_cast<float>(operands.w.at(k, c, r, s)) - static_cast<float>(operands.x.at(n, channel, h, w));
      double const term = dy.at(n, k, p, q) * (difference < -1 ? -1 : difference > 1 ? 1 : difference);
      int64_t const* const stride = operands.dx.stride;
      int64_t const at = n * stride[0] + channel * stride[1] + h * stride[2] + w * stride[3];
      sums[at] += term, magnitudes[at] += std::fabs(term);
    });
  });
  for (size_t i = 0; i < sums.size(); ++i) check_close(operands.dx.data[i], sums[i], magnitudes[i], int64_t{layer.group_K} * layer.R * layer.S);

  REQUIRE(adder2d_fprop_cpu(&params.layer, threads) == 0);
  for_outputs(layer, [&](int64_t n, int64_t k, int64_t p, int64_t q) {
    double sum = 0;
    for_taps(layer, n, k, p, q, [&](int64_t c, int64_t r, int64_t s, int64_t h, int64_t w, bool inside, int64_t channel, int64_t) {
      sum += std::fabs((inside ? operands.x.at(n, channel, h, w) : 0) - operands.w.at(k, c, r, s));
    });
    double const b = bias ? operands.b[k] : 0;
    check_close(static_cast<float>(operands.y.at(n, k, p, q)), b - sum, sum + std::fabs(b), int64_t{layer.group_C} * layer.R * layer.S);
  });
}

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
    if (params.stride_h > 0) params.P = static_cast<int32_t>(adder2d_output_size(params.H, params.R, params.stride_h, params.pad_h, params.dil_h));
    if (params.stride_w > 0) params.Q = static_cast<int32_t>(adder2d_output_size(params.W, params.S, params.stride_w, params.pad_w, params.dil_w));
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
    CHECK(adder2d_fprop(&params, nullptr) == 1 && adder2d_dgrad(&dgrad, nullptr) == 1 && adder2d_wgrad(&wgrad, nullptr) == 1);
  }
  CHECK(good || adder2d_fprop_workspace(&params) + adder2d_dgrad_workspace(&dgrad) + adder2d_wgrad_workspace(&wgrad) == 0);
  if (good) {
    adder2d_fprop_workspace(&params), adder2d_dgrad_workspace(&dgrad), adder2d_wgrad_workspace(&wgrad), adder2d_wgrad_takes(&wgrad);
    CHECK(adder2d_fprop(&params, nullptr) != 0 || params.N == 0);
    CHECK(adder2d_dgrad(&dgrad, nullptr) != 0 || params.N == 0);
    CHECK(adder2d_wgrad(&wgrad, nullptr) != 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: plugin_fuzz SEED COUNT\n");
    return 2;
  }
  setenv("CUDA_VISIBLE_DEVICES", "-1", 1);
  uint64_t const seed = strtoull(argv[1], nullptr, 10), count = strtoull(argv[2], nullptr, 10);
  for (uint64_t number = seed; number < seed + count && failures == 0; ++number) {
    Random random(number);
    random.one_in(2) ? fuzz_plugin(random) : fuzz_functions(random);
    if (failures) printf("in case %llu\n", static_cast<unsigned long long>(number));
  }
  printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
