"""The plugin's scale, shift, residual and limits from Python."""

import importlib
import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch2trt_adder import reference
from torch2trt_adder.numerics import tolerance
from torch2trt_adder.trt import api, plugin

MODULES = [name for name in ("tensorrt_rtx", "tensorrt") if importlib.util.find_spec(name)]


@pytest.fixture(params=MODULES or [pytest.param("none", marks=pytest.mark.skip(reason="needs tensorrt-rtx"))])
def trt(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


@pytest.mark.parametrize(
    "epilogue",
    [
        {},
        {"scale": True},
        {"residual": True, "lower": 0},
        {"scale": np.bool_(True), "residual": True, "lower": 0, "upper": 6.5},
        {"lower": -math.inf, "upper": math.inf},
        {"upper": np.float32(1)},
    ],
    ids=str,
)
def test_create(trt: Any, epilogue: dict[str, Any]) -> None:
    assert plugin.create("layer", 2, (1, 0), trt=trt, **epilogue) is not None


@pytest.mark.parametrize(
    "epilogue, reason",
    [
        ({"scale": 1}, "scale must be True or False, got 1"),
        ({"residual": None}, "residual must be True or False, got None"),
        ({"lower": "0"}, "lower must be a number or None, got '0'"),
        ({"upper": math.nan}, "upper must be a number or None, got nan"),
        ({"lower": True}, "lower must be a number or None, got True"),
        ({"lower": 1, "upper": 0}, "lower must not be above upper, got 1 and 0"),
        ({"upper": -math.inf, "lower": 0}, "lower must not be above upper, got 0 and -inf"),
    ],
    ids=str,
)
def test_create_refuses(trt: Any, epilogue: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"adder2d: {reason}"):
        plugin.create("layer", trt=trt, **epilogue)


def test_add_adder2d_refuses() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (-1, 4, 9, -1))
    weight = torch.zeros(8, 4, 3, 3)
    bad = {
        r"scale must be \[8\], one number a filter, got \[4\]": {"scale": torch.ones(4)},
        r"shift must be \[8\], one number a filter, got \[8, 1\]": {"shift": torch.ones(8, 1)},
        r"residual must have the shape \[-1, 8, 7, -1\] of y, got \[-1, 8, 9, -1\]": {
            "residual": network.add_input("r0", trt.float32, (-1, 8, 9, -1))
        },
        r"residual must have the shape .* got \[8, 7, 7\]": {
            "residual": network.add_input("r1", trt.float32, (8, 7, 7))
        },
        "residual must be float32 or float16": {"residual": network.add_input("r2", trt.int32, (-1, 8, 7, -1))},
        "lower must be a number": {"lower": "zero"},
    }
    for reason, arguments in bad.items():
        with pytest.raises(ValueError, match=f"adder2d: {reason}"):
            plugin.add_adder2d(network, x, weight, trt=trt, **arguments)
    assert network.num_layers == 0
    fits = {"scale": torch.ones(8), "residual": network.add_input("r3", trt.float16, (-1, 8, 7, 5)), "lower": 0.0}
    with pytest.raises(RuntimeError, match="offer no plugin layers"):
        plugin.add_adder2d(network, x, weight, trt=trt, **fits)


# ---- on a GPU

KINDS = {
    "scale": (True, False, None, None),
    "residual": (False, True, None, None),
    "relu": (False, False, 0.0, None),
    "everything": (True, True, 0.0, 6.0),
}


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("x_half, y_half", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("channels, filters", [(16, 24), (5, 13)])
def test_engine(channels: int, filters: int, kind: tuple, x_half: bool, y_half: bool) -> None:
    """One layer in an engine, against float64; x and the residual are inputs, so that every format starts from linear."""
    import tensorrt as trt

    scaled, added, lower, upper = kind
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x, residual = draw(3, channels, 9, 7), draw(3, filters, 9, 7)
    weight, bias = draw(filters, channels, 3, 3), draw(filters)
    scale, shift = draw(filters).abs() / 16 + 0.01, draw(filters) + 3
    dtypes = [torch.float16 if half else torch.float32 for half in (x_half, y_half)]
    x, residual = x.to(dtypes[0]), residual.to(dtypes[1])

    plugin.register()
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    network = builder.create_network(api.explicit_batch(trt))
    types = {torch.float32: trt.float32, torch.float16: trt.float16}
    inputs = {"x": x} | ({"residual": residual} if added else {})
    itensors = {name: network.add_input(name, types[t.dtype], (-1, *t.shape[1:])) for name, t in inputs.items()}
    arguments: dict[str, Any] = {"scale": scale, "shift": shift} if scaled else {}
    layer = plugin.add_adder2d(
        network, itensors["x"], weight, bias, 1, 1, output_type=types[dtypes[1]], name="adder",
        residual=itensors.get("residual"), lower=lower, upper=upper, **arguments,
    )  # fmt: skip
    y = layer.get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    if not api.is_strongly_typed(trt):
        y.dtype = types[dtypes[1]]
        config.set_flag(trt.BuilderFlag.FP16)
    profile = builder.create_optimization_profile()
    for name, tensor in inputs.items():
        profile.set_shape(name, *((n, *tensor.shape[1:]) for n in (1, 3, 8)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, "TensorRT builds no engine: its log says why"
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    made = torch.full(residual.shape, torch.nan, dtype=dtypes[1], device="cuda")
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    for name, tensor in on_gpu.items():
        assert context.set_input_shape(name, tuple(tensor.shape))
        context.set_tensor_address(name, tensor.data_ptr())
    context.set_tensor_address("y", made.data_ptr())
    assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()

    sums = reference.adder2d(x.double(), weight.double(), bias.double(), 1, 1)
    wide = [t.double()[:, None, None] for t in (scale, shift, bias)]
    terms = sums.abs() + 2 * wide[2].abs()
    bound = tolerance.sum_error(channels * 9, dtypes[0]) * terms
    expected = sums
    if scaled:
        expected, bound, terms = expected * wide[0] + wide[1], bound * wide[0], terms * wide[0] + wide[1].abs()
    if added:
        expected, terms = expected + residual.double(), terms + residual.double().abs()
    # Four operations in float32, each of a value no larger than its terms, and one rounding to y's type.
    bound = bound + 4 * torch.finfo(torch.float32).eps * terms + torch.finfo(dtypes[1]).eps * expected.abs()
    expected = expected.clamp(lower, upper) if (lower, upper) != (None, None) else expected
    excess = ((made.cpu().double() - expected).abs() - bound).max().item()
    assert excess <= 0, f"y is beyond its bound by {excess:.3g}"
