"""Which tensors were computed from the network's inputs, while torch2trt traces."""

import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorrt as trt
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from .tracing import ConversionContext

# ---- which tensors were computed from the network's inputs


class Origin(NamedTuple):
    storage: StorageWeakRef
    address: range  # of the data, empty unless it is in host memory
    place: str  # what it is, in words


class Flow(TorchDispatchMode):
    """Sees every operation of the traced model, however it is called."""

    def __init__(self, ctx: "ConversionContext") -> None:
        super().__init__()
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

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
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
            self.adder_calls += func.overloadpacket is torch.ops.torch2trt_adder.adder2d
            name = func._schema.name.partition("::")[2]
            sources = [o for o in map(self.origin, tensors) if o is not None]
            # zeros_like and its kin take shape and type from a tensor, no values.
            if sources and not name.startswith("new_") and not name.endswith("_like"):
                copies = name in ("detach", "alias", "_to_copy", "clone")
                place = sources[0].place if copies else f"the result of {self.ctx.place()}"
                for tensor in (*tree_leaves(result), *_written(func, args, kwargs)):
                    self.mark(tensor, place)
        return result

    def see(self, tensors: Iterable[Tensor]) -> None:
        self.seen += map(weakref.ref, tensors)

    def _forget_values(self, written: Any, converted: bool) -> None:
        """Takes their TensorRT tensors from all that share the memory of `written`, whose values are new.

        `written` itself keeps its own where a converter is about to replace it, which reads the old one.
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
        if isinstance(itensor, trt.ITensor) and tensor.is_floating_point() and tensor.numel() > 0:
            if itensor.name not in self.largest:
                self.largest[itensor.name] = tensor.detach().abs().max().item()


def _written(func: Any, args: tuple, kwargs: dict) -> list[Any]:
    """The arguments that an operation writes to."""
    named = zip((argument.name for argument in func._schema.arguments), args)
    values = {**dict(named), **kwargs}
    written = (a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return tree_leaves([values[name] for name in written if name in values])


tensor_size = torch.Tensor.size  # before torch2trt replaces it
host = sys.modules["torch2trt.torch2trt"]  # the attribute torch2trt.torch2trt is the function


def detach_trt(tensors: Sequence[Tensor]) -> None:
    """Removes the TensorRT tensors that torch2trt has attached."""
    for tensor in tensors:
        if hasattr(tensor, "_trt"):
            del tensor._trt
