"""Adder layers through Torch-TensorRT."""

import os
import pathlib

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # as in test_engines.py

import pytest
import torch
from torch import nn

torch_tensorrt = pytest.importorskip("torch_tensorrt", reason="needs torch_tensorrt: pip install torch_tensorrt")

import torch2trt_adder
from test_converter import calibrated
from torch2trt_adder.converter import rounding_bounds
from torch2trt_adder.models import addernet_mnist, resnet20

pytestmark = pytest.mark.gpu


def test_the_converter_is_registered() -> None:
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS

    assert torch2trt_adder.torch_tensorrt_error() is None
    assert torch.ops.torch2trt_adder.adder2d.default in DYNAMO_CONVERTERS


@pytest.mark.parametrize("make, shape", [(addernet_mnist, (1, 28, 28)), (resnet20, (3, 32, 32))])
def test_compile_with_a_dynamic_batch(make, shape: tuple, tmp_path: pathlib.Path) -> None:
    """Everything in one engine, which is saved and loaded again."""
    torch.manual_seed(0)
    model: nn.Module = calibrated(make(), 8, *shape).cuda()
    x = torch.randn(64, *shape, device="cuda")
    shapes = {"min_shape": (1, *shape), "opt_shape": (8, *shape), "max_shape": (64, *shape)}
    inputs = [torch_tensorrt.Input(**shapes, dtype=torch.float32)]
    options = {"min_block_size": 1, "require_full_compilation": True}
    compiled = torch_tensorrt.compile(model, ir="dynamo", inputs=inputs, **options)
    torch_tensorrt.save(compiled, str(tmp_path / "model.ep"), inputs=[x[:2]])
    loaded = torch.export.load(tmp_path / "model.ep").module()
    for batch in (1, 64):
        with torch.no_grad():
            bound = rounding_bounds(model, [x[:batch]])
            assert (compiled(x[:batch]) - model(x[:batch])).abs().max() <= bound
    with torch.no_grad():
        assert (loaded(x[:2]) - model(x[:2])).abs().max() <= rounding_bounds(model, [x[:2]])
