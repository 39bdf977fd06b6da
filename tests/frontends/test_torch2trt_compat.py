"""torch2trt 0.5 on a TensorRT that has dropped what it needs: tensorrt-rtx, which has the API of TensorRT 11."""

import importlib.util
import pathlib
import sys

import pytest
from processes import run_python

from torch2trt_adder.frontends import torch2trt_compat

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install tensorrt-rtx")

START = """
import sys
import torch, tensorrt_rtx
sys.modules["tensorrt"] = trt = tensorrt_rtx  # the API of TensorRT 11
from torch import nn
# What TensorRT 11 has and TensorRT for RTX has not: devices other than the GPU.
for owner, name in ((trt.ITensor, "location"), (trt.IBuilderConfig, "DLA_core"), (trt.IBuilderConfig, "default_device_type")):
    if not hasattr(owner, name):
        setattr(owner, name, property(lambda self: None, lambda self, value: None))
for name in ("TensorLocation", "DeviceType"):
    if not hasattr(trt, name):
        setattr(trt, name, type(name, (), {"DEVICE": 0, "HOST": 1, "GPU": 0, "DLA": 1}))
trt.__version__ = "11.0"  # it counts its own versions from 1
before = set(dir(trt)), trt.NetworkDefinitionCreationFlag, trt.BuilderFlag
"""


def run(script: str) -> str:
    return run_python(START + script)


def test_needed() -> None:
    import tensorrt_rtx

    assert torch2trt_compat.needed(tensorrt_rtx)


@pytest.mark.torch2trt
def test_without_the_patches_torch2trt_cannot_be_imported() -> None:
    out = run("""
try:
    import torch2trt
except AttributeError as error:
    print(error)
""")
    assert "CalibrationAlgoType" in out


@pytest.mark.torch2trt
def test_importing_the_package_makes_torch2trt_work() -> None:
    """Networks of several layers and types, fixed and dynamic; TensorRT's module stays as it was."""
    out = run("""
import torch2trt_adder
from torch2trt_adder import frontends
assert frontends.is_enabled("torch2trt"), frontends.error("torch2trt")
from torch2trt import torch2trt, TRTModule
import torch2trt as package
host = sys.modules["torch2trt.torch2trt"]
built = []
host.TRTModule = lambda engine, *names, **flatteners: built.append(engine) or nn.Module()  # there is no GPU to load it

def convert(model, x, **options):
    torch2trt(model.eval(), [x], **options)
    assert isinstance(built[-1], trt.IHostMemory) and built[-1].nbytes > 1000

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.a(x)))
        x = torch.relu(x + self.b(x))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))

x = torch.randn(2, 3, 16, 16)
convert(Net(), x)
convert(Net(), x, max_batch_size=8)
convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), x, min_shapes=[(1, 3, 8, 8)], max_shapes=[(4, 3, 20, 20)])
convert(nn.Conv2d(3, 4, 3).half(), x.half())
for option, word in (("fp16_mode", "fp16_mode"), ("int8_mode", "int8_mode")):
    try:
        convert(Net(), x, **{option: True})
    except RuntimeError as error:
        assert word in str(error) and "route='onnx'" in str(error), error
    else:
        raise AssertionError(option)
assert before == (set(dir(trt)), trt.NetworkDefinitionCreationFlag, trt.BuilderFlag)
print(len(built))
""")
    assert out.strip().splitlines()[-1] == "4"


@pytest.mark.parametrize(
    "content, warned",
    [(None, False), ("raise OSError('libnvinfer.so.8')", False), ("def torch2trt(model, inputs): pass", True)],
    ids=["a folder of that name", "cannot be imported", "of another version"],
)
def test_a_torch2trt_that_cannot_be_used(content: str | None, warned: bool, tmp_path: pathlib.Path) -> None:
    """Importing the package works all the same, and `convert` knows why it takes ONNX."""
    if content is None and importlib.util.find_spec("torch2trt"):
        pytest.skip("torch2trt is installed, and hides a folder of that name")
    (tmp_path / "torch2trt").mkdir()
    if content is not None:
        (tmp_path / "torch2trt" / "__init__.py").write_text(content)
    out = run(f"""
sys.path.insert(0, {str(tmp_path)!r})
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch2trt_adder
print(["make constants of adder layers" in str(w.message) for w in said if "torch2trt_adder" in str(w.message)])
torch.cuda.is_available = lambda: True
from torch2trt_adder.conversion import routes
print(routes.missing("torch2trt"))
print(routes.missing())
""")
    said, torch2trt, auto = out.splitlines()
    assert said == ("[True]" if warned else "[]")
    assert torch2trt.startswith("torch2trt cannot be used (")
    assert auto == "None" or "pip install onnx" in auto


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.torch2trt
def test_nothing_is_patched_where_nothing_is_missing() -> None:
    import tensorrt as trt

    if torch2trt_compat.needed(trt):
        pytest.skip("this TensorRT needs the patches")
    host = sys.modules["torch2trt.torch2trt"]
    assert host.trt is trt and sys.modules["torch2trt.dataset_calibrator"].__file__
