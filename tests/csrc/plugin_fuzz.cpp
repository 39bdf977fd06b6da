// Seeded random cases for the plugin and the C functions: hostile fields, ranks, extents, types, counts, pointers,
// bytes and orders of calls. The host code is compiled into this program, to run under sanitizers; kernels come from
// the library.
//
//   plugin_fuzz SEED COUNT    the cases SEED to SEED + COUNT - 1; a case depends on its number only
//
// Build: g++ -std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -rdynamic -I csrc -I tests
//        tests/csrc/plugin_fuzz.cpp tests/csrc/fuzz_functions.cpp csrc/cpu/adder2d_cpu.cpp csrc/api/check.cpp
//        csrc/tensorrt/{attributes,plugin_v2, plugin_v3}.cpp torch2trt_adder/libtorch2trt_adder.so -ldl -pthread -o
//        plugin_fuzz
//
// It hides all GPUs, so that a launch always fails: what must hold is that every call returns, and returns what it
// should.
#include <string.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "fuzz_random.h"
#include "plugin_host.h"
#include "tensorrt/plugins.h"

using namespace nvinfer1;

namespace {

// ---- fields

// The attributes of a layer as an engine of TensorRT 8 stores them.
std::vector<int32_t> stored_values(Layer const& layer) {
  std::vector<int32_t> values = {layer.stride[0],   layer.stride[1],   layer.padding[0], layer.padding[1],
                                 layer.dilation[0], layer.dilation[1], layer.groups,     layer.output_type,
                                 layer.scale,       layer.residual,    0,                0};
  memcpy(&values[10], &layer.lower, 4);
  memcpy(&values[11], &layer.upper, 4);
  return values;
}

// A field collection, and whether a creator must refuse it (values aside).
struct Fields {
  int32_t values[12];  // as they are stored
  std::vector<PluginField> list;
  PluginFieldCollection collection{};
  bool malformed = false;

  Fields(Random& random, Layer const& layer) {
    std::copy_n(stored_values(layer).begin(), 12, values);
    auto const type = PluginFieldType::kINT32;
    list = {{"stride", values, type, 2},
            {"padding", values + 2, type, 2},
            {"dilation", values + 4, type, 2},
            {"groups", values + 6, type, 1},
            {"output_type", values + 7, type, 1},
            {"scale", values + 8, type, 1},
            {"residual", values + 9, type, 1},
            {"lower", values + 10, PluginFieldType::kFLOAT32, 1},
            {"upper", values + 11, PluginFieldType::kFLOAT32, random.one_in(3) && std::isinf(layer.upper) ? 0 : 1}};
    for (int32_t i = random.one_in(2) ? random.between(1, 3) : 0; i > 0; --i) spoil(random);
    for (int32_t i = static_cast<int32_t>(list.size()) - 1; i > 0; --i) std::swap(list[i], list[random.between(0, i)]);
    collection = {static_cast<int32_t>(list.size()), list.data()};
    if (random.one_in(20))
      collection.nbFields = random.one_in(2) ? -random.between(1, 99) : 65 + random.below(1 << 30), malformed = true;
    if (random.one_in(20)) collection.fields = nullptr, malformed |= collection.nbFields != 0;
  }

 private:
  // A limit without a value is absent; of another type, the field is malformed already.
  static bool may_be_empty(PluginField const& field) {
    return field.name != nullptr && (strcmp(field.name, "lower") == 0 || strcmp(field.name, "upper") == 0);
  }

  void spoil(Random& random) {
    PluginField& field = list[random.below(static_cast<int32_t>(list.size()))];
    bool const known = field.name != nullptr && strncmp(field.name, "plugin_", 7) != 0;
    switch (random.below(9)) {
      case 0: values[random.below(12)] = random.hostile32(); break;
      case 1: field.name = nullptr, malformed = true; break;
      case 2: field.name = random.one_in(2) ? "strides" : "", malformed = true; break;
      case 3: list.push_back(field), malformed |= known; break;
      case 4: field.data = nullptr, malformed |= known && (field.length != 0 || !may_be_empty(field)); break;
      case 5:
        field.length = random.one_in(2) ? random.between(3, 1 << 20) : -random.below(9);
        malformed |= known && (field.length != 0 || !may_be_empty(field));
        break;
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
  v_1_0::IPluginV3OneRuntime* runtime() const {
    return capability<v_1_0::IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME);
  }
};

std::vector<char> stored(IPluginV2DynamicExt const& plugin) {
  std::vector<char> bytes(plugin.getSerializationSize());
  plugin.serialize(bytes.data());
  return bytes;
}

// ---- descriptions

constexpr size_t kMostTensors = 7;  // six inputs and y

// Extents of an input or of y, with ranks.
struct Shape {
  int32_t rank;
  int64_t extents[8];
};

std::vector<Shape> shapes_of(Layer const& p) {
  Shape const y = {4, {p.N, p.K(), output_size(p, 0), output_size(p, 1)}};
  std::vector<Shape> shapes = {{4, {p.N, p.C(), p.H, p.W}}, {4, {p.K(), p.group_C, p.R, p.S}}};
  for (int32_t i = 0; i < 1 + 2 * p.scale; ++i) shapes.push_back({1, {p.K()}});
  if (p.residual) shapes.push_back(y);
  shapes.push_back(y);
  return shapes;
}

// Whether anything was changed.
bool spoil(Random& random, std::vector<Shape>& shapes) {
  int32_t const count = random.one_in(2) ? random.between(1, 3) : 0;
  for (int32_t i = 0; i < count; ++i) {
    Shape& shape = shapes[random.below(static_cast<int32_t>(shapes.size()))];
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
std::vector<Desc> descriptions(Random& random, std::vector<Shape> const& shapes, Layer const& layer) {
  std::vector<Desc> result;
  for (size_t i = 0; i < shapes.size(); ++i) {
    Desc desc{};
    desc.dims.nbDims = shapes[i].rank;
    for (int32_t j = 0; j < 8; ++j)
      desc.dims.d[j] = static_cast<std::decay_t<decltype(desc.dims.d[0])>>(shapes[i].extents[j]);
    bool const y = i + 1 == shapes.size(), map = i == 0 || y || (layer.residual && i + 2 == shapes.size());
    desc.type = random_type(random, y ? layer.output_type : map ? random.below(2) : 0);
    desc.format = static_cast<TensorFormat>(random.one_in(20) ? random.between(-1, 12) : 0);
    if (map && desc.type == DataType::kHALF && random.one_in(3)) desc.format = TensorFormat::kHWC8;
    result.push_back(desc);
  }
  result.resize(kMostTensors);  // a plugin of spoilt attributes may have more inputs than the layer
  return result;
}

template <typename Extent>
std::vector<DimsExprsOf<Extent>> expressions(Random& random, Calculator<Extent>& calculator,
                                             std::vector<Shape> const& shapes) {
  std::vector<DimsExprsOf<Extent>> result;
  for (size_t i = 0; i + 1 < shapes.size(); ++i) {
    DimsExprsOf<Extent> exprs{shapes[i].rank, {}};
    for (int32_t j = 0; j < 8; ++j)
      exprs.d[j] =
          random.one_in(99) ? nullptr : calculator.extent(static_cast<Extent>(shapes[i].extents[j]), !random.one_in(5));
    result.push_back(exprs);
  }
  result.resize(kMostTensors - 1);
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
  void const* inputs[6];
  void* outputs[1];
  void const* const* in;
  void* const* out;
  explicit Pointers(Random& random)
      : in(random.one_in(30) ? nullptr : inputs), out(random.one_in(30) ? nullptr : outputs) {
    for (void const*& input : inputs) input = random.one_in(30) ? nullptr : memory;
    outputs[0] = random.one_in(30) ? nullptr : memory;
  }
};

// Whether any tensor of an Adder2d layer may be so.
template <typename Desc>
bool is_offered(Desc const& desc) {
  bool const half = desc.type == DataType::kHALF;
  if (desc.format == TensorFormat::kHWC8) return half;
  return desc.format == TensorFormat::kLINEAR && (half || desc.type == DataType::kFLOAT);
}

int32_t random_count(Random& random, int32_t usual) { return random.one_in(15) ? random.hostile32() : usual; }

// `own` is the number of inputs of the plugin, which is that of `layer` where it is `sane`.
void call_v2(Random& random, IPluginV2DynamicExt& plugin, Layer const& layer, int32_t own, bool sane) {
  std::vector<Shape> shapes = shapes_of(layer);
  bool const good = !spoil(random, shapes) && sane;
  auto const descs = descriptions<trt8::PluginTensorDesc>(random, shapes, layer);
  auto const* in = random.one_in(30) ? nullptr : descs.data();
  int32_t const nbInputs = random_count(random, own), nbOutputs = random_count(random, 1);
  switch (random.below(6)) {
    case 0: {
      Calculator<int32_t> calculator;
      auto const exprs = expressions(random, calculator, shapes);
      bool const whole = std::all_of(exprs.begin(), exprs.begin() + layer.nb_inputs(),
                                     [](auto const& e) { return std::count(e.d, e.d + 8, nullptr) == 0; });
      auto const y = plugin.getOutputDimensions(random.hostile32(), random.one_in(30) ? nullptr : exprs.data(),
                                                nbInputs, calculator);
      check_shape(y, y.nbDims != 0, false, layer);
      if (nbInputs == own) {
        auto const again = plugin.getOutputDimensions(0, exprs.data(), own, calculator);
        check_shape(again, again.nbDims != 0, good && whole, layer);
      }
      break;
    }
    case 1: {
      int32_t const pos = random.one_in(4) ? random.hostile32() : random.below(own + 1);
      bool const supported = plugin.supportsFormatCombination(pos, in, nbInputs, nbOutputs);
      CHECK(!supported || (pos >= 0 && pos <= own && in != nullptr && nbInputs == own && nbOutputs == 1));
      CHECK(!supported || is_offered(descs[pos]));
      break;
    }
    case 2: plugin.configurePlugin(nullptr, nbInputs, nullptr, nbOutputs); break;
    case 3: CHECK(plugin.getWorkspaceSize(in, nbInputs, nullptr, nbOutputs) > 0); break;
    case 4: {
      Pointers const pointers(random);
      auto const* const out = random.one_in(30) ? nullptr : &descs[layer.nb_inputs()];
      int32_t const error = plugin.enqueue(in, out, pointers.in, pointers.out, nullptr, nullptr);
      CHECK(error != 0 || shapes[0].extents[0] % (int64_t{1} << 32) == 0);  // only an empty batch needs no GPU
      break;
    }
    case 5:
      CHECK(static_cast<int32_t>(plugin.getOutputDataType(random.hostile32(), nullptr, nbInputs)) ==
                layer.output_type ||
            !sane);
      break;
  }
}

void call_v3(Random& random, Plugins const& plugins, Layer const& layer, int32_t own, bool sane) {
  std::vector<Shape> shapes = shapes_of(layer);
  bool const good = !spoil(random, shapes) && sane;
  auto const now = descriptions<trt10::PluginTensorDesc>(random, shapes, layer);
  std::vector<trt10::DynamicPluginTensorDesc> dynamic;
  for (auto const& desc : now) dynamic.push_back({desc, desc.dims, desc.dims, desc.dims});
  if (random.one_in(4)) dynamic[random.below(kMostTensors)].max.d[random.below(8)] = random.hostile64();
  auto const* in = random.one_in(30) ? nullptr : now.data();
  auto const* profile = random.one_in(30) ? nullptr : dynamic.data();
  int32_t const nbInputs = random_count(random, own), nbOutputs = random_count(random, 1);
  bool const counts = nbInputs == own && nbOutputs == 1;
  switch (random.below(7)) {
    case 0: {
      Calculator<int64_t> calculator;
      auto const exprs = expressions(random, calculator, shapes);
      bool const whole = std::all_of(exprs.begin(), exprs.begin() + layer.nb_inputs(),
                                     [](auto const& e) { return std::count(e.d, e.d + 8, nullptr) == 0; });
      trt10::DimsExprs y{};
      bool const fails = random.one_in(10);
      if (fails) calculator.fail_after(random.below(10));
      bool const given = plugins.build()->getOutputShapes(exprs.data(), nbInputs, nullptr, random.hostile32(),
                                                          random.one_in(30) ? nullptr : &y, nbOutputs, calculator) == 0;
      CHECK(!given || (counts && !fails));
      if (given) check_shape(y, true, good && whole, layer);
      break;
    }
    case 1: {
      int32_t const pos = random.one_in(4) ? random.hostile32() : random.below(own + 1);
      bool const supported = plugins.build()->supportsFormatCombination(pos, profile, nbInputs, nbOutputs);
      CHECK(!supported || (pos >= 0 && pos <= own && profile != nullptr && counts));
      CHECK(!supported || is_offered(now[pos]));
      break;
    }
    case 2:
      CHECK(plugins.build()->configurePlugin(profile, nbInputs, nullptr, nbOutputs) != 0 ||
            (counts && profile != nullptr));
      break;
    case 3: CHECK(plugins.build()->getWorkspaceSize(profile, nbInputs, nullptr, nbOutputs) > 0); break;
    case 4:
      CHECK(plugins.runtime()->onShapeChange(in, nbInputs, nullptr, nbOutputs) != 0 || (counts && in != nullptr));
      break;
    case 5: {
      Pointers const pointers(random);
      auto const* const out = random.one_in(30) ? nullptr : &now[layer.nb_inputs()];
      CHECK(plugins.runtime()->enqueue(in, out, pointers.in, pointers.out, nullptr, nullptr) != 0 ||
            shapes[0].extents[0] == 0);
      break;
    }
    case 6: {
      DataType type = static_cast<DataType>(-1);
      bool const given =
          plugins.build()->getOutputDataTypes(random.one_in(9) ? nullptr : &type, nbOutputs, nullptr, nbInputs) == 0;
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
  for (int32_t i = random.below(3); i > 0; --i)
    changed[random.below(static_cast<int32_t>(changed.size()))] ^= static_cast<char>(1 << random.below(8));
  if (random.one_in(5)) changed.resize(random.below(99));
  Plugins restored(nullptr);
  restored.v2.reset(
      static_cast<IPluginV2DynamicExt*>(creator.deserializePlugin("layer", changed.data(), changed.size())));
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
  int32_t values[12];
  memcpy(values, stored(*plugins.v2).data() + 8, sizeof(values));
  bool const sane = memcmp(values, stored_values(layer).data(), sizeof(values)) == 0;
  int32_t const own = 3 + 2 * values[8] + values[9];
  for (int32_t call = random.between(1, 12); call > 0; --call) {
    if (random.one_in(8)) store_and_restore(random, plugins);
    if (random.one_in(2)) call_v2(random, *plugins.v2, layer, own, sane);
    else call_v3(random, plugins, layer, own, sane);
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
