"""The networks that torch2trt makes with our converters, without a GPU: tensorrt-rtx builds them, network_interpreter.py
computes them. Adder layers are convolutions here, since the plugin computes in engines only; engines are in
test_torch2trt_layers.py.
"""

import json
import pathlib

import layer_cases
import layer_networks
import pytest
from processes import run_python
from test_torch2trt_compat import START

pytestmark = pytest.mark.torch2trt
pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install tensorrt-rtx")

SCRIPT = """
import json, torch2trt_adder, network_interpreter, layer_cases, layer_networks, torch.nn.functional as F
from torch2trt_adder import frontends
assert frontends.is_enabled("torch2trt"), frontends.error("torch2trt")
import torch2trt as package
sys.modules["torch2trt.torch2trt"].TRTModule = lambda *args, **kwargs: nn.Module()  # there is no GPU to load an engine
trt.Builder.build_serialized_network = lambda self, network, config: None

@torch.no_grad()
def check(model, shapes, **options):
    model, x = model.eval(), torch.randn(shapes[0])
    network = package.torch2trt(model, [x], **options).network
    for shape in shapes:
        x = torch.randn(shape)
        expected = model(x.clone())
        (y,) = network_interpreter.run(trt, network, x)
        # Both compute in float32, in another order; a wrong window, axis or constant changes far more than this.
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

def attempt(*args, **kwargs):
    try:
        torch.manual_seed(0)
        check(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""

SIZES = {"min_shapes": [(1, 8, 9, 7)], "opt_shapes": [(2, 8, 12, 10)], "max_shapes": [(5, 8, 20, 20)]}
LAYERS = f"""
results = {{}}
for name in (*layer_cases.FUNCTIONS, *layer_cases.FIXED):
    results[name + "-static"] = attempt(layer_cases.call(name), [(2, 8, 12, 10)])
    shapes = [(2, 8, 12, 10), (1, 8, 12, 10), (5, 8, 12, 10)]
    results[name + "-batches"] = attempt(layer_cases.call(name), shapes, max_batch_size=5)
    if name in layer_cases.FUNCTIONS:
        shapes = [(2, 8, 12, 10), (1, 8, 9, 7), (4, 8, 15, 16)]
        results[name + "-sizes"] = attempt(layer_cases.call(name), shapes, **{SIZES!r})
for name, (_, shape) in layer_networks.NETWORKS.items():
    shapes = [(4, *shape), (1, *shape), (6, *shape)]
    results[name + "-network"] = attempt(layer_networks.network(name, nn.Conv2d), shapes, max_batch_size=6)
print(json.dumps(results))
"""


def run(script: str) -> str:
    quiet = "import warnings; warnings.simplefilter('ignore')\n"
    return run_python(
        quiet + START + SCRIPT + script, folders=tuple(pathlib.Path(__file__).resolve().parents[:2]), timeout=900
    )


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return json.loads(run(LAYERS).splitlines()[-1])


CASES = [
    *(f"{name}-{mode}" for name in layer_cases.FUNCTIONS for mode in ("static", "batches", "sizes")),
    *(f"{name}-{mode}" for name in layer_cases.FIXED for mode in ("static", "batches")),
    *(f"{name}-network" for name in layer_networks.NETWORKS),
]


@pytest.mark.parametrize("name", CASES)
def test_network_computes_what_pytorch_does(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None


UNKNOWN = """
def set_item(x):
    y = x * 1
    y[:, 0] = 0
    return y

def in_place(x):
    return (x * 1).sinc_()

def in_place_of_a_view(x):
    y = x * 1
    y[:, :2].mul_(2)
    return y

class Tripled:
    def __radd__(self, x):
        return x * 3

wrong = lambda x: torch.nn.functional.glu(x, 1)
good = {
    "a view that is written to": lambda x: (x * 1)[:, :2].mul_(2),
    "None": lambda x: x * 2 if x != None else x,
    "the other operand's operator": lambda x: x + Tripled(),
    "a float times an extent": lambda x: F.interpolate(x, size=int(x.size(2) * 1.5)) + F.interpolate(x, size=int(1.5 * x.size(2))),
}
for name, function in good.items():
    error = attempt(layer_cases.Call(function), [(2, 8, 12, 10)])
    assert error is None, (name, error)
for function in (set_item, in_place, in_place_of_a_view, wrong):
    error = attempt(layer_cases.Call(function), [(2, 8, 12, 10)])
    assert error and "torch2trt has no converter for the result of the model (Call)" in error, (function, error)

# An output that is another one, or an input.
class Repeated(nn.Module):
    def forward(self, x):
        y = x * 2
        return y, y, x, F.dropout(x, training=False)

network = package.torch2trt(Repeated().eval(), [torch.randn(2, 3)]).network
x = torch.randn(2, 3)
for y, expected in zip(network_interpreter.run(trt, network, x), (2 * x, 2 * x, x, x), strict=True):
    assert torch.equal(y, expected)
assert [network.get_output(i).name for i in range(4)] == ["output_0", "output_1", "output_2", "output_3"]
assert network.get_input(0).name == "input_0"

# A layer that gives no number where the one that it looks like gives one.
from torch2trt_adder import Adder2d
from torch2trt_adder.frontends import tracing
y = torch.randn(1, 4, 5, 5)
layer, lost = Adder2d(3, 4, 3), y.clone()
lost[0, 0, 0, 0] = torch.nan
tracing._check_close("layer", y, y.clone(), layer)
for output in (lost, y + 1, y.half(), y[:, :3]):
    try:
        tracing._check_close("layer", output, y, layer)
    except RuntimeError as error:
        assert "does not compute adder2d" in str(error)
    else:
        raise AssertionError(output)

# What an argument asks for and no layer can do is said, not left out.
for function, words in {
    lambda x: F.max_pool2d(x, 2, dilation=2): "max_pool2d with dilation 2",
    lambda x: torch.div(x, 2, rounding_mode="floor"): "rounding_mode='floor'",
    lambda x: x[:, torch.ones(8, dtype=torch.bool)]: "list of constant integers",
    lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True): "antialias=True",
    lambda x: F.normalize(x, p=3): "p=3",
    lambda x: x.sum(1, dtype=torch.float16): "keeps the type",
}.items():
    error = attempt(layer_cases.Call(function), [(2, 8, 12, 10)])
    assert error and error.startswith("NotImplementedError") and words in error, (words, error)

# A converter of someone else that gives another shape.
from torch2trt import tensorrt_converter
@tensorrt_converter("torch.nn.functional.logsigmoid")
def flat(ctx):
    layer = ctx.network.add_shuffle(ctx.method_args[0]._trt)
    layer.reshape_dims = (-1,)
    ctx.method_return._trt = layer.get_output(0)
error = attempt(layer_cases.Call(lambda x: F.logsigmoid(x)), [(2, 8, 12, 10)])
assert error and "gives a result of shape [1920], PyTorch one of shape [2, 8, 12, 10]" in error, error

# One that was registered before stays, one that is registered later replaces ours.
from torch2trt_adder.frontends import torch2trt_layers
before = package.CONVERTERS["torch.nn.functional.logsigmoid"]["converter"]
torch2trt_layers.converts("torch.nn.functional.logsigmoid")(lambda ctx, x: None)
assert package.CONVERTERS["torch.nn.functional.logsigmoid"]["converter"] is before is flat

import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    attempt(nn.ReLU(), [(2, 8)], fp16=True, something_of_a_third_party=1)
said = [str(w.message) for w in said if "ignores the option" in str(w.message)]
assert said == ["torch2trt ignores the option 'fp16'; did you mean 'fp16_mode'?"], said
"""


def test_what_has_no_converter_raises() -> None:
    run(UNKNOWN)
