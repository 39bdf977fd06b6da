"""torch2trt's inner module, and what it attaches to tensors. Importing this needs torch2trt."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch2trt as torch2trt

host: Any = sys.modules["torch2trt.torch2trt"]  # the attribute torch2trt.torch2trt is the function
tensor_size = torch.Tensor.size  # before torch2trt replaces it


def detach_trt(tensors: Iterable[Any]) -> None:
    """Removes the TensorRT tensors that torch2trt has attached."""
    for tensor in tensors:
        if hasattr(tensor, "_trt"):
            del tensor._trt
