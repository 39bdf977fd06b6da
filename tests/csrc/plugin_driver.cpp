// Plays TensorRT for both plugin generations, without TensorRT: creator -> plugin -> shapes and formats -> serialise ->
// create again -> clone -> delete, and with a GPU enqueue against a double-precision loop.
//
//   plugin_driver LIBRARY contract              everything that needs no GPU
//   plugin_driver LIBRARY offers VERSION [HOST] how many creators a caller of that version gets (0: version unknown)
//   plugin_driver LIBRARY registry HOST STEPS   the same checks on the creator that a real registry hands out;
//                                               HOST is libnvinfer or the like, STEPS of dlopen, load, register, unload
//   plugin_driver LIBRARY gpu                   enqueue on real data
//
// Build: g++ -std=c++17 -rdynamic -I csrc -I tests tests/csrc/plugin_driver.cpp -ldl -o plugin_driver
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "plugin_host.h"

using namespace nvinfer1;

// The library takes the object that calls getPluginCreators for a TensorRT of this version.
static int32_t caller_version = 0;
extern "C" int32_t getInferLibVersion() { return caller_version; }

// ---- problems

// One layer: attributes and sizes.
struct Problem {
  int32_t N, C, H, W, K, R, S;
  int32_t stride[2], padding[2], dilation[2];
  int32_t groups;
  int32_t P() const { return (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) / stride[0] + 1; }
  int32_t Q() const { return (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) / stride[1] + 1; }
};

static Problem const kProblems[] = {
    {1, 1, 1, 1, 1, 1, 1, {1, 1}, {0, 0}, {1, 1}, 1},    {2, 3, 7, 9, 5, 3, 3, {1, 1}, {1, 1}, {1, 1}, 1},
    {3, 16, 14, 11, 8, 3, 2, {2, 1}, {1, 0}, {1, 2}, 1}, {5, 12, 13, 13, 18, 3, 3, {2, 2}, {1, 1}, {1, 1}, 6},
    {1, 64, 8, 8, 70, 3, 3, {1, 1}, {1, 1}, {1, 1}, 1},  {8, 20, 12, 12, 50, 5, 5, {1, 1}, {0, 0}, {1, 1}, 1},
    {2, 7, 19, 5, 7, 1, 3, {3, 2}, {2, 4}, {2, 2}, 7},   {4, 512, 4, 4, 33, 3, 3, {1, 1}, {1, 1}, {1, 1}, 1},
};

static PluginFieldType const kFloat32Field = static_cast<PluginFieldType>(1);
static PluginFieldType const kCharField = static_cast<PluginFieldType>(6);

struct FieldValues {
  int32_t stride[2], padding[2], dilation[2], groups, output_type;
  int32_t scale = 0, residual = 0;
  float lower = -INFINITY, upper = INFINITY;
  int32_t nb_inputs() const { return 3 + 2 * scale + residual; }
  bool has_residual(int32_t input) const { return residual && input == nb_inputs() - 1; }
};

static FieldValues const kDefaults = {{1, 1}, {0, 0}, {1, 1}, 1, 0};

// What follows the sum.
struct Epilogue {
  int32_t scale, residual;
  float lower, upper;
};

static Epilogue const kEpilogues[] = {
    {0, 0, -INFINITY, INFINITY}, {1, 0, -INFINITY, INFINITY}, {0, 1, -300, 6}, {1, 1, 0, INFINITY}};

static FieldValues values_of(Problem const& p, int32_t output_type, Epilogue const& e = kEpilogues[0]) {
  return {{p.stride[0], p.stride[1]}, {p.padding[0], p.padding[1]}, {p.dilation[0], p.dilation[1]}, p.groups, output_type,
          e.scale, e.residual, e.lower, e.upper};
}

// Runs it for each type of y and each epilogue.
static void for_each_kind(std::function<void(int32_t, Epilogue const&)> const& run) {
  for (int32_t output_type : {0, 1})
    for (Epilogue const& epilogue : kEpilogues) run(output_type, epilogue);
}

static bool same(FieldValues const& a, FieldValues const& b) { return memcmp(&a, &b, sizeof(a)) == 0; }

// A collection over `values`, with pairs of two numbers.
struct Fields {
  explicit Fields(FieldValues const& v) : values(v) {
    list = {{"stride", values.stride, PluginFieldType::kINT32, 2},
            {"padding", values.padding, PluginFieldType::kINT32, 2},
            {"dilation", values.dilation, PluginFieldType::kINT32, 2},
            {"groups", &values.groups, PluginFieldType::kINT32, 1},
            {"output_type", &values.output_type, PluginFieldType::kINT32, 1},
            {"scale", &values.scale, PluginFieldType::kINT32, 1},
            {"residual", &values.residual, PluginFieldType::kINT32, 1},
            {"lower", &values.lower, PluginFieldType::kFLOAT32, 1},
            {"upper", &values.upper, PluginFieldType::kFLOAT32, std::isinf(values.upper) ? 0 : 1}};
    collection = {static_cast<int32_t>(list.size()), list.data()};
  }
  FieldValues values;
  std::vector<PluginField> list;
  PluginFieldCollection collection;
};

static bool has_all_fields(PluginFieldCollection const* fc) {
  char const* const names[] = {"stride", "padding", "dilation", "groups", "output_type", "scale", "residual", "lower", "upper"};
  if (fc == nullptr || fc->nbFields != 9) return false;
  for (int32_t i = 0; i < 9; ++i) {
    PluginField const& field = fc->fields[i];
    auto const type = i < 7 ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32;
    if (strcmp(field.name, names[i]) != 0 || field.type != type || field.length != (i < 3 ? 2 : 1)) return false;
  }
  return true;
}

static FieldValues read_fields(PluginFieldCollection const* fc) {
  FieldValues values{};
  if (!has_all_fields(fc)) return values;
  void* const targets[] = {values.stride, values.padding,   values.dilation, &values.groups, &values.output_type,
                           &values.scale, &values.residual, &values.lower,   &values.upper};
  for (int32_t i = 0; i < 9; ++i) memcpy(targets[i], fc->fields[i].data, fc->fields[i].length * sizeof(int32_t));
  return values;
}

// Field lists that a creator must accept, with what they mean, and lists that it must refuse.
static void for_good_fields(std::function<void(PluginFieldCollection const*, FieldValues const&)> const& run) {
  run(nullptr, kDefaults);
  PluginFieldCollection const none{0, nullptr};
  run(&none, kDefaults);
  for (Problem const& p : kProblems)
    for_each_kind([&](int32_t output_type, Epilogue const& epilogue) {
      Fields fields(values_of(p, output_type, epilogue));
      run(&fields.collection, fields.values);
    });
  int32_t const two = 2, pair[2] = {3, 4};
  PluginField const some[] = {{"padding", &two, PluginFieldType::kINT32, 1},
                              {"plugin_version", "1", kCharField, 2},
                              {"stride", pair, PluginFieldType::kINT32, 2},
                              {"dilation", &two, PluginFieldType::kINT32, 1}};
  PluginFieldCollection const fc{4, some};
  run(&fc, {{3, 4}, {2, 2}, {2, 2}, 1, 0});
  PluginFieldCollection const unused{0, some};
  run(&unused, kDefaults);
}

static void for_bad_fields(std::function<void(PluginFieldCollection const*)> const& run) {
  int32_t const good[3] = {1, 1, 1}, zero[2] = {1, 0}, minus = -1, two = 2, huge = 0x7fffffff;
  float const one = 1, nan = NAN, infinite[] = {INFINITY, -INFINITY};
  PluginField const bad[] = {
      {"stride", zero, PluginFieldType::kINT32, 2},       {"stride", &minus, PluginFieldType::kINT32, 1},
      {"padding", &minus, PluginFieldType::kINT32, 1},    {"padding", &huge, PluginFieldType::kINT32, 1},
      {"dilation", zero, PluginFieldType::kINT32, 2},     {"groups", &zero[1], PluginFieldType::kINT32, 1},
      {"groups", &minus, PluginFieldType::kINT32, 1},     {"groups", good, PluginFieldType::kINT32, 2},
      {"output_type", &two, PluginFieldType::kINT32, 1},  {"output_type", &minus, PluginFieldType::kINT32, 1},
      {"stride", good, PluginFieldType::kINT32, 3},       {"stride", good, PluginFieldType::kINT32, 0},
      {"stride", nullptr, PluginFieldType::kINT32, 2},    {"stride", &one, kFloat32Field, 1},
      {"scale", &two, PluginFieldType::kINT32, 1},        {"scale", &minus, PluginFieldType::kINT32, 1},
      {"scale", good, PluginFieldType::kINT32, 2},        {"residual", &two, PluginFieldType::kINT32, 1},
      {"residual", &one, kFloat32Field, 1},               {"scale", good, PluginFieldType::kINT32, 0},
      {"lower", &nan, kFloat32Field, 1},                  {"upper", &nan, kFloat32Field, 1},
      {"lower", good, PluginFieldType::kINT32, 1},        {"upper", &one, kFloat32Field, 2},
      {"lower", nullptr, kFloat32Field, 1},               {"upper", &one, kFloat32Field, -1},
  };
  for (PluginField const& field : bad) {
    PluginFieldCollection const fc{1, &field};
    run(&fc);
  }
  PluginField const twice[] = {{"stride", good, PluginFieldType::kINT32, 2}, {"stride", good, PluginFieldType::kINT32, 2}};
  PluginField const crossed[] = {{"lower", &one, kFloat32Field, 1}, {"upper", infinite + 1, kFloat32Field, 1}};
  PluginField const unknown[] = {{"strides", good, PluginFieldType::kINT32, 2}};  // as ONNX names it for Conv
  PluginField const nameless[] = {{nullptr, good, PluginFieldType::kINT32, 2}};
  PluginFieldCollection const damaged[] = {{2, twice},   {2, crossed}, {1, unknown}, {1, nameless},
                                           {3, nullptr}, {-1, twice},  {0x7fffffff, twice}};
  for (PluginFieldCollection const& fc : damaged) run(&fc);
}

// ---- tensor descriptions

template <typename Dims>
static Dims dims(std::initializer_list<int64_t> extents) {
  Dims result{static_cast<int32_t>(extents.size()), {}};
  int32_t i = 0;
  for (int64_t extent : extents) result.d[i++] = static_cast<decltype(result.d[0] + 0)>(extent);
  return result;
}

// What the tensors of one layer have in common with those of no other.
struct Types {
  int32_t x = 0, y = 0, residual = 0;
  TensorFormat x_format = TensorFormat::kLINEAR, y_format = TensorFormat::kLINEAR, residual_format = TensorFormat::kLINEAR;
};

// The inputs and y of one problem with batch N.
template <typename Desc>
static std::vector<Desc> tensors(Problem const& p, int32_t N, Types const& types, FieldValues const& values) {
  using Dims = decltype(Desc::dims);
  auto const type = [](int32_t value) { return static_cast<DataType>(value); };
  std::vector<Desc> result = {{dims<Dims>({N, p.C, p.H, p.W}), type(types.x), types.x_format, 1.f},
                              {dims<Dims>({p.K, p.C / p.groups, p.R, p.S}), type(0), TensorFormat::kLINEAR, 1.f}};
  for (int32_t i = 0; i < 1 + 2 * values.scale; ++i) result.push_back({dims<Dims>({p.K}), type(0), TensorFormat::kLINEAR, 1.f});
  Dims const y = dims<Dims>({N, p.K, p.P(), p.Q()});
  if (values.residual) result.push_back({y, type(types.residual), types.residual_format, 1.f});
  result.push_back({y, type(types.y), types.y_format, 1.f});
  return result;
}

static std::vector<trt10::DynamicPluginTensorDesc> profile(Problem const& p, int32_t N, Types const& types, FieldValues const& values) {
  std::vector<trt10::DynamicPluginTensorDesc> result;
  auto const smallest = tensors<trt10::PluginTensorDesc>(p, 1, types, values);
  auto const largest = tensors<trt10::PluginTensorDesc>(p, N, types, values);
  for (size_t i = 0; i < largest.size(); ++i) {
    result.push_back({largest[i], smallest[i].dims, largest[i].dims, largest[i].dims});
    if (largest[i].dims.nbDims == 4 && i != 1) result[i].desc.dims.d[0] = -1;
  }
  return result;
}

// Checks shapes through `run(inputs, builder, y)`, which says whether the plugin gave one.
template <typename Extent>
static void check_output_shape(Problem const& p, FieldValues const& values,
                               std::function<bool(DimsExprsOf<Extent> const*, ExprBuilderOf<Extent>&, DimsExprsOf<Extent>*)> run) {
  for (bool isConstant : {true, false}) {
    Calculator<Extent> calculator;
    auto const exprs = [&](std::initializer_list<int32_t> extents, bool constant) {
      DimsExprsOf<Extent> result{static_cast<int32_t>(extents.size()), {}};
      int32_t i = 0;
      for (int32_t extent : extents) result.d[i++] = calculator.extent(extent, constant);
      return result;
    };
    std::vector<DimsExprsOf<Extent>> inputs = {exprs({p.N, p.C, p.H, p.W}, isConstant),
                                               exprs({p.K, p.C / p.groups, p.R, p.S}, true)};
    for (int32_t i = 0; i < 1 + 2 * values.scale; ++i) inputs.push_back(exprs({p.K}, true));
    if (values.residual) inputs.push_back(exprs({p.N, p.K, p.P(), p.Q()}, isConstant));
    DimsExprsOf<Extent> y{};
    CHECK(run(inputs.data(), calculator, &y));
    CHECK(y.nbDims == 4);
    int32_t const expected[4] = {p.N, p.K, p.P(), p.Q()};
    for (int32_t i = 0; i < 4 && y.nbDims == 4; ++i) CHECK(Calculator<Extent>::value(*y.d[i]) == expected[i]);

    auto const refused = [&](int32_t input, DimsExprsOf<Extent> const& wrong) {
      std::vector<DimsExprsOf<Extent>> changed = inputs;
      changed[input] = wrong;
      CHECK(!run(changed.data(), calculator, &y));
    };
    for (int32_t input = 0; input < values.nb_inputs(); ++input)
      for (int32_t rank : {-1, 0, 2, 8, 9}) {  // unknown, a scalar, wrong, the most that there may be, and one more
        DimsExprsOf<Extent> wrong{rank, {}};
        for (int32_t i = 0; i < std::min(rank, 8); ++i) wrong.d[i] = calculator.extent(1, true);
        if (input < 2 || rank != -1) refused(input, wrong);
      }
    refused(0, {4, {inputs[0].d[0], nullptr, inputs[0].d[2], inputs[0].d[3]}});
    refused(0, exprs({p.C, p.H, p.W}, true));
    refused(1, exprs({p.K, p.C / p.groups}, true));
    refused(2, exprs({1, p.K}, true));
    refused(2, exprs({p.K + 1}, true));
    if (isConstant) refused(0, exprs({p.N, p.C + 1, p.H, p.W}, true));
    if (isConstant) refused(1, exprs({p.K, p.C / p.groups, p.H + 2 * p.padding[0] + 1, p.S}, true));  // does not fit
    for (int32_t input = 3; input < values.nb_inputs(); ++input)
      if (!values.has_residual(input)) refused(input, exprs({p.K + 1}, true));
    if (values.residual) {
      int32_t const at = values.nb_inputs() - 1;
      refused(at, exprs({p.N, p.K + 1, p.P(), p.Q()}, true));
      refused(at, exprs({p.K, p.P(), p.Q()}, true));
      if (isConstant) refused(at, exprs({p.N + 1, p.K, p.P(), p.Q()}, true));
      if (isConstant) refused(at, exprs({p.N, p.K, p.P() + 1, p.Q()}, true));
      if (isConstant) refused(at, exprs({p.N, p.K, p.P(), 1 + p.Q()}, true));
    }
    for (int32_t operations = 0; operations < 10; ++operations) {
      calculator.fail_after(operations);
      refused(0, inputs[0]);
    }
  }
}

// Types and formats as the layer promises them, through `run(position, type, format)`. The residual is float16 in kHWC8.
static void check_formats(Problem const& p, FieldValues const& values, std::function<bool(int32_t, DataType, TensorFormat)> const& run) {
  constexpr int32_t kLinear = 0, kHWC8 = 2;
  int32_t const y = values.nb_inputs();
  for (int32_t pos = 0; pos <= y; ++pos)
    for (int32_t type = 0; type < 12; ++type)
      for (int32_t format = 0; format < 13; ++format) {
        bool const map = pos == 0 || values.has_residual(pos);
        bool const good_type = map ? type == 0 || type == 1 : pos == y ? type == values.output_type : type == 0;
        // y in kHWC8 has no filling, and is written as a float16 residual is read.
        bool const channels_last = format == kHWC8 && type == 1 && (map || (pos == y && p.K % 8 == 0));
        bool const linear = format == kLinear && !(pos == y && values.residual && type == 1);
        CHECK(run(pos, static_cast<DataType>(type), static_cast<TensorFormat>(format)) == (good_type && (linear || channels_last)));
      }
}

// What enqueue must refuse before it launches anything: null, ranks and types that the layer does not have.
template <typename Desc, typename Run>
static void check_enqueue(std::vector<Desc> const& good, FieldValues const& values, Run const& run) {
  constexpr int32_t kInvalidValue = 1;  // any other error comes from a launch
  int32_t const n = values.nb_inputs();
  void* const there = const_cast<Desc*>(good.data());
  std::vector<void const*> pointers(n, there);
  void const* const* const inputs = pointers.data();
  void* outputs[1] = {there};
  CHECK(run(nullptr, &good[n], inputs, outputs) == kInvalidValue &&
        run(good.data(), nullptr, inputs, outputs) == kInvalidValue);
  CHECK(run(good.data(), &good[n], nullptr, outputs) == kInvalidValue &&
        run(good.data(), &good[n], inputs, nullptr) == kInvalidValue);
  for (void const*& input : pointers) {
    input = nullptr;
    CHECK(run(good.data(), &good[n], inputs, outputs) == kInvalidValue);
    input = there;
  }
  outputs[0] = nullptr;
  CHECK(run(good.data(), &good[n], inputs, outputs) == kInvalidValue);
  outputs[0] = there;
  for (int32_t tensor = 0; tensor <= n; ++tensor) {
    for (int32_t rank : {-1, 0, 3, 9, 0x7fffffff}) {
      auto wrong = good;
      wrong[tensor].dims.nbDims = rank;
      CHECK(run(wrong.data(), &wrong[n], inputs, outputs) == kInvalidValue);
    }
    for (int32_t type : {2, 3, 7}) {  // INT8, whose number is ours of bfloat16, INT32, and TensorRT's own BF16
      auto wrong = good;
      for (int32_t i = tensor; i < (tensor == 1 ? 3 : tensor + 1); ++i)
        wrong[i].type = static_cast<DataType>(type);  // bias too
      CHECK(run(wrong.data(), &wrong[n], inputs, outputs) == kInvalidValue);
    }
    for (int32_t format : {-1, 1, 5, 8}) {  // formats that the layer does not offer
      auto wrong = good;
      wrong[tensor].format = static_cast<TensorFormat>(format);
      if (tensor == 0 || tensor == n || values.has_residual(tensor))
        CHECK(run(wrong.data(), &wrong[n], inputs, outputs) == kInvalidValue);
    }
  }
  auto wrong = good;
  wrong[0].type = DataType::kFLOAT;
  wrong[0].format = TensorFormat::kHWC8;  // of float16 only
  CHECK(run(wrong.data(), &wrong[n], inputs, outputs) == kInvalidValue);
  if (values.scale)
    for (int32_t tensor : {3, 4}) {
      wrong = good;
      wrong[tensor].type = DataType::kHALF;
      CHECK(run(wrong.data(), &wrong[n], inputs, outputs) == kInvalidValue);
    }
  if (values.residual)
    for (int32_t axis = 0; axis < 4; ++axis) {
      wrong = good;
      wrong[n - 1].dims.d[axis] += 1;
      CHECK(run(wrong.data(), &wrong[n], inputs, outputs) == kInvalidValue);
    }
}


// ---- TensorRT 10 and newer

static void check_v3(v_1_0::IPluginCreatorV3One& creator) {
  using namespace v_1_0;
  CHECK(creator.getAPILanguage() == APILanguage::kCPP);
  CHECK(std::string(creator.getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE");
  CHECK(creator.getInterfaceInfo().major == 1 && creator.getInterfaceInfo().minor == 0);
  CHECK(std::string(creator.getPluginName()) == "Adder2d");
  CHECK(std::string(creator.getPluginVersion()) == "1");
  CHECK(std::string(creator.getPluginNamespace()).empty());
  CHECK(has_all_fields(creator.getFieldNames()));
  for_bad_fields([&](PluginFieldCollection const* fc) { CHECK(creator.createPlugin("bad", fc, TensorRTPhase::kBUILD) == nullptr); });

  for_good_fields([&](PluginFieldCollection const* fc, FieldValues const& expected) {
    std::unique_ptr<IPluginV3> plugin(creator.createPlugin("layer", fc, TensorRTPhase::kBUILD));
    REQUIRE(plugin != nullptr);
    CHECK(std::string(plugin->getInterfaceInfo().kind) == "PLUGIN");
    auto* core = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
    auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    REQUIRE(core && build && runtime);
    CHECK(plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(3)) == nullptr);
    CHECK(std::string(core->getInterfaceInfo().kind) == "PLUGIN_V3ONE_CORE");
    CHECK(std::string(build->getInterfaceInfo().kind) == "PLUGIN_V3ONE_BUILD");
    CHECK(std::string(runtime->getInterfaceInfo().kind) == "PLUGIN_V3ONE_RUNTIME");
    CHECK(std::string(core->getPluginName()) == "Adder2d" && std::string(core->getPluginVersion()) == "1");
    CHECK(std::string(core->getPluginNamespace()).empty());
    CHECK(build->getNbOutputs() == 1);
    CHECK(build->getNbTactics() == 0 && runtime->setTactic(0) == 0);
    DataType const inputs[3] = {DataType::kHALF, DataType::kFLOAT, DataType::kFLOAT};
    DataType output = static_cast<DataType>(-1);
    CHECK(build->getOutputDataTypes(&output, 1, inputs, 3) == 0);
    CHECK(static_cast<int32_t>(output) == expected.output_type);

    // As an engine does: fields -> creator in the runtime phase, and clones that outlive their originals.
    std::unique_ptr<IPluginV3> again(creator.createPlugin("layer", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    REQUIRE(again != nullptr);
    std::unique_ptr<IPluginV3> clone(again->clone());
    again.reset();
    auto* clone_runtime = static_cast<IPluginV3OneRuntime*>(clone->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::unique_ptr<IPluginV3> attached(clone_runtime->attachToContext(nullptr));
    clone.reset();
    REQUIRE(attached != nullptr);
    auto* last = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    CHECK(same(read_fields(last->getFieldsToSerialize()), expected));
  });

  for (Problem const& p : kProblems)
    for_each_kind([&](int32_t output_type, Epilogue const& epilogue) {
      FieldValues const values = values_of(p, output_type, epilogue);
      int32_t const n = values.nb_inputs();
      Types types;
      types.x = types.residual = 1;
      types.y = output_type;
      types.residual_format = TensorFormat::kHWC8;
      Fields const fields(values);
      std::unique_ptr<IPluginV3> plugin(creator.createPlugin("layer", &fields.collection, TensorRTPhase::kBUILD));
      REQUIRE(plugin != nullptr);
      auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
      auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
      check_output_shape<int64_t>(p, values, [&](trt10::DimsExprs const* in, trt10::IExprBuilder& builder, trt10::DimsExprs* y) {
        return build->getOutputShapes(in, n, nullptr, 0, y, 1, builder) == 0;
      });
      auto const good = profile(p, 8, types, values);
      check_formats(p, values, [&](int32_t pos, DataType type, TensorFormat format) {
        auto changed = good;
        changed[pos].desc.type = type;
        changed[pos].desc.format = format;
        return build->supportsFormatCombination(pos, changed.data(), n, 1);
      });
      CHECK(build->configurePlugin(good.data(), n, &good[n], 1) == 0);
      CHECK(build->configurePlugin(good.data(), n - 1, &good[n], 1) != 0 &&
            build->configurePlugin(good.data(), n, &good[n], 2) != 0);
      CHECK(build->configurePlugin(nullptr, n, nullptr, 1) != 0);
      for (int32_t pos : {-1, n + 1, 0x7fffffff}) CHECK(!build->supportsFormatCombination(pos, good.data(), n, 1));
      CHECK(!build->supportsFormatCombination(0, nullptr, n, 1) && !build->supportsFormatCombination(0, good.data(), n + 1, 1));
      CHECK(build->getOutputDataTypes(nullptr, 1, nullptr, 3) != 0);
      auto wrong = good;
      wrong[1].desc.dims.d[1] = wrong[1].min.d[1] = wrong[1].max.d[1] = wrong[1].opt.d[1] = p.C / p.groups + 1;
      CHECK(build->configurePlugin(wrong.data(), n, &wrong[n], 1) != 0);
      auto const now = tensors<trt10::PluginTensorDesc>(p, p.N, types, values);
      CHECK(runtime->onShapeChange(now.data(), n, &now[n], 1) == 0);
      CHECK(runtime->onShapeChange(now.data(), n - 1, &now[n], 1) != 0 && runtime->onShapeChange(nullptr, n, &now[n], 1) != 0);
      check_enqueue(now, values, [&](trt10::PluginTensorDesc const* in, trt10::PluginTensorDesc const* out, void const* const* inputs,
                             void* const* outputs) { return runtime->enqueue(in, out, inputs, outputs, nullptr, nullptr); });
      auto unfit = now;
      unfit[n].dims.d[2] += 1;
      CHECK(runtime->enqueue(unfit.data(), &unfit[n], nullptr, nullptr, nullptr, nullptr) != 0);
    });
}

// ---- TensorRT 8.5 to 9.x

struct Destroy {
  void operator()(IPluginV2* plugin) const { plugin->destroy(); }
};
using PluginV2 = std::unique_ptr<IPluginV2DynamicExt, Destroy>;

static PluginV2 dynamic(IPluginV2* plugin) { return PluginV2(static_cast<IPluginV2DynamicExt*>(plugin)); }

static FieldValues stored(IPluginV2DynamicExt& plugin) {
  std::vector<char> bytes(plugin.getSerializationSize());
  plugin.serialize(bytes.data());
  FieldValues values{};
  if (bytes.size() == 8 + sizeof(values)) memcpy(&values, bytes.data() + 8, sizeof(values));
  return values;
}

static void check_v2(IPluginCreator& creator) {
  CHECK(creator.getTensorRTVersion() == 8500);
  CHECK(std::string(creator.getPluginName()) == "Adder2d");
  CHECK(std::string(creator.getPluginVersion()) == "1");
  CHECK(std::string(creator.getPluginNamespace()).empty());
  CHECK(has_all_fields(creator.getFieldNames()));
  for_bad_fields([&](PluginFieldCollection const* fc) { CHECK(creator.createPlugin("bad", fc) == nullptr); });

  for_good_fields([&](PluginFieldCollection const* fc, FieldValues const& expected) {
    PluginV2 plugin = dynamic(creator.createPlugin("layer", fc));
    REQUIRE(plugin != nullptr);
    CHECK(plugin->getTensorRTVersion() == 0x03002134);
    CHECK(std::string(plugin->getPluginType()) == "Adder2d" && std::string(plugin->getPluginVersion()) == "1");
    CHECK(std::string(plugin->getPluginNamespace()).empty());
    CHECK(plugin->getNbOutputs() == 1);
    CHECK(plugin->initialize() == 0);
    DataType const inputs[3] = {DataType::kHALF, DataType::kFLOAT, DataType::kFLOAT};
    CHECK(static_cast<int32_t>(plugin->getOutputDataType(0, inputs, 3)) == expected.output_type);

    std::vector<char> bytes(plugin->getSerializationSize());
    plugin->serialize(bytes.data());
    PluginV2 again = dynamic(creator.deserializePlugin("layer", bytes.data(), bytes.size()));
    REQUIRE(again != nullptr);
    again->setPluginNamespace("somewhere");
    PluginV2 clone(again->clone());
    again.reset();
    REQUIRE(clone != nullptr);
    CHECK(std::string(clone->getPluginNamespace()) == "somewhere");
    CHECK(same(stored(*clone), expected));
    plugin->terminate();

    CHECK(creator.deserializePlugin("layer", bytes.data(), bytes.size() - 1) == nullptr);
    CHECK(creator.deserializePlugin("layer", bytes.data(), 0) == nullptr);
    CHECK(creator.deserializePlugin("layer", nullptr, bytes.size()) == nullptr);
    // magic, layout, a value, a switch
    for (size_t place : {size_t{0}, size_t{4}, size_t{8 + offsetof(FieldValues, groups) + 3}, size_t{8 + offsetof(FieldValues, scale) + 2}}) {
      std::vector<char> damaged = bytes;
      damaged[place] ^= '\x80';
      CHECK(creator.deserializePlugin("layer", damaged.data(), damaged.size()) == nullptr);
    }
  });

  // Engines built before there was an epilogue.
  int32_t const layout_1[] = {0x32444441, 1, 2, 3, 4, 5, 1, 2, 6, 1};
  PluginV2 old = dynamic(creator.deserializePlugin("layer", layout_1, sizeof(layout_1)));
  REQUIRE(old != nullptr);
  CHECK(same(stored(*old), {{2, 3}, {4, 5}, {1, 2}, 6, 1}));
  int32_t mixed[14] = {};
  memcpy(mixed, layout_1, sizeof(layout_1));
  CHECK(creator.deserializePlugin("layer", mixed, sizeof(mixed)) == nullptr);  // layout 1 of the length of layout 2
  mixed[1] = 2;
  CHECK(creator.deserializePlugin("layer", mixed, sizeof(layout_1)) == nullptr);

  for (Problem const& p : kProblems)
    for_each_kind([&](int32_t output_type, Epilogue const& epilogue) {
      FieldValues const values = values_of(p, output_type, epilogue);
      int32_t const n = values.nb_inputs();
      Types types;
      types.x = types.residual = 1;
      types.y = output_type;
      types.residual_format = TensorFormat::kHWC8;
      Fields const fields(values);
      PluginV2 plugin = dynamic(creator.createPlugin("layer", &fields.collection));
      REQUIRE(plugin != nullptr);
      check_output_shape<int32_t>(p, values, [&](trt8::DimsExprs const* in, trt8::IExprBuilder& builder, trt8::DimsExprs* y) {
        *y = plugin->getOutputDimensions(0, in, n, builder);
        return y->nbDims == 4;
      });
      auto const good = tensors<trt8::PluginTensorDesc>(p, p.N, types, values);
      check_formats(p, values, [&](int32_t pos, DataType type, TensorFormat format) {
        auto changed = good;
        changed[pos].type = type;
        changed[pos].format = format;
        return plugin->supportsFormatCombination(pos, changed.data(), n, 1);
      });
      for (int32_t pos : {-1, n + 1, 0x7fffffff}) CHECK(!plugin->supportsFormatCombination(pos, good.data(), n, 1));
      CHECK(!plugin->supportsFormatCombination(0, nullptr, n, 1) && !plugin->supportsFormatCombination(0, good.data(), n + 1, 1));
      check_enqueue(good, values, [&](trt8::PluginTensorDesc const* in, trt8::PluginTensorDesc const* out, void const* const* inputs,
                              void* const* outputs) { return plugin->enqueue(in, out, inputs, outputs, nullptr, nullptr); });
      auto wrong = good;
      wrong[1].dims.d[1] += 1;
      CHECK(!plugin->supportsFormatCombination(0, wrong.data(), n, 1));
      auto unfit = good;
      unfit[n].dims.d[2] += 1;
      CHECK(plugin->enqueue(unfit.data(), &unfit[n], nullptr, nullptr, nullptr, nullptr) != 0);
    });

  // The registry's namespace goes on to the plugins.
  creator.setPluginNamespace("elsewhere");
  CHECK(std::string(creator.getPluginNamespace()) == "elsewhere");
  CHECK(std::string(dynamic(creator.createPlugin("layer", nullptr))->getPluginNamespace()) == "elsewhere");
  creator.setPluginNamespace("");
}

// ---- the library

struct Library {
  explicit Library(char const* path) : handle(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    if (handle == nullptr) printf("%s\n", dlerror());
    REQUIRE(handle != nullptr);
  }
  template <typename Function>
  Function* symbol(char const* name) const {
    auto* const function = reinterpret_cast<Function*>(dlsym(handle, name));
    if (function == nullptr) printf("%s is not exported\n", name);
    REQUIRE(function != nullptr);
    return function;
  }
  v_1_0::IPluginCreatorV3One& v3() const {
    int32_t count = -1;
    auto* const creators = symbol<v_1_0::IPluginCreatorInterface* const*(int32_t&)>("getCreators")(count);
    REQUIRE(count == 1 && creators && creators[0]);
    return static_cast<v_1_0::IPluginCreatorV3One&>(*creators[0]);
  }
  IPluginCreator* const* v2(int32_t version, int32_t& count) const {
    caller_version = version;
    count = -1;
    return symbol<IPluginCreator* const*(int32_t&)>("getPluginCreators")(count);
  }
  void* handle;
};

static void contract(Library const& library) {
  library.symbol<void(ILoggerFinder*)>("setLoggerFinder")(nullptr);
  check_v3(library.v3());
  CHECK(&library.v3() == &library.v3());
  int32_t count;
  IPluginCreator* const* creators = library.v2(8601, count);
  REQUIRE(count == 1 && creators && creators[0]);
  check_v2(*creators[0]);
  CHECK(library.v2(8503, count)[0] == creators[0] && count == 1);
  for (int32_t version : {10701, 100000, 100001, 101600, 110000, 110400, 8400}) {  // TensorRT 10 reads V2 creators by another layout
    CHECK(library.v2(version, count) != nullptr);
    CHECK(count == 0);
  }
  CHECK(library.symbol<int32_t()>("adder2d_register_plugin")() == 0);  // no TensorRT in this process
}

static void registry(char const* path, char const* host_path, std::string const& steps) {
  void* const host = dlopen(host_path, RTLD_NOW | RTLD_LOCAL);
  if (host == nullptr) printf("%s\n", dlerror());
  REQUIRE(host != nullptr);
  int32_t const version = reinterpret_cast<int32_t (*)()>(dlsym(host, "getInferLibVersion"))();
  void* const registry = reinterpret_cast<void* (*)()>(dlsym(host, "getPluginRegistry"))();
  caller_version = version;
  RegistrySlots slots;
  REQUIRE(registry_slots(version, &slots));
  auto const find = [&] { return call_slot<void*>(registry, slots.getCreator, "Adder2d", "1", ""); };
  REQUIRE(find() == nullptr);

  void* opened = nullptr;
  for (size_t begin = 0; begin < steps.size();) {
    size_t const end = std::min(steps.find(',', begin), steps.size());
    std::string const step = steps.substr(begin, end - begin);
    begin = end + 1;
    if (step == "dlopen") {
      CHECK(dlopen(path, RTLD_NOW | RTLD_LOCAL) != nullptr);
    } else if (step == "load") {
      opened = call_slot<void*>(registry, slots.loadLibrary, path);
      CHECK(opened != nullptr);
    } else if (step == "register") {
      CHECK(Library(path).symbol<int32_t()>("adder2d_register_plugin")() == 1);
    } else if (step == "unload") {
      REQUIRE(opened != nullptr);
      call_slot<void>(registry, slots.deregisterLibrary, opened);
      CHECK(find() == nullptr);
      continue;
    } else {
      printf("no such step: %s\n", step.c_str());
      REQUIRE(false);
    }
    CHECK(find() != nullptr);
  }
  void* const creator = find();
  if (creator == nullptr) return;  // unloaded last
  slots.v3 ? check_v3(*static_cast<v_1_0::IPluginCreatorV3One*>(creator)) : check_v2(*static_cast<IPluginCreator*>(creator));
}

// ---- the GPU, through the CUDA driver

struct Cuda {
  template <typename... Args>
  void call(char const* name, Args... args) const {
    auto* const function = reinterpret_cast<int (*)(Args...)>(dlsym(handle, name));
    int const error = function ? function(args...) : -1;
    if (error != 0) printf("%s: error %d\n", name, error);
    REQUIRE(error == 0);
  }
  Cuda() : handle(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
    REQUIRE(handle != nullptr);
    int device;
    void* context;
    call("cuInit", 0u);
    call("cuDeviceGet", &device, 0);
    call("cuDevicePrimaryCtxRetain", &context, device);
    call("cuCtxSetCurrent", context);
  }
  cudaStream_t stream() const {
    cudaStream_t result;
    call("cuStreamCreate", &result, 1u);  // does not wait for the default stream
    return result;
  }
  void wait(cudaStream_t stream) const { call("cuStreamSynchronize", stream); }
  void* handle;
};

// Device memory with a guard behind it that nobody may touch.
class Buffer {
 public:
  Buffer(Cuda const& cuda, size_t bytes) : mCuda(cuda), mBytes(bytes) {
    mCuda.call("cuMemAlloc_v2", &mAddress, bytes + kGuard);
    mCuda.call("cuMemsetD8_v2", mAddress, static_cast<unsigned char>(kFill), bytes + kGuard);
  }
  Buffer(Buffer const&) = delete;
  ~Buffer() {
    std::vector<unsigned char> guard(kGuard);
    mCuda.call("cuMemcpyDtoH_v2", static_cast<void*>(guard.data()), mAddress + mBytes, kGuard);
    for (unsigned char byte : guard)
      if (byte != kFill) {
        CHECK(!"a buffer was written past its end");
        break;
      }
    mCuda.call("cuMemFree_v2", mAddress);
  }
  void upload(void const* source) const { mCuda.call("cuMemcpyHtoD_v2", mAddress, source, mBytes); }
  void download(void* target) const { mCuda.call("cuMemcpyDtoH_v2", target, mAddress, mBytes); }
  void* address() const { return reinterpret_cast<void*>(mAddress); }

 private:
  static constexpr size_t kGuard = 4096;
  static constexpr unsigned char kFill = 0xA5;
  Cuda const& mCuda;
  size_t mBytes;
  unsigned long long mAddress = 0;
};

// Of a multiple of 1/64 below 16, which float16 holds exactly.
static uint16_t to_half(float value) {
  if (value == 0) return 0;
  int exponent;
  float const fraction = std::frexp(std::fabs(value), &exponent);  // in [0.5, 1)
  uint16_t const mantissa = static_cast<uint16_t>(fraction * 2048) & 0x3ff;
  return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) | mantissa);
}

static double from_half(uint16_t bits) {
  double const sign = bits & 0x8000 ? -1 : 1;
  int const exponent = (bits >> 10) & 0x1f, mantissa = bits & 0x3ff;
  if (exponent == 0x1f) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// Data of one layer on the device, and what must come out.
class Layer {
 public:
  Layer(Cuda const& cuda, Problem const& p, int32_t N, Types const& types, FieldValues const& values, size_t workspace_bytes)
      : mProblem(p), mN(N), mTypes(types), mValues(values), mX(size_t(N) * p.C * p.H * p.W),
        mWeight(size_t(p.K) * (p.C / p.groups) * p.R * p.S), mBias(p.K), mScale(p.K, 1), mShift(p.K, 0),
        mResidual(size_t(N) * p.K * p.P() * p.Q(), 0), mXBuffer(cuda, size_of(N, p.C, p.H, p.W, types.x, types.x_format)),
        mWeightBuffer(cuda, mWeight.size() * 4), mBiasBuffer(cuda, p.K * 4), mScaleBuffer(cuda, p.K * 4), mShiftBuffer(cuda, p.K * 4),
        mResidualBuffer(cuda, size_of(N, p.K, p.P(), p.Q(), types.residual, types.residual_format)),
        mYBuffer(cuda, size_of(N, p.K, p.P(), p.Q(), types.y, types.y_format)), mWorkspace(cuda, workspace_bytes) {
    uint32_t state = 12345 + p.C * 7 + p.K;
    auto const next = [&state] {  // multiples of 1/64 in [-8, 8)
      state = state * 1664525u + 1013904223u;
      return (static_cast<int32_t>(state >> 22) - 512) / 64.f;
    };
    bool const wide = p.C >= 512;  // sums beyond float16's range
    for (float& v : mX) v = wide ? 15.f : next();
    for (float& v : mWeight) v = wide ? -15.f : next();
    for (float& v : mBias) v = next();
    if (values.scale)
      for (int32_t k = 0; k < p.K; ++k) mScale[k] = next() / 256, mShift[k] = next();
    if (values.residual)
      for (float& v : mResidual) v = next();
    upload_map(mXBuffer, mX, N, p.C, p.H, p.W, types.x, types.x_format);
    upload_map(mResidualBuffer, mResidual, N, p.K, p.P(), p.Q(), types.residual, types.residual_format);
    mWeightBuffer.upload(mWeight.data());
    mBiasBuffer.upload(mBias.data());
    mScaleBuffer.upload(mScale.data());
    mShiftBuffer.upload(mShift.data());
    mInputs = {mXBuffer.address(), mWeightBuffer.address(), mBiasBuffer.address()};
    if (values.scale) mInputs.insert(mInputs.end(), {mScaleBuffer.address(), mShiftBuffer.address()});
    if (values.residual) mInputs.push_back(mResidualBuffer.address());
    mOutputs[0] = mYBuffer.address();
  }
  void const* const* inputs() const { return mInputs.data(); }
  void* const* outputs() const { return mOutputs; }
  void* workspace() const { return mWorkspace.address(); }

  // Compares y with the formula in double.
  void check() const {
    Problem const& p = mProblem;
    int32_t const P = p.P(), Q = p.Q(), group_C = p.C / p.groups, group_K = p.K / p.groups;
    std::vector<char> bytes(size_of(mN, p.K, P, Q, mTypes.y, mTypes.y_format));
    mYBuffer.download(bytes.data());
    double const eps32 = std::ldexp(1., -23), eps_y = mTypes.y ? std::ldexp(1., -10) : eps32;
    // float16 differences and sums, each rounded at most 7 times (csrc/fprop/fprop_half.cu). All data are exact in float16.
    double const halves = mTypes.x ? 7 * std::ldexp(1., -11) : 0;
    double const sums = 2 * eps32 * std::sqrt(double(group_C) * p.R * p.S) + halves;
    size_t wrong = 0, i = 0;
    for (int32_t n = 0; n < mN; ++n)
      for (int32_t k = 0; k < p.K; ++k)
        for (int32_t out_h = 0; out_h < P; ++out_h)
          for (int32_t out_w = 0; out_w < Q; ++out_w, ++i) {
            double sum = 0;
            for (int32_t c = 0; c < group_C; ++c)
              for (int32_t r = 0; r < p.R; ++r)
                for (int32_t s = 0; s < p.S; ++s) {
                  int32_t const h = out_h * p.stride[0] - p.padding[0] + r * p.dilation[0];
                  int32_t const w = out_w * p.stride[1] - p.padding[1] + s * p.dilation[1];
                  int64_t const channel = (int64_t(n) * p.C + k / group_K * group_C + c) * p.H;
                  double const x = h >= 0 && h < p.H && w >= 0 && w < p.W ? mX[(channel + h) * p.W + w] : 0;
                  sum += std::fabs(x - mWeight[((int64_t(k) * group_C + c) * p.R + r) * p.S + s]);
                }
            size_t const place = place_of(n, k, out_h, out_w, p.K, P, Q, mTypes.y_format);
            uint16_t half;
            float single;
            memcpy(&half, bytes.data() + 2 * (mTypes.y ? place : 0), 2);
            memcpy(&single, bytes.data() + 4 * (mTypes.y ? 0 : place), 4);
            double const y = mTypes.y ? from_half(half) : single, scale = mScale[k];
            double const exact = scale * (mBias[k] - sum) + mShift[k] + mResidual[i];
            double const expected = std::min(std::max(exact, double(mValues.lower)), double(mValues.upper));
            // Each of the four operations of the epilogue rounds a value that is no larger than its terms.
            double const terms = std::fabs(scale) * (sum + std::fabs(mBias[k])), others = std::fabs(mShift[k]) + std::fabs(mResidual[i]);
            double const limit = sums * terms + (eps_y + 4 * eps32) * (terms + others);
            // Beyond 65504 a float16 result must be an infinity, never a wrong number.
            bool const overflows = mTypes.y && std::fabs(expected) > 65520;
            bool const right = overflows ? std::isinf(y) && y < 0 : std::fabs(y - expected) <= limit;
            if (!right && wrong++ == 0) printf("y[%d, %d, %d, %d] is %g, expected %g\n", n, k, out_h, out_w, y, expected);
          }
    if (wrong)
      printf("%zu of %zu outputs are wrong: x [%d, %d, %d, %d], %d filters %dx%d, types %d %d %d, formats %d %d %d, scale %d, residual %d\n",
             wrong, i, mN, p.C, p.H, p.W, p.K, p.R, p.S, mTypes.x, mTypes.y, mTypes.residual, static_cast<int>(mTypes.x_format),
             static_cast<int>(mTypes.y_format), static_cast<int>(mTypes.residual_format), mValues.scale, mValues.residual);
    CHECK(wrong == 0);
  }

 private:
  // Where TensorRT keeps an element: [N, C, H, W], or in kHWC8 [N, H, W, C rounded up to 8].
  static size_t pitch_of(int32_t C, TensorFormat format) { return format == TensorFormat::kHWC8 ? (size_t(C) + 7) / 8 * 8 : size_t(C); }
  static size_t place_of(int32_t n, int32_t c, int32_t h, int32_t w, int32_t C, int32_t H, int32_t W, TensorFormat format) {
    if (format == TensorFormat::kHWC8) return ((size_t(n) * H + h) * W + w) * pitch_of(C, format) + c;
    return ((size_t(n) * C + c) * H + h) * W + w;
  }
  static size_t size_of(int32_t N, int32_t C, int32_t H, int32_t W, int32_t type, TensorFormat format) {
    return size_t(N) * pitch_of(C, format) * H * W * (type ? 2 : 4);
  }
  static void upload_map(Buffer const& buffer, std::vector<float> const& values, int32_t N, int32_t C, int32_t H, int32_t W,
                         int32_t type, TensorFormat format) {
    size_t const count = size_of(N, C, H, W, type, format) / (type ? 2 : 4);
    std::vector<float> singles(type ? 0 : count, NAN);
    std::vector<uint16_t> halves(type ? count : 0, 0x7e00);  // NaN, which must not reach any result from the filling
    size_t i = 0;
    for (int32_t n = 0; n < N; ++n)
      for (int32_t c = 0; c < C; ++c)
        for (int32_t h = 0; h < H; ++h)
          for (int32_t w = 0; w < W; ++w, ++i) {
            size_t const place = place_of(n, c, h, w, C, H, W, format);
            if (type) halves[place] = to_half(values[i]);
            else singles[place] = values[i];
          }
    buffer.upload(type ? static_cast<void const*>(halves.data()) : singles.data());
  }

  Problem mProblem;
  int32_t mN;
  Types mTypes;
  FieldValues mValues;
  std::vector<float> mX, mWeight, mBias, mScale, mShift, mResidual;
  Buffer mXBuffer, mWeightBuffer, mBiasBuffer, mScaleBuffer, mShiftBuffer, mResidualBuffer, mYBuffer, mWorkspace;
  std::vector<void const*> mInputs;
  void* mOutputs[1];
};

// Types and formats that a layer supports, the mixed ones among them.
static std::vector<Types> types_of(Problem const& p, FieldValues const& values) {
  constexpr auto kLinear = TensorFormat::kLINEAR, kHWC8 = TensorFormat::kHWC8;
  std::vector<Types> result;
  for (int32_t x : {0, 1})
    for (int32_t residual : {0, 1})
      if (values.residual || !residual) result.push_back({x, values.output_type, residual, kLinear, kLinear, kLinear});
  result.push_back({1, values.output_type, 0, kHWC8, kLinear, kLinear});
  if (values.output_type && p.K % 8 == 0) {
    result.push_back({1, 1, 1, kHWC8, kHWC8, kHWC8});
    result.push_back({0, 1, 0, kLinear, kHWC8, kLinear});
  }
  if (values.residual && !values.output_type) result.push_back({1, 0, 1, kHWC8, kLinear, kHWC8});
  return result;
}

static void gpu(Library const& library) {
  using namespace v_1_0;
  Cuda const cuda;
  int32_t count;
  IPluginCreator* const* const creators = library.v2(8601, count);
  REQUIRE(count == 1);
  constexpr int32_t kMaxN = 8;  // the profile that the workspace is asked for
  cudaStream_t const stream = cuda.stream(), other = cuda.stream();

  for (Problem const& p : kProblems)
    for_each_kind([&](int32_t y_type, Epilogue const& epilogue) {
      FieldValues const values = values_of(p, y_type, epilogue);
      int32_t const n = values.nb_inputs();
      Fields const fields(values);
      for (Types const& types : types_of(p, values)) {
        PluginV2 v2 = dynamic(creators[0]->createPlugin("layer", &fields.collection));
        std::unique_ptr<IPluginV3> v3(library.v3().createPlugin("layer", &fields.collection, TensorRTPhase::kRUNTIME));
        REQUIRE(v2 && v3);
        auto* build = static_cast<IPluginV3OneBuild*>(v3->getCapabilityInterface(PluginCapabilityType::kBUILD));
        auto* runtime = static_cast<IPluginV3OneRuntime*>(v3->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        auto const v2_max = tensors<trt8::PluginTensorDesc>(p, kMaxN, types, values);
        auto const v3_max = profile(p, kMaxN, types, values);
        for (int32_t pos = 0; pos <= n; ++pos) {
          CHECK(v2->supportsFormatCombination(pos, v2_max.data(), n, 1));
          CHECK(build->supportsFormatCombination(pos, v3_max.data(), n, 1));
        }
        size_t const v2_bytes = v2->getWorkspaceSize(v2_max.data(), n, &v2_max[n], 1);
        size_t const v3_bytes = build->getWorkspaceSize(v3_max.data(), n, &v3_max[n], 1);
        for (int32_t N : {1, 3, kMaxN}) {
          if (N == 3 && (types.x || values.residual)) continue;  // the sizes between are those of any layer
          // Both generations at once, on two streams.
          Layer const first(cuda, p, N, types, values, v2_bytes), second(cuda, p, N, types, values, v3_bytes);
          auto const v2_now = tensors<trt8::PluginTensorDesc>(p, N, types, values);
          auto const v3_now = tensors<trt10::PluginTensorDesc>(p, N, types, values);
          CHECK(v2->enqueue(v2_now.data(), &v2_now[n], first.inputs(), first.outputs(), first.workspace(), stream) == 0);
          CHECK(runtime->onShapeChange(v3_now.data(), n, &v3_now[n], 1) == 0);
          CHECK(runtime->enqueue(v3_now.data(), &v3_now[n], second.inputs(), second.outputs(), second.workspace(), other) == 0);
          cuda.wait(stream);
          cuda.wait(other);
          first.check();
          second.check();
        }
      }
    });
}

int main(int argc, char** argv) {
  std::string const mode = argc > 2 ? argv[2] : "";
  if (mode == "contract" && argc == 3) {
    contract(Library(argv[1]));
  } else if (mode == "offers" && (argc == 4 || argc == 5)) {
    if (argc == 5) REQUIRE(dlopen(argv[4], RTLD_NOW | RTLD_LOCAL) != nullptr);
    int32_t count;
    REQUIRE(Library(argv[1]).v2(atoi(argv[3]), count) != nullptr);
    printf("%d creators\n", count);
  } else if (mode == "registry" && argc == 5) {
    registry(argv[1], argv[3], argv[4]);
  } else if (mode == "gpu" && argc == 3) {
    gpu(Library(argv[1]));
  } else {
    fprintf(stderr, "usage: plugin_driver LIBRARY contract | offers VERSION [HOST] | registry HOST STEPS | gpu\n");
    return 2;
  }
  printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
