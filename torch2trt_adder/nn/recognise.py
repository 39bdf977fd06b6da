"""Third-party adder layers, recognised by their attributes."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..ops import checks
from ..utils import arguments
from .adder2d import Adder2d
from .fused import FusedAdder2d

LayerFields = Callable[[nn.Module], dict[str, Any]]
adder_classes: dict[type[nn.Module], LayerFields] = {}


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
    adder_classes[cls] = fields


# ---- recognising layers by their attributes


def tensor_attribute(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of that name, also one that is computed from other parameters (by pruning, weight_norm, parametrize)."""
    places = [vars(module), module._parameters, module._buffers]
    if isinstance(parametrizations := getattr(module, "parametrizations", None), nn.ModuleDict):
        places.append(parametrizations._modules)
    value = getattr(module, name) if any(name in place for place in places) else None
    return value if isinstance(value, Tensor) else None


def layer_fields(module: nn.Module) -> dict[str, Any] | None:
    """The arguments of `adder2d` that a third-party adder layer stands for, or None for any other module."""
    if isinstance(module, Adder2d | FusedAdder2d):
        return None
    for cls in type(module).__mro__:
        if cls in adder_classes:
            return adder_classes[cls](module)
    adder = tensor_attribute(module, "adder")
    if adder is None or adder.dim() != 4 or not (hasattr(module, "stride") and hasattr(module, "padding")):
        return None
    bias = tensor_attribute(module, "b")
    fields = {"weight": adder, "bias": tensor_attribute(module, "bias") if bias is None else bias}
    names = ("stride", "padding", "dilation", "groups", "eta")
    fields.update({name: getattr(module, name) for name in names if hasattr(module, name)})
    fields["groups"] = next(possible_groups(module, fields))
    return fields


def possible_groups(module: nn.Module, fields: dict[str, Any]) -> Iterator[Any]:
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


def make_layer(module: nn.Module, fields: dict[str, Any], path: str) -> Adder2d:
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
            fields.get("eta", getattr(module, "eta", checks.ETA)),
            device="meta",
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"adopt: Adder2d cannot stand for {path} ({type(module).__name__}): {error}") from error
    layer.adder, layer.b = weight, bias
    return layer
