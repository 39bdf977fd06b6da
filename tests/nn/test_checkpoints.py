"""checkpoints.py: every kind of file that people give, with the parameters that must arrive or the sentence they read."""

import argparse
import gzip
import json
import pathlib
import pickle
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torch2trt_adder import Adder2d, load_checkpoint
from torch2trt_adder.models import addernet_mnist
from torch2trt_adder.nn import checkpoints


class Net(nn.Module):
    def __init__(self, filters: int = 5) -> None:
        super().__init__()
        self.adder = Adder2d(3, filters, 3)
        self.bn = nn.BatchNorm2d(filters)
        self.head = nn.Sequential(nn.Linear(filters, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.adder(x)).mean((2, 3)))


def trained() -> Net:
    """A network whose every value differs from that of a new one."""
    torch.manual_seed(7)
    net = Net()
    for value in net.state_dict().values():
        value.copy_(torch.rand(value.shape) if value.is_floating_point() else torch.tensor(3))
    return net


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---- files that load

STATES: dict[str, Callable[[Net], Any]] = {
    "plain": lambda net: net.state_dict(),
    "plain dict": lambda net: dict(net.state_dict()),
    "state_dict": lambda net: {"epoch": 3, "state_dict": net.state_dict(), "best": 0.9},
    "model_state_dict": lambda net: {"model_state_dict": net.state_dict(), "optimizer": {"state": {}}},
    "model": lambda net: {"optimizer": {"state": {}}, "model": net.state_dict()},
    "net": lambda net: {"net": net.state_dict(), "acc": 91.5},
    "nested": lambda net: {"model": {"state_dict": net.state_dict()}},
    "DataParallel": lambda net: nn.DataParallel(net).state_dict(),
    "compiled": lambda net: torch.compile(net).state_dict(),
    "compiled DataParallel": lambda net: {"net": torch.compile(nn.DataParallel(net)).state_dict()},
    "DataParallel of compiled": lambda net: nn.DataParallel(torch.compile(net)).state_dict(),
    "float16": lambda net: {key: value.half() for key, value in net.state_dict().items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_loads(state: Callable[[Net], Any], legacy: bool, tmp_path: pathlib.Path) -> None:
    net, file = trained(), tmp_path / "net.pth"
    torch.save(state(net), file, _use_new_zipfile_serialization=not legacy)
    model = Net().eval()
    assert load_checkpoint(model, file) is model and not model.training
    if state is STATES["float16"]:
        net = net.half().float()
    assert equal(model, net)
    assert load_checkpoint(Net(), str(file)).adder.adder.dtype is torch.float32


def test_a_compiled_part(tmp_path: pathlib.Path) -> None:
    net, file = trained(), tmp_path / "net.pth"
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.head = torch.compile(net.head)
    torch.save(net.state_dict(), file)
    assert any(key.startswith("head._orig_mod.") for key in net.state_dict())
    model = load_checkpoint(Net(), file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compiled"])
def test_into_a_wrapped_model(wrap: Callable[[nn.Module], nn.Module], tmp_path: pathlib.Path) -> None:
    net, file = trained(), tmp_path / "net.pth"
    torch.save(net.state_dict(), file)
    inner = Net()
    load_checkpoint(wrap(inner), file)
    assert equal(inner, net)


def test_a_model_with_a_part_named_module(tmp_path: pathlib.Path) -> None:
    """The prefix belongs to the network here, and a file of DataParallel has it twice."""
    file = tmp_path / "net.pth"
    both = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    for theirs in (both, nn.DataParallel(both)):
        torch.save(theirs.state_dict(), file)
        model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
        assert equal(load_checkpoint(model, file), both)


def test_versions_of_modules_arrive(tmp_path: pathlib.Path) -> None:
    """torch mends old files by the version in `_metadata`, whatever the prefix: BatchNorm 1 had no counter."""
    net, file = nn.DataParallel(trained()), tmp_path / "net.pth"
    state = net.state_dict()
    del state["module.bn.num_batches_tracked"]
    torch.save(state, file)
    with pytest.raises(RuntimeError, match=r"bn\.num_batches_tracked is missing in the file\.$"):
        load_checkpoint(Net(), file)
    state._metadata["module.bn"]["version"] = 1
    torch.save(state, file)
    assert torch.equal(load_checkpoint(Net(), file).adder.adder, net.module.adder.adder)


def test_safetensors(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, file = trained(), tmp_path / "net.safetensors"
    header, data = {}, b""
    names = {torch.float32: "F32", torch.int64: "I64"}
    for key, value in net.state_dict().items():
        raw = value.numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[key] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)  # what an import of an absent package does
        with pytest.raises(
            RuntimeError, match="in the safetensors format, which needs a package: pip install safetensors"
        ):
            load_checkpoint(Net(), file)
    pytest.importorskip("safetensors", reason="the package that reads the format is not installed")
    assert equal(load_checkpoint(Net(), file), net)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(RuntimeError, match=r"is a damaged safetensors file \(.*\); copy or download it again\.$"):
        load_checkpoint(Net(), file)


def test_infinite_values_load(tmp_path: pathlib.Path) -> None:
    """Buffers may hold infinities by design: an observer's first minimum, an attention mask."""
    model, file = nn.Module(), tmp_path / "mask.pth"
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    torch.save(model.state_dict(), file)
    model.mask = torch.zeros(2)
    assert load_checkpoint(model, file).mask[1] == -torch.inf


# ---- files that do not


def saved(content: Any) -> Callable[[pathlib.Path], None]:
    return lambda file: torch.save(content, file)


def cut(file: pathlib.Path) -> None:
    torch.save(Net().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-100])


def cut_legacy(file: pathlib.Path) -> None:
    torch.save(Net().state_dict(), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-100])


def overwritten(file: pathlib.Path) -> None:
    torch.save(Net().state_dict(), file)
    data = bytearray(file.read_bytes())
    data[40:200] = bytes(160)
    file.write_bytes(data)


def script(file: pathlib.Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(file)


def program(file: pathlib.Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), file.with_suffix(".pt2"))
    file.with_suffix(".pt2").rename(file)


def text(content: bytes) -> Callable[[pathlib.Path], None]:
    return lambda file: file.write_bytes(content) and None


def npz(file: pathlib.Path) -> None:
    with open(file, "wb") as stream:
        np.savez(stream, w=np.ones(3))


def missing(*keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in Net().state_dict().items() if key not in keys}


def with_nan() -> dict[str, Tensor]:
    state = Net().state_dict()
    state["head.1.weight"][1, 2] = torch.nan
    return state


RUN = r"in the project that wrote it, and only if you trust the file, run torch\.save\(torch\.load\(FILE, weights_only=False\)"
AGAIN = "copy or download it again"
KEYS = [f"x{i}" for i in range(9)]
BAD: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "empty": (text(b""), f"is empty; {AGAIN}"),
    "cut": (cut, rf"is cut off after \d+ bytes; {AGAIN}"),
    "cut, legacy": (cut_legacy, f"is damaged or cut off .*; {AGAIN}"),
    "overwritten": (overwritten, f"is damaged or cut off .*; {AGAIN}"),
    "LFS": (
        text(b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n"),
        "is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`",
    ),
    "HTML": (
        text(b"\n<!DOCTYPE html>\n<html>"),
        "is a web page .* download the file itself, by its raw or download link",
    ),
    "XML": (text(b'\xef\xbb\xbf<?xml version="1.0"?><Error/>'), "is a web page .* download the file itself"),
    "text": (text(b"not found\n"), r"is not a file that torch\.save wrote; give one of torch\.save\(model\.state_dict"),
    "gzip": (text(gzip.compress(b"x" * 99)), r"is not a file that torch\.save wrote"),
    "pickle": (text(pickle.dumps({"w": np.ones(3)})), r"is not a file that torch\.save wrote"),
    "TorchScript": (script, r"is a TorchScript archive; load it with torch\.jit\.load"),
    "program": (program, r"is a zip archive that torch\.save did not write; .* torch\.export\.load"),
    "npz": (npz, r"is a zip archive that torch\.save did not write"),
    "module": (
        saved(Net()),
        rf"is a whole pickled object \(\w*\.?test_checkpoints\.Net\), .*; {RUN}\.state_dict\(\), NEW_FILE",
    ),
    "module, legacy": (
        lambda file: torch.save(Net(), file, _use_new_zipfile_serialization=False),
        rf"is a whole pickled object \(\w*\.?test_checkpoints\.Net\), .*; {RUN}\.state_dict\(\)",
    ),
    "objects": (
        saved({"state_dict": Net().state_dict(), "args": argparse.Namespace(lr=0.1)}),
        rf"holds objects besides tensors \(argparse\.Namespace\), .*; {RUN}\[KEY\], NEW_FILE\) with the key",
    ),
    "tensor": (saved(torch.ones(3)), "holds a Tensor, not a state_dict; write it with"),
    "list": (saved([1, 2]), "holds a list, not a state_dict"),
    "no tensors": (saved({"epoch": 3, "best": 1.0}), r"holds a dict without tensors \(its keys: epoch, best\), not a"),
    "empty dict": (saved({}), r"holds a dict without tensors \(its keys: none\), not a state_dict"),
    "shape": (
        saved(Net(filters=6).state_dict()),
        r"does not fit Net: adder\.adder has shape \[6, 3, 3, 3\] in the file and \[5, 3, 3, 3\] in the model; bn\.weight has",
    ),
    "missing": (saved(missing("bn.weight")), r"does not fit Net: bn\.weight is missing in the file\.$"),
    "more": (saved(Net().state_dict() | {"x": torch.ones(1)}), r"does not fit Net: x is not in the model\.$"),
    "both prefixes": (
        saved(Net().state_dict() | {"module.bn.bias": torch.ones(5)}),
        r"does not fit Net: module\.bn\.bias is not in the model\.$",
    ),
    "many": (
        saved(Net().state_dict() | dict.fromkeys(KEYS, torch.ones(1))),
        r"does not fit Net: x0 is not in the model; x1 [^;]*; x2 [^;]*; x3 [^;]*; x4 [^;]*; and 4 more\.$",
    ),
    "no tensor": (
        saved(Net().state_dict() | {"bn.bias": 3}),
        r"does not fit Net: bn\.bias has type int in the file and is a tensor in the model\.$",
    ),
    "not a number": (
        saved(with_nan()),
        r"holds NaN in head\.1\.weight \(1 of 8 values\): the training that wrote it had diverged; use an earlier",
    ),
}


@pytest.mark.parametrize("write, sentence", BAD.values(), ids=BAD)
def test_a_bad_file_is_one_sentence_and_changes_nothing(
    write: Callable[[pathlib.Path], None], sentence: str, tmp_path: pathlib.Path
) -> None:
    file, model = tmp_path / "net.pth", trained()
    write(file)
    with pytest.raises(RuntimeError, match=rf"^the checkpoint {file} {sentence}") as caught:
        load_checkpoint(model, file)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert equal(model, trained())


@pytest.mark.parametrize("wanted", [FileNotFoundError, IsADirectoryError], ids=["none", "folder"])
def test_no_file(wanted: type[OSError], tmp_path: pathlib.Path) -> None:
    file = tmp_path / "absent.pth" if wanted is FileNotFoundError else tmp_path
    with pytest.raises(wanted, match=rf"^the checkpoint {file} cannot be read \((No such file|Is a) .*\)\.$"):
        load_checkpoint(Net(), file)


def test_not_a_model(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        load_checkpoint(addernet_mnist, tmp_path / "x.pth")  # the function's result is meant


def test_no_code_of_the_file_runs(tmp_path: pathlib.Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return pathlib.Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Net().state_dict(), "extra": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(RuntimeError, match="holds objects besides tensors"):
        load_checkpoint(Net(), tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_read_gives_what_a_resumed_run_needs(tmp_path: pathlib.Path) -> None:
    content = {"recipe": {"lr": 0.1, "amp": "off"}, "history": [{"loss": 1.5}], "model": Net().state_dict()}
    torch.save(content, tmp_path / "last.pt")
    found = checkpoints.read(tmp_path / "last.pt")
    assert found["recipe"] == content["recipe"] and found["history"] == content["history"]
