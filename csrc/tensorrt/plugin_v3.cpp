// Adder2d for TensorRT 10.0 to 11.x: an IPluginV3 over the shared core.
#include <new>

#include "attributes.h"
#include "plugins.h"

namespace adder2d {
namespace {

using namespace nvinfer1;
using namespace nvinfer1::v_1_0;
using namespace nvinfer1::trt10;

constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = -1;

class Adder2dPluginV3 final : public IPluginV3,
                              public IPluginV3OneCore,
                              public IPluginV3OneBuild,
                              public IPluginV3OneRuntime {
 public:
  explicit Adder2dPluginV3(Attributes const& attributes) : mAttributes(attributes) {}

  // ---- IPluginV3

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override { return new (std::nothrow) Adder2dPluginV3(mAttributes); }

  // ---- IPluginV3OneCore

  char const* getPluginName() const noexcept override { return kPluginName; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // ---- IPluginV3OneBuild

  int32_t getNbOutputs() const noexcept override { return kNbOutputs; }

  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
                          int32_t nbOutputs) noexcept override {
    if (!check_counts(mAttributes, nbInputs, nbOutputs) || in == nullptr) return kFailure;
    using Desc = DynamicPluginTensorDesc;
    auto const smallest = [](Desc const& each) { return make_tensor(each.min, each.desc.type, each.desc.format); };
    auto const largest = [](Desc const& each) { return make_tensor(each.max, each.desc.type, each.desc.format); };
    return fits(make_tensors(in, nbInputs, smallest)) && fits(make_tensors(in, nbInputs, largest)) ? kSuccess
                                                                                                  : kFailure;
  }

  int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const*,
                             int32_t) const noexcept override {
    if (nbOutputs != kNbOutputs || outputTypes == nullptr) return kFailure;
    outputTypes[0] = static_cast<DataType>(mAttributes.output_type);
    return kSuccess;
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
                          int32_t nbOutputs, IExprBuilder& exprBuilder) noexcept override {
    if (nbOutputs != kNbOutputs) return kFailure;
    return output_shape(mAttributes, inputs, nbInputs, exprBuilder, outputs) ? kSuccess : kFailure;
  }

  bool supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                 int32_t nbOutputs) noexcept override {
    if (!check_counts(mAttributes, nbInputs, nbOutputs) || inOut == nullptr || pos < 0 || pos >= nbInputs + nbOutputs)
      return false;
    auto const tensor_of = [](DynamicPluginTensorDesc const& each) { return make_tensor(each.desc); };
    return supports_format(mAttributes, make_tensors(inOut, nbInputs + nbOutputs, tensor_of), pos);
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    return kWorkspaceBytes;
  }

  // ---- IPluginV3OneRuntime

  int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*,
                        int32_t nbOutputs) noexcept override {
    if (!check_counts(mAttributes, nbInputs, nbOutputs) || in == nullptr) return kFailure;
    return fits(make_tensors(in, nbInputs)) ? kSuccess : kFailure;
  }

  int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return adder2d::enqueue(mAttributes, inputDesc, outputDesc, inputs, outputs, workspace, stream);
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override { return mFields.point_to(&mAttributes); }

 private:
  bool fits(Tensors const& in) const {
    char const* const reason = check_inputs(mAttributes, in);
    if (reason) report("%s", reason);
    return reason == nullptr;
  }

  Attributes const mAttributes;
  FieldList mFields;
};

class Adder2dPluginV3Creator final : public IPluginCreatorV3One {
 public:
  Adder2dPluginV3Creator() { mFields.point_to(nullptr); }

  IPluginV3* createPlugin(char const*, PluginFieldCollection const* fc, TensorRTPhase) noexcept override {
    Attributes attributes;
    return parse(fc, &attributes) ? new (std::nothrow) Adder2dPluginV3(attributes) : nullptr;
  }
  PluginFieldCollection const* getFieldNames() noexcept override { return &mFields.collection; }
  char const* getPluginName() const noexcept override { return kPluginName; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  FieldList mFields;
};

}  // namespace

nvinfer1::v_1_0::IPluginCreatorV3One& plugin_v3_creator() {
  // Never destroyed: a registry may outlive this library's static objects.
  static auto& creator = *new Adder2dPluginV3Creator;
  return creator;
}

}  // namespace adder2d
