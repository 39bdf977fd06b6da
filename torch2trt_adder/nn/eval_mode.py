"""Layers that compute something else in training mode."""

import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

# Methods that may set or print the mode, but compute nothing.
_NO_COMPUTATION = {"__init__", "__repr__", "__setstate__", "__getstate__", "extra_repr", "train", "eval"}


def training_layer(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The first layer in training mode that computes something else there, with its path; None where there is none.

    Of a layer of torch that is known from its class and attributes. Any other layer, and a model, counts as one if its
    code reads ``self.training``; one that does not computes the same in both modes.
    """
    return next(((path, layer) for path, layer in model.named_modules() if _depends_on_mode(layer)), None)


def _depends_on_mode(layer: nn.Module) -> bool:
    if not layer.training:
        return False
    if isinstance(layer, _DropoutNd):
        return layer.p > 0
    if isinstance(layer, _BatchNorm):
        return layer.running_mean is not None or layer.running_var is not None
    if isinstance(layer, _InstanceNorm):
        return bool(layer.track_running_stats)
    if isinstance(layer, nn.RReLU):
        return True
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
        return layer.dropout > 0
    hooks = (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
    if any(type(hook).__name__ == "SpectralNorm" for hook in hooks):  # it updates the weight in training
        return True
    return any(_reads_training(code) for code in _codes(layer))


# Of torch's own classes only this one reads the mode without being handled above.
_TORCH = {"_SpectralNorm"}


def _codes(layer: nn.Module) -> Iterator[types.CodeType]:
    """The code of the layer's own methods, those of torch's classes left out."""
    own: list[Any] = [layer.__dict__.get("forward")]
    for cls in type(layer).__mro__:
        in_torch = cls.__module__.partition(".")[0] == "torch" and cls.__name__ not in _TORCH
        if not in_torch:
            own += [value for name, value in vars(cls).items() if name not in _NO_COMPUTATION]
    for value in own:
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        function = inspect.unwrap(value) if callable(value) else value
        if isinstance(function, types.FunctionType):
            yield function.__code__


def _reads_training(code: types.CodeType) -> bool:
    nested = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return "training" in code.co_names or any(map(_reads_training, nested))


def check_model(caller: str, model: nn.Module) -> None:
    """Raises unless `model` is a network written in Python of which no part computes something else in eval mode."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}"
            + ("; give the module that it was made of." if isinstance(model, torch.jit.ScriptModule) else ".")
        )
    found = training_layer(model)
    if found is not None:
        path, layer = found
        name = f"layer {path!r}" if path else "the model"
        raise ValueError(
            f"{caller}: {name if path and not model.training else 'the model'} is in training mode, where {name} "
            f"({type(layer).__name__}) does not compute what it does in inference; call model.eval() first."
        )
