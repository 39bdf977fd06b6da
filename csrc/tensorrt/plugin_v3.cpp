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
    if (!check_counts(nbInputs, nbOutputs) || in == nullptr) return kFailure;
    Tensor const smallest[] = {at(in[0].min, in[0]), at(in[1].min, in[1]), at(in[2].min, in[2])};
    Tensor const largest[] = {at(in[0].max, in[0]), at(in[1].max, in[1]), at(in[2].max, in[2])};
    return fits(smallest) && fits(largest) ? kSuccess : kFailure;
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
    if (!check_counts(nbInputs, nbOutputs) || inOut == nullptr || pos < 0 || pos >= nbInputs + nbOutputs) return false;
    return supports_format(mAttributes, pos, inOut[pos].desc.type, inOut[pos].desc.format);
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    return kWorkspaceBytes;
  }

  // ---- IPluginV3OneRuntime

  int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*,
                        int32_t nbOutputs) noexcept override {
    if (!check_counts(nbInputs, nbOutputs) || in == nullptr) return kFailure;
    Tensor const actual[] = {make_tensor(in[0]), make_tensor(in[1]), make_tensor(in[2])};
    return fits(actual) ? kSuccess : kFailure;
  }

  int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return adder2d::enqueue(mAttributes, inputDesc, outputDesc, inputs, outputs, workspace, stream);
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  PluginFieldCollection const* getFieldsToSerialize() noexcept override { return mFields.point_to(&mAttributes); }

 private:
  static Tensor at(Dims const& dims, DynamicPluginTensorDesc const& tensor) {
    return make_tensor(dims, tensor.desc.type);
  }

  // Whether inputs of these shapes make a valid problem, as far as their extents are known.
  bool fits(Tensor const (&in)[kNbInputs]) const {
    char const* reason = check_known(mAttributes, in[0], in[1], in[2]);
    Adder2dParams params;
    if (reason == nullptr && is_known(in[0]) && is_known(in[1]) && is_known(in[2]))
      reason = fill_params(mAttributes, in[0], in[1], in[2], &params);
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
