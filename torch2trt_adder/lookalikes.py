"""``adopt`` replaces third-party adder layers by `Adder2d`.

Layers are recognised by their attributes, and names prove nothing: a transposed layer has the same ones. So a copy of
each layer runs on a small random input, and its output is compared with that of adder2d.
"""

import collections
import copy
import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import arguments, ops, reference
from .module import HOOKS, Adder2d, lost_state, replace_layers

LayerFields = Callable[[nn.Module], dict[str, Any]]
_adder_classes: dict[type[nn.Module], LayerFields] = {}


def register_adder_class(cls: type[nn.Module], fields: LayerFields) -> None:
    """Teaches `adopt` a class of adder layers whose attributes have other names than the published ones.

    Args:
        cls: the class; its subclasses count too.
        fields: gets a layer of that class and returns a dict with ``weight`` (its parameter [K, C / groups, R, S])
            and, where they differ from the defaults of `adder2d`, ``bias``, ``stride``, ``padding``, ``dilation``,
            ``groups``, ``eta``.

    Raises:
        TypeError: `cls` is not a subclass of torch.nn.Module.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_adder_class: cls must be a subclass of torch.nn.Module, got {cls!r}.")
    _adder_classes[cls] = fields


def adopt(model: nn.Module, inplace: bool = True) -> nn.Module:
    """Replaces the adder layers of a network by `Adder2d`, whatever file they came from, and returns the network.

    An adder layer is a module with a 4-D parameter ``adder`` and attributes ``stride`` and ``padding`` (``b`` or
    ``bias``, ``dilation``, ``groups`` and ``eta`` are used where it has them), or one of a class given to
    `register_adder_class`. Each is proved: a copy of it with random weights runs on a small input, in evaluation and in
    training mode, and has to return what adder2d returns, up to rounding. Its own gradients are not compared.

    The new layer shares the old one's parameters (so device, dtype, requires_grad and an optimizer's hold stay),
    its training mode and its forward and backward hooks, and a layer used in two places stays one layer. References
    to an old layer other than its parents' registered children keep the old one. A network of `Adder2d` stays as it is.

    Args:
        model: any module; if it is an adder layer itself, the new layer is returned.
        inplace: False works on a deep copy and leaves `model` as it is.

    Raises:
        ValueError: a layer that does not compute adder2d or cannot be tried, or that has more than `Adder2d` keeps
            (other parameters, buffers, tensors and numbers, an `adder` made by pruning or weight_norm), named by its
            path in the model; a network without any adder layer. Nothing was replaced then.

    Warns:
        UserWarning: a layer of a registered class cannot be tried here, so `register_adder_class` is trusted.
    """
    layers = _proven_layers(model, training=True)
    if not layers and not any(isinstance(module, Adder2d) for module in model.modules()):
        raise ValueError(_nothing_found(model))
    if inplace:
        modules = dict(model.named_modules())
        return replace_layers(model, {modules[path]: layer for path, layer in layers.items()})
    return _replace_as(layers, copy.deepcopy(model))


def adopted_copy(model: nn.Module) -> nn.Module:
    """`model` with its third-party adder layers adopted, for inference: a copy that shares all tensors.

    It is `model` itself where it has none. As `adopt`, but a layer may lose what does not change its output now, and only
    its evaluation mode is proved.

    Raises:
        ValueError: as `adopt`, except for a network without adder layers.
    """
    layers = _proven_layers(model, training=False)
    if not layers:
        return model
    shared = [*model.parameters(), *model.buffers()]
    for module in model.modules():  # weights that hooks compute, which cannot be copied
        shared += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return _replace_as(layers, copy.deepcopy(model, {id(tensor): tensor for tensor in shared}))


def _replace_as(layers: dict[str, Adder2d], model: nn.Module) -> nn.Module:
    """Replaces the layers of a copy, where `layers` are to replace those of the original."""
    replaced: dict[nn.Module, nn.Module] = {}
    for path, layer in layers.items():
        module = model.get_submodule(path)
        fields = {**(_layer_fields(module) or {}), "groups": layer.groups}
        replaced[module] = _adopt_layer(module, fields, path)
    return replace_layers(model, replaced)


def _proven_layers(model: nn.Module, training: bool) -> dict[str, Adder2d]:
    """What may replace the third-party adder layers of a network, by path."""
    layers: dict[str, Adder2d] = {}
    proven: dict[Hashable, int] = {}
    for path, module in model.named_modules():
        fields = _layer_fields(module)
        if fields is not None:
            layers[path] = _proven_layer(module, fields, path or type(module).__name__, training, proven)
    return layers


def _nothing_found(model: nn.Module) -> str:
    near = [path for path, module in model.named_modules() if isinstance(_tensor(module, "adder"), Tensor)]
    return (
        f"adopt: {type(model).__name__} has no adder layer, that is, a module with a 4-D parameter `adder` and "
        "attributes `stride` and `padding`"
        + (f" ({near[0] or type(model).__name__} has an `adder`, but not the rest)" if near else "")
        + "; name the class of its layers with register_adder_class, or replace convolutions with adderize."
    )


# ---- recognising layers by their attributes


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of that name, also one that is computed from other parameters (by pruning, weight_norm, parametrize)."""
    places = [vars(module), module._parameters, module._buffers]
    if isinstance(parametrizations := getattr(module, "parametrizations", None), nn.ModuleDict):
        places.append(parametrizations._modules)
    value = getattr(module, name) if any(name in place for place in places) else None
    return value if isinstance(value, Tensor) else None


def _layer_fields(module: nn.Module) -> dict[str, Any] | None:
    """The arguments of `adder2d` that a third-party adder layer stands for, or None for any other module."""
    if isinstance(module, Adder2d):
        return None
    for cls in type(module).__mro__:
        if cls in _adder_classes:
            return _adder_classes[cls](module)
    adder = _tensor(module, "adder")
    if adder is None or adder.dim() != 4 or not (hasattr(module, "stride") and hasattr(module, "padding")):
        return None
    bias = _tensor(module, "b")
    fields = {"weight": adder, "bias": _tensor(module, "bias") if bias is None else bias}
    names = ("stride", "padding", "dilation", "groups", "eta")
    fields.update({name: getattr(module, name) for name in names if hasattr(module, name)})
    fields["groups"] = next(_possible_groups(module, fields))
    return fields


def _possible_groups(module: nn.Module, fields: dict[str, Any]) -> Iterator[Any]:
    """What the groups of a layer may be, by its attributes: depth-wise layers often have none, and a filter [K, 1, R, S].

    More than one where the attributes leave it open; a forward that accepts K channels then tells.
    """
    filters, channels = fields["weight"].shape[:2]
    flags = [getattr(module, name, False) for name in ("depth_wise", "depthwise")]
    depthwise = any(isinstance(flag, int) and flag for flag in flags)
    groups = getattr(module, "groups", None)
    if groups is not None and not (depthwise and groups == 1 and channels == 1):
        yield groups
        return
    for name in ("input_channel", "input_channels", "in_channel", "in_channels"):
        total = arguments.as_integer(getattr(module, name, None))
        if total is not None and total > 0 and channels > 0 and total % channels == 0:
            yield total // channels
            return
    if depthwise and channels == 1:
        yield filters
        return
    yield 1
    if channels == 1 and filters > 1:
        yield filters


def _adopt_layer(module: nn.Module, fields: dict[str, Any], path: str) -> Adder2d:
    """An `Adder2d` with the parameters of `module`, which is not proved to compute the same."""
    unknown = set(fields) - {"weight", "bias", "stride", "padding", "dilation", "groups", "eta"}
    weight, bias, groups = fields.get("weight"), fields.get("bias"), arguments.as_integer(fields.get("groups", 1))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
            raise ValueError(
                f"adopt: the {name} of {path} is not a plain parameter: pruning, weight_norm or a parametrization "
                "computes it, or it is a buffer; make it one first (prune.remove, remove_weight_norm or "
                "parametrize.remove_parametrizations of torch.nn.utils)."
            )
    if unknown or not isinstance(weight, nn.Parameter) or weight.dim() != 4:
        raise ValueError(f"adopt: {path} needs a 4-D parameter `weight` and fields of adder2d, got {sorted(fields)}.")
    if bias is not None and not isinstance(bias, nn.Parameter):
        raise ValueError(f"adopt: the bias of {path} must be a parameter or None, got {type(bias).__name__}.")
    if groups is None or groups < 1:
        raise ValueError(f"adopt: {path} has groups {fields['groups']!r}; they must be an int >= 1.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"adopt: the bias of {path} must be [{len(weight)}], one value per filter, got {list(bias.shape)}."
        )
    if getattr(module, "quantize", False):  # as ShiftAddNet's adder layers can
        raise ValueError(f"adopt: {path} quantizes its weights, which Adder2d does not; turn `quantize` off first.")
    try:
        layer = Adder2d(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            fields.get("stride", 1),
            fields.get("padding", 0),
            bias is not None,
            fields.get("dilation", 1),
            groups,
            fields.get("eta", getattr(module, "eta", ops.ETA)),
            device="meta",
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"adopt: Adder2d cannot stand for {path} ({type(module).__name__}): {error}") from error
    layer.adder, layer.b = weight, bias
    return layer


# ---- proving that a layer is what its attributes say


def _proven_layer(
    module: nn.Module, fields: dict[str, Any], path: str, training: bool, proven: dict[Hashable, int]
) -> Adder2d:
    """`proven` keeps the groups by the keys of proven layers: a deep network repeats a few."""
    registered = any(cls in _adder_classes for cls in type(module).__mro__)
    layer = _adopt_layer(module, fields, path)
    name = f"{path} ({type(module).__name__})"
    for lost in _lost(module, layer, registered) if training else ():
        raise ValueError(
            f"adopt: {name} would lose {lost}, which Adder2d does not have; if the layer computes adder2d without it, "
            "remove it first."
        )
    key, reasons = _key(module, layer), []
    if key in proven:
        return _adopt_layer(module, {**fields, "groups": proven[key]}, path)
    for groups in [layer.groups] if registered else reversed(list(_possible_groups(module, fields))):
        layer = _adopt_layer(module, {**fields, "groups": groups}, path)
        try:
            reason = _why_it_differs(module, layer, training)
        except _CannotRun as error:
            if registered:
                warnings.warn(f"adopt: {name} {error}; its registered fields are trusted.", stacklevel=4)
                return layer
            reason = f"{error}; move the network to the device that it needs, or register its class"
        if reason is None:
            if key is not None:
                proven[key] = groups
            return layer
        reasons.append(reason)
    raise ValueError(f"adopt: {name} {reasons[-1]}; register_adder_class tells the fields of other classes.")


def _key(module: nn.Module, layer: Adder2d) -> Hashable:
    """What the proof of a layer depends on, its weights apart; None where that is not known."""
    attributes = {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}
    plain = int, float, str, type(None)
    if (
        next(lost_state(module, (layer.adder, layer.b)), None)
        or module._modules
        or not all(isinstance(leaf, plain) for leaf in tree_leaves(list(attributes.values())))
    ):
        return None
    return type(module), repr(attributes), repr(layer), layer.adder.shape, layer.adder.dtype, layer.adder.device


def _lost(module: nn.Module, layer: Adder2d, registered: bool) -> Iterator[str]:
    yield from lost_state(module, (layer.adder, layer.b))
    for name, value in vars(module).items():
        if name in ("eta", *_MODULE_ATTRIBUTES):
            continue
        leaves = tree_leaves(value)
        if any(isinstance(leaf, Tensor) and leaf is not layer.adder and leaf is not layer.b for leaf in leaves):
            yield f"its attribute `{name}`, a tensor"
        # A float is part of the arithmetic: a scale, a norm, a share of zeros. Who registers a class knows its floats.
        elif not registered and isinstance(value, float if name != "sparsity" else float | int) and value:
            yield f"its attribute `{name}` = {value!r}"


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


class _CannotRun(Exception):
    """The forward of a layer failed; the text says how, as the end of a sentence about it."""


def _why_it_differs(module: nn.Module, layer: Adder2d, training: bool) -> str | None:
    """What tells `module` from `layer`, as the end of a sentence about it, or None where both compute the same.

    A copy of the module runs, without its hooks and with random weights: those that it has may hide a difference (a
    bias of zeros, filters that are symmetric). It is float32 where the module is float16: the function is proved,
    and its rounding is its own.
    """
    device, dtype = layer.adder.device, layer.adder.dtype
    devices = [torch.device("cpu") if device.type == "meta" else device]
    if device.type == "cpu" and torch.cuda.is_available():
        devices.append(torch.device("cuda"))  # for code that has nothing but a CUDA kernel
    dtype = dtype if dtype is torch.float64 else torch.float32
    failures = []
    for device, shape in itertools.product(devices, _probe_shapes(layer)):
        try:
            return _compare(module, layer, shape, device, dtype, (False, True) if training else (False,))
        except _CannotRun as error:
            failures.append(error)
    raise failures[0]


def _probe_shapes(layer: Adder2d) -> Iterator[tuple[int, int, int, int]]:
    """Small inputs that reach all taps, the padding and two steps of the stride; at last a square one."""
    kernel = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    height, width = (
        max(k, k + stride - 2 * pad) for k, stride, pad in zip(kernel, layer.stride, layer.padding, strict=True)
    )
    width += 1 + (width + 1 == height)
    samples = 2 if layer.adder.numel() < 2**20 else 1  # published code holds [K, CRS, NPQ] at once
    yield samples, layer.input_channel, height, width
    yield samples, layer.input_channel, max(height, width), max(height, width)


def _compare(
    module: nn.Module,
    layer: Adder2d,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    modes: Sequence[bool],
) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def draw(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu", dtype=dtype)

    weight, bias = draw(layer.adder.shape), None if layer.b is None else draw(layer.b.shape)
    x = draw(shape)
    x[-1] *= 100  # beyond the range of what clamps its input
    with (
        torch.no_grad(),
        torch.random.fork_rng([] if device.type != "cuda" else [device]),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            twin = _twin(module, [(layer.adder, weight), (layer.b, bias)]).to(device, dtype)
        except Exception as error:
            raise _CannotRun(f"cannot be copied to be tried ({_first_line(error)})") from error
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        exact = None if bias is None else bias.double()
        expected = reference.adder2d(x.double(), weight.double(), exact, *geometry)
        for training in modes:
            twin.train(training)
            try:
                output = twin.forward(x.to(device, copy=True))
            except Exception as error:
                raise _CannotRun(
                    f"cannot be tried on an input {list(shape)} on {device} ({_first_line(error)})"
                ) from error
            reason = difference(output, expected, bias, layer.adder[0].numel())
            if reason is not None:
                return f"does not compute adder2d {'in training mode' if training else 'in evaluation mode'}: {reason}"
    return None


def _twin(module: nn.Module, tensors: Sequence[tuple[nn.Parameter | None, Tensor | None]]) -> nn.Module:
    """A deep copy of a layer without its hooks, with other tensors in the place of its parameters."""
    bare = copy.copy(module)
    for name in HOOKS:
        vars(bare)[name] = None if name == "_is_full_backward_hook" else collections.OrderedDict()
    others = {id(old): nn.Parameter(new, requires_grad=False) for old, new in tensors if new is not None}
    return copy.deepcopy(bare, others)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def difference(output: Any, expected: Tensor, bias: Tensor | None, length: int) -> str | None:
    """How an output differs from adder2d's `expected` beyond rounding, or None where it does not.

    A sum of `length` terms of one sign errs by at most ``2 * eps * sqrt(length)`` of itself in float32 (measured on
    normal draws: a quarter of it), and rounding it to its dtype by eps of that; both outputs err. A bias, which may
    cancel the sum, is one more term.
    """
    if not isinstance(output, Tensor):
        return f"it returns a {type(output).__name__}, not a tensor"
    if not output.is_floating_point():
        return f"its output is {output.dtype}"
    if output.shape != expected.shape:
        return f"its output is {list(output.shape)}, and adder2d's {list(expected.shape)}"
    y, y0 = output.detach().cpu().double(), expected.detach().cpu().double()
    offset = y0.new_zeros(()) if bias is None else bias.detach().cpu().double()[:, None, None]
    eps = max(torch.finfo(t.dtype).eps for t in (output, expected))
    limit = 2 * (eps + 2 * torch.finfo(torch.float32).eps * math.sqrt(length)) * ((y0 - offset).abs() + offset.abs())
    wrong = ~((y - y0).abs() <= limit) & y0.isfinite()
    if not bool(wrong.any()):
        return None
    at = ((y - y0).abs().nan_to_num(math.inf) * wrong).flatten().nan_to_num(0).argmax()
    return (
        f"its output is {y.flatten()[at].item():.6g} where adder2d's is {y0.flatten()[at].item():.6g} "
        f"(rounding explains {limit.flatten()[at].item():.3g})"
    )
