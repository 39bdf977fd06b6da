// The part of TensorRT's plugin ABI that this project uses, declared by ourselves (Linux x86-64, Itanium C++ ABI), so
// that the library compiles without a TensorRT header and one file serves TensorRT 8.5 to 11.
//
// The order of the virtual functions IS the interface: never reorder, insert or remove one. Class names and namespaces
// are TensorRT's own, so that type information agrees; the structs, whose extents grew from 32 to 64 bits in
// TensorRT 10, live in two inner namespaces, `trt8` (8.5 to 9.x) and `trt10` (10.0 on).
#pragma once

#include <stddef.h>
#include <stdint.h>

struct CUstream_st;
struct cudnnContext;
struct cublasContext;
using cudaStream_t = CUstream_st*;

namespace nvinfer1 {

// ---- enums: the values in use

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1 };
enum class TensorFormat : int32_t { kLINEAR = 0, kHWC8 = 2 };
enum class PluginFieldType : int32_t { kFLOAT32 = 1, kINT32 = 5 };
enum class DimensionOperation : int32_t { kSUM = 0, kPROD = 1, kSUB = 4, kFLOOR_DIV = 7 };
enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };
enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class APILanguage : int32_t { kCPP = 0 };

// ---- structs of one shape in all versions

struct PluginField {
  char const* name;
  void const* data;
  PluginFieldType type;
  int32_t length;  // number of values at `data`
};

struct PluginFieldCollection {
  int32_t nbFields;
  PluginField const* fields;
};

struct InterfaceInfo {
  char const* kind;
  int32_t major;
  int32_t minor;
};

static_assert(sizeof(PluginField) == 24 && offsetof(PluginField, type) == 16 && offsetof(PluginField, length) == 20,
              "");
static_assert(sizeof(PluginFieldCollection) == 16 && offsetof(PluginFieldCollection, fields) == 8, "");
static_assert(sizeof(InterfaceInfo) == 16 && offsetof(InterfaceInfo, major) == 8, "");

// ---- structs and shape expressions over the extent type

constexpr int32_t kMaxDims = 8;

template <typename Extent>
struct DimsOf {
  int32_t nbDims;
  Extent d[kMaxDims];
};

template <typename Extent>
struct PluginTensorDescOf {
  DimsOf<Extent> dims;
  DataType type;
  TensorFormat format;
  float scale;
};

template <typename Extent>
class DimensionExprOf {
 public:
  class Impl {
   public:
    virtual ~Impl() noexcept = default;
    virtual bool isConstant() const noexcept = 0;
    virtual Extent getConstantValue() const noexcept = 0;
  };
  virtual ~DimensionExprOf() noexcept = default;
  bool isConstant() const noexcept { return mImpl->isConstant(); }
  Extent getConstantValue() const noexcept { return mImpl->getConstantValue(); }

 protected:
  Impl* mImpl = nullptr;
};

template <typename Extent>
class ExprBuilderOf {
 public:
  using Expr = DimensionExprOf<Extent>;
  class Impl {
   public:
    virtual ~Impl() noexcept = default;
    virtual Expr const* constant(Extent value) noexcept = 0;
    virtual Expr const* operation(DimensionOperation op, Expr const& first, Expr const& second) noexcept = 0;
  };
  virtual ~ExprBuilderOf() noexcept = default;
  Expr const* constant(Extent value) noexcept { return mImpl->constant(value); }
  Expr const* operation(DimensionOperation op, Expr const& first, Expr const& second) noexcept {
    return mImpl->operation(op, first, second);
  }

 protected:
  Impl* mImpl = nullptr;
};

template <typename Extent>
struct DimsExprsOf {
  int32_t nbDims;
  DimensionExprOf<Extent> const* d[kMaxDims];
};

namespace trt8 {
using Dims = DimsOf<int32_t>;
using PluginTensorDesc = PluginTensorDescOf<int32_t>;
using IDimensionExpr = DimensionExprOf<int32_t>;
using IExprBuilder = ExprBuilderOf<int32_t>;
using DimsExprs = DimsExprsOf<int32_t>;
struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min;
  Dims max;
};
static_assert(sizeof(Dims) == 36 && alignof(Dims) == 4 && offsetof(Dims, d) == 4, "");
static_assert(sizeof(PluginTensorDesc) == 48 && offsetof(PluginTensorDesc, type) == 36, "");
static_assert(offsetof(PluginTensorDesc, format) == 40 && offsetof(PluginTensorDesc, scale) == 44, "");
static_assert(sizeof(DynamicPluginTensorDesc) == 120 && offsetof(DynamicPluginTensorDesc, min) == 48, "");
static_assert(offsetof(DynamicPluginTensorDesc, max) == 84, "");
static_assert(sizeof(DimsExprs) == 72 && offsetof(DimsExprs, d) == 8, "");
static_assert(sizeof(IExprBuilder) == 16 && sizeof(IDimensionExpr) == 16, "");
}  // namespace trt8

namespace trt10 {
using Dims = DimsOf<int64_t>;
using PluginTensorDesc = PluginTensorDescOf<int64_t>;
using IDimensionExpr = DimensionExprOf<int64_t>;
using IExprBuilder = ExprBuilderOf<int64_t>;
using DimsExprs = DimsExprsOf<int64_t>;
struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min;
  Dims max;
  Dims opt;
};
static_assert(sizeof(Dims) == 72 && alignof(Dims) == 8 && offsetof(Dims, d) == 8, "");
static_assert(sizeof(PluginTensorDesc) == 88 && offsetof(PluginTensorDesc, type) == 72, "");
static_assert(offsetof(PluginTensorDesc, format) == 76 && offsetof(PluginTensorDesc, scale) == 80, "");
static_assert(sizeof(DynamicPluginTensorDesc) == 304 && offsetof(DynamicPluginTensorDesc, min) == 88, "");
static_assert(offsetof(DynamicPluginTensorDesc, max) == 160 && offsetof(DynamicPluginTensorDesc, opt) == 232, "");
static_assert(sizeof(DimsExprs) == 72 && offsetof(DimsExprs, d) == 8, "");
static_assert(sizeof(IExprBuilder) == 16 && sizeof(IDimensionExpr) == 16, "");
}  // namespace trt10

class IGpuAllocator;
class ILoggerFinder;

// ---- TensorRT 8.5 to 9.x: IPluginV2DynamicExt, one table of 30 slots

class IPluginV2 {
 public:
  virtual int32_t getTensorRTVersion() const noexcept = 0;
  virtual char const* getPluginType() const noexcept = 0;
  virtual char const* getPluginVersion() const noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual trt8::Dims getOutputDimensions(int32_t index, trt8::Dims const* inputs, int32_t nbInputs) noexcept = 0;
  virtual bool supportsFormat(DataType type, TensorFormat format) const noexcept = 0;
  virtual void configureWithFormat(trt8::Dims const* inputs, int32_t nbInputs, trt8::Dims const* outputs,
                                   int32_t nbOutputs, DataType type, TensorFormat format,
                                   int32_t maxBatchSize) noexcept = 0;
  virtual int32_t initialize() noexcept = 0;
  virtual void terminate() noexcept = 0;
  virtual size_t getWorkspaceSize(int32_t maxBatchSize) const noexcept = 0;
  virtual int32_t enqueue(int32_t batchSize, void const* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept = 0;
  virtual size_t getSerializationSize() const noexcept = 0;
  virtual void serialize(void* buffer) const noexcept = 0;
  virtual void destroy() noexcept = 0;
  virtual IPluginV2* clone() const noexcept = 0;
  virtual void setPluginNamespace(char const* pluginNamespace) noexcept = 0;
  virtual char const* getPluginNamespace() const noexcept = 0;
  virtual ~IPluginV2() noexcept = default;
};

class IPluginV2Ext : public IPluginV2 {
 public:
  IPluginV2Ext* clone() const noexcept override = 0;
  virtual DataType getOutputDataType(int32_t index, DataType const* inputTypes, int32_t nbInputs) const noexcept = 0;
  virtual bool isOutputBroadcastAcrossBatch(int32_t index, bool const* inputIsBroadcasted,
                                            int32_t nbInputs) const noexcept = 0;
  virtual bool canBroadcastInputAcrossBatch(int32_t index) const noexcept = 0;
  virtual void configurePlugin(trt8::Dims const* inputs, int32_t nbInputs, trt8::Dims const* outputs, int32_t nbOutputs,
                               DataType const* inputTypes, DataType const* outputTypes, bool const* inputIsBroadcast,
                               bool const* outputIsBroadcast, TensorFormat format, int32_t maxBatchSize) noexcept = 0;
  virtual void attachToContext(cudnnContext*, cublasContext*, IGpuAllocator*) noexcept {}
  virtual void detachFromContext() noexcept {}
};

class IPluginV2DynamicExt : public IPluginV2Ext {
 public:
  IPluginV2DynamicExt* clone() const noexcept override = 0;
  virtual trt8::DimsExprs getOutputDimensions(int32_t index, trt8::DimsExprs const* inputs, int32_t nbInputs,
                                              trt8::IExprBuilder& exprBuilder) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t pos, trt8::PluginTensorDesc const* inOut, int32_t nbInputs,
                                         int32_t nbOutputs) noexcept = 0;
  virtual void configurePlugin(trt8::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                               trt8::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept = 0;
  virtual size_t getWorkspaceSize(trt8::PluginTensorDesc const* inputs, int32_t nbInputs,
                                  trt8::PluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept = 0;
  virtual int32_t enqueue(trt8::PluginTensorDesc const* inputDesc, trt8::PluginTensorDesc const* outputDesc,
                          void const* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept = 0;

  // The version that a dynamic plugin reports: its kind in the top byte, a library version below; the oldest one
  // served.
  int32_t getTensorRTVersion() const noexcept override { return (3 << 24) | 8500; }

 private:
  // What the static-shape interfaces asked for; TensorRT never calls these on a dynamic plugin.
  trt8::Dims getOutputDimensions(int32_t, trt8::Dims const*, int32_t) noexcept final { return {-1, {}}; }
  bool supportsFormat(DataType, TensorFormat) const noexcept final { return false; }
  void configureWithFormat(trt8::Dims const*, int32_t, trt8::Dims const*, int32_t, DataType, TensorFormat,
                           int32_t) noexcept final {}
  size_t getWorkspaceSize(int32_t) const noexcept final { return 0; }
  int32_t enqueue(int32_t, void const* const*, void* const*, void*, cudaStream_t) noexcept final { return 1; }
  bool isOutputBroadcastAcrossBatch(int32_t, bool const*, int32_t) const noexcept final { return false; }
  bool canBroadcastInputAcrossBatch(int32_t) const noexcept final { return true; }
  void configurePlugin(trt8::Dims const*, int32_t, trt8::Dims const*, int32_t, DataType const*, DataType const*,
                       bool const*, bool const*, TensorFormat, int32_t) noexcept final {}
};

class IPluginCreator {
 public:
  virtual int32_t getTensorRTVersion() const noexcept { return 8500; }
  virtual char const* getPluginName() const noexcept = 0;
  virtual char const* getPluginVersion() const noexcept = 0;
  virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
  virtual IPluginV2* createPlugin(char const* name, PluginFieldCollection const* fc) noexcept = 0;
  virtual IPluginV2* deserializePlugin(char const* name, void const* serialData, size_t serialLength) noexcept = 0;
  virtual void setPluginNamespace(char const* pluginNamespace) noexcept = 0;
  virtual char const* getPluginNamespace() const noexcept = 0;
  virtual ~IPluginCreator() noexcept = default;
};

// ---- TensorRT 10.0 to 11.x: IPluginV3 and its capabilities

class IVersionedInterface {
 public:
  virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
  virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
  virtual ~IVersionedInterface() noexcept = default;
};

namespace v_1_0 {

class IPluginCapability : public IVersionedInterface {};
class IPluginResourceContext;

class IPluginV3 : public IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
  virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
  virtual IPluginV3* clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
  virtual char const* getPluginName() const noexcept = 0;
  virtual char const* getPluginVersion() const noexcept = 0;
  virtual char const* getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
  virtual int32_t configurePlugin(trt10::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                  trt10::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept = 0;
  virtual int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes,
                                     int32_t nbInputs) const noexcept = 0;
  virtual int32_t getOutputShapes(trt10::DimsExprs const* inputs, int32_t nbInputs, trt10::DimsExprs const* shapeInputs,
                                  int32_t nbShapeInputs, trt10::DimsExprs* outputs, int32_t nbOutputs,
                                  trt10::IExprBuilder& exprBuilder) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t pos, trt10::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                         int32_t nbOutputs) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual size_t getWorkspaceSize(trt10::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
                                  trt10::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept = 0;
  virtual int32_t getValidTactics(int32_t*, int32_t) noexcept { return 0; }
  virtual int32_t getNbTactics() noexcept { return 0; }
  virtual char const* getTimingCacheID() noexcept { return nullptr; }
  virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
  virtual char const* getMetadataString() noexcept { return nullptr; }
};

class IPluginV3OneRuntime : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
  virtual int32_t setTactic(int32_t) noexcept { return 0; }
  virtual int32_t onShapeChange(trt10::PluginTensorDesc const* in, int32_t nbInputs, trt10::PluginTensorDesc const* out,
                                int32_t nbOutputs) noexcept = 0;
  virtual int32_t enqueue(trt10::PluginTensorDesc const* inputDesc, trt10::PluginTensorDesc const* outputDesc,
                          void const* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept = 0;
  virtual IPluginV3* attachToContext(IPluginResourceContext* context) noexcept = 0;
  virtual PluginFieldCollection const* getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginCreatorV3One : public IPluginCreatorInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
  virtual IPluginV3* createPlugin(char const* name, PluginFieldCollection const* fc, TensorRTPhase phase) noexcept = 0;
  virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
  virtual char const* getPluginName() const noexcept = 0;
  virtual char const* getPluginVersion() const noexcept = 0;
  virtual char const* getPluginNamespace() const noexcept = 0;
};

}  // namespace v_1_0

// ---- the registry, whose slots moved from version to version

// Slots of the functions of IPluginRegistry, -1 where a version has none. Creators are IPluginCreator where `v3` is
// false and IPluginCreatorV3One where it is true. The loading functions are there for programs that load plugins
// themselves.
struct RegistrySlots {
  bool v3;
  int32_t registerCreator;    // bool (creator&, char const* namespace)
  int32_t deregisterCreator;  // bool (creator const&)
  int32_t getCreator;         // creator* (char const* name, char const* version, char const* namespace)
  int32_t loadLibrary;        // void* (char const* path)
  int32_t deregisterLibrary;  // void (void*)
};

// What getInferLibVersion() says: major * 1000 + ... up to 9.x, major * 10000 + ... from 10.0 on; TensorRT-RTX 1.x
// counts its own versions in between.
constexpr bool is_trt8(int32_t version) { return version >= 8500 && version < 10000; }
constexpr bool is_trt10_or_rtx(int32_t version) { return version >= 10000; }

// False where the registry of that version is not known: leave it alone.
inline bool registry_slots(int32_t version, RegistrySlots* slots) {
  if (version >= 8500 && version < 8600)
    *slots = {false, 0, 7, 2, -1, -1};
  else if (version == 8600)
    *slots = {false, 0, 11, 2, 5, 6};
  else if (version > 8600 && version < 10000)
    *slots = {false, 0, 7, 2, 10, 11};
  else if (version >= 100000 && version < 110000)
    *slots = {true, 12, 15, 14, 10, 11};
  else if (version >= 110000 && version < 120000)
    *slots = {true, 8, 11, 10, 6, 7};
  else if (version >= 10701 && version < 20000)
    *slots = {true, 8, 11, 10, 6, 7};  // TensorRT-RTX
  else
    return false;
  return true;
}

// Calls a virtual function by its slot.
template <typename Result, typename... Args>
Result call_slot(void* object, int32_t slot, Args... args) {
  using Function = Result (*)(void*, Args...);
  return (*static_cast<Function**>(object))[slot](object, args...);
}

}  // namespace nvinfer1
