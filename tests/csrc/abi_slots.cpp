// Prints what csrc/tensorrt/abi.h must share with TensorRT's own headers: slots of virtual functions, sizes and
// offsets of structs, values of enums, interface names. One source serves both sides, so that the two outputs can be
// compared line by line (docs/tensorrt-abi.md says how):
//
//   abi.h         g++ -std=c++17 -I csrc -D VERSION=8503 tests/csrc/abi_slots.cpp
//   real headers  g++ -std=c++17 -fno-access-control -I TENSORRT/include -I CUDA/include -D TENSORRT tests/csrc/abi_slots.cpp
//
// VERSION is the number of getInferLibVersion(); with TENSORRT it comes from the headers. A function whose signature
// differs does not compile. -fno-access-control (g++ only) reaches functions that are private or protected.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cstddef>

#ifdef TENSORRT
#include <NvInferRuntime.h>
#if NV_TENSORRT_MAJOR >= 10
#define VERSION (NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH)
#else
#define VERSION (NV_TENSORRT_MAJOR * 1000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH)
#endif
#else
#include "tensorrt/abi.h"
#endif

using namespace nvinfer1;
#ifndef TENSORRT
#if VERSION >= 10000
using namespace trt10;
#else
using namespace trt8;
#endif
#endif
#if VERSION >= 10000
using namespace nvinfer1::v_1_0;
using Extent = int64_t;
#else
using Extent = int32_t;
#endif

#ifdef TENSORRT
using ExprBuilderImpl = apiv::VExprBuilder;
using DimensionExprImpl = apiv::VDimensionExpr;
#else
using ExprBuilderImpl = IExprBuilder::Impl;
using DimensionExprImpl = IDimensionExpr::Impl;
#endif

// The Itanium C++ ABI stores a pointer to a virtual member function as 1 + the byte offset in the table.
template <typename Function>
int slot_of(Function function) {
  intptr_t words[2];
  static_assert(sizeof(function) == sizeof(words), "");
  memcpy(words, &function, sizeof(words));
  return words[0] % 2 == 1 && words[1] == 0 ? static_cast<int>(words[0] / static_cast<intptr_t>(sizeof(void*))) : -1;
}

#define SLOT(Class, name, Result, ...) \
  printf("%-24s %2d %s\n", #Class, slot_of(static_cast<Result (Class::*) __VA_ARGS__>(&Class::name)), #name)
#define SIZE(Struct) printf("%-24s size %zu align %zu\n", #Struct, sizeof(Struct), alignof(Struct))
#define OFFSET(Struct, member) printf("%-24s offset %zu %s\n", #Struct, offsetof(Struct, member), #member)
#define VALUE(Enum, name) printf("%-24s value %d %s\n", #Enum, static_cast<int>(Enum::name), #name)
// getInterfaceInfo reads nothing of the object, whose class is abstract.
#define INFO(Class)                                                                         \
  do {                                                                                      \
    alignas(16) static char object[256];                                                    \
    InterfaceInfo const info = reinterpret_cast<Class*>(object)->Class::getInterfaceInfo(); \
    printf("%-24s \"%s\" %d.%d\n", #Class, info.kind, int{info.major}, int{info.minor});     \
  } while (0)

static void print_structs_and_enums() {
  SIZE(Dims);
  OFFSET(Dims, nbDims);
  OFFSET(Dims, d);
  SIZE(PluginTensorDesc);
  OFFSET(PluginTensorDesc, dims);
  OFFSET(PluginTensorDesc, type);
  OFFSET(PluginTensorDesc, format);
  OFFSET(PluginTensorDesc, scale);
  SIZE(DynamicPluginTensorDesc);
  OFFSET(DynamicPluginTensorDesc, desc);
  OFFSET(DynamicPluginTensorDesc, min);
  OFFSET(DynamicPluginTensorDesc, max);
#if VERSION >= 10000
  OFFSET(DynamicPluginTensorDesc, opt);
  SIZE(InterfaceInfo);
  OFFSET(InterfaceInfo, major);
  OFFSET(InterfaceInfo, minor);
#endif
  SIZE(DimsExprs);
  OFFSET(DimsExprs, d);
  SIZE(PluginField);
  OFFSET(PluginField, name);
  OFFSET(PluginField, data);
  OFFSET(PluginField, type);
  OFFSET(PluginField, length);
  SIZE(PluginFieldCollection);
  OFFSET(PluginFieldCollection, nbFields);
  OFFSET(PluginFieldCollection, fields);
  SIZE(IExprBuilder);
  SIZE(IDimensionExpr);
  VALUE(DataType, kFLOAT);
  VALUE(DataType, kHALF);
  VALUE(TensorFormat, kLINEAR);
  VALUE(PluginFieldType, kINT32);
  VALUE(DimensionOperation, kSUM);
  VALUE(DimensionOperation, kPROD);
  VALUE(DimensionOperation, kSUB);
  VALUE(DimensionOperation, kFLOOR_DIV);
  SLOT(ExprBuilderImpl, constant, IDimensionExpr const*, (Extent));
  SLOT(ExprBuilderImpl, operation, IDimensionExpr const*,
       (DimensionOperation, IDimensionExpr const&, IDimensionExpr const&));
  SLOT(DimensionExprImpl, isConstant, bool, () const);
  SLOT(DimensionExprImpl, getConstantValue, Extent, () const);
}

#if VERSION < 10000

static void print_plugin() {
  SLOT(IPluginV2, getTensorRTVersion, int32_t, () const);
  SLOT(IPluginV2, getPluginType, char const*, () const);
  SLOT(IPluginV2, getPluginVersion, char const*, () const);
  SLOT(IPluginV2, getNbOutputs, int32_t, () const);
  SLOT(IPluginV2, getOutputDimensions, Dims, (int32_t, Dims const*, int32_t));
  SLOT(IPluginV2, supportsFormat, bool, (DataType, TensorFormat) const);
  SLOT(IPluginV2, configureWithFormat, void,
       (Dims const*, int32_t, Dims const*, int32_t, DataType, TensorFormat, int32_t));
  SLOT(IPluginV2, initialize, int32_t, ());
  SLOT(IPluginV2, terminate, void, ());
  SLOT(IPluginV2, getWorkspaceSize, size_t, (int32_t) const);
  SLOT(IPluginV2, enqueue, int32_t, (int32_t, void const* const*, void* const*, void*, cudaStream_t));
  SLOT(IPluginV2, getSerializationSize, size_t, () const);
  SLOT(IPluginV2, serialize, void, (void*) const);
  SLOT(IPluginV2, destroy, void, ());
  SLOT(IPluginV2, clone, IPluginV2*, () const);
  SLOT(IPluginV2, setPluginNamespace, void, (char const*));
  SLOT(IPluginV2, getPluginNamespace, char const*, () const);
  SLOT(IPluginV2Ext, clone, IPluginV2Ext*, () const);
  SLOT(IPluginV2Ext, getOutputDataType, DataType, (int32_t, DataType const*, int32_t) const);
  SLOT(IPluginV2Ext, isOutputBroadcastAcrossBatch, bool, (int32_t, bool const*, int32_t) const);
  SLOT(IPluginV2Ext, canBroadcastInputAcrossBatch, bool, (int32_t) const);
  SLOT(IPluginV2Ext, configurePlugin, void,
       (Dims const*, int32_t, Dims const*, int32_t, DataType const*, DataType const*, bool const*, bool const*,
        TensorFormat, int32_t));
  SLOT(IPluginV2Ext, attachToContext, void, (cudnnContext*, cublasContext*, IGpuAllocator*));
  SLOT(IPluginV2Ext, detachFromContext, void, ());
  SLOT(IPluginV2DynamicExt, clone, IPluginV2DynamicExt*, () const);
  SLOT(IPluginV2DynamicExt, getOutputDimensions, DimsExprs, (int32_t, DimsExprs const*, int32_t, IExprBuilder&));
  SLOT(IPluginV2DynamicExt, supportsFormatCombination, bool, (int32_t, PluginTensorDesc const*, int32_t, int32_t));
  SLOT(IPluginV2DynamicExt, configurePlugin, void,
       (DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t));
  SLOT(IPluginV2DynamicExt, getWorkspaceSize, size_t,
       (PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) const);
  SLOT(IPluginV2DynamicExt, enqueue, int32_t,
       (PluginTensorDesc const*, PluginTensorDesc const*, void const* const*, void* const*, void*, cudaStream_t));
  SLOT(IPluginV2DynamicExt, getTensorRTVersion, int32_t, () const);
  SLOT(IPluginCreator, getTensorRTVersion, int32_t, () const);
  SLOT(IPluginCreator, getPluginName, char const*, () const);
  SLOT(IPluginCreator, getPluginVersion, char const*, () const);
  SLOT(IPluginCreator, getFieldNames, PluginFieldCollection const*, ());
  SLOT(IPluginCreator, createPlugin, IPluginV2*, (char const*, PluginFieldCollection const*));
  SLOT(IPluginCreator, deserializePlugin, IPluginV2*, (char const*, void const*, size_t));
  SLOT(IPluginCreator, setPluginNamespace, void, (char const*));
  SLOT(IPluginCreator, getPluginNamespace, char const*, () const);
}

#else

static void print_plugin() {
  VALUE(TensorRTPhase, kBUILD);
  VALUE(TensorRTPhase, kRUNTIME);
  VALUE(PluginCapabilityType, kCORE);
  VALUE(PluginCapabilityType, kBUILD);
  VALUE(PluginCapabilityType, kRUNTIME);
  VALUE(APILanguage, kCPP);
  SLOT(IVersionedInterface, getAPILanguage, APILanguage, () const);
  SLOT(IVersionedInterface, getInterfaceInfo, InterfaceInfo, () const);
  INFO(IPluginV3);
  SLOT(IPluginV3, getCapabilityInterface, IPluginCapability*, (PluginCapabilityType));
  SLOT(IPluginV3, clone, IPluginV3*, ());
  INFO(IPluginV3OneCore);
  SLOT(IPluginV3OneCore, getPluginName, char const*, () const);
  SLOT(IPluginV3OneCore, getPluginVersion, char const*, () const);
  SLOT(IPluginV3OneCore, getPluginNamespace, char const*, () const);
  INFO(IPluginV3OneBuild);
  SLOT(IPluginV3OneBuild, configurePlugin, int32_t,
       (DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t));
  SLOT(IPluginV3OneBuild, getOutputDataTypes, int32_t, (DataType*, int32_t, DataType const*, int32_t) const);
  SLOT(IPluginV3OneBuild, getOutputShapes, int32_t,
       (DimsExprs const*, int32_t, DimsExprs const*, int32_t, DimsExprs*, int32_t, IExprBuilder&));
  SLOT(IPluginV3OneBuild, supportsFormatCombination, bool, (int32_t, DynamicPluginTensorDesc const*, int32_t, int32_t));
  SLOT(IPluginV3OneBuild, getNbOutputs, int32_t, () const);
  SLOT(IPluginV3OneBuild, getWorkspaceSize, size_t,
       (DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) const);
  SLOT(IPluginV3OneBuild, getValidTactics, int32_t, (int32_t*, int32_t));
  SLOT(IPluginV3OneBuild, getNbTactics, int32_t, ());
  SLOT(IPluginV3OneBuild, getTimingCacheID, char const*, ());
  SLOT(IPluginV3OneBuild, getFormatCombinationLimit, int32_t, ());
  SLOT(IPluginV3OneBuild, getMetadataString, char const*, ());
  INFO(IPluginV3OneRuntime);
  SLOT(IPluginV3OneRuntime, setTactic, int32_t, (int32_t));
  SLOT(IPluginV3OneRuntime, onShapeChange, int32_t,
       (PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t));
  SLOT(IPluginV3OneRuntime, enqueue, int32_t,
       (PluginTensorDesc const*, PluginTensorDesc const*, void const* const*, void* const*, void*, cudaStream_t));
  SLOT(IPluginV3OneRuntime, attachToContext, IPluginV3*, (IPluginResourceContext*));
  SLOT(IPluginV3OneRuntime, getFieldsToSerialize, PluginFieldCollection const*, ());
  INFO(IPluginCreatorV3One);
  SLOT(IPluginCreatorV3One, createPlugin, IPluginV3*, (char const*, PluginFieldCollection const*, TensorRTPhase));
  SLOT(IPluginCreatorV3One, getFieldNames, PluginFieldCollection const*, ());
  SLOT(IPluginCreatorV3One, getPluginName, char const*, () const);
  SLOT(IPluginCreatorV3One, getPluginVersion, char const*, () const);
  SLOT(IPluginCreatorV3One, getPluginNamespace, char const*, () const);
}

#endif

static void print_registry() {
  int32_t registerCreator = -1, deregisterCreator = -1, getCreator = -1, loadLibrary = -1, deregisterLibrary = -1;
#ifdef TENSORRT
#if VERSION >= 10000
  using Creator = IPluginCreatorInterface;
  getCreator = slot_of(&IPluginRegistry::getCreator);
#else
  using Creator = IPluginCreator;
  getCreator = slot_of(&IPluginRegistry::getPluginCreator);
#endif
  using Register = bool (IPluginRegistry::*)(Creator&, char const*);
  using Deregister = bool (IPluginRegistry::*)(Creator const&);
  registerCreator = slot_of(static_cast<Register>(&IPluginRegistry::registerCreator));
  deregisterCreator = slot_of(static_cast<Deregister>(&IPluginRegistry::deregisterCreator));
#if VERSION >= 8600
  loadLibrary = slot_of(&IPluginRegistry::loadLibrary);
  deregisterLibrary = slot_of(&IPluginRegistry::deregisterLibrary);
#endif
#else
  RegistrySlots slots{};
  if (registry_slots(VERSION, &slots)) {
    registerCreator = slots.registerCreator, deregisterCreator = slots.deregisterCreator, getCreator = slots.getCreator;
    loadLibrary = slots.loadLibrary, deregisterLibrary = slots.deregisterLibrary;
  }
#endif
  printf("IPluginRegistry          %2d registerCreator\n", registerCreator);
  printf("IPluginRegistry          %2d deregisterCreator\n", deregisterCreator);
  printf("IPluginRegistry          %2d getCreator\n", getCreator);
  printf("IPluginRegistry          %2d loadLibrary\n", loadLibrary);
  printf("IPluginRegistry          %2d deregisterLibrary\n", deregisterLibrary);
}

int main() {
  printf("version %d\n", VERSION);
  print_structs_and_enums();
  print_plugin();
  print_registry();
}
