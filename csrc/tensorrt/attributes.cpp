#include "attributes.h"

#include <stdarg.h>
#include <stdio.h>

#include <algorithm>
#include <cstring>
#include <limits>

namespace adder2d {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;

// The one list of fields: name and place in Attributes.
struct FieldPlace {
  char const* name;
  size_t offset;
  int32_t length;
};
constexpr FieldPlace kFieldPlaces[kNbFields] = {
    {"stride", offsetof(Attributes, stride), 2},
    {"padding", offsetof(Attributes, padding), 2},
    {"dilation", offsetof(Attributes, dilation), 2},
    {"groups", offsetof(Attributes, groups), 1},
    {"output_type", offsetof(Attributes, output_type), 1},
};

char const* sentence(char const* format, ...) __attribute__((format(printf, 1, 2)));
char const* sentence(char const* format, ...) {
  static thread_local char text[256];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  return text;
}

// TensorRT's FLOAT and HALF have the numbers of Adder2dType.
static_assert(static_cast<int32_t>(DataType::kFLOAT) == ADDER2D_FLOAT32, "");
static_assert(static_cast<int32_t>(DataType::kHALF) == ADDER2D_FLOAT16, "");

void fill_attributes(Attributes const& attributes, Adder2dParams* params) {
  *params = Adder2dParams{};
  params->stride_h = attributes.stride[0];
  params->stride_w = attributes.stride[1];
  params->pad_h = attributes.padding[0];
  params->pad_w = attributes.padding[1];
  params->dil_h = attributes.dilation[0];
  params->dil_w = attributes.dilation[1];
  params->groups = attributes.groups;
  params->y_type = attributes.output_type;
}

// P, Q and the strides of contiguous tensors, once the sizes and attributes are set; then the check.
char const* complete_params(Adder2dParams* params) {
  if (params->stride_h > 0 && params->stride_w > 0) {  // else adder2d_check names the stride
    int64_t const P = adder2d_output_size(params->H, params->R, params->stride_h, params->pad_h, params->dil_h);
    int64_t const Q = adder2d_output_size(params->W, params->S, params->stride_w, params->pad_w, params->dil_w);
    params->P = static_cast<int32_t>(std::min<int64_t>(P, std::numeric_limits<int32_t>::max()));
    params->Q = static_cast<int32_t>(std::min<int64_t>(Q, std::numeric_limits<int32_t>::max()));
  }
  int64_t const x_map = int64_t{params->H} * params->W;
  int64_t const y_map = int64_t{params->P} * params->Q;
  int64_t const x_stride[4] = {params->C * x_map, x_map, params->W, 1};
  int64_t const y_stride[4] = {params->K * y_map, y_map, params->Q, 1};
  std::copy_n(x_stride, 4, params->x_stride);
  std::copy_n(y_stride, 4, params->y_stride);
  return adder2d_check(params);
}

}  // namespace

void report(char const* format, ...) {
  char text[320];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  fprintf(stderr, "torch2trt_adder: %s\n", text);
}

// ---- fields

nvinfer1::PluginFieldCollection const* FieldList::point_to(Attributes const* attributes) {
  for (int32_t i = 0; i < kNbFields; ++i) {
    FieldPlace const& place = kFieldPlaces[i];
    void const* data = attributes ? reinterpret_cast<char const*>(attributes) + place.offset : nullptr;
    fields[i] = {place.name, data, PluginFieldType::kINT32, place.length};
  }
  collection = {kNbFields, fields};
  return &collection;
}

bool parse(nvinfer1::PluginFieldCollection const* fc, Attributes* attributes) {
  *attributes = Attributes{};
  int32_t const nbFields = fc && fc->fields ? fc->nbFields : 0;
  for (int32_t i = 0; i < nbFields; ++i) {
    nvinfer1::PluginField const& field = fc->fields[i];
    if (field.name == nullptr) continue;
    for (FieldPlace const& place : kFieldPlaces) {
      if (std::strcmp(field.name, place.name) != 0) continue;
      if (field.type != PluginFieldType::kINT32) {
        report("field %s must be of type INT32 (5), got type %d", place.name, static_cast<int32_t>(field.type));
        return false;
      }
      if (field.data == nullptr || (field.length != 1 && field.length != place.length)) {
        report("field %s must hold 1%s values, got %d", place.name, place.length == 2 ? " or 2" : "",
               field.data ? field.length : 0);
        return false;
      }
      char* target = reinterpret_cast<char*>(attributes) + place.offset;
      for (int32_t j = 0; j < place.length; ++j) {
        int32_t const source = field.length == 1 ? 0 : j;
        std::memcpy(target + j * sizeof(int32_t), static_cast<char const*>(field.data) + source * sizeof(int32_t),
                    sizeof(int32_t));
      }
    }
  }
  return validate(*attributes);
}

bool validate(Attributes const& attributes) {
  if (attributes.output_type != static_cast<int32_t>(DataType::kFLOAT) &&
      attributes.output_type != static_cast<int32_t>(DataType::kHALF)) {
    report("output_type must be FLOAT (0) or HALF (1), got %d", attributes.output_type);
    return false;
  }
  // The smallest problem of these attributes: one channel a group, a kernel and an input of one element.
  Adder2dParams params;
  fill_attributes(attributes, &params);
  params.N = params.H = params.W = params.R = params.S = 1;
  params.C = params.K = std::max(attributes.groups, 1);
  char const* reason = complete_params(&params);
  if (reason) report("%s", reason);
  return reason == nullptr;
}

// ---- tensors

bool is_known(Tensor const& tensor) {
  return tensor.nbDims > 0 && std::all_of(tensor.d, tensor.d + std::min(tensor.nbDims, nvinfer1::kMaxDims),
                                          [](int64_t extent) { return extent >= 0; });
}

char const* check_known(Attributes const& attributes, Tensor const& x, Tensor const& weight, Tensor const& bias) {
  if (x.nbDims > 0 && x.nbDims != 4) return sentence("x must be [N, C, H, W], got %d dimensions", x.nbDims);
  if (weight.nbDims > 0 && weight.nbDims != 4)
    return sentence("weight must be [K, C / groups, R, S], got %d dimensions", weight.nbDims);
  if (bias.nbDims > 0 && bias.nbDims != 1) return sentence("bias must be [K], got %d dimensions", bias.nbDims);
  long long const C = x.nbDims == 4 ? x.d[1] : -1;
  long long const K = weight.nbDims == 4 ? weight.d[0] : -1;
  long long const group_C = weight.nbDims == 4 ? weight.d[1] : -1;
  long long const bias_K = bias.nbDims == 1 ? bias.d[0] : -1;
  if (C >= 0 && group_C >= 0 && C != group_C * attributes.groups)
    return sentence("x has %lld channels, but weight wants %lld in each of %d groups", C, group_C, attributes.groups);
  if (K >= 0 && K % attributes.groups != 0) return sentence("groups must divide the %lld filters, got %d", K, attributes.groups);
  if (K >= 0 && bias_K >= 0 && K != bias_K) return sentence("bias must have the %lld filters of weight, got %lld", K, bias_K);
  return nullptr;
}

char const* fill_params(Attributes const& attributes, Tensor const& x, Tensor const& weight, Tensor const& bias,
                        Adder2dParams* params) {
  if (x.nbDims != 4 || weight.nbDims != 4 || bias.nbDims != 1)
    return sentence("x, weight and bias must have 4, 4 and 1 dimensions, got %d, %d and %d", x.nbDims, weight.nbDims, bias.nbDims);
  for (Tensor const* tensor : {&x, &weight, &bias})
    for (int32_t i = 0; i < tensor->nbDims; ++i)
      if (tensor->d[i] < 0 || tensor->d[i] > std::numeric_limits<int32_t>::max())
        return sentence("every extent must be from 0 to 2^31 - 1, got %lld", static_cast<long long>(tensor->d[i]));
  if (char const* reason = check_known(attributes, x, weight, bias)) return reason;
  if (bias.type != weight.type) return sentence("bias must have the type of weight (%d), got %d", weight.type, bias.type);
  fill_attributes(attributes, params);
  params->N = static_cast<int32_t>(x.d[0]);
  params->C = static_cast<int32_t>(x.d[1]);
  params->H = static_cast<int32_t>(x.d[2]);
  params->W = static_cast<int32_t>(x.d[3]);
  params->K = static_cast<int32_t>(weight.d[0]);
  params->R = static_cast<int32_t>(weight.d[2]);
  params->S = static_cast<int32_t>(weight.d[3]);
  params->x_type = x.type;
  params->w_type = weight.type;
  return complete_params(params);
}

int32_t enqueue(Attributes const& attributes, Tensor const& x, Tensor const& weight, Tensor const& bias, Tensor const& y,
                void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) {
  constexpr int32_t kInvalid = 1;  // cudaErrorInvalidValue
  Adder2dParams params;
  if (char const* reason = fill_params(attributes, x, weight, bias, &params)) {
    report("%s", reason);
    return kInvalid;
  }
  int64_t const expected[4] = {params.N, params.K, params.P, params.Q};
  if (y.nbDims != 4 || !std::equal(expected, expected + 4, y.d) || y.type != attributes.output_type) {
    report("the output must be [%d, %d, %d, %d] of type %d, got %d dimensions of type %d", params.N, params.K, params.P,
           params.Q, attributes.output_type, y.nbDims, y.type);
    return kInvalid;
  }
  params.x = inputs[0];
  params.w = inputs[1];
  params.b = inputs[2];
  params.y = outputs[0];
  params.workspace = workspace;
  params.workspace_bytes = workspace != nullptr ? kWorkspaceBytes : 0;
  int32_t const error = adder2d_fprop(&params, stream);
  if (error != 0) report("adder2d_fprop failed: %s", adder2d_error_string(error));
  return error;
}

bool supports_format(Attributes const& attributes, int32_t pos, DataType type, nvinfer1::TensorFormat format) {
  if (format != nvinfer1::TensorFormat::kLINEAR) return false;
  switch (pos) {
    case 0: return type == DataType::kFLOAT || type == DataType::kHALF;
    case 1:  // weight and bias stay float32 beside a float16 x: the kernel converts them as it fills its tiles
    case 2: return type == DataType::kFLOAT;
    case 3: return static_cast<int32_t>(type) == attributes.output_type;
    default: return false;
  }
}

}  // namespace adder2d
