"""programs.py: a .pt2 file loads without running code of its own, or is refused."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torch2trt_adder import Adder2d
from torch2trt_adder.cli import programs

pytestmark = pytest.mark.filterwarnings("ignore")


class Network(nn.Module):
    """Everything that a file holds: a parameter, a buffer, a dynamic extent, guards, nested inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.adder, self.bias = Adder2d(3, 4, 3), nn.Buffer(torch.randn(4, 1, 1))

    def forward(self, x: torch.Tensor, others: list[torch.Tensor]) -> dict[str, Any]:
        y = self.adder(x) + self.bias
        return {"flat": y.reshape(y.shape[0] * 4, -1), "half": [x[:, :, : x.shape[2] // 2], others[0].mean()]}


@pytest.fixture(scope="module")
def good() -> bytes:
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 8, 8), [torch.randn(3)]
    axes = ({0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim.AUTO}, [None])
    program = torch.export.export(Network().eval(), inputs, dynamic_shapes=axes)
    program._guards_code = ["L['x'].size()[0] <= 64", *program._guards_code]  # whether or not this torch has made some
    data = io.BytesIO()
    torch.export.save(program, data)
    return data.getvalue()


def changed(data: bytes, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> bytes:
    """The archive with other entries; `extra` is added."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(result, "w") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a second entry of one name
        root = source.namelist()[0].split("/")[0]
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
        for name, contents in (extra or {}).items():
            target.writestr(f"{root}/{name}", contents)
    return result.getvalue()


def test_a_good_file_loads_and_computes_the_same(good: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "good.pt2").write_bytes(good)
    program = programs.load(tmp_path / "good.pt2")
    x, others = torch.randn(5, 3, 9, 8), [torch.randn(3)]
    for ours, theirs in zip(
        torch.utils._pytree.tree_leaves(program.module()(x, others)),
        torch.utils._pytree.tree_leaves(torch.export.load(io.BytesIO(good)).module()(x, others)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


class Hostile:
    def __init__(self, mark: pathlib.Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def in_model(edit: Callable[[dict], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, contents: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return contents
        model = json.loads(contents)
        edit(model)
        return json.dumps(model).encode()

    return change


def each_extent(code: str) -> Callable[[dict], None]:
    def edit(value: Any) -> None:
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
            edit(entry)
        if isinstance(value, dict) and "expr_str" in value:
            value["expr_str"] = code

    return edit


def first_node(target: str, argument: str) -> Callable[[dict], None]:
    def edit(model: dict) -> None:
        node = model["graph_module"]["graph"]["nodes"][0]
        node["target"], node["inputs"] = target, [{"name": "", "arg": {"as_string": argument}, "kind": 1}]

    return edit


def first_input(name: str) -> Callable[[dict], None]:
    def edit(model: dict) -> None:
        old = model["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"]
        text = json.dumps(model).replace(json.dumps(old), json.dumps(name))
        model.clear()
        model.update(json.loads(text))

    return edit


def a_name_that_hides_it(code: str) -> Callable[[dict], None]:
    """A tensor that is called like a key whose text is never evaluated."""

    def edit(model: dict) -> None:
        model["graph_module"]["graph"]["sym_int_values"]["metadata"] = {"as_expr": {"expr_str": code, "hint": None}}

    return edit


def input_structure(model: dict) -> None:
    context = json.dumps({"default_factory_module": "hostile_module", "default_factory_name": "x", "dict_context": []})
    spec = json.dumps([1, {"type": "collections.defaultdict", "context": context, "children_spec": []}])
    model["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec


def attacks(mark: pathlib.Path) -> dict[str, tuple[Callable[[str, bytes], bytes], dict[str, bytes]]]:
    buffer = io.BytesIO()
    torch.save(((Hostile(mark),), {}), buffer)
    payload = buffer.getvalue()
    code = f"__import__('os').mkdir('{mark}')"

    def entry(suffix: str, contents: bytes) -> Callable[[str, bytes], bytes]:
        return lambda name, old: contents if name.endswith(suffix) else old

    def pickled_weight(name: str, old: bytes) -> bytes:
        if name.endswith("weights/weight_0"):
            return payload
        if not name.endswith("model_weights_config.json"):
            return old
        config = json.loads(old)
        for meta in config["config"].values():
            meta["use_pickle"] |= meta["path_name"] == "weight_0"
        return json.dumps(config).encode()

    def object_constant(prefix: str) -> Callable[[str, bytes], bytes]:
        def change(name: str, old: bytes) -> bytes:
            if not name.endswith("model_constants_config.json"):
                return old
            meta = {"path_name": f"{prefix}_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
            return json.dumps({"config": {"object": meta}}).encode()

        return change

    same = lambda name, old: old  # noqa: E731
    return {
        "sample inputs": (entry("sample_inputs/model.pt", payload), {}),
        "a pickled weight": (pickled_weight, {}),
        "weights of the old format": (same, {"data/weights/model.pt": payload}),
        "constants of the old format": (same, {"data/constants/model.pt": payload}),
        "an opaque object": (
            object_constant("opaque_obj"),
            {"data/constants/opaque_obj_0": pickle.dumps(Hostile(mark))},
        ),
        "a custom object": (object_constant("custom_obj"), {"data/constants/custom_obj_0": payload}),
        "compiled code": (same, {"data/aotinductor/model/x.so": b""}),
        "a second entry of one name": (same, {"data/sample_inputs/model.pt": payload}),
        "an extent": (in_model(each_extent(code)), {}),
        "an extent of a tensor called metadata": (in_model(a_name_that_hides_it(code)), {}),
        "a function of sympy": (in_model(each_extent(f'parse_expr("{code}")')), {}),
        "an extent's attribute": (in_model(each_extent("Symbol('x').__class__")), {}),
        "a guard": (in_model(lambda model: model["guards_code"].append(f"{code} is None")), {}),
        "a comprehension in a guard": (in_model(lambda model: model["guards_code"].append("[x for x in L] == 0")), {}),
        "an operator": (in_model(first_node("torch.os.mkdir", str(mark))), {}),
        "torch.ops.load_library": (in_model(first_node("torch.ops.load_library", str(mark))), {}),
        "operator.call": (in_model(first_node("_operator.call", str(mark))), {}),
        "an input's name": (in_model(first_input(f"p_x={code}")), {}),
        "a module of an input's structure": (in_model(input_structure), {}),
    }


@pytest.mark.parametrize("kind", attacks(pathlib.Path("ran")))
def test_a_hostile_file_is_refused(kind: str, good: bytes, tmp_path: pathlib.Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.pt2"
    change, extra = attacks(mark)[kind]
    path.write_bytes(changed(good, change, extra))
    with pytest.raises(
        programs.UnsafeProgram, match="evil.pt2 may run code when it is loaded: .*; add --trust if you know"
    ):
        programs.load(path)
    assert not mark.exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("kind", ["sample inputs", "a pickled weight", "an opaque object", "an extent"])
def test_trust_loads_it_all(kind: str, good: bytes, tmp_path: pathlib.Path) -> None:
    """So these files are hostile indeed."""
    mark, path = tmp_path / "ran", tmp_path / "evil.pt2"
    change, extra = attacks(mark)[kind]
    path.write_bytes(changed(good, change, extra))
    with contextlib.suppress(ValueError):  # what comes after the code is of no interest
        programs.load(path, trust=True)
    assert mark.exists()


@pytest.mark.parametrize(
    "contents", [b"", b"no archive", b"PK\5\6" + bytes(18)], ids=["empty", "text", "empty archive"]
)
def test_what_is_not_a_program(contents: bytes, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.pt2").write_bytes(contents)
    with pytest.raises(ValueError, match="x.pt2 cannot be loaded as an exported program") as raised:
        programs.load(tmp_path / "x.pt2")
    assert "\n" not in str(raised.value) and not caplog.records
    with pytest.raises(OSError, match="none.pt2 cannot be read"):
        programs.load(tmp_path / "none.pt2")


def test_an_operator_that_is_not_registered(good: bytes, tmp_path: pathlib.Path) -> None:
    """The remedy is the package that defines it, not trust."""
    path = tmp_path / "x.pt2"
    path.write_bytes(changed(good, in_model(first_node("torch.ops.somebodys.function.default", "x"))))
    with pytest.raises(ValueError, match="operator torch.ops.somebodys.function.default is not known") as raised:
        programs.load(path)
    assert not isinstance(raised.value, programs.UnsafeProgram)
