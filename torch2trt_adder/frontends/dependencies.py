"""Which tensors were computed from the network's inputs, while torch2trt traces."""

import contextlib
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorrt as trt
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Origin(NamedTuple):
    storage: StorageWeakRef
    address: range  # of the data, empty unless it is in host memory
    place: str  # what it is, in words


class Context(Protocol):
    """What the tracker needs of a conversion context."""

    lock: bool

    def unhooked(self) -> contextlib.AbstractContextManager[None]: ...

    def place(self) -> str: ...


class DependencyTracker(TorchDispatchMode):
    """Sees every operation of the traced model, however it is called."""

    def __init__(self, ctx: Context) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's class has no annotations
        self.ctx = ctx
        self.origins: dict[int, Origin] = {}  # by storage
        self.seen: list[weakref.ref[Tensor]] = []
        self.largest: dict[str, float] = {}  # magnitude in this run, by the name of the TensorRT tensor
        self.adder_calls = 0
        self.paused = False

    def origin(self, tensor: Tensor) -> Origin | None:
        """Where `tensor` was computed from the network's inputs; None where it does not depend on them."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return None
        return self.origins.get(tensor.untyped_storage()._cdata)

    def mark(self, tensor: Any, place: str) -> None:
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            start = storage.data_ptr() if tensor.device.type == "cpu" else 0
            address = range(start, start + storage.nbytes() if start else 0)
            self.origins[storage._cdata] = Origin(StorageWeakRef(storage), address, place)

    def origin_of_array(self, array: np.ndarray) -> Origin | None:
        """As `origin`, for an array that shares its memory with a tensor, as tensor.numpy() does."""
        address = array.__array_interface__["data"][0]
        return next((o for o in self.origins.values() if address in o.address and not o.storage.expired()), None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        converted = self.ctx.lock  # by the call around this operation
        with self.ctx.unhooked():
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.see(tensors)
            for tensor in tensors:
                self._measure(tensor)  # now: the operation may work in place
            result = func(*args, **kwargs)
            for tensor in _written(func, args, kwargs):
                self._forget_values(tensor, converted)
            self.adder_calls += func.overloadpacket in _ADDER_OPERATORS
            name = func._schema.name.partition("::")[2]
            sources = [o for o in map(self.origin, tensors) if o is not None]
            # zeros_like and the like read the shape and type of a tensor, not its values.
            if sources and not name.startswith("new_") and not name.endswith("_like"):
                copies = name in ("detach", "alias", "_to_copy", "clone")
                place = sources[0].place if copies else f"the result of {self.ctx.place()}"
                for tensor in (*tree_leaves(result), *_written(func, args, kwargs)):
                    self.mark(tensor, place)
        return result

    def see(self, tensors: Iterable[Tensor]) -> None:
        self.seen += map(weakref.ref, tensors)

    def _forget_values(self, written: Any, converted: bool) -> None:
        """Removes the TensorRT tensors of all tensors that share the memory of `written`, whose values are new.

        `written` keeps its own if a converter is about to replace it: the converter reads the old one.
        """
        if not isinstance(written, Tensor) or written.layout is not torch.strided:
            return
        storage = written.untyped_storage()._cdata
        for tensor in [ref() for ref in self.seen]:
            if tensor is None or not hasattr(tensor, "_trt") or (converted and tensor is written):
                continue
            if tensor.layout is torch.strided and tensor.untyped_storage()._cdata == storage:
                del tensor._trt

    def _measure(self, tensor: Tensor) -> None:
        itensor = getattr(tensor, "_trt", None)
        if not isinstance(itensor, trt.ITensor) or itensor.name in self.largest:
            return
        if tensor.is_floating_point() and tensor.numel() > 0:
            self.largest[itensor.name] = tensor.detach().abs().max().item()


_ADDER_OPERATORS = torch.ops.torch2trt_adder.adder2d, torch.ops.torch2trt_adder.adder2d_fused


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    named = zip((argument.name for argument in func._schema.arguments), args)
    values = {**dict(named), **kwargs}
    written = (a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return tree_leaves([values[name] for name in written if name in values])
