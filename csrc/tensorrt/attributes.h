// What both plugin generations share: the attributes of an Adder2d layer, their way in and out as plugin fields, the
// output shape and the step from TensorRT's tensor descriptions to Adder2dParams.
#pragma once

#include "../adder2d.h"
#include "abi.h"

namespace adder2d {

constexpr char const* kPluginName = "Adder2d";
constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "";
constexpr int32_t kNbInputs = 3;  // x [N, C, H, W], weight [K, C / groups, R, S], bias [K]
constexpr int32_t kNbOutputs = 1;

// Everything a plugin knows; height comes before width. `output_type` is the DataType of y whatever the type of x:
// raw sums of wide layers pass float16's 65504, so a float16 layer keeps a float32 output unless told otherwise.
struct Attributes {
  int32_t stride[2] = {1, 1};
  int32_t padding[2] = {0, 0};
  int32_t dilation[2] = {1, 1};
  int32_t groups = 1;
  int32_t output_type = static_cast<int32_t>(nvinfer1::DataType::kFLOAT);
};

// ---- fields

constexpr int32_t kNbFields = 5;

// The fields of an Adder2d layer as TensorRT wants them. `point_to` makes their data the values of `attributes` (null: names
// and types only), which must stay where it is for as long as the collection is in use.
struct FieldList {
  nvinfer1::PluginField fields[kNbFields];
  nvinfer1::PluginFieldCollection collection;
  nvinfer1::PluginFieldCollection const* point_to(Attributes const* attributes);
};

// Reads the fields given into `attributes`; absent ones keep their default, foreign names are passed over, a pair may come
// as one value for both axes. Reports the reason and returns false on a bad field or value.
bool parse(nvinfer1::PluginFieldCollection const* fc, Attributes* attributes);

// Reports and returns false where no layer can have these attributes.
bool validate(Attributes const& attributes);

// ---- tensors

struct Tensor {
  int32_t nbDims;
  int64_t d[nvinfer1::kMaxDims];
  int32_t type;
};

template <typename Dims>
Tensor make_tensor(Dims const& dims, nvinfer1::DataType type) {
  Tensor tensor{dims.nbDims, {}, static_cast<int32_t>(type)};
  for (int32_t i = 0; i < dims.nbDims && i < nvinfer1::kMaxDims; ++i) tensor.d[i] = dims.d[i];
  return tensor;
}

template <typename Desc>
Tensor make_tensor(Desc const& desc) {
  return make_tensor(desc.dims, desc.type);
}

// Whether rank and extents are all known.
bool is_known(Tensor const& tensor);

// Why the layer cannot take these tensors, or null. Unknown extents (-1) and ranks (nbDims < 1) are passed over.
char const* check_known(Attributes const& attributes, Tensor const& x, Tensor const& weight, Tensor const& bias);

// The whole problem but its pointers; y follows from the rest. Returns why it is not valid, or null.
char const* fill_params(Attributes const& attributes, Tensor const& x, Tensor const& weight, Tensor const& bias,
                        Adder2dParams* params);

// What every layer asks TensorRT for. adder2d_fprop takes any workspace, so one number serves all shapes of a profile, whose
// wants do not grow with their size. torch2trt allows 32 MiB by default.
constexpr size_t kWorkspaceBytes = 31 << 20;

// Runs the layer; `y` is checked against what the inputs give. Returns 0 for success.
int32_t enqueue(Attributes const& attributes, Tensor const& x, Tensor const& weight, Tensor const& bias, Tensor const& y,
                void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream);

// Whether tensor `pos` (x, weight, bias, y) may have this type and format.
bool supports_format(Attributes const& attributes, int32_t pos, nvinfer1::DataType type, nvinfer1::TensorFormat format);

// y [N, K, P, Q] in expressions. False where the ranks, or the channels as far as known, are wrong; reported.
template <typename Exprs, typename Builder>
bool output_shape(Attributes const& attributes, Exprs const* inputs, int32_t nbInputs, Builder& builder, Exprs* y);

// One line on stderr. TensorRT's own logger is never called: its layout differs between versions.
void report(char const* format, ...) __attribute__((format(printf, 1, 2)));

// ---- definition of the template

template <typename Exprs, typename Builder>
bool output_shape(Attributes const& attributes, Exprs const* inputs, int32_t nbInputs, Builder& builder, Exprs* y) {
  using Op = nvinfer1::DimensionOperation;
  if (nbInputs != kNbInputs) {
    report("Adder2d takes %d inputs (x, weight, bias), got %d", kNbInputs, nbInputs);
    return false;
  }
  Tensor known[kNbInputs]{};
  for (int32_t i = 0; i < kNbInputs; ++i) {
    known[i].nbDims = inputs[i].nbDims;
    for (int32_t j = 0; j < inputs[i].nbDims && j < nvinfer1::kMaxDims; ++j)
      known[i].d[j] = inputs[i].d[j]->isConstant() ? int64_t{inputs[i].d[j]->getConstantValue()} : -1;
  }
  if (char const* reason = check_known(attributes, known[0], known[1], known[2])) {
    report("%s", reason);
    return false;
  }
  Exprs const& x = inputs[0];
  Exprs const& weight = inputs[1];
  *y = Exprs{4, {x.d[0], weight.d[0]}};
  auto const* one = builder.constant(1);
  for (int32_t axis = 0; axis < 2; ++axis) {
    // P = (H + 2 * padding - dilation * (R - 1) - 1) / stride + 1, and the same for Q.
    auto const* padded = builder.operation(Op::kSUM, *x.d[2 + axis], *builder.constant(2 * attributes.padding[axis] - 1));
    auto const* reach = builder.operation(Op::kPROD, *builder.constant(attributes.dilation[axis]),
                                          *builder.operation(Op::kSUB, *weight.d[2 + axis], *one));
    auto const* steps = builder.operation(Op::kFLOOR_DIV, *builder.operation(Op::kSUB, *padded, *reach),
                                          *builder.constant(attributes.stride[axis]));
    y->d[2 + axis] = builder.operation(Op::kSUM, *steps, *one);
  }
  return true;
}

}  // namespace adder2d
