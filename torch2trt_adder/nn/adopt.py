"""``adopt`` replaces third-party adder layers by `Adder2d`.

proof.py runs each layer first: names prove nothing.
"""

import copy
import warnings
from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .adder2d import Adder2d
from .proof import CannotRun, why_it_differs
from .recognise import (
    adder_classes,
    layer_fields,
    make_layer,
    possible_groups,
    tensor_attribute,
)
from .replace import lost_state, replace_layers


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
        fields = {**(layer_fields(module) or {}), "groups": layer.groups}
        replaced[module] = make_layer(module, fields, path)
    return replace_layers(model, replaced)


def _proven_layers(model: nn.Module, training: bool) -> dict[str, Adder2d]:
    """What may replace the third-party adder layers of a network, by path."""
    layers: dict[str, Adder2d] = {}
    proven: dict[Hashable, int] = {}
    for path, module in model.named_modules():
        fields = layer_fields(module)
        if fields is not None:
            layers[path] = _proven_layer(module, fields, path or type(module).__name__, training, proven)
    return layers


def _nothing_found(model: nn.Module) -> str:
    near = [path for path, module in model.named_modules() if isinstance(tensor_attribute(module, "adder"), Tensor)]
    return (
        f"adopt: {type(model).__name__} has no adder layer, that is, a module with a 4-D parameter `adder` and "
        "attributes `stride` and `padding`"
        + (f" ({near[0] or type(model).__name__} has an `adder`, but not the rest)" if near else "")
        + "; name the class of its layers with register_adder_class, or replace convolutions with adderize."
    )


# ---- proving that a layer is what its attributes say


def _proven_layer(
    module: nn.Module, fields: dict[str, Any], path: str, training: bool, proven: dict[Hashable, int]
) -> Adder2d:
    """`proven` keeps the groups by the keys of proven layers: a deep network repeats a few."""
    registered = any(cls in adder_classes for cls in type(module).__mro__)
    layer = make_layer(module, fields, path)
    name = f"{path} ({type(module).__name__})"
    for lost in _lost(module, layer, registered) if training else ():
        raise ValueError(
            f"adopt: {name} would lose {lost}, which Adder2d does not have; if the layer computes adder2d without it, "
            "remove it first."
        )
    key, reasons = _key(module, layer), []
    if key in proven:
        return make_layer(module, {**fields, "groups": proven[key]}, path)
    for groups in [layer.groups] if registered else reversed(list(possible_groups(module, fields))):
        layer = make_layer(module, {**fields, "groups": groups}, path)
        try:
            reason = why_it_differs(module, layer, training)
        except CannotRun as error:
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
