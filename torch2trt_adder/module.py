"""The adder layer as a module, the options of its training, and what puts it in the place of other layers: ``adopt``
for somebody else's adder layers, ``adderize`` for convolutions.
"""

import copy
import warnings
from collections.abc import Callable, Collection, Sequence
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
        eta: of the adaptive scaling of the weight gradient inside backward(); None leaves that gradient as it is, for
            `scale_gradients` to scale it later. May be changed at any time.

    Attributes:
        adder: parameter [K, C / groups, R, S].
        b: parameter [K], or None without a bias.

    Raises:
        ValueError: a size, stride, padding, dilation, groups or eta that cannot be.
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
        eta: float | None = ops.ETA,
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
        ops.check_eta("Adder2d", eta)
        self.eta = eta
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
        return ops.adder2d(input, self.adder, self.b, self.stride, self.padding, self.dilation, self.groups, self.eta)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # model.to(memory_format=torch.channels_last) turns every 4-D parameter, but the kernels read filters as they lie in a
        # contiguous one: each call would copy them.
        if not self.adder.is_contiguous():
            self.adder.data = self.adder.data.contiguous()
        return self

    def extra_repr(self) -> str:
        text = f"{self.input_channel}, {self.output_channel}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "bias": False, "eta": ops.ETA}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"Adder2d: {name} must be an int or a pair of ints, each >= {least}, got {value!r}.")
    return pair


# ---- the adaptive scaling, outside of backward()


def set_eta(model: nn.Module, eta: float | None) -> nn.Module:
    """Sets `eta` of all adder layers of a network and returns the network."""
    ops.check_eta("set_eta", eta)
    for layer in _adder_layers("set_eta", model).values():
        layer.eta = eta
    return model


@torch.no_grad()
def scale_gradients(model: nn.Module, eta: float = ops.ETA) -> None:
    """Scales the gradient of every `adder` to the norm ``eta * sqrt(numel)``: AdderNet's rule, just before the step.

    By default a layer does this inside backward(), as the published code does. Whatever multiplies gradients afterwards
    is then lost or wrong: GradScaler divides the scaled gradient by its loss scale (65536 at first), so that the adder
    layers hardly learn; accumulating n batches adds n scaled gradients, whatever their norms were; several GPUs average
    gradients of which each was scaled by itself. Scaling once, when the gradient is complete, is right for all of them
    and equals the published rule on the whole batch::

        set_eta(model, None)                    # once: backward() leaves the gradient as it is
        ...
        scaler.scale(loss).backward()           # as often as there are batches to accumulate
        scaler.unscale_(optimizer)              # where there is a GradScaler
        scale_gradients(model)
        scaler.step(optimizer)

    A layer that is used several times in one pass has its sum scaled once. Gradients that are None, zero or not finite
    stay None, zero or not finite (GradScaler skips the step).

    Raises:
        ValueError: a layer that has scaled its gradient inside backward() already; a network without adder layers.
    """
    if eta is None:
        raise ValueError("scale_gradients: eta must be a finite number above 0, got None.")
    ops.check_eta("scale_gradients", eta)
    layers = _adder_layers("scale_gradients", model)
    for path, layer in layers.items():
        if layer.eta is not None:
            raise ValueError(
                f"scale_gradients: layer {path} has scaled its gradient in backward() already (its eta is "
                f"{layer.eta}); call set_eta(model, None) before training."
            )
    ops.adaptive_scaling_([a.grad for a in {layer.adder for layer in layers.values()} if a.grad is not None], eta)


def _adder_layers(caller: str, model: nn.Module) -> dict[str, Adder2d]:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Adder2d)}
    if not layers:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no Adder2d layer; adopt() makes them from other adder layers, "
            "adderize() from convolutions."
        )
    return layers


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
    return _replace(model, adopted)


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
    return layer


def _replace(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts new layers in the place of old ones, with their training mode and hooks; returns the network."""
    for old, new in layers.items():
        new.training = old.training
        for name in _HOOKS:
            setattr(new, name, getattr(old, name))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]
    return layers.get(model, model)


# ---- replacing convolutions


def adderize(
    model: nn.Module,
    keep_first: bool = True,
    keep_last: bool = True,
    keep_shortcuts: bool = False,
    exclude: Collection[str] = (),
    eta: float | None = ops.ETA,
    inplace: bool = True,
) -> nn.Module:
    """Replaces the convolutions (`torch.nn.Conv2d`) of a network by adder layers, and returns the network.

    As in the paper, the first and the last layer stay convolutions (a classifier that is `torch.nn.Linear` stays
    anyway), and the 1x1 convolutions on the shortcuts of a ResNet become adder layers. "First" and "last" go by the
    order in which the network registers its layers.

    The new layers have the geometry, device, dtype, training mode, hooks and frozen state of the old ones, and new
    weights, N(0, 1) as published: a trained convolution's weights mean nothing to an adder layer, whose weights have
    the scale of its inputs. So the network is to be trained, and it needs BatchNorm behind each adder layer.

    Args:
        model: any module.
        keep_first: leaves the first convolution alone.
        keep_last: leaves the last convolution alone, unless a `torch.nn.Linear` comes after it.
        keep_shortcuts: leaves the 1x1 convolutions alone whose path has a part "downsample" or "shortcut", the names in
            torchvision's ResNets and in common code for CIFAR.
        exclude: paths of modules, as in `named_modules()`; they and what they contain are left alone.
        eta: of the new layers.
        inplace: False works on a deep copy and leaves `model` alone.

    Raises:
        ValueError: a convolution that no adder layer can stand for (a `padding_mode` other than "zeros", padding "same"
            that differs on both sides, a subclass of Conv2d), named by its path; a path in `exclude` that the network
            does not have; nothing to replace.
    """
    if not inplace:
        model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for path in exclude:
        if path not in modules:
            raise ValueError(f"adderize: exclude names {path!r}, but {type(model).__name__} has no such module.")
    convolutions = [path for path, module in modules.items() if isinstance(module, nn.Conv2d)]
    ends = [path for path, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
    kept = {*convolutions[: int(keep_first)], *ends[len(ends) - int(keep_last) :]}
    layers: dict[nn.Module, nn.Module] = {}
    for path in convolutions:
        module, parts = modules[path], path.split(".")
        on_shortcut = "downsample" in parts or "shortcut" in parts
        if (
            path in kept
            or any(path == other or path.startswith(f"{other}.") for other in exclude)
            or (keep_shortcuts and on_shortcut and module.kernel_size == (1, 1))
        ):
            continue
        layers[module] = _adderize_layer(module, path, eta)
    if not layers:
        raise ValueError(
            f"adderize: {type(model).__name__} has no convolution to replace; {len(convolutions)} of its layers are "
            "Conv2d, and all of them are kept by keep_first, keep_last, keep_shortcuts or exclude."
        )
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules.values()):
        warnings.warn(
            f"adderize: {type(model).__name__} has no BatchNorm; the sums of adder layers are large and negative, and "
            "train only with BatchNorm behind each of them.",
            stacklevel=2,
        )
    return _replace(model, layers)


def _adderize_layer(module: nn.Conv2d, path: str, eta: float | None) -> Adder2d:
    remedy = "change it, or name it in `exclude`."
    if type(module) is not nn.Conv2d:
        raise ValueError(f"adderize: {path} is a {type(module).__name__}, not plainly torch.nn.Conv2d; {remedy}")
    if module.padding_mode != "zeros":
        raise ValueError(
            f"adderize: {path} pads with {module.padding_mode!r}, and adder layers with zeros only; put the padding "
            f"into a layer of its own (torch.nn.functional.pad), {remedy}"
        )
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError(
                f"adderize: {path} has padding 'same' and kernel {module.kernel_size}, which needs more padding on one "
                f"side than on the other; put the padding into a layer of its own (torch.nn.functional.pad), {remedy}"
            )
        padding = tuple(t // 2 for t in total)
    layer = Adder2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        padding,
        module.bias is not None,
        module.dilation,
        module.groups,
        eta,
        device=module.weight.device,
        dtype=module.weight.dtype,
    )
    layer.adder.requires_grad_(module.weight.requires_grad)
    if layer.b is not None:
        layer.b.requires_grad_(module.bias.requires_grad)
    return layer
