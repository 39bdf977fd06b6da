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
    {"stride", offsetof(Attributes, stride), 2},           {"padding", offsetof(Attributes, padding), 2},
    {"dilation", offsetof(Attributes, dilation), 2},       {"groups", offsetof(Attributes, groups), 1},
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

// The Adder2dType of a type of TensorRT. The two have numbers of their own: 2 is INT8 there and bfloat16 here. False
// where the plugin does not support the type.
bool convert_type(DataType type, int32_t* converted) {
  switch (type) {
    case DataType::kFLOAT: *converted = ADDER2D_FLOAT32; return true;
    case DataType::kHALF: *converted = ADDER2D_FLOAT16; return true;
  }
  return false;
}

char const* convert_type(char const* name, DataType type, int32_t* converted) {
  if (convert_type(type, converted)) return nullptr;
  return sentence("%s must be FLOAT (0) or HALF (1), got type %d", name, static_cast<int32_t>(type));
}

char const* fill_attributes(Attributes const& attributes, Adder2dParams* params) {
  *params = Adder2dParams{};
  params->stride_h = attributes.stride[0];
  params->stride_w = attributes.stride[1];
  params->pad_h = attributes.padding[0];
  params->pad_w = attributes.padding[1];
  params->dil_h = attributes.dilation[0];
  params->dil_w = attributes.dilation[1];
  params->groups = attributes.groups;
  return convert_type("output_type", static_cast<DataType>(attributes.output_type), &params->y_type);
}

// P and Q, the check, and the strides of contiguous tensors, once the sizes and attributes are set.
char const* complete_params(Adder2dParams* params) {
  if (params->stride_h > 0 && params->stride_w > 0) {  // else adder2d_check names the stride
    int64_t const P = adder2d_output_size(params->H, params->R, params->stride_h, params->pad_h, params->dil_h);
    int64_t const Q = adder2d_output_size(params->W, params->S, params->stride_w, params->pad_w, params->dil_w);
    params->P = static_cast<int32_t>(std::min<int64_t>(P, std::numeric_limits<int32_t>::max()));
    params->Q = static_cast<int32_t>(std::min<int64_t>(Q, std::numeric_limits<int32_t>::max()));
  }
  // Before the strides: of a valid problem, no product of extents passes 2^58.
  if (char const* reason = adder2d_check(params)) return reason;
  int64_t const x_map = int64_t{params->H} * params->W;
  int64_t const y_map = int64_t{params->P} * params->Q;
  int64_t const x_stride[4] = {params->C * x_map, x_map, params->W, 1};
  int64_t const y_stride[4] = {params->K * y_map, y_map, params->Q, 1};
  std::copy_n(x_stride, 4, params->x_stride);
  std::copy_n(y_stride, 4, params->y_stride);
  return adder2d_check(params);
}

// The problem of known shapes, float32 in and with the layer's output type. Returns why it is not valid, or null.
char const* fill_sizes(Attributes const& attributes, Tensor const& x, Tensor const& weight, Adder2dParams* params) {
  if (char const* reason = fill_attributes(attributes, params)) return reason;
  params->N = static_cast<int32_t>(x.d[0]);
  params->C = static_cast<int32_t>(x.d[1]);
  params->H = static_cast<int32_t>(x.d[2]);
  params->W = static_cast<int32_t>(x.d[3]);
  params->K = static_cast<int32_t>(weight.d[0]);
  params->R = static_cast<int32_t>(weight.d[2]);
  params->S = static_cast<int32_t>(weight.d[3]);
  return complete_params(params);
}

// Ranks, ranges and channels, as far as known.
char const* check_channels(Attributes const& attributes, Tensor const& x, Tensor const& weight, Tensor const& bias) {
  if (x.nbDims != -1 && x.nbDims != 4) return sentence("x must be [N, C, H, W], got %d dimensions", x.nbDims);
  if (weight.nbDims != -1 && weight.nbDims != 4)
    return sentence("weight must be [K, C / groups, R, S], got %d dimensions", weight.nbDims);
  if (bias.nbDims != -1 && bias.nbDims != 1) return sentence("bias must be [K], got %d dimensions", bias.nbDims);
  for (Tensor const* tensor : {&x, &weight, &bias})
    for (int32_t i = 0; i < tensor->nbDims; ++i)
      if (tensor->d[i] > std::numeric_limits<int32_t>::max())
        return sentence("every extent must be from 0 to 2^31 - 1, got %lld", static_cast<long long>(tensor->d[i]));
  // From here on extents are int32, so that a product of two is an int64.
  long long const C = x.nbDims == 4 ? x.d[1] : -1;
  long long const K = weight.nbDims == 4 ? weight.d[0] : -1;
  long long const group_C = weight.nbDims == 4 ? weight.d[1] : -1;
  long long const bias_K = bias.nbDims == 1 ? bias.d[0] : -1;
  if (C >= 0 && group_C >= 0 && C != group_C * attributes.groups)
    return sentence("x has %lld channels, but weight wants %lld in each of %d groups", C, group_C, attributes.groups);
  if (K >= 0 && K % attributes.groups != 0)
    return sentence("groups must divide the %lld filters, got %d", K, attributes.groups);
  if (K >= 0 && bias_K >= 0 && K != bias_K)
    return sentence("bias must have the %lld filters of weight, got %lld", K, bias_K);
  return nullptr;
}

// Reads one field into its place; reports and returns false where it is malformed.
bool read_field(nvinfer1::PluginField const& field, FieldPlace const& place, Attributes* attributes) {
  if (field.type != PluginFieldType::kINT32) {
    report("field %s must be of type INT32 (5), got type %d", place.name, static_cast<int32_t>(field.type));
    return false;
  }
  if (field.data == nullptr || (field.length != 1 && field.length != place.length)) {
    report("field %s must hold %s, got %d%s", place.name, place.length == 2 ? "1 or 2 values" : "1 value", field.length,
           field.data ? "" : " at null");
    return false;
  }
  char* const target = reinterpret_cast<char*>(attributes) + place.offset;
  for (int32_t i = 0; i < place.length; ++i) {
    int32_t const source = field.length == 1 ? 0 : i;
    std::memcpy(target + i * sizeof(int32_t), static_cast<char const*>(field.data) + source * sizeof(int32_t),
                sizeof(int32_t));
  }
  return true;
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
  constexpr int32_t kMaxFields = 64;  // far more than any caller has: a larger count is damaged data
  *attributes = Attributes{};
  int32_t const nbFields = fc ? fc->nbFields : 0;
  if (nbFields < 0 || nbFields > kMaxFields || (nbFields > 0 && fc->fields == nullptr)) {
    report("a field collection must hold 0 to %d fields, got %d%s", kMaxFields, nbFields, fc->fields ? "" : " at null");
    return false;
  }
  bool given[kNbFields] = {};
  for (int32_t i = 0; i < nbFields; ++i) {
    nvinfer1::PluginField const& field = fc->fields[i];
    if (field.name == nullptr) {
      report("field %d has no name", i);
      return false;
    }
    if (std::strncmp(field.name, "plugin_", 7) == 0 || std::strncmp(field.name, "tensorrt_plugin_", 16) == 0) continue;
    FieldPlace const* const place =
        std::find_if(kFieldPlaces, kFieldPlaces + kNbFields,
                     [&field](FieldPlace const& candidate) { return std::strcmp(field.name, candidate.name) == 0; });
    if (place == kFieldPlaces + kNbFields) {
      report("an Adder2d layer has the fields stride, padding, dilation, groups and output_type, got \"%.64s\"",
             field.name);
      return false;
    }
    if (given[place - kFieldPlaces]) {
      report("field %s was given twice", place->name);
      return false;
    }
    given[place - kFieldPlaces] = true;
    if (!read_field(field, *place, attributes)) return false;
  }
  return validate(*attributes);
}

bool validate(Attributes const& attributes) {
  // The smallest problem of these attributes: one channel a group, a kernel and an input of one element.
  Adder2dParams params;
  char const* reason = fill_attributes(attributes, &params);
  params.N = params.H = params.W = params.R = params.S = 1;
  params.C = params.K = std::max(attributes.groups, 1);
  if (reason == nullptr) reason = complete_params(&params);
  if (reason) report("%s", reason);
  return reason == nullptr;
}

// ---- tensors

bool is_known(Tensor const& tensor) {
  return tensor.nbDims >= 0 && tensor.nbDims <= nvinfer1::kMaxDims &&
         std::all_of(tensor.d, tensor.d + tensor.nbDims, [](int64_t extent) { return extent >= 0; });
}

bool check_counts(int32_t nbInputs, int32_t nbOutputs) {
  if (nbInputs == kNbInputs && nbOutputs == kNbOutputs) return true;
  report("an Adder2d layer has %d inputs (x, weight, bias) and %d output, got %d and %d", kNbInputs, kNbOutputs,
         nbInputs, nbOutputs);
  return false;
}

char const* check_known(Attributes const& attributes, Tensor const& x, Tensor const& weight, Tensor const& bias) {
  if (char const* reason = check_channels(attributes, x, weight, bias)) return reason;
  Tensor one = x;
  if (one.nbDims == 4 && one.d[0] < 0) one.d[0] = 1;
  if (x.nbDims != 4 || weight.nbDims != 4 || !is_known(one) || !is_known(weight)) return nullptr;
  Adder2dParams params;
  return fill_sizes(attributes, one, weight, &params);
}

char const* fill_params(Attributes const& attributes, Tensor const& x, Tensor const& weight, Tensor const& bias,
                        Adder2dParams* params) {
  if (x.nbDims != 4 || weight.nbDims != 4 || bias.nbDims != 1)
    return sentence("x, weight and bias must have 4, 4 and 1 dimensions, got %d, %d and %d", x.nbDims, weight.nbDims,
                    bias.nbDims);
  if (!is_known(x) || !is_known(weight) || !is_known(bias)) return "every extent of x, weight and bias must be known";
  if (char const* reason = check_channels(attributes, x, weight, bias)) return reason;
  if (bias.type != weight.type)
    return sentence("bias must have the type of weight (%d), got %d", static_cast<int32_t>(weight.type),
                    static_cast<int32_t>(bias.type));
  if (char const* reason = fill_sizes(attributes, x, weight, params)) return reason;
  if (char const* reason = convert_type("x", x.type, &params->x_type)) return reason;
  return convert_type("weight", weight.type, &params->w_type);
}

int32_t enqueue(Attributes const& attributes, Tensor const& x, Tensor const& weight, Tensor const& bias,
                Tensor const& y, void const* const* inputs, void* const* outputs, void* workspace,
                cudaStream_t stream) {
  Adder2dParams params;
  if (char const* reason = fill_params(attributes, x, weight, bias, &params)) {
    report("%s", reason);
    return kInvalidValue;
  }
  int64_t const expected[4] = {params.N, params.K, params.P, params.Q};
  if (y.nbDims != 4 || !std::equal(expected, expected + 4, y.d) ||
      static_cast<int32_t>(y.type) != attributes.output_type) {
    report("the output must be [%d, %d, %d, %d] of type %d, got %d dimensions of type %d", params.N, params.K, params.P,
           params.Q, attributes.output_type, y.nbDims, static_cast<int32_t>(y.type));
    return kInvalidValue;
  }
  if (params.N == 0) return 0;  // empty tensors may lie at null
  if (inputs == nullptr || outputs == nullptr || std::find(inputs, inputs + kNbInputs, nullptr) != inputs + kNbInputs ||
      outputs[0] == nullptr) {
    report("enqueue needs the addresses of x, weight, bias and y, got null");
    return kInvalidValue;
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
