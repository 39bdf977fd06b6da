"""Networks of fuse() through torch2trt: the converter's network, computed without a GPU; and engines on a GPU."""

import os
import pathlib

os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # as in test_torch2trt_engines.py

import pytest
import torch
from processes import run_python
from test_torch2trt_compat import START

import torch2trt_adder
from torch2trt_adder.models import resnet20
from torch2trt_adder.numerics.rounding import rounding_bounds

pytestmark = pytest.mark.torch2trt

SCRIPT = """
import torch.nn.functional as F
import torch2trt_adder, network_interpreter
from torch2trt_adder import Adder2d, frontends, fuse
from torch2trt_adder.trt import plugin
assert frontends.is_enabled("torch2trt"), frontends.error("torch2trt")
import torch2trt as package
sys.modules["torch2trt.torch2trt"].TRTModule = lambda *args, **kwargs: nn.Module()  # there is no GPU to load an engine
trt.Builder.build_serialized_network = lambda self, network, config: None

def convolution(network, x, weight, bias, stride, padding, dilation, groups, output_type, name):
    # The plugin computes in engines only, and this TensorRT has none: a convolution has the same shapes.
    arrays = [t.detach().numpy() for t in (weight, torch.zeros(len(weight)) if bias is None else bias)]
    layer = network.add_convolution_nd(x, len(weight), tuple(weight.shape[2:]), *arrays)
    layer.stride_nd, layer.padding_nd, layer.dilation_nd, layer.num_groups = stride, padding, dilation, groups
    layer.name = name
    return layer

plugin.add_adder2d = convolution

class Net(nn.Module):
    def __init__(self, limits):
        super().__init__()
        self.a, self.na, self.limits = Adder2d(4, 4, 3, padding=1, bias=True), nn.BatchNorm2d(4), limits
    def forward(self, x):
        return self.limits(self.na(self.a(x)) + x)

torch.manual_seed(0)
cases = {
    "relu": (F.relu, ["CONVOLUTION", "SCALE", "ELEMENTWISE", "ACTIVATION"]),
    "relu6": (F.relu6, ["CONVOLUTION", "SCALE", "ELEMENTWISE", "ACTIVATION"]),
    "lower": (lambda x: x.clamp(min=-0.5), ["CONVOLUTION", "SCALE", "ELEMENTWISE", "CONSTANT", "ELEMENTWISE"]),
    "upper": (lambda x: x.clamp(max=0.5), ["CONVOLUTION", "SCALE", "ELEMENTWISE", "CONSTANT", "ELEMENTWISE"]),
    "none": (nn.Identity(), ["CONVOLUTION", "SCALE", "ELEMENTWISE"]),
}
for name, (limits, kinds) in cases.items():
    model = Net(limits).eval()
    nn.init.uniform_(model.na.weight), nn.init.normal_(model.na.bias)
    fused, x = fuse(model), torch.randn(2, 4, 6, 5)
    network = package.torch2trt(fused, [x], fuse=False, max_batch_size=4).network
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    assert [layer.type.name for layer in layers] == kinds, (name, [layer.type.name for layer in layers])
    assert layers[0].name == "a:adder2d_0", layers[0].name
    for batch in (2, 4):
        x = torch.randn(batch, 4, 6, 5)
        layer = fused.a
        y = F.conv2d(x, layer.adder, layer.b, 1, 1) * layer.scale[:, None, None] + layer.shift[:, None, None] + x
        (result,) = network_interpreter.run(trt, network, x)
        torch.testing.assert_close(result, limits(y), rtol=1e-5, atol=1e-5)

class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, 3, 3), requires_grad=False)
    def forward(self, x):
        return torch2trt_adder.ops.adder2d_fused(x, self.w, scale=x.mean((0, 2, 3)))

try:
    package.torch2trt(Computed().eval(), [torch.randn(2, 4, 6, 5)], fuse=False)
except RuntimeError as error:
    assert "the scale is computed from the network's inputs" in str(error), error
else:
    raise AssertionError("a computed scale became a constant")
"""


def test_network() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install tensorrt-rtx")
    run_python(START + SCRIPT, folders=(pathlib.Path(__file__).resolve().parents[1],))


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("route", ["torch2trt", "onnx"])
@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused again", "not fused"])
def test_engines_of_a_fused_network(route: str, fp16: bool, fuse: bool) -> None:
    """An engine of fuse(model) computes what the model does, whether the build fuses its layers again or not."""
    torch.manual_seed(0)
    model, x = resnet20().cuda(), torch.randn(64, 3, 32, 32, device="cuda")
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
        model.eval()
        engine = torch2trt_adder.convert(torch2trt_adder.fuse(model), [x], route=route, fp16_mode=fp16, fuse=fuse)
        expected, limit = model(x), rounding_bounds(model, [x], fp16).item()
        difference = (engine(x) - expected).abs().max().item()
    assert limit < (0.5 if fp16 else 1e-2) * expected.abs().max(), "the bound says too little"
    assert difference <= limit, f"the engine differs from the model by {difference:.3g}, rounding explains {limit:.3g}"
