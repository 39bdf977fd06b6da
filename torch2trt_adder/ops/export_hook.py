"""What `adder2d` gives inside a plain ``torch.onnx.export``: a slot that `export` fills, so that the operator does not
import its exporter."""

from collections.abc import Callable

from torch import Tensor

symbol: Callable[..., Tensor] | None = None  # None also while export_onnx translates the operator itself
