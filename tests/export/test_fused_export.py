"""ONNX files of fused networks: an Adder2d node and standard nodes, in float32 from the sum to the limits."""

import pathlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")

from networks import calibrated

from torch2trt_adder import Adder2d, fuse, ops
from torch2trt_adder.export.exporter import export_onnx
from torch2trt_adder.export.format import adder_nodes, check_nodes
from torch2trt_adder.export.runtime import onnxruntime_session, run_onnxruntime

X = (2, 4, 9, 8)


class Block(nn.Module):
    """Two layers and a shortcut."""

    def __init__(self, relu: Any = F.relu) -> None:
        super().__init__()
        self.a, self.b = Adder2d(4, 6, 3, padding=1, bias=True), Adder2d(6, 4, 3, padding=1)
        self.na, self.nb, self.relu = nn.BatchNorm2d(6), nn.BatchNorm2d(4), relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.na(self.a(x)))
        return self.relu(self.nb(self.b(y)) + x)


def block(relu: Any = F.relu) -> nn.Module:
    torch.manual_seed(0)
    return fuse(calibrated(Block(relu), *X))


def types(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_nodes_and_values(tmp_path: pathlib.Path) -> None:
    """export_onnx compares the file with PyTorch, at other batches as well."""
    fused = block()
    path = export_onnx(fused, [torch.randn(X)], tmp_path / "net.onnx", {0: "batch"})
    model = onnx.load(path)
    check_nodes(model)
    kinds = [kind for kind in types(model) if kind not in ("Shape", "Squeeze")]
    assert kinds == ["Adder2d", "BatchNormalization", "Relu", "Adder2d", "BatchNormalization", "Add", "Relu"]
    assert [node.name for node in adder_nodes(model.graph)] == ["a:adder2d_0", "b:adder2d_1"]
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    names = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for norm, layer in zip(norms, (fused.a, fused.b), strict=True):
        scale, shift, mean, var = (torch.from_numpy(names[name].copy()) for name in norm.input[1:])
        assert torch.equal(scale, layer.scale) and torch.equal(shift, layer.shift)
        assert not mean.any() and (var == 1).all() and onnx.helper.get_node_attr_value(norm, "epsilon") == 0


@pytest.mark.parametrize(
    "relu, kinds",
    [
        (F.relu6, ["Clip"]),
        (lambda x: x.clamp(max=0.5), ["Clip"]),
        (lambda x: x.clamp(min=-0.25), ["Clip"]),
        (nn.Identity(), []),
    ],
)
def test_limits(relu: Any, kinds: list[str], tmp_path: pathlib.Path) -> None:
    path = export_onnx(block(relu), [torch.randn(X)], tmp_path / "net.onnx")
    assert [kind for kind in types(onnx.load(path)) if kind in ("Clip", "Relu")] == 2 * kinds


def test_each_part_alone(tmp_path: pathlib.Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4, 3, 3))
            self.scale, self.shift = nn.Parameter(torch.rand(4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (
                    ops.adder2d_fused(x, self.w, scale=self.scale, padding=1),
                    ops.adder2d_fused(x, self.w, shift=self.shift, padding=1, lower=-20),
                    ops.adder2d_fused(x, self.w, residual=x[:, :1], padding=1, upper=-20.5),
                    ops.adder2d_fused(x, self.w, padding=1),
                )

    torch.manual_seed(0)
    net = Net().requires_grad_(False).eval()
    path = export_onnx(net, [torch.randn(X)], tmp_path / "net.onnx")
    assert sorted(types(onnx.load(path))).count("Adder2d") == 4


def test_float16(tmp_path: pathlib.Path) -> None:
    """The sums of this network pass 65504: all is float32 until the value is rounded once."""
    torch.manual_seed(0)
    model = nn.Sequential(Adder2d(64, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    nn.init.normal_(model[0].adder, -150, 10)
    x = torch.randn(2, 64, 6, 6)
    fused = fuse(calibrated(model, *x.shape)).half()
    path = export_onnx(fused, [x.half()], tmp_path / "net.onnx")
    exported = onnx.load(path)
    assert types(exported) == ["Cast", "Adder2d", "BatchNormalization", "Relu", "Cast"]
    assert all(tensor.data_type == onnx.TensorProto.FLOAT for tensor in exported.graph.initializer)
    session = onnxruntime_session(path.read_bytes())
    (y,) = run_onnxruntime(session, [x.half()])
    y = torch.as_tensor(y)
    assert y.dtype is torch.float16 and y.isfinite().all() and y.max() > 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_that_the_plugin_does_not_support(dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        TypeError, match=r"cannot be exported, TensorRT's plugin (takes|accepts|supports) float32 and float16"
    ):
        export_onnx(block().to(dtype), [torch.randn(X, dtype=dtype)], tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_exported_program(tmp_path: pathlib.Path) -> None:
    x = torch.randn(X)
    program = torch.export.export(block(), (x,))
    path = export_onnx(program, [x], tmp_path / "net.onnx")
    assert types(onnx.load(path)).count("Adder2d") == 2


@pytest.mark.parametrize("how", [{"dynamo": True, "verbose": False}, {"dynamo": False}], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore")
def test_plain_torch_onnx_export(how: dict[str, Any], dtype: torch.dtype, tmp_path: pathlib.Path) -> None:
    """torch's own export knows no fused layer: it gets the node and ordinary operators, in float32."""
    if how["dynamo"] and not hasattr(torch.onnx, "ops"):
        pytest.skip("torch.onnx.ops came with torch 2.8")
    fused, path = block().to(dtype), tmp_path / "net.onnx"
    torch.onnx.export(fused, (torch.randn(X, dtype=dtype),), path, **how)
    model = onnx.load(path)
    adders = adder_nodes(model.graph)
    assert len(adders) == 2
    for adder in adders:
        assert onnx.helper.get_node_attr_value(adder, "output_type") == 0
    assert {"Mul", "Add"} <= set(types(model)) and {"Relu", "Clip"} & set(types(model))
