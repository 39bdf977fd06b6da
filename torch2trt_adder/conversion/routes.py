"""What a route from PyTorch to TensorRT needs on this machine."""

import importlib.util

import torch

from .. import frontends

ROUTES = ("auto", "torch2trt", "onnx")


def missing(route: str = "auto") -> str | None:
    """What `convert` lacks on this machine and how to get it, as one sentence; None where everything is there."""
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no NVIDIA GPU here, on which TensorRT builds its engines: use a "
            "machine with a GPU and a CUDA build of torch."
        )
    if not importlib.util.find_spec("tensorrt"):
        return "TensorRT is not installed: pip install tensorrt."
    if route == "torch2trt":
        if not importlib.util.find_spec("torch2trt"):
            return "torch2trt is not installed: pip install git+https://github.com/NVIDIA-AI-IOT/torch2trt."
        error = frontends.error("torch2trt")
        if error is not None:
            return f"torch2trt cannot be used ({type(error).__name__}: {error})."
        return None
    absent = [package for package in ("onnx", "onnxscript") if not importlib.util.find_spec(package)]
    if route == "auto":
        if missing("torch2trt") is None or not absent:
            return None
        return f"{missing('torch2trt')} Or go through ONNX: pip install {' '.join(absent)}."
    return f"{absent[0]} is not installed: pip install {' '.join(absent)}." if absent else None
