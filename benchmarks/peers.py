"""What else a user could call for an adder layer, and convolution as a yardstick: each as a call without arguments.

Where a peer needs the image unfolded (im2col), only the published formula counts the unfolding.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from layers import Layer
from torch import Tensor

Call = Callable[[], Tensor]


class Skipped(Exception):
    """A peer that cannot run here; the text says why."""


def columns(x: Tensor, layer: Layer) -> Tensor:
    """What every output reads: [groups, CRS, NPQ]."""
    unfolded = F.unfold(x, layer.R, 1, layer.padding, layer.stride)  # [N, groups * CRS, PQ]
    return unfolded.transpose(0, 1).reshape(layer.groups, layer.CRS, -1)


def _maps(rows: Tensor, layer: Layer) -> Tensor:
    """[groups, K / groups, NPQ] as [N, K, P, Q]."""
    return rows.reshape(layer.K, layer.N, layer.P, layer.P).transpose(0, 1)


def _broadcast(filters: Tensor, taps: Tensor) -> Tensor:
    """filters [groups, K / groups, CRS], taps [groups, CRS, NPQ] -> [groups, K / groups, NPQ]."""
    return -(filters[..., None] - taps[:, None]).abs().sum(2)


def _filters(w: Tensor, layer: Layer) -> Tensor:
    return w.reshape(layer.groups, layer.K // layer.groups, -1)


def reference(x: Tensor, w: Tensor, layer: Layer) -> tuple[Call, Callable[[Tensor], Tensor]]:
    """The formula of AdderNet's published code: unfold, then one broadcast over all filters and pixels."""
    if x.is_cuda:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    else:
        free = 4 << 30  # more takes minutes
    needed = 2 * layer.macs * x.element_size()  # differences, and their absolute values
    if needed > free:
        raise Skipped(f"needs {needed / 1e9:.1f} GB for its temporaries, and {free / 1e9:.1f} GB are free")
    return lambda: _broadcast(_filters(w, layer), columns(x, layer)), lambda rows: _maps(rows, layer)


def cdist(x: Tensor, w: Tensor, layer: Layer) -> tuple[Call, Callable[[Tensor], Tensor]]:
    """torch.cdist(p=1) on unfolded columns; float32 only."""
    filters, taps = _filters(w, layer).contiguous(), columns(x, layer).mT.contiguous()
    return lambda: torch.cdist(filters, taps, p=1), lambda rows: -_maps(rows, layer)


def compiled(x: Tensor, w: Tensor, layer: Layer) -> tuple[Call, Callable[[Tensor], Tensor]]:
    """The broadcast through torch.compile, which fuses it into one reduction, on unfolded columns."""
    if importlib.util.find_spec("triton") is None:
        raise Skipped("torch.compile needs triton, which is not installed")
    import torch._dynamo  # not part of `import torch`

    torch._dynamo.reset()  # each shape compiled for itself, however many there were before
    filters, taps = _filters(w, layer).contiguous(), columns(x, layer).contiguous()
    function = torch.compile(_broadcast, dynamic=False, fullgraph=True)
    return lambda: function(filters, taps), lambda rows: _maps(rows, layer)


PEERS = {"reference": reference, "cdist": cdist, "compile": compiled}


# ---- yardstick


@contextlib.contextmanager
def conv_precision(precision: str) -> Iterator[None]:
    """cuDNN's float32 convolutions in "ieee" or "tf32"."""
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch 2.9 and later
        owner, name, value = cudnn.conv, "fp32_precision", precision
    else:
        owner, name, value = cudnn, "allow_tf32", precision == "tf32"
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def conv2d(x: Tensor, w: Tensor, layer: Layer) -> Call:
    """torch's convolution of the same shape."""
    return lambda: F.conv2d(x, w, None, *layer.geometry)
