#include "attributes.h"

#include <stdarg.h>
#include <stdio.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

namespace adder2d {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorFormat;

// The one list of fields: name, place in Attributes, type, and the numbers of values that a field may hold.
struct FieldPlace {
  char const* name;
  size_t offset;
  PluginFieldType type;
  int32_t min_length, length;
};
constexpr FieldPlace kFieldPlaces[kNbFields] = {
    {"stride", offsetof(Attributes, stride), PluginFieldType::kINT32, 1, 2},
    {"padding", offsetof(Attributes, padding), PluginFieldType::kINT32, 1, 2},
    {"dilation", offsetof(Attributes, dilation), PluginFieldType::kINT32, 1, 2},
    {"groups", offsetof(Attributes, groups), PluginFieldType::kINT32, 1, 1},
    {"output_type", offsetof(Attributes, output_type), PluginFieldType::kINT32, 1, 1},
    {"scale", offsetof(Attributes, scale), PluginFieldType::kINT32, 1, 1},
    {"residual", offsetof(Attributes, residual), PluginFieldType::kINT32, 1, 1},
    {"lower", offsetof(Attributes, lower), PluginFieldType::kFLOAT32, 0, 1},
    {"upper", offsetof(Attributes, upper), PluginFieldType::kFLOAT32, 0, 1},
};
static_assert(sizeof(float) == sizeof(int32_t), "read_field copies values of either type");

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

// The attributes, with an epilogue where the layer has one. A residual is float32 until its tensor is known.
char const* fill_attributes(Attributes const& attributes, Problem* problem) {
  *problem = Problem{};
  Adder2dParams& params = problem->params;
  params.stride_h = attributes.stride[0];
  params.stride_w = attributes.stride[1];
  params.pad_h = attributes.padding[0];
  params.pad_w = attributes.padding[1];
  params.dil_h = attributes.dilation[0];
  params.dil_w = attributes.dilation[1];
  params.groups = attributes.groups;
  problem->epilogue.lower = attributes.lower;
  problem->epilogue.upper = attributes.upper;
  if (attributes.has_epilogue()) params.epilogue = &problem->epilogue;
  return convert_type("output_type", static_cast<DataType>(attributes.output_type), &params.y_type);
}

// Strides of a tensor [., channels, height, width]. In kHWC8 channels lie side by side, filled up to a multiple of 8.
void set_strides(TensorFormat format, int64_t channels, int64_t height, int64_t width, int64_t (&stride)[4]) {
  int64_t const pitch = (channels + 7) / 8 * 8;
  int64_t const linear[4] = {channels * height * width, height * width, width, 1};
  int64_t const channels_last[4] = {height * width * pitch, 1, width * pitch, pitch};
  std::copy_n(format == TensorFormat::kHWC8 ? channels_last : linear, 4, stride);
}

// P and Q, the check, and the strides, once the sizes and attributes are set.
char const* complete_problem(TensorFormat x_format, TensorFormat y_format, TensorFormat residual_format,
                             Problem* problem) {
  Adder2dParams* const params = &problem->params;
  if (params->stride_h > 0 && params->stride_w > 0) {  // else adder2d_check names the stride
    int64_t const P = adder2d_output_size(params->H, params->R, params->stride_h, params->pad_h, params->dil_h);
    int64_t const Q = adder2d_output_size(params->W, params->S, params->stride_w, params->pad_w, params->dil_w);
    params->P = static_cast<int32_t>(std::min<int64_t>(P, std::numeric_limits<int32_t>::max()));
    params->Q = static_cast<int32_t>(std::min<int64_t>(Q, std::numeric_limits<int32_t>::max()));
  }
  // Before the strides: of a valid problem, no product of extents passes 2^58, and none of kHWC8 2^61.
  if (char const* reason = adder2d_check(params)) return reason;
  set_strides(x_format, params->C, params->H, params->W, params->x_stride);
  set_strides(y_format, params->K, params->P, params->Q, params->y_stride);
  set_strides(residual_format, params->K, params->P, params->Q, problem->epilogue.residual_stride);
  return adder2d_check(params);
}

// The problem of known shapes, float32 in and with the layer's output type. Returns why it is not valid, or null.
char const* fill_sizes(Attributes const& attributes, Tensors const& in, TensorFormat y_format, Problem* problem) {
  if (char const* reason = fill_attributes(attributes, problem)) return reason;
  Tensor const &x = in.at[0], &weight = in.at[1], &residual = in.at[attributes.residual_at()];
  Adder2dParams* const params = &problem->params;
  params->N = static_cast<int32_t>(x.d[0]);
  params->C = static_cast<int32_t>(x.d[1]);
  params->H = static_cast<int32_t>(x.d[2]);
  params->W = static_cast<int32_t>(x.d[3]);
  params->K = static_cast<int32_t>(weight.d[0]);
  params->R = static_cast<int32_t>(weight.d[2]);
  params->S = static_cast<int32_t>(weight.d[3]);
  if (char const* reason = complete_problem(x.format, y_format, residual.format, problem)) return reason;
  if (!attributes.residual || residual.nbDims != 4) return nullptr;
  int32_t const expected[3] = {params->K, params->P, params->Q};
  for (int32_t i = 0; i < 3; ++i)
    if (residual.d[1 + i] >= 0 && residual.d[1 + i] != expected[i])
      return sentence("residual must have the shape [%d, %d, %d, %d] of y, got extent %lld on axis %d", params->N,
                      params->K, params->P, params->Q, static_cast<long long>(residual.d[1 + i]), 1 + i);
  return nullptr;
}

// Whether y may have this type and format. kHWC8 fills the channels up to a multiple of 8; other layers may read that
// filling, which the kernel does not write, so that y has that format only where there is none.
bool is_output(Attributes const& attributes, Tensor const& y, int64_t channels) {
  bool const channels_last = y.format == TensorFormat::kHWC8 && y.type == DataType::kHALF && channels > 0 && channels % 8 == 0;
  return static_cast<int32_t>(y.type) == attributes.output_type && (y.format == TensorFormat::kLINEAR || channels_last);
}

char const* check_ranks(Attributes const& attributes, Tensors const& in) {
  constexpr struct {
    char const* name;
    char const* shape;
    int32_t rank;
  } kInputs[] = {{"x", "[N, C, H, W]", 4},
                 {"weight", "[K, C / groups, R, S]", 4},
                 {"bias", "[K]", 1},
                 {"scale", "[K]", 1},
                 {"shift", "[K]", 1},
                 {"residual", "[N, K, P, Q]", 4}};
  for (int32_t i = 0; i < attributes.nb_inputs(); ++i) {
    Tensor const& tensor = in.at[i];
    auto const& input = kInputs[attributes.residual && i == attributes.residual_at() ? 5 : i];
    if (tensor.nbDims != -1 && tensor.nbDims != input.rank)
      return sentence("%s must be %s, got %d dimensions", input.name, input.shape, tensor.nbDims);
    for (int32_t j = 0; j < tensor.nbDims; ++j)
      if (tensor.d[j] > std::numeric_limits<int32_t>::max())
        return sentence("every extent must be from 0 to 2^31 - 1, got %lld", static_cast<long long>(tensor.d[j]));
  }
  return nullptr;
}

// Ranks, ranges, channels and the residual's batch, as far as known.
char const* check_channels(Attributes const& attributes, Tensors const& in) {
  if (char const* reason = check_ranks(attributes, in)) return reason;
  Tensor const &x = in.at[0], &weight = in.at[1];
  // From here on extents are int32, so that a product of two is an int64.
  long long const C = x.nbDims == 4 ? x.d[1] : -1;
  long long const K = weight.nbDims == 4 ? weight.d[0] : -1;
  long long const group_C = weight.nbDims == 4 ? weight.d[1] : -1;
  if (C >= 0 && group_C >= 0 && C != group_C * attributes.groups)
    return sentence("x has %lld channels, but weight wants %lld in each of %d groups", C, group_C, attributes.groups);
  if (K >= 0 && K % attributes.groups != 0)
    return sentence("groups must divide the %lld filters, got %d", K, attributes.groups);
  constexpr char const* kVectors[] = {"bias", "scale", "shift"};
  for (int32_t i = 0; i < 1 + 2 * attributes.scale; ++i) {
    Tensor const& vector = in.at[2 + i];
    long long const length = vector.nbDims == 1 ? vector.d[0] : -1;
    if (K >= 0 && length >= 0 && K != length)
      return sentence("%s must have the %lld filters of weight, got %lld", kVectors[i], K, length);
  }
  Tensor const& residual = in.at[attributes.residual_at()];
  if (!attributes.residual || residual.nbDims != 4) return nullptr;
  if (x.nbDims == 4 && x.d[0] >= 0 && residual.d[0] >= 0 && x.d[0] != residual.d[0])
    return sentence("residual must have the batch of x, %lld, got %lld", static_cast<long long>(x.d[0]),
                    static_cast<long long>(residual.d[0]));
  if (K >= 0 && residual.d[1] >= 0 && residual.d[1] != K)
    return sentence("residual must have the %lld filters of weight as channels, got %lld", K,
                    static_cast<long long>(residual.d[1]));
  return nullptr;
}

// Reads one field into its place; reports and returns false where it is malformed.
bool read_field(nvinfer1::PluginField const& field, FieldPlace const& place, Attributes* attributes) {
  if (field.type != place.type) {
    report("field %s must be of type %s (%d), got type %d", place.name,
           place.type == PluginFieldType::kINT32 ? "INT32" : "FLOAT32", static_cast<int32_t>(place.type),
           static_cast<int32_t>(field.type));
    return false;
  }
  bool const empty = field.length == 0 && place.min_length == 0;
  if (empty) return true;  // the default
  if (field.data == nullptr || (field.length != 1 && field.length != place.length)) {
    report("field %s must hold %s, got %d%s", place.name,
           place.length == 2 ? "1 or 2 values" : place.min_length == 0 ? "0 or 1 values" : "1 value", field.length,
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
    fields[i] = {place.name, data, place.type, place.length};
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
      report(
          "an Adder2d layer has the fields stride, padding, dilation, groups, output_type, scale, residual, lower and "
          "upper, got \"%.64s\"",
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
  for (auto const& [name, value] : {std::pair{"scale", attributes.scale}, {"residual", attributes.residual}})
    if (value != 0 && value != 1) {
      report("%s must be 0 or 1, got %d", name, value);
      return false;
    }
  // The smallest problem of these attributes: one channel a group, a kernel and an input of one element.
  Problem problem;
  char const* reason = fill_attributes(attributes, &problem);
  Adder2dParams& params = problem.params;
  params.N = params.H = params.W = params.R = params.S = 1;
  params.C = params.K = std::max(attributes.groups, 1);
  if (reason == nullptr)
    reason = complete_problem(TensorFormat::kLINEAR, TensorFormat::kLINEAR, TensorFormat::kLINEAR, &problem);
  if (reason) report("%s", reason);
  return reason == nullptr;
}

// ---- tensors

bool is_known(Tensor const& tensor) {
  return tensor.nbDims >= 0 && tensor.nbDims <= nvinfer1::kMaxDims &&
         std::all_of(tensor.d, tensor.d + tensor.nbDims, [](int64_t extent) { return extent >= 0; });
}

bool check_counts(Attributes const& attributes, int32_t nbInputs, int32_t nbOutputs) {
  if (nbInputs == attributes.nb_inputs() && nbOutputs == kNbOutputs) return true;
  report("this Adder2d layer has %d inputs (x, weight, bias%s%s) and %d output, got %d and %d", attributes.nb_inputs(),
         attributes.scale ? ", scale, shift" : "", attributes.residual ? ", residual" : "", kNbOutputs, nbInputs,
         nbOutputs);
  return false;
}

char const* check_known(Attributes const& attributes, Tensors const& in) {
  if (char const* reason = check_channels(attributes, in)) return reason;
  Tensors one = in;
  if (one.at[0].nbDims == 4 && one.at[0].d[0] < 0) one.at[0].d[0] = 1;
  if (one.at[0].nbDims != 4 || one.at[1].nbDims != 4 || !is_known(one.at[0]) || !is_known(one.at[1])) return nullptr;
  Problem problem;
  return fill_sizes(attributes, one, TensorFormat::kLINEAR, &problem);
}

char const* check_inputs(Attributes const& attributes, Tensors const& in) {
  if (char const* reason = check_known(attributes, in)) return reason;
  if (!std::all_of(in.at, in.at + attributes.nb_inputs(), is_known)) return nullptr;
  Problem problem;
  return fill_problem(attributes, in, TensorFormat::kLINEAR, &problem);
}

char const* fill_problem(Attributes const& attributes, Tensors const& in, TensorFormat y_format, Problem* problem) {
  Tensor const &x = in.at[0], &weight = in.at[1], &bias = in.at[2];
  if (!std::all_of(in.at, in.at + attributes.nb_inputs(), is_known)) return "every extent of every input must be known";
  if (char const* reason = check_channels(attributes, in)) return reason;
  if (bias.type != weight.type)
    return sentence("bias must have the type of weight (%d), got %d", static_cast<int32_t>(weight.type),
                    static_cast<int32_t>(bias.type));
  for (int32_t i = kMinInputs; i < attributes.residual_at(); ++i)
    if (in.at[i].type != DataType::kFLOAT)
      return sentence("scale and shift must be FLOAT (0), got type %d", static_cast<int32_t>(in.at[i].type));
  Tensor const& residual = in.at[attributes.residual_at()];
  for (auto const& [name, tensor] : {std::pair{"x", &x}, {"residual", &residual}})
    if (tensor->format != TensorFormat::kLINEAR &&
        (tensor->format != TensorFormat::kHWC8 || tensor->type != DataType::kHALF))
      return sentence("%s must be linear, or HWC8 of float16, got format %d of type %d", name,
                      static_cast<int32_t>(tensor->format), static_cast<int32_t>(tensor->type));
  if (char const* reason = fill_sizes(attributes, in, y_format, problem)) return reason;
  if (char const* reason = convert_type("x", x.type, &problem->params.x_type)) return reason;
  if (char const* reason = convert_type("weight", weight.type, &problem->params.w_type)) return reason;
  return attributes.residual ? convert_type("residual", residual.type, &problem->epilogue.residual_type) : nullptr;
}

int32_t enqueue(Attributes const& attributes, Tensors const& in, Tensor const& y, void const* const* inputs,
                void* const* outputs, void* workspace, cudaStream_t stream) {
  Problem problem;
  Adder2dParams& params = problem.params;
  if (char const* reason = fill_problem(attributes, in, y.format, &problem)) {
    report("%s", reason);
    return kInvalidValue;
  }
  int64_t const expected[4] = {params.N, params.K, params.P, params.Q};
  if (y.nbDims != 4 || !std::equal(expected, expected + 4, y.d) || !is_output(attributes, y, params.K)) {
    report("the output must be [%d, %d, %d, %d] of type %d, got %d dimensions of type %d and format %d", params.N,
           params.K, params.P, params.Q, attributes.output_type, y.nbDims, static_cast<int32_t>(y.type),
           static_cast<int32_t>(y.format));
    return kInvalidValue;
  }
  if (params.N == 0) return 0;  // empty tensors may lie at null
  int32_t const nbInputs = attributes.nb_inputs();
  if (inputs == nullptr || outputs == nullptr || std::find(inputs, inputs + nbInputs, nullptr) != inputs + nbInputs ||
      outputs[0] == nullptr) {
    report("enqueue needs the addresses of all its inputs and of y, got null");
    return kInvalidValue;
  }
  params.x = inputs[0];
  params.w = inputs[1];
  params.b = inputs[2];
  params.y = outputs[0];
  params.workspace = workspace;
  params.workspace_bytes = workspace != nullptr ? kWorkspaceBytes : 0;
  if (attributes.scale) {
    problem.epilogue.scale = static_cast<float const*>(inputs[3]);
    problem.epilogue.shift = static_cast<float const*>(inputs[4]);
  }
  if (attributes.residual) problem.epilogue.residual = inputs[attributes.residual_at()];
  int32_t const error = adder2d_fprop(&params, stream);
  if (error != 0) report("adder2d_fprop failed: %s", adder2d_error_string(error));
  return error;
}

bool supports_format(Attributes const& attributes, Tensors const& tensors, int32_t pos) {
  int32_t const nbInputs = attributes.nb_inputs();
  if (pos < 0 || pos > nbInputs) return false;
  Tensor const& tensor = tensors.at[pos];
  bool const half = tensor.type == DataType::kHALF;
  if (pos == nbInputs) {
    Tensor const& weight = tensors.at[1];
    // One layout for residual and y: the kernel reads the one as it writes the other, with the same vectors.
    Tensor const& residual = tensors.at[attributes.residual_at()];
    bool const differs = attributes.residual && half && residual.type == tensor.type && residual.format != tensor.format;
    return !differs && is_output(attributes, tensor, weight.nbDims == 4 ? weight.d[0] : -1);
  }
  if (pos == 0 || (attributes.residual && pos == attributes.residual_at()))
    return (tensor.format == TensorFormat::kLINEAR && (half || tensor.type == DataType::kFLOAT)) ||
           (tensor.format == TensorFormat::kHWC8 && half);
  // Weight and bias stay float32 beside a float16 x: the kernel converts them as it fills its tiles.
  return tensor.format == TensorFormat::kLINEAR && tensor.type == DataType::kFLOAT;
}

}  // namespace adder2d
