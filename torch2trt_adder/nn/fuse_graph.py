"""What `fuse` reads in a network: torch.fx's graph of it, and which operations may follow an adder layer."""

import dataclasses
import inspect
import math
import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..ops import schema
from ..utils import arguments
from .adder2d import Adder2d
from .fused import FusedAdder2d

Modules = Mapping[str, nn.Module]
Limits = tuple[float | None, float | None]

# ---- tracing


class _Value(fx.Proxy):
    """A traced value that refuses isinstance: torch.fx would answer that it is no tensor, and trace another branch."""

    @property  # type: ignore[misc]  # it can be written elsewhere
    def __class__(self) -> type:  # isinstance asks for it
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        if not caller.startswith(("torch.", "torch2trt_adder.")):
            raise fx.proxy.TraceError("its code asks for the type of a traced value (isinstance)")
        return type(self)


def _in_place(function: Callable[..., Any]) -> Callable[[_Value, Any], fx.Proxy]:
    def method(self: _Value, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


# torch.fx would trace `x += y` as `x = x + y`, which leaves other references to x as they are.
_IN_PLACE_OPERATORS = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul),
}
for _function in _IN_PLACE_OPERATORS:
    setattr(_Value, f"__{_function.__name__}__", _in_place(_function))


class Tracer(fx.Tracer):
    """torch.fx's tracer with adder layers and BatchNorm as leaves, and what `is_leaf` says besides."""

    def __init__(self, is_leaf: Callable[[nn.Module], bool] = lambda module: False) -> None:
        super().__init__()
        self.is_leaf = is_leaf

    def trace_module(self, module: nn.Module) -> fx.Graph:
        """The graph of `module`; raises whatever its code raises where it cannot be traced."""
        kinds = inspect.Parameter
        for name, parameter in inspect.signature(module.forward).parameters.items():
            # An argument that is left out would be traced as one that is given.
            if parameter.default is not kinds.empty or parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
                raise fx.proxy.TraceError(f"its forward has the optional argument {name!r}")
        return self.trace(module)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, Adder2d | FusedAdder2d) or self.is_leaf(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


# ---- adder layers

_ADDER_OPS = (schema.adder2d_op, schema.adder2d_eta_op)


def is_adder(node: fx.Node, modules: Modules) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], Adder2d)
    return node.op == "call_function" and node.target in _ADDER_OPS


def name_of_call(node: fx.Node) -> str:
    """What a report calls a call of the operator: the path of its weight, where it has one."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else node.name


def functional_layer(node: fx.Node, root: nn.Module) -> Adder2d | str:
    """The layer that a call of the operator stands for, or why it cannot be fused."""
    names = "input", "weight", "bias", "stride", "padding", "dilation", "groups", "eta"
    given = {**dict(zip(names, node.args)), **node.kwargs}
    weight, bias = (_attribute(given[name], root) for name in ("weight", "bias"))
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        return "its weight or bias is computed"
    stride, padding, dilation = (arguments.as_pair(given[name]) for name in ("stride", "padding", "dilation"))
    groups = arguments.as_integer(given["groups"])
    if stride is None or padding is None or dilation is None or groups is None:
        return "its stride, padding, dilation or groups are computed"
    K, channels, *kernel = weight.shape
    layer = Adder2d(
        channels * groups,
        K,
        tuple(kernel),
        stride,
        padding,
        bias is not None,
        dilation,
        groups,
        device="meta",
    )
    layer.adder = nn.Parameter(weight.detach(), requires_grad=False)
    layer.b = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _attribute(value: Any, root: nn.Module) -> Any:
    """The tensor that a get_attr node reads; any other value as it is."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return operator.attrgetter(str(value.target))(root)
    return value


# ---- BatchNorm

NORMS = nn.BatchNorm2d, nn.SyncBatchNorm


@dataclasses.dataclass(frozen=True)
class Norm:
    """A BatchNorm in eval mode; all tensors are [K]."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def norm_of_module(module: nn.Module) -> Norm | str:
    """The BatchNorm that a module of `NORMS` is, or why it cannot be folded."""
    assert isinstance(module, NORMS)
    if module.running_mean is None or module.running_var is None:
        return "the BatchNorm after it has no running statistics"
    return Norm(module.running_mean, module.running_var, module.weight, module.bias, module.eps)


def norm_of_call(node: fx.Node, root: nn.Module) -> Norm | str:
    """The same of a call of torch.nn.functional.batch_norm."""
    names = "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    given = {"weight": None, "bias": None, "training": False, "eps": 1e-5, **dict(zip(names, node.args)), **node.kwargs}
    mean, var, weight, bias = (
        _attribute(given[name], root) for name in ("running_mean", "running_var", "weight", "bias")
    )
    if given["training"] is not False or mean is None or var is None:
        return "the batch_norm after it has no running statistics, or is in training mode"
    if not all(value is None or isinstance(value, Tensor) for value in (mean, var, weight, bias)):
        return "the statistics or parameters of the batch_norm after it are computed"
    eps = given["eps"]
    return (
        Norm(mean, var, weight, bias, eps)
        if isinstance(eps, float)
        else "the eps of the batch_norm after it is computed"
    )


def fold(layer: Adder2d, norm: Norm) -> tuple[Tensor, Tensor] | str:
    """Scale and shift in float32, or why the two cannot become one layer.

    The shift is made of the scale as it is rounded: what both err then cancels, as the sum and the mean do.
    """
    if layer.adder.dtype is torch.float64:
        return "it is float64, and scale and shift are float32"
    if norm.mean.shape != (layer.output_channel,):
        return f"the BatchNorm after it has {len(norm.mean)} channels"
    device = layer.adder.device
    mean, var = norm.mean.detach().double().to(device), norm.var.detach().double().to(device)
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double().to(device)
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double().to(device)
    scale = (weight / torch.sqrt(var + norm.eps)).float()
    return scale, (bias - mean * scale.double()).float()


# ---- what follows


def passes(module: nn.Module) -> bool:
    """Whether a module returns its input as it is."""
    return type(module) in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d) and not module.training


_RELU = {torch.relu, torch.relu_, F.relu, F.relu_}
_RELU_METHODS = {"relu", "relu_"}
_HARDTANH = {F.hardtanh, F.hardtanh_}
_CLAMP = {torch.clamp, torch.clamp_, torch.clip, torch.clip_}
_CLAMP_METHODS = {"clamp", "clamp_", "clip", "clip_"}
_ONE_SIDED: dict[Any, str] = {
    **dict.fromkeys((torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_"), "min"),
    **dict.fromkeys((torch.clamp_max, torch.clamp_max_, "clamp_max", "clamp_max_"), "max"),
}


def limits_of_module(module: nn.Module) -> Limits | None:
    """The limits between which an activation cuts its input, or None for any other module."""
    if type(module) is nn.ReLU:
        return 0.0, None
    if type(module) in (nn.ReLU6, nn.Hardtanh):
        return _checked(module.min_val, module.max_val)
    return None


def limits_of_call(node: fx.Node) -> Limits | None:
    """The same of a call of a function or method; its first argument is what is cut."""
    target, rest, named = node.target, node.args[1:], dict(node.kwargs)
    if named.pop("inplace", False) not in (False, True) or "out" in named:
        return None
    if target in _RELU or (node.op == "call_method" and target in _RELU_METHODS):
        return 0.0, None
    if target is F.relu6:
        return 0.0, 6.0
    if target in _HARDTANH:
        values = {"min_val": -1.0, "max_val": 1.0, **dict(zip(("min_val", "max_val", "inplace"), rest)), **named}
        return _checked(values["min_val"], values["max_val"])
    if target in _CLAMP or (node.op == "call_method" and target in _CLAMP_METHODS):
        values = {"min": None, "max": None, **dict(zip(("min", "max"), rest)), **named}
        return _checked(values["min"], values["max"])
    side = _ONE_SIDED.get(target)
    if side is not None:
        values = {"min": None, "max": None, **dict(zip((side,), rest)), **named}
        return _checked(values["min"], values["max"])
    return None


def _checked(lower: Any, upper: Any) -> Limits | None:
    numbers = [value for value in (lower, upper) if value is not None]
    if not numbers or any(isinstance(v, bool) or not isinstance(v, int | float) or math.isnan(v) for v in numbers):
        return None  # computed limits, or none
    if len(numbers) == 2 and lower > upper:
        return None
    return None if lower is None else float(lower), None if upper is None else float(upper)


def name_of_limits(limits: Limits) -> str:
    if limits in ((0.0, None), (0.0, 6.0)):
        return "ReLU" if limits[1] is None else "ReLU6"
    return f"clamp({limits[0]}, {limits[1]})"


def residual_of(node: fx.Node, value: fx.Node) -> fx.Node | str | None:
    """What a sum adds to `value`; None where `node` is not a sum; or why it cannot become part of the layer."""
    functions = {operator.add, operator.iadd, torch.add}
    if not (node.target in functions or (node.op == "call_method" and node.target in ("add", "add_"))):
        return None
    named = {key: entry for key, entry in node.kwargs.items() if not (key == "alpha" and entry == 1)}
    other = named.pop("other", None)
    operands = (*node.args, *((other,) if other is not None else ()))
    if named or len(operands) != 2:
        return "the sum after it has other arguments"
    first, second = operands
    if first is value and isinstance(second, fx.Node) and second is not value:
        return second
    if second is value and isinstance(first, fx.Node) and first is not value:
        in_place = node.target is operator.iadd or node.target == "add_"
        return "the sum after it is written over its other operand" if in_place else first
    return "the sum after it has an operand that is not a tensor of the network"


# ---- values that change in place

_NEW_FUNCTIONS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.cat, torch.relu, torch.sigmoid),
    *(F.conv2d, F.linear, F.batch_norm, F.max_pool2d, F.avg_pool2d, *_ADDER_OPS),
}
_NEW_MODULES = (
    Adder2d,
    FusedAdder2d,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.MaxPool2d,
    nn.AvgPool2d,
)


def disturbed(start: fx.Node, end: fx.Node, value: fx.Node, modules: Modules) -> bool:
    """Whether an operation between two nodes may write into `value`, or into a tensor that shares its memory."""
    group: dict[fx.Node, set[fx.Node]] = {}
    for node in start.graph.nodes:
        group[node] = {node}
        if not _is_new(node, modules):
            for other in node.all_input_nodes:
                group[node] |= group[other]
            for member in group[node]:
                group[member] = group[node]
    node = start.next
    while node is not end:
        if any(written in group[value] for written in _written(node, modules)):
            return True
        node = node.next
    return False


def _is_new(node: fx.Node, modules: Modules) -> bool:
    """Whether a node's value surely has memory of its own."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, _NEW_MODULES) or getattr(module, "inplace", None) is False
    if node.op == "call_method":
        return False
    return node.op != "call_function" or node.target in _NEW_FUNCTIONS


def _written(node: fx.Node, modules: Modules) -> list[fx.Node]:
    """The inputs that a node may write into."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        known = type(module).__module__.startswith("torch.nn") or isinstance(module, Adder2d | FusedAdder2d)
        if known and not getattr(module, "inplace", False):
            return []
        return node.all_input_nodes
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = (
        node.target in (*_IN_PLACE_OPERATORS, operator.setitem)
        or (name.endswith("_") and not name.endswith("__"))
        or name == "__setitem__"
        or "out" in node.kwargs
        or node.kwargs.get("inplace", False)
        or (getattr(node.target, "__module__", None) == "torch.nn.functional" and True in node.args[1:])
    )
    return node.all_input_nodes if writes and node.op in ("call_function", "call_method") else []
