// What both plugin generations share: the attributes of an Adder2d layer, their way in and out as plugin fields, the
// output shape and the step from TensorRT's tensor descriptions to Adder2dParams.
#pragma once

#include <cmath>

#include "../adder2d.h"
#include "abi.h"

namespace adder2d {

constexpr char const* kPluginName = "Adder2d";
constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "";
// x [N, C, H, W], weight [K, C / groups, R, S], bias [K], and where the attributes say so scale [K] and shift [K], and
// then residual [N, K, P, Q].
constexpr int32_t kMinInputs = 3;
constexpr int32_t kMaxInputs = 6;
constexpr int32_t kNbOutputs = 1;

// Everything a plugin knows; height comes before width. `output_type` is the DataType of y whatever the type of x:
// raw sums of wide layers pass float16's 65504, so a float16 layer keeps a float32 output unless told otherwise. The
// numbers have the types of plugin fields and stored engines.
struct Attributes {
  int32_t stride[2] = {1, 1};
  int32_t padding[2] = {0, 0};
  int32_t dilation[2] = {1, 1};
  int32_t groups = 1;
  int32_t output_type = static_cast<int32_t>(nvinfer1::DataType::kFLOAT);
  // The epilogue, y = clamp(scale[k] * (bias[k] - sum) + shift[k] + residual, lower, upper).
  int32_t scale = 0;        // 1: there are inputs scale and shift, float32
  int32_t residual = 0;     // 1: there is an input residual
  float lower = -INFINITY;  // infinite where there is no limit
  float upper = INFINITY;
  int32_t nb_inputs() const { return kMinInputs + 2 * scale + residual; }
  int32_t residual_at() const { return kMinInputs + 2 * scale; }
  bool has_epilogue() const { return scale || residual || lower != -INFINITY || upper != INFINITY; }
};

// One line on stderr. TensorRT's own logger is never called: its layout differs between versions.
void report(char const* format, ...) __attribute__((format(printf, 1, 2)));

// ---- fields

constexpr int32_t kNbFields = 9;

// The fields of an Adder2d layer as TensorRT wants them. `point_to` makes their data the values of `attributes` (null:
// names and types only), which must stay where it is for as long as the collection is in use.
struct FieldList {
  nvinfer1::PluginField fields[kNbFields];
  nvinfer1::PluginFieldCollection collection;
  nvinfer1::PluginFieldCollection const* point_to(Attributes const* attributes);
};

// Reads the fields given into `attributes`; absent ones keep their default, and so do limits without a value; a pair may
// come as one value for both axes.
// Reports the reason and returns false on a bad value, and on a field that is unknown, given twice or malformed: a
// misspelt field, or one of a newer release, would else give a layer of wrong results. Names that begin with "plugin_"
// or "tensorrt_plugin_" are skipped: they speak to TensorRT's ONNX parser.
bool parse(nvinfer1::PluginFieldCollection const* fc, Attributes* attributes);

// Reports and returns false where no layer can have these attributes.
bool validate(Attributes const& attributes);

// ---- tensors

// A tensor description of either generation. A rank of -1 and extents below 0 are unknown; a rank of 0 is a scalar.
struct Tensor {
  int32_t nbDims;
  int64_t d[nvinfer1::kMaxDims];
  nvinfer1::DataType type;
  nvinfer1::TensorFormat format;
};

template <typename Dims>
Tensor make_tensor(Dims const& dims, nvinfer1::DataType type, nvinfer1::TensorFormat format) {
  Tensor tensor{dims.nbDims, {}, type, format};
  for (int32_t i = 0; i < dims.nbDims && i < nvinfer1::kMaxDims; ++i) tensor.d[i] = dims.d[i];
  return tensor;
}

template <typename Desc>
Tensor make_tensor(Desc const& desc) {
  return make_tensor(desc.dims, desc.type, desc.format);
}

// The inputs of one layer, and its output after the last of them where the caller has one.
struct Tensors {
  Tensor at[kMaxInputs + kNbOutputs] = {};
};

// Of `count` descriptions (at most all that there is room for), each through `tensor_of`.
template <typename Desc, typename Convert>
Tensors make_tensors(Desc const* desc, int32_t count, Convert tensor_of) {
  Tensors tensors;
  for (int32_t i = 0; i < count && i < kMaxInputs + kNbOutputs; ++i) tensors.at[i] = tensor_of(desc[i]);
  return tensors;
}

template <typename Desc>
Tensors make_tensors(Desc const* desc, int32_t count) {
  return make_tensors(desc, count, [](Desc const& each) { return make_tensor(each); });
}

// Whether rank and extents are all known.
bool is_known(Tensor const& tensor);

// Whether these are the inputs and outputs of an Adder2d layer in number; reported where they are not.
bool check_counts(Attributes const& attributes, int32_t nbInputs, int32_t nbOutputs);

// Why the layer does not support inputs of these shapes, or null. What is unknown is not checked; shapes that are
// known but for their batch are checked as a whole.
char const* check_known(Attributes const& attributes, Tensors const& in);

// Why these inputs do not make a valid problem, or null. What is unknown is not checked.
char const* check_inputs(Attributes const& attributes, Tensors const& in);

// A problem for adder2d_fprop: `params` points to `epilogue` where the layer has one.
struct Problem {
  Adder2dParams params;
  Adder2dEpilogue epilogue;
};

// The whole problem but its pointers to tensors; y follows from the rest, but for its format. Returns why it is not
// valid, or null.
char const* fill_problem(Attributes const& attributes, Tensors const& in, nvinfer1::TensorFormat y_format,
                         Problem* problem);

// What every layer asks TensorRT for. adder2d_fprop takes any workspace, so one number serves all shapes of a profile,
// whose wants do not grow with their size. torch2trt allows 32 MiB by default.
constexpr size_t kWorkspaceBytes = 31 << 20;

constexpr int32_t kInvalidValue = 1;  // cudaErrorInvalidValue

// Runs the layer; `y` is checked against what the inputs give, and pointers against null. Returns 0 for success.
int32_t enqueue(Attributes const& attributes, Tensors const& in, Tensor const& y, void const* const* inputs,
                void* const* outputs, void* workspace, cudaStream_t stream);

template <typename Desc>
int32_t enqueue(Attributes const& attributes, Desc const* in, Desc const* out, void const* const* inputs,
                void* const* outputs, void* workspace, cudaStream_t stream) {
  if (in == nullptr || out == nullptr) {
    report("enqueue needs descriptions of its inputs and outputs, got null");
    return kInvalidValue;
  }
  return enqueue(attributes, make_tensors(in, attributes.nb_inputs()), make_tensor(out[0]), inputs, outputs, workspace,
                 stream);
}

// Whether tensor `pos` of `tensors` (the inputs, then y) may have its type and format, given those before it.
bool supports_format(Attributes const& attributes, Tensors const& tensors, int32_t pos);

// y [N, K, P, Q] in expressions. False where a rank is unknown, or the shapes, as far as known, are wrong; reported.
template <typename Exprs, typename Builder>
bool output_shape(Attributes const& attributes, Exprs const* inputs, int32_t nbInputs, Builder& builder, Exprs* y);

// ---- definition of the template

template <typename Exprs, typename Builder>
bool output_shape(Attributes const& attributes, Exprs const* inputs, int32_t nbInputs, Builder& builder, Exprs* y) {
  using Op = nvinfer1::DimensionOperation;
  using Expr = typename Builder::Expr;
  if (!check_counts(attributes, nbInputs, kNbOutputs)) return false;
  if (inputs == nullptr || y == nullptr) {
    report("the output shape needs the shapes of the inputs and a place, got null");
    return false;
  }
  Tensors known;
  for (int32_t i = 0; i < nbInputs; ++i) {
    known.at[i].nbDims = inputs[i].nbDims;
    for (int32_t j = 0; j < inputs[i].nbDims && j < nvinfer1::kMaxDims; ++j) {
      Expr const* const extent = inputs[i].d[j];
      if (extent == nullptr) {
        report("extent %d of input %d is null", j, i);
        return false;
      }
      known.at[i].d[j] = extent->isConstant() ? int64_t{extent->getConstantValue()} : -1;
    }
  }
  char const* reason = check_known(attributes, known);
  if (reason == nullptr && (known.at[0].nbDims != 4 || known.at[1].nbDims != 4))
    reason = "the ranks of x and weight must be known before the output shape";
  if (reason) {
    report("%s", reason);
    return false;
  }
  // A builder gives null where it has no memory, or no such operation.
  auto const constant = [&builder](int32_t value) -> Expr const* { return builder.constant(value); };
  auto const apply = [&builder](Op op, Expr const* a, Expr const* b) -> Expr const* {
    return a && b ? builder.operation(op, *a, *b) : nullptr;
  };
  Exprs const& x = inputs[0];
  Exprs const& weight = inputs[1];
  Exprs shape{4, {x.d[0], weight.d[0]}};
  for (int32_t axis = 0; axis < 2; ++axis) {
    // P = (H + 2 * padding - dilation * (R - 1) - 1) / stride + 1, and the same for Q. `validate` keeps 2 * padding an
    // int32.
    Expr const* const padded = apply(Op::kSUM, x.d[2 + axis], constant(2 * attributes.padding[axis] - 1));
    Expr const* const taps = apply(Op::kSUB, weight.d[2 + axis], constant(1));
    Expr const* const reach = apply(Op::kPROD, constant(attributes.dilation[axis]), taps);
    Expr const* const steps = apply(Op::kFLOOR_DIV, apply(Op::kSUB, padded, reach), constant(attributes.stride[axis]));
    shape.d[2 + axis] = apply(Op::kSUM, steps, constant(1));
    if (shape.d[2 + axis] == nullptr) {
      report("TensorRT could not compute the output shape");
      return false;
    }
  }
  *y = shape;
  return true;
}

}  // namespace adder2d
