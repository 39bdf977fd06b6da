"""The adder layer as a module, and ``adopt``, which puts it in the place of somebody else's adder layers."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops


class Adder2d(nn.Module):
    """``y[n,k,p,q] = b[k] - sum over c,r,s of |x - adder[k,c,r,s]|`` on [N, C, H, W], with the gradients of AdderNet.

    Constructor and parameter names are those of the published AdderNet code, whose checkpoints load with
    ``strict=True``; dilation, groups and pairs for height and width come on top.

    Args:
        input_channel, output_channel: C and K.
        kernel_size, stride, padding, dilation: one int, or a pair for height and width.
        bias: whether the layer has a bias ``b`` (the attribute ``bias`` is this flag, as in the published code).
        groups: divides C and K; groups == C makes the layer depth-wise.

    Attributes:
        adder: parameter [K, C / groups, R, S].
        b: parameter [K], or None without a bias.

    Raises:
        ValueError: a size, stride, padding, dilation or groups that cannot be.
    """

    def __init__(
        self,
        input_channel: int,
        output_channel: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        bias: bool = False,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("input_channel", input_channel), ("output_channel", output_channel), ("groups", groups)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Adder2d: {name} must be an int >= 1, got {value!r}.")
        if input_channel % groups != 0 or output_channel % groups != 0:
            raise ValueError(
                f"Adder2d: groups must divide input_channel {input_channel} and output_channel {output_channel}, "
                f"got {groups}."
            )
        self.input_channel = input_channel
        self.output_channel = output_channel
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = _pair("padding", padding, 0)
        self.dilation = _pair("dilation", dilation, 1)
        self.groups = groups
        self.bias = bool(bias)
        size = (output_channel, input_channel // groups, *self.kernel_size)
        self.adder = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(output_channel, device=device, dtype=dtype)) if self.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published initialisation: adder ~ N(0, 1), b ~ U(0, 1)."""
        nn.init.normal_(self.adder)
        if self.b is not None:
            nn.init.uniform_(self.b)

    def forward(self, input: Tensor) -> Tensor:
        # Through the module: torch2trt hooks the function by its qualified name.
        return ops.adder2d(input, self.adder, self.b, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        text = f"{self.input_channel}, {self.output_channel}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("bias", False)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"Adder2d: {name} must be an int or a pair of ints, each >= {least}, got {value!r}.")
    return pair


# ---- adopting foreign layers

LayerFields = Callable[[nn.Module], dict[str, Any]]
_adder_classes: dict[type[nn.Module], LayerFields] = {}

# What a caller may have hung on a layer. The dicts themselves move, so that a handle's remove() still works.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def register_adder_class(cls: type[nn.Module], fields: LayerFields) -> None:
    """Teaches `adopt` a class of adder layers that looks unlike the published one.

    Args:
        cls: the class; its subclasses count too.
        fields: takes a layer of that class and returns a dict with ``weight`` (its parameter [K, C / groups, R, S])
            and, where they differ from the defaults of `adder2d`, ``bias``, ``stride``, ``padding``, ``dilation``,
            ``groups``.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_adder_class: cls must be a subclass of torch.nn.Module, got {cls!r}.")
    _adder_classes[cls] = fields


def adopt(model: nn.Module, inplace: bool = True) -> nn.Module:
    """Replaces the adder layers of a network by `Adder2d`, whatever file they came from, and returns the network.

    An adder layer is a module with a 4-D parameter ``adder`` and attributes ``stride`` and ``padding`` (``b``,
    ``dilation`` and ``groups`` are taken where it has them), or one of a class given to `register_adder_class`.
    The new layer shares the old one's parameters (so device, dtype, requires_grad and an optimizer's hold stay),
    its training mode and its forward and backward hooks, and a layer used in two places stays one layer. Nothing else
    moves: buffers, further parameters and attributes stay behind with the old layer, as do references to it
    other than its parents' registered children.

    Args:
        model: any module; if it is an adder layer itself, the new layer is returned.
        inplace: False works on a deep copy and leaves `model` alone.

    Raises:
        ValueError: a layer whose attributes do not describe an adder layer, named by its path in the model.
    """
    if not inplace:
        model = copy.deepcopy(model)
    adopted: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        fields = _layer_fields(module)
        if fields is not None:
            adopted[module] = _adopt_layer(module, fields, path or type(module).__name__)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in adopted:
                parent._modules[name] = adopted[child]
    return adopted.get(model, model)


def _layer_fields(module: nn.Module) -> dict[str, Any] | None:
    """The arguments of `adder2d` that a foreign adder layer stands for, or None for any other module."""
    if isinstance(module, Adder2d):
        return None
    for cls in type(module).__mro__:
        if cls in _adder_classes:
            return _adder_classes[cls](module)
    adder = module._parameters.get("adder")
    if adder is None or adder.dim() != 4 or not (hasattr(module, "stride") and hasattr(module, "padding")):
        return None
    fields = {"weight": adder, "bias": module._parameters.get("b")}
    fields.update(
        {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups") if hasattr(module, name)}
    )
    return fields


def _adopt_layer(module: nn.Module, fields: dict[str, Any], path: str) -> Adder2d:
    unknown = set(fields) - {"weight", "bias", "stride", "padding", "dilation", "groups"}
    weight, bias, groups = fields.get("weight"), fields.get("bias"), fields.get("groups", 1)
    if unknown or not isinstance(weight, nn.Parameter) or weight.dim() != 4:
        raise ValueError(f"adopt: {path} needs a 4-D parameter `weight` and fields of adder2d, got {sorted(fields)}.")
    if bias is not None and not isinstance(bias, nn.Parameter):
        raise ValueError(f"adopt: the bias of {path} must be a parameter or None, got {type(bias).__name__}.")
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
            device="meta",
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"adopt: {path} ({type(module).__name__}) is no layer that Adder2d can stand for: {error}"
        ) from error
    layer.adder, layer.b = weight, bias
    layer.training = module.training
    for name in _HOOKS:
        setattr(layer, name, getattr(module, name))
    return layer
