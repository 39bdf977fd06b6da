"""The operator inside torch's ONNX exporters."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import checks, export_hook, fused, schema
from .format import DOMAIN, OP_TYPE, node_attributes


def symbol(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """What `ops.adder2d` stands for inside a plain ``torch.onnx.export``: the node without its body."""
    if not hasattr(torch.onnx, "ops"):
        raise RuntimeError(
            f"adder2d: torch.onnx.export(..., dynamo=True) of torch {torch.__version__} knows no symbolic operators: use "
            "torch2trt_adder.export_onnx, dynamo=False, or torch 2.8 or newer."
        )
    stride, padding, dilation = (_pair(v) for v in (stride, padding, dilation))
    output = schema.adder2d_fake(input, weight, bias, stride, padding, dilation, groups)
    inputs = (input, weight.float(), weight.new_zeros(len(weight)).float() if bias is None else bias.float())
    attributes = node_attributes(stride, padding, dilation, groups, output.dtype)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OP_TYPE}", inputs, attrs=attributes, dtype=output.dtype, shape=output.shape, version=1
    )


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _torchscript_symbol(
    g: Any,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """The same for torch's older exporter, ``torch.onnx.export(..., dynamo=False)``."""
    kinds = {"Float": torch.float32, "Half": torch.float16}
    scalar = input.type().scalarType()
    attributes = node_attributes(stride, padding, dilation, groups, kinds.get(scalar, scalar))
    if torch.onnx.symbolic_helper._is_none(bias):
        bias = g.op("Constant", value_t=torch.zeros(weight.type().sizes()[0]))
    elif scalar == "Half":
        bias = g.op("Cast", bias, to_i=1)
    if scalar == "Half":
        weight = g.op("Cast", weight, to_i=1)
    suffixes = {list: "i", int: "i", str: "s"}
    named = {f"{name}_{suffixes[type(value)]}": value for name, value in attributes.items()}
    output = g.op(f"{DOMAIN}::{OP_TYPE}", input, weight, bias, **named)
    image = input.type().sizes()
    if image is not None and None not in image:
        size = checks.output_size(image, weight.type().sizes(), None, stride, padding, dilation, groups)
        output.setType(input.type().with_sizes(size))
    return output


torch.onnx.register_custom_op_symbolic(  # type: ignore[attr-defined]  # torch.onnx does not list it
    f"{DOMAIN}::adder2d",
    torch.onnx.symbolic_helper.parse_args("v", "v", "v", "is", "is", "is", "i")(_torchscript_symbol),
    9,
)


def translations() -> dict[Any, Any]:
    """The exporter's translations of this package's operators, and one that corrects its own."""
    node = _node()
    return {
        schema.adder2d_op: _adder2d_translation(node),
        fused.adder2d_fused_op: _fused_translation(node),
        torch.ops.aten.scalar_tensor.default: scalar_tensor_translation(),
    }


def _node() -> Any:
    """The operator Adder2d for onnxscript."""
    import onnx
    import onnxscript

    Schema = onnx.defs.OpSchema
    integers, integer, string = Schema.AttrType.INTS, Schema.AttrType.INT, Schema.AttrType.STRING
    signature = Schema(
        OP_TYPE,
        DOMAIN,
        1,
        inputs=[
            Schema.FormalParameter("x", "T"),
            Schema.FormalParameter("weight", "tensor(float)"),
            Schema.FormalParameter("bias", "tensor(float)"),
        ],
        outputs=[Schema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[
            *(Schema.Attribute(name, integers, required=True) for name in ("stride", "padding", "dilation")),
            *(Schema.Attribute(name, integer, required=True) for name in ("groups", "output_type")),
            Schema.Attribute("plugin_namespace", string, required=False),
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), OP_TYPE, signature)


def _dtype(input: Any) -> Any:
    """The dtype of an onnxscript value where the plugin supports it; else ONNX's own, for `node_attributes` to refuse."""
    import onnx

    dtypes: dict[int, torch.dtype] = {
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.FLOAT16: torch.float16,
    }
    return dtypes.get(int(input.dtype), input.dtype)


def _adder2d_translation(node: Any) -> Any:
    """That of torch.ops.torch2trt_adder.adder2d."""
    import onnx
    import onnxscript

    op: Any = onnxscript.opset18

    def adder2d(
        input: Any,
        weight: Any,
        bias: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Any:
        attributes = node_attributes(stride, padding, dilation, groups, _dtype(input))
        if bias is None:
            zeros = np.zeros(int(weight.shape[0]), np.float32)
            bias = op.Constant(value=onnx.numpy_helper.from_array(zeros))
        elif input.dtype != onnx.TensorProto.FLOAT:
            bias = op.Cast(bias, to=onnx.TensorProto.FLOAT)
        if input.dtype != onnx.TensorProto.FLOAT:
            weight = op.Cast(weight, to=onnx.TensorProto.FLOAT)
        return node(input, weight, bias, **attributes)

    return adder2d


def _fused_translation(node: Any) -> Any:
    """That of adder2d_fused: the node, then standard ones, which TensorRT's build fuses again.

    All of it is float32: the sums of float16 layers pass 65504. Scale and shift become a BatchNormalization without
    statistics, of which TensorRT makes the scale layer that it makes of any BatchNorm.
    """
    import onnx
    import onnxscript

    op: Any = onnxscript.opset18
    FLOAT = onnx.TensorProto.FLOAT

    def constant(value: float, *size: int) -> Any:
        return op.Constant(value=onnx.numpy_helper.from_array(np.full(size, value, np.float32)))

    def adder2d_fused(
        input: Any,
        weight: Any,
        bias: Any,
        scale: Any,
        shift: Any,
        residual: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        lower: float | None = None,
        upper: float | None = None,
    ) -> Any:
        # Refuses the dtypes that the plugin does not support.
        node_attributes(stride, padding, dilation, groups, _dtype(input))
        attributes = node_attributes(stride, padding, dilation, groups, torch.float32)
        K, half = int(weight.shape[0]), input.dtype != FLOAT
        if bias is None:
            bias = constant(0, K)
        elif half:
            bias = op.Cast(bias, to=FLOAT)
        x = op.Cast(input, to=FLOAT) if half else input
        y = node(x, op.Cast(weight, to=FLOAT) if half else weight, bias, **attributes)
        if scale is not None or shift is not None:
            scale = constant(1, K) if scale is None else scale
            shift = constant(0, K) if shift is None else shift
            y = op.BatchNormalization(y, scale, shift, constant(0, K), constant(1, K), epsilon=0.0)
        if residual is not None:
            y = op.Add(y, op.Cast(residual, to=FLOAT) if half else residual)
        if lower == 0 and upper is None:
            y = op.Relu(y)
        elif lower is not None or upper is not None:
            limits = [None if limit is None else constant(limit) for limit in (lower, upper)]
            y = op.Clip(y, *limits)
        return op.Cast(y, to=input.dtype) if half else y

    return adder2d_fused


def scalar_tensor_translation() -> Any:
    """That of torch.ops.aten.scalar_tensor, which the exporter rounds to float32 even where it is float64."""
    import onnx
    import onnxscript

    op: Any = onnxscript.opset18

    def scalar_tensor(
        s: Any, dtype: int = onnx.TensorProto.FLOAT, layout: Any = None, device: Any = None, pin_memory: Any = None
    ) -> Any:
        if not isinstance(s, bool | int | float):  # computed from an extent
            return op.Cast(s, to=dtype)
        array = np.array(s, np.float64 if isinstance(s, float) else np.int64)
        value = op.Constant(value=onnx.numpy_helper.from_array(array))
        return value if dtype == onnx.helper.np_dtype_to_tensor_dtype(array.dtype) else op.Cast(value, to=dtype)

    return scalar_tensor


export_hook.symbol = symbol
# export_onnx translates the operator itself, so it empties the slot, for all threads, as torch's own mark of an export is:
# a thread that compiles meanwhile must not take symbolic operators for its own. One thread exports at a time.
_lock = threading.RLock()


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Marks export_onnx's own call of the exporter, and drops remarks on packages that do not concern this network."""
    logger = logging.getLogger("torch.onnx")
    with _lock, warnings.catch_warnings():
        level, before, export_hook.symbol = logger.level, export_hook.symbol, None
        logger.setLevel(logging.ERROR)
        try:
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", "# The axis name")  # one name for several axes, as asked for
            warnings.filterwarnings("ignore", "# ONNX model has different number of inputs")  # see dynamic.name_axes
            yield
        finally:
            export_hook.symbol = before
            logger.setLevel(level)
