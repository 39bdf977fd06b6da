"""Adder layers through Torch-TensorRT: the converter alone with a stand-in on a CPU, all of it on a GPU."""

import importlib.util
import os
import pathlib

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # as in test_torch2trt_engines.py

import pytest
import torch
from networks import calibrated
from processes import run_python
from torch import nn

import torch2trt_adder
from torch2trt_adder.models import addernet_mnist, resnet20
from torch2trt_adder.numerics.rounding import rounding_bounds

# What the converter uses of Torch-TensorRT, and a network that takes plugin layers; the registry is TensorRT for RTX's.
STAND_IN = {
    "__init__.py": "",
    "dynamo/__init__.py": "",
    "dynamo/conversion/__init__.py": """
CONVERTERS = {}

def dynamo_tensorrt_converter(target, *, supports_dynamic_shapes=False):
    assert supports_dynamic_shapes  # else dynamic calls stay in PyTorch
    return lambda function: CONVERTERS.setdefault(target, function)
""",
    "dynamo/conversion/converter_utils.py": "def get_trt_tensor(ctx, value, name): return value\n",
}
CONVERT = """
import sys
import tensorrt_rtx as trt
sys.modules["tensorrt"] = trt
import numpy as np, torch
from types import SimpleNamespace
from torch import nn
import torch2trt_adder
from torch_tensorrt.dynamo.conversion import CONVERTERS
assert torch2trt_adder.torch_tensorrt_error() is None

class Network:
    def __init__(self):
        self.layers = []

    def add_constant(self, shape, weights):
        array = weights.numpy().reshape(shape).copy()
        return SimpleNamespace(name="", get_output=lambda i: array)

    def add_plugin_v3(self, inputs, shapes, plugin):
        self.layers.append(SimpleNamespace(inputs=inputs, plugin=plugin, name="", get_output=lambda i: "y"))
        return self.layers[-1]

layer = torch2trt_adder.Adder2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), groups=2, bias=sys.argv[1] == "bias").eval()
program = torch.export.export(layer, (torch.randn(2, 4, 9, 8),)).run_decompositions()
(node,) = (node for node in program.graph.nodes if node.target in CONVERTERS)
assert node.target is torch.ops.torch2trt_adder.adder2d.default and not node.kwargs
values = {"input": SimpleNamespace(dtype=trt.float16, shape=(-1, 4, 9, 8)), "adder": layer.adder, "b": layer.b}

def value(arg):
    if not isinstance(arg, torch.fx.Node):
        return arg
    return next(v for name, v in values.items() if arg.name in (name, f"p_{name}"))

args = tuple(value(arg) for arg in node.args)
network = Network()
assert CONVERTERS[node.target](SimpleNamespace(net=network), node.target, args, node.kwargs, "adder_7") == "y"
(made,) = network.layers
x, weight, bias = made.inputs
assert made.name == "adder_7" and x is values["input"]
np.testing.assert_array_equal(weight, layer.adder.detach())
np.testing.assert_array_equal(bias, np.zeros(6, np.float32) if layer.b is None else layer.b.detach())
computed = (args[0], SimpleNamespace(shape=(6, 2, 3, 2)), *args[2:])
try:
    CONVERTERS[node.target](SimpleNamespace(net=network), node.target, computed, {}, "adder_8")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("bias", ["bias", "none"])
def test_converter(bias: str, tmp_path: pathlib.Path) -> None:
    """A call as torch.export leaves it becomes a plugin layer with the layer's weights."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install tensorrt-rtx")
    for name, source in STAND_IN.items():
        path = tmp_path / "torch_tensorrt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    said = run_python(CONVERT, bias, folders=(tmp_path,))
    assert "adder2d in adder_8" in said and "the weight is computed from the network's inputs" in said


# ---- Torch-TensorRT itself

needs_torch_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is None, reason="needs torch_tensorrt: pip install torch_tensorrt"
)


@needs_torch_tensorrt
@pytest.mark.gpu
def test_the_converter_is_registered() -> None:
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS

    assert torch2trt_adder.torch_tensorrt_error() is None
    assert torch.ops.torch2trt_adder.adder2d.default in DYNAMO_CONVERTERS


@needs_torch_tensorrt
@pytest.mark.gpu
@pytest.mark.parametrize("make, shape", [(addernet_mnist, (1, 28, 28)), (resnet20, (3, 32, 32))])
def test_compile_with_a_dynamic_batch(make, shape: tuple, tmp_path: pathlib.Path) -> None:
    """Everything in one engine, which is saved and loaded again."""
    import torch_tensorrt

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
