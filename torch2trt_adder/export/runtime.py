"""ONNX Runtime on the CPU."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# ---- the check


def onnxruntime_session(model: bytes | str | os.PathLike[str]) -> Any:
    """An onnxruntime.InferenceSession on the CPU, for an exported file or its contents.

    Raises:
        RuntimeError: onnxruntime is missing or refuses the model.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise RuntimeError("onnxruntime is not installed: pip install onnxruntime.")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception class for each of its status codes
        raise RuntimeError(f"ONNX Runtime refuses the model: {error}") from error


def run_onnxruntime(session: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The graph's outputs for its inputs in their order, on the CPU."""
    feeds = {entry.name: tensor.detach().cpu().numpy() for entry, tensor in zip(session.get_inputs(), tensors)}
    try:
        return [torch.from_numpy(np.asarray(array)) for array in session.run(None, feeds)]
    except Exception as error:
        raise RuntimeError(f"ONNX Runtime cannot run the model: {error}") from error
