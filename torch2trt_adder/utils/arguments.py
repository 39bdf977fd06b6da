"""Integers, pairs and eta as the operator, the module and the plugin accept them."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.fx
from torch import Tensor


def check_eta(caller: str, eta: float | None) -> None:
    """Raises unless `eta` is None or a finite number above 0: a ValueError, or a TypeError for what is not a number."""
    if eta is None:
        return
    if type(eta) is not float and (not isinstance(eta, numbers.Real | torch.SymFloat) or isinstance(eta, bool)):
        shown = repr(eta) if isinstance(eta, bool | str) else f"a {type(eta).__name__}"
        raise TypeError(f"{caller}: eta must be None or a finite number above 0, got {shown}.")
    if not 0 < eta < math.inf:
        raise ValueError(f"{caller}: eta must be None or a finite number above 0, got {eta!r}.")


def as_integer(value: Any) -> int | None:
    """`value` as an int where it is an integer (NumPy's included), else None. A bool is not an integer here."""
    if type(value) is int:
        return value
    if isinstance(value, bool | Tensor):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_pair(value: Any) -> tuple[int, int] | None:
    """(h, w) from an integer or a sequence or array of two, else None."""
    number = as_integer(value)
    if number is not None:
        return number, number
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) != 2:
        return None
    height, width = as_integer(value[0]), as_integer(value[1])
    return None if height is None or width is None else (height, width)


def pair_of(caller: str, name: str, value: Any, minimum: int) -> tuple[int, int]:
    """(h, w) of a layer's attribute, or a ValueError."""
    pair = as_pair(value)
    if pair is None or min(pair) < minimum:
        raise ValueError(f"{caller}: {name} must be an int or a pair of ints, each >= {minimum}, got {value!r}.")
    if max(pair) >= 2**31:
        raise ValueError(f"{caller}: {name} must be below 2^31, got {value!r}.")
    return pair


def count_of(caller: str, name: str, value: Any) -> int:
    """A number of channels or groups, or a ValueError."""
    number = as_integer(value)
    if number is None or number < 1:
        raise ValueError(f"{caller}: {name} must be an int >= 1, got {value!r}.")
    if number >= 2**31:
        raise ValueError(f"{caller}: {name} must be below 2^31, got {value!r}.")
    return number


def schema_integer(name: str, value: Any) -> Any:
    """`value` as the schema accepts an int; symbols of a tracer stay what they are."""
    if isinstance(value, torch.SymInt | torch.fx.Proxy):
        return value
    number = as_integer(value)
    if number is None:
        raise TypeError(f"adder2d: {name} must be an int, got {value!r}.")
    return number


def schema_pair(name: str, value: Any) -> Any:
    """`value` as the schema accepts an int[2]; its length is checked with the shapes."""
    if isinstance(value, tuple | list):
        return [schema_integer(name, v) for v in value]
    if isinstance(value, torch.SymInt | torch.fx.Proxy):
        return value
    pair = as_pair(value)
    if pair is None:
        raise TypeError(f"adder2d: {name} must be an int or a pair of ints, got {value!r}.")
    return pair


def check_are_tensors(input: Any, weight: Any, bias: Any) -> None:
    # A class of its own, such as a tracer's proxy, has __torch_function__.
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if (
            isinstance(value, Tensor)
            or hasattr(type(value), "__torch_function__")
            or (name == "bias" and value is None)
        ):
            continue
        wanted = "a torch.Tensor or None" if name == "bias" else "a torch.Tensor"
        raise TypeError(
            f"adder2d: {name} must be {wanted}, got a {type(value).__name__}; convert it with torch.as_tensor."
        )
