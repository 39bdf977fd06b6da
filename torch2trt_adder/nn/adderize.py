"""``adderize`` replaces convolutions by adder layers."""

import copy
import warnings
from collections.abc import Collection

from torch import nn

from ..ops import checks
from .adder2d import Adder2d
from .replace import lost_state, replace_layers


def adderize(
    model: nn.Module,
    keep_first: bool = True,
    keep_last: bool = True,
    keep_shortcuts: bool = False,
    exclude: Collection[str] = (),
    eta: float | None = checks.ETA,
    inplace: bool = True,
) -> nn.Module:
    """Replaces the convolutions (`torch.nn.Conv2d`) of a network by adder layers, and returns the network.

    As in the paper, the first and the last layer stay convolutions (a classifier that is `torch.nn.Linear` stays
    anyway), and the 1x1 convolutions on the shortcuts of a ResNet become adder layers. "First" and "last" go by the
    order in which the network registers its layers.

    The new layers have the geometry, device, dtype, training mode, hooks and frozen state of the old ones, and new
    weights, N(0, 1) as published: a trained convolution's weights mean nothing to an adder layer, whose weights have
    the scale of its inputs. So the network is to be trained, and it needs BatchNorm after each adder layer.
    Convolutions that share one weight become adder layers that share one.

    Args:
        model: any module.
        keep_first: keeps the first convolution.
        keep_last: keeps the last convolution, unless a `torch.nn.Linear` comes after it.
        keep_shortcuts: keeps the 1x1 convolutions whose path has a part "downsample" or "shortcut", the names in
            torchvision's ResNets and in common code for CIFAR.
        exclude: paths of modules, as in `named_modules()`; they and what they contain are kept.
        eta: of the new layers.
        inplace: False works on a deep copy and does not change `model`.

    Raises:
        ValueError: a convolution that no adder layer can stand for (a `padding_mode` other than "zeros", padding "same"
            that differs on both sides, a subclass of Conv2d, a weight that hooks or parametrizations make, as
            spectral_norm and pruning do, further parameters, buffers or a `forward` of its own), named by its path; a
            path in `exclude` that the network does not have; nothing to replace.
    """
    modules = dict(model.named_modules())
    for path in exclude:
        if path not in modules:
            raise ValueError(f"adderize: exclude names {path!r}, but {type(model).__name__} has no such module.")
    convolutions = [path for path, module in modules.items() if isinstance(module, nn.Conv2d)]
    ends = [path for path, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)]
    kept = {*convolutions[: int(keep_first)], *ends[len(ends) - int(keep_last) :]}
    layers: dict[str, Adder2d] = {}
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for path in convolutions:
        module, parts = modules[path], path.split(".")
        on_shortcut = "downsample" in parts or "shortcut" in parts
        if (
            path in kept
            or any(path == other or path.startswith(f"{other}.") for other in exclude)
            or (keep_shortcuts and on_shortcut and module.kernel_size == (1, 1))
        ):
            continue
        layers[path] = layer = _adderize_layer(module, path, eta)
        layer.adder = shared.setdefault(module.weight, layer.adder)
    if not layers:
        raise ValueError(
            f"adderize: {type(model).__name__} has no convolution to replace; {len(convolutions)} of its layers are "
            "Conv2d, and all of them are kept by keep_first, keep_last, keep_shortcuts or exclude."
        )
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules.values()):
        warnings.warn(
            f"adderize: {type(model).__name__} has no BatchNorm; the sums of adder layers are large and negative, and "
            "train only with BatchNorm after each of them.",
            stacklevel=2,
        )
    if not inplace:
        model = copy.deepcopy(model)
    return replace_layers(model, {model.get_submodule(path): layer for path, layer in layers.items()})


def _adderize_layer(module: nn.Conv2d, path: str, eta: float | None) -> Adder2d:
    remedy = "change it, or name it in `exclude`."
    _check_plain(module, path, remedy)
    if type(module) is not nn.Conv2d:
        raise ValueError(f"adderize: {path} is a {type(module).__name__}, not plainly torch.nn.Conv2d; {remedy}")
    if module.padding_mode != "zeros":
        raise ValueError(
            f"adderize: {path} pads with {module.padding_mode!r}, and adder layers with zeros only; put the padding "
            f"into a layer of its own (torch.nn.functional.pad), {remedy}"
        )
    padding = (0, 0) if isinstance(module.padding, str) else tuple(module.padding)  # "valid" is none
    if module.padding == "same":
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
    if layer.b is not None and module.bias is not None:
        layer.b.requires_grad_(module.bias.requires_grad)
    return layer


def _check_plain(module: nn.Conv2d, path: str, remedy: str) -> None:
    """Raises where the weight is not the convolution's own, or where more than weight and bias would be lost."""
    made = [n for n in ("weight", "bias") if n not in module._parameters and getattr(module, n, None) is not None]
    if made:
        raise ValueError(
            f"adderize: the {' and '.join(made)} of {path} is computed by hooks or parametrizations (spectral_norm, "
            "weight_norm, pruning), which would fail on an adder layer; remove them (remove_spectral_norm, "
            f"remove_weight_norm, prune.remove or parametrize.remove_parametrizations of torch.nn.utils), {remedy}"
        )
    lost = next(lost_state(module, (module.weight, module.bias)), None)
    if lost is not None:
        raise ValueError(f"adderize: {path} would lose {lost}; {remedy}")
