"""Implementations by device, and calls of them that leave out the dispatcher."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils import arguments
from .launch import adder2d_cpu, adder2d_cuda
from .launch_gradients import (
    grad_input_cpu,
    grad_input_cuda,
    grad_weight_cpu,
    grad_weight_cuda,
)
from .schema import adder2d_op, library


class Kernels(NamedTuple):
    """The operators' implementations on one device."""

    forward: Callable[..., Tensor]
    grad_input: Callable[..., Tensor]
    grad_weight: Callable[..., Tensor]


_KERNELS = {
    "CPU": Kernels(adder2d_cpu, grad_input_cpu, grad_weight_cpu),
    "CUDA": Kernels(adder2d_cuda, grad_input_cuda, grad_weight_cuda),
}
for _device, _implementations in _KERNELS.items():
    for _name, _function in zip(
        ("adder2d", "adder2d_grad_input", "adder2d_grad_weight"), _implementations, strict=True
    ):
        library.impl(_name, _function, _device)


# Reached in inference mode only: elsewhere Autograd is there to turn it into adder2d.
def _adder2d_eta_inference(*options: Any) -> Tensor:
    *adder2d_options, eta = options
    arguments.check_eta("adder2d_eta", eta)
    return adder2d_op(*adder2d_options)


library.impl("adder2d_eta", _adder2d_eta_inference, "CompositeExplicitAutograd")

# ---- calls without the dispatcher
# A Python kernel costs some 5 us on its way through the dispatcher, and a call has two, as much as all the rest of it.
# What the dispatcher decides by is the keys of the thread and of the tensors (torch._ops.key_extractor reads them in the
# same way): where those are of an idle thread and of plain tensors, its choice is known.

_Keys = torch._C.DispatchKeySet
_Key = torch._C.DispatchKey
_can_read_keys = hasattr(_Keys, "raw_repr")  # newer than torch 2.4, where all calls take the dispatcher
_tensor_keys = torch._C._dispatch_keys
_included_keys = torch._C._dispatch_tls_local_include_set
_excluded_keys = torch._C._dispatch_tls_local_exclude_set


def _thread_keys() -> tuple[int, int]:
    return _included_keys().raw_repr(), _excluded_keys().raw_repr()


def _idle_thread_keys() -> set[tuple[int, int]]:
    """Those of a thread where no mode, tracer, transform or autocast is active, as is and in inference mode."""
    found = set()

    def read() -> None:
        found.add(_thread_keys())
        with torch.inference_mode():
            found.add(_thread_keys())

    thread = threading.Thread(target=read)  # in this one, something may be active
    thread.start()
    thread.join()
    return found


def _plain_tensor_keys(device: str) -> list[int]:
    """Those of a tensor on "CPU" or "CUDA" that is nothing else besides, as is and made in inference mode."""
    keys = _Keys(getattr(_Key, device)) | _Keys(getattr(_Key, f"Autocast{device}"))
    return [
        keys.raw_repr(),
        (keys | _Keys(getattr(_Key, f"Autograd{device}")) | _Keys(_Key.ADInplaceOrView)).raw_repr(),
    ]


_IDLE = _idle_thread_keys() if _can_read_keys else set()
_PLAIN = {}
if _can_read_keys:
    _PLAIN = {keys: kernels for device, kernels in _KERNELS.items() for keys in _plain_tensor_keys(device)}
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # subclasses may have a __torch_function__


def find_kernels(first: Tensor, second: Tensor, third: Tensor | None) -> Kernels | None:
    """What the dispatcher would come to for these tensors, but for autograd; None where anything else has a say."""
    if (
        not _can_read_keys
        or torch.compiler.is_compiling()
        or _thread_keys() not in _IDLE
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()  # which shows the operators
        or torch.autograd.forward_ad._current_level >= 0
        or type(first) not in _PLAIN_TYPES
        or type(second) not in _PLAIN_TYPES
    ):
        return None
    kernels = _PLAIN.get(_tensor_keys(first).raw_repr())
    if kernels is None or _PLAIN.get(_tensor_keys(second).raw_repr()) is not kernels:
        return None
    if third is not None and (
        type(third) not in _PLAIN_TYPES or _PLAIN.get(_tensor_keys(third).raw_repr()) is not kernels
    ):
        return None
    return kernels


def plain_pairs(*values: int | Sequence[int]) -> list[tuple[int, int]] | None:
    """As pairs what the schema takes for int[2], or None for what is left to it."""
    pairs = []
    for value in values:
        if type(value) is int:
            value = (value, value)
        elif type(value) is not tuple or len(value) != 2 or type(value[0]) is not int or type(value[1]) is not int:
            return None
        pairs.append(value)
    return pairs
