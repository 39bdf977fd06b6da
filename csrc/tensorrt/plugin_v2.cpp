// Adder2d for TensorRT 8.5 to 9.x: an IPluginV2DynamicExt over the shared core.
#include <cstring>
#include <new>
#include <string>

#include "attributes.h"
#include "plugins.h"

namespace adder2d {
namespace {

using namespace nvinfer1;
using namespace nvinfer1::trt8;

// What an engine stores for one layer.
struct Serialized {
  int32_t magic = 0x32444441;  // "ADD2"
  int32_t layout = 2;
  Attributes attributes;
};
static_assert(sizeof(Serialized) == 56, "the layout is part of saved engines: a change wants a new layout number");

// Layout 1 ended before the epilogue, which it did not have.
constexpr size_t kLayout1Bytes = offsetof(Serialized, attributes) + offsetof(Attributes, scale);
static_assert(kLayout1Bytes == 40, "engines of layout 1 must stay readable");

class Adder2dPluginV2 final : public IPluginV2DynamicExt {
 public:
  Adder2dPluginV2(Attributes const& attributes, std::string const& pluginNamespace)
      : mAttributes(attributes), mNamespace(pluginNamespace) {}

  char const* getPluginType() const noexcept override { return kPluginName; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  int32_t getNbOutputs() const noexcept override { return kNbOutputs; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }

  size_t getSerializationSize() const noexcept override { return sizeof(Serialized); }

  void serialize(void* buffer) const noexcept override {
    if (buffer == nullptr) return report("an Adder2d layer cannot be stored at null");
    Serialized serialized;
    serialized.attributes = mAttributes;
    std::memcpy(buffer, &serialized, sizeof(serialized));
  }

  IPluginV2DynamicExt* clone() const noexcept override {
    try {
      return new Adder2dPluginV2(*this);
    } catch (std::bad_alloc const&) {
      return nullptr;
    }
  }

  void setPluginNamespace(char const* pluginNamespace) noexcept override {
    try {
      mNamespace = pluginNamespace ? pluginNamespace : "";
    } catch (std::bad_alloc const&) {
      report("no memory for the plugin namespace");
    }
  }
  char const* getPluginNamespace() const noexcept override { return mNamespace.c_str(); }

  DataType getOutputDataType(int32_t, DataType const*, int32_t) const noexcept override {
    return static_cast<DataType>(mAttributes.output_type);
  }

  DimsExprs getOutputDimensions(int32_t, DimsExprs const* inputs, int32_t nbInputs,
                                IExprBuilder& exprBuilder) noexcept override {
    DimsExprs y{};
    return output_shape(mAttributes, inputs, nbInputs, exprBuilder, &y) ? y : DimsExprs{};
  }

  bool supportsFormatCombination(int32_t pos, PluginTensorDesc const* inOut, int32_t nbInputs,
                                 int32_t nbOutputs) noexcept override {
    // This generation cannot fail in configurePlugin: shapes that do not fit end here, where nothing is supported.
    if (!check_counts(mAttributes, nbInputs, nbOutputs) || inOut == nullptr || pos < 0 || pos >= nbInputs + nbOutputs)
      return false;
    Tensors const tensors = make_tensors(inOut, nbInputs + nbOutputs);
    if (char const* reason = check_known(mAttributes, tensors)) {
      // Once, not for each of the types and formats that TensorRT tries.
      if (pos == 0 && inOut[0].type == DataType::kFLOAT && inOut[0].format == TensorFormat::kLINEAR)
        report("%s", reason);
      return false;
    }
    return supports_format(mAttributes, tensors, pos);
  }

  void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                       int32_t) noexcept override {}

  size_t getWorkspaceSize(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) const noexcept override {
    return kWorkspaceBytes;
  }

  int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return adder2d::enqueue(mAttributes, inputDesc, outputDesc, inputs, outputs, workspace, stream);
  }

 private:
  Attributes const mAttributes;
  std::string mNamespace;  // the registry's key to this plugin's creator
};

class Adder2dPluginV2Creator final : public IPluginCreator {
 public:
  Adder2dPluginV2Creator() { mFields.point_to(nullptr); }

  char const* getPluginName() const noexcept override { return kPluginName; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &mFields.collection; }

  IPluginV2* createPlugin(char const*, PluginFieldCollection const* fc) noexcept override {
    Attributes attributes;
    return parse(fc, &attributes) ? create(attributes) : nullptr;
  }

  IPluginV2* deserializePlugin(char const*, void const* serialData, size_t serialLength) noexcept override {
    Serialized const expected;
    Serialized serialized;
    if (serialData == nullptr || (serialLength != sizeof(serialized) && serialLength != kLayout1Bytes)) {
      report("a stored Adder2d layer must have %zu or %zu bytes, got %zu%s", sizeof(serialized), kLayout1Bytes,
             serialLength, serialData ? "" : " at null");
      return nullptr;
    }
    std::memcpy(&serialized, serialData, serialLength);  // what is missing keeps its default
    if (serialized.magic != expected.magic) {
      report("the stored data are not an Adder2d layer: they begin with %#x, not %#x", serialized.magic,
             expected.magic);
      return nullptr;
    }
    int32_t const layout = serialLength == kLayout1Bytes ? 1 : expected.layout;
    if (serialized.layout != layout) {
      report(
          "the stored Adder2d layer of %zu bytes has layout %d, this library reads %d there: build the engine anew "
          "with this library",
          serialLength, serialized.layout, layout);
      return nullptr;
    }
    return validate(serialized.attributes) ? create(serialized.attributes) : nullptr;
  }

  void setPluginNamespace(char const* pluginNamespace) noexcept override {
    try {
      mNamespace = pluginNamespace ? pluginNamespace : "";
    } catch (std::bad_alloc const&) {
      report("no memory for the plugin namespace");
    }
  }
  char const* getPluginNamespace() const noexcept override { return mNamespace.c_str(); }

 private:
  IPluginV2* create(Attributes const& attributes) const noexcept {
    try {
      return new Adder2dPluginV2(attributes, mNamespace);
    } catch (std::bad_alloc const&) {
      return nullptr;
    }
  }

  FieldList mFields;
  std::string mNamespace = kPluginNamespace;
};

}  // namespace

nvinfer1::IPluginCreator& plugin_v2_creator() {
  // Never destroyed: a registry may outlive this library's static objects.
  static auto& creator = *new Adder2dPluginV2Creator;
  return creator;
}

}  // namespace adder2d
