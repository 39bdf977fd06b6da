"""Every verb of `torch2trt-adder` with wrong files, wrong code and wrong streams: one sentence, and nothing is lost."""

import importlib.util
import io
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from torch import nn

from torch2trt_adder import Adder2d, library
from torch2trt_adder.cli import main, parser
from torch2trt_adder.conversion import routes

ROOT = pathlib.Path(library.__file__).resolve().parents[1]
HAS_ONNX = importlib.util.find_spec("onnx") is not None
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs onnx")
_numbers = itertools.count()

NETWORK = """
from torch import nn
from torch2trt_adder import Adder2d, library
def make():
    return nn.Sequential(Adder2d(3, 4, 3))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def module(text: str = NETWORK) -> str:
    """The name of a new module in the working directory; Python remembers those it has imported."""
    name = f"network_{next(_numbers)}"
    pathlib.Path(f"{name}.py").write_text(text)
    return name


def contents() -> dict[str, object]:
    """All that lies in the working directory, but for Python's caches."""
    return {
        str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in sorted(pathlib.Path(".").rglob("*"))
        if "__pycache__" not in path.parts
    }


def failure(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command fails, by --json and for people; no file changes."""
    before = contents()
    capsys.readouterr()
    assert main([*arguments]) == 1
    shown = capsys.readouterr()
    sentences = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "Traceback" not in shown.err
    assert "FAILED | torch2trt-adder " in shown.out
    assert main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"] and report["error"].splitlines()[0] == sentences[0].removeprefix("error: ")
    assert contents() == before
    return report["error"]


# ---- files to read

READS = {
    "export MODEL.pt2": ["export", "BAD.pt2", "out.onnx"],
    "export --checkpoint": ["export", "network:make", "out.onnx", "--shape", "1x3x8x8", "--checkpoint", "BAD.pth"],
    "convert MODEL.pt2": ["convert", "BAD.pt2", "out.plan"],
    "convert MODEL.onnx": ["convert", "BAD.onnx", "out.plan"],
    "convert --checkpoint": ["convert", "network:make", "out.plan", "--shape", "1x3x8x8", "--checkpoint", "BAD.pth"],
    "build ONNX": ["build", "BAD.onnx", "out.plan"],
    "check MODEL.pt2": ["check", "BAD.pt2", "good"],
    "check MODEL.onnx": ["check", "BAD.onnx", "good"],
    "check PLAN": ["check", "network:make", "BAD.plan"],
    "bench PLAN": ["bench", "BAD.plan"],
    "inspect PLAN": ["inspect", "BAD.plan"],
    "triton PLAN": ["triton", "repository", "BAD.plan"],
}


@pytest.mark.parametrize("kind", ["missing", "folder", "below a file", "unreadable"])
@pytest.mark.parametrize("verb", READS)
def test_an_input_that_cannot_be_read(verb: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = READS[verb]
    pathlib.Path("good").touch()
    bad = next(argument for argument in arguments if argument.startswith("BAD"))
    if kind == "folder":
        pathlib.Path(bad).mkdir()
    elif kind == "below a file":
        arguments = [f"good/{bad}" if argument == bad else argument for argument in arguments]
    elif kind == "unreadable":
        if os.geteuid() == 0:
            pathlib.Path(bad).symlink_to(bad)  # root may read everything but this
        else:
            pathlib.Path(bad).touch(mode=0)
    assert f"{bad} cannot be read (" in failure(*arguments, capsys=capsys)


@needs_onnx
@pytest.mark.parametrize("data", [b"", b"no such thing", bytes(1000)], ids=["empty", "text", "zeros"])
@pytest.mark.parametrize(
    "verb", ["export MODEL.pt2", "export --checkpoint", "build ONNX", "check MODEL.onnx", "triton PLAN"]
)
def test_an_input_of_another_kind(verb: str, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """Where neither a GPU nor TensorRT is asked for first."""
    arguments = [module() + ":make" if argument == "network:make" else argument for argument in READS[verb]]
    pathlib.Path("good").touch()
    bad = next(argument for argument in arguments if argument.startswith("BAD"))
    pathlib.Path(bad).write_bytes(data)
    assert bad in failure(*arguments, capsys=capsys)


# ---- files to write

WRITES = {
    "export": ["export", "network:make", "OUT", "--shape", "1x3x8x8"],
    "convert": ["convert", "network:make", "OUT", "--shape", "1x3x8x8"],
    "build": ["build", "x.onnx", "OUT"],
    "build --timing-cache": ["build", "x.onnx", "x.plan", "--timing-cache", "OUT"],
    "demo": ["demo", "--checkpoint", "OUT"],
    "triton": ["triton", "OUT", "x.plan"],
}


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "below a file"])
@pytest.mark.parametrize("verb", WRITES)
def test_an_output_that_cannot_be_written(verb: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("x.onnx").write_bytes(b"onnx")
    pathlib.Path("x.plan").write_bytes(b"plan")
    out = pathlib.Path("out")
    if kind == "folder" and verb == "triton":  # it writes into folders
        (out / "x" / "config.pbtxt").mkdir(parents=True)
    elif kind == "folder":
        out.mkdir()
    elif kind == "pipe":
        os.mkfifo(out)
    elif kind == "device":
        out.symlink_to(os.devnull)
    else:
        out.touch()
        out = out / "x"
    message = failure(*[str(out) if argument == "OUT" else argument for argument in WRITES[verb]], capsys=capsys)
    assert (str(out) in message or os.devnull in message) and "cannot be written (" in message


def save_program(name: str) -> None:
    data = io.BytesIO()
    torch.export.save(torch.export.export(nn.Sequential(Adder2d(3, 4, 3)).eval(), (torch.randn(1, 3, 8, 8),)), data)
    pathlib.Path(name).write_bytes(data.getvalue())


def save_onnx(name: str, weights: str | None = None) -> None:
    """x + w, with w in another file if it has a name."""
    import onnx

    w = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    if weights is not None:
        pathlib.Path(weights).write_bytes(w.SerializeToString())
        w.ClearField("float_data")
        w.data_location = onnx.TensorProto.EXTERNAL
        w.external_data.add(key="location", value=weights)
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [w])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), name)


@needs_onnx
@pytest.mark.parametrize(
    "arguments, what",
    [
        (["export", "NETWORK:make", "c.pth", "--checkpoint", "c.pth", "--shape", "1x3x8x8"], "the checkpoint"),
        (["export", "NETWORK:make", "soft", "--checkpoint", "c.pth", "--shape", "1x3x8x8"], "the checkpoint"),
        (["export", "NETWORK:make", "hard", "--checkpoint", "c.pth", "--shape", "1x3x8x8"], "the checkpoint"),
        (["export", "NETWORK:make", "NETWORK.py", "--shape", "1x3x8x8"], "the file of NETWORK:make"),
        (["export", "m.pt2", "m.pt2"], "the model"),
        (["export", "m.pt2", "sub/../m.pt2"], "the model"),
        (["convert", "m.pt2", "m.pt2"], "the model"),
        (["convert", "x.onnx", "x.onnx"], "the model"),
        (["convert", "x.onnx", "w.bin"], "the file w.bin of its weights"),
        (["convert", "NETWORK:make", "c.pth", "--checkpoint", "c.pth", "--shape", "1x3x8x8"], "the checkpoint"),
        (["build", "x.onnx", "x.onnx"], "the ONNX file"),
        (["build", "x.onnx", "w.bin"], "the file w.bin of its weights"),
        (["build", "x.onnx", "x.plan", "--timing-cache", "x.plan"], "the engine"),
        (["build", "x.onnx", "x.plan", "--timing-cache", "x.onnx"], "the ONNX file"),
        (["build", "x.onnx", "x.plan", "--timing-cache", "w.bin"], "the file w.bin of its weights"),
        (["triton", ".", "start.sh"], "the plan"),
        (["triton", ".", "m/1/model.plan", "--name", "m"], "the plan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_output_that_is_an_input(arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    network = module()
    arguments = [argument.replace("NETWORK", network) for argument in arguments]
    torch.save({}, "c.pth")
    pathlib.Path("soft").symlink_to("c.pth")
    os.link("c.pth", "hard")
    pathlib.Path("sub").mkdir()
    if "m.pt2" in arguments:
        save_program("m.pt2")
    save_onnx("x.onnx", "w.bin")
    pathlib.Path("start.sh").touch()
    pathlib.Path("m/1").mkdir(parents=True)
    pathlib.Path("m/1/model.plan").touch()
    message = failure(*arguments, capsys=capsys)
    assert f"is {what.replace('NETWORK', network)} itself; name another file" in message


@needs_onnx
@pytest.mark.parametrize(
    "arguments", [["build", "x.onnx", "x.plan"], ["convert", "x.onnx", "x.plan"], ["check", "x.onnx", "y"]]
)
def test_weights_that_are_missing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    save_onnx("x.onnx", "w.bin")
    pathlib.Path("w.bin").unlink()
    pathlib.Path("y").touch()
    assert "the weights of the ONNX file lie in w.bin, which is not there" in failure(*arguments, capsys=capsys)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "a b", "ümlaut", 'a"b', "a.b", "a\n"])
def test_names_of_triton(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("x.plan").touch()
    message = failure("triton", "repository", "x.plan", "--name", name, capsys=capsys)
    assert message == f"{name!r} cannot be a model's name; give --name letters, digits, _ and -."


# ---- the user's code


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "import sys\nsys.exit(0)",
            r"^NAME cannot be imported: it raised SystemExit: sys\.exit\(0\) \(at NAME\.py:2\)$",
        ),
        ("def make(:", r"^NAME cannot be imported: it raised SyntaxError: .* \(NAME\.py, line 1\)$"),
        ("import nowhere", r"^NAME cannot be imported: it raised ModuleNotFoundError: No module .* \(at NAME\.py:1\)$"),
        ("from os import nothing", r"^NAME cannot be imported: it raised ImportError: .* \(at NAME\.py:1\)$"),
        ("1 / 0", r"^NAME cannot be imported: it raised ZeroDivisionError: division by zero \(at NAME\.py:1\)$"),
        ("make = 3", r"^the function NAME:make cannot be found: NAME has no function 'make'\.$"),
        ("def make():\n    exit()", r"^NAME:make\(\) raised SystemExit: sys\.exit\(None\) \(at NAME\.py:2\)$"),
        ("def make(n):\n    pass", r"^NAME:make\(\) raised TypeError: make\(\) missing 1 required"),
        ("def make():\n    assert False", r"^NAME:make\(\) raised AssertionError \(at NAME\.py:2\)$"),
        (
            "from torch2trt_adder import Adder2d\ndef make():\n    return Adder2d(3, 0, 3)",
            r"^NAME:make\(\) raised ValueError: .* \(at NAME\.py:3\)$",
        ),
    ],
)
def test_code_that_does_not_make_a_network(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = module(text)
    assert re.search(message.replace("NAME", name), failure("export", f"{name}:make", "x.onnx", capsys=capsys))


def test_shapes_that_a_program_was_not_exported_for(capsys: pytest.CaptureFixture[str]) -> None:
    axes = ({0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("height", min=4)},)
    network = nn.Sequential(Adder2d(3, 4, 3)).eval()
    program = torch.export.export(network, (torch.randn(2, 3, 8, 8),), dynamic_shapes=axes)
    torch.export.save(program, "m.pt2")
    for shape in ("1x3x8x9", "65x3x8x8", "1x3x8", "1x4x8x8", "1x3x3x8"):
        message = failure("export", "m.pt2", "x.onnx", "--shape", shape, capsys=capsys)
        assert "m.pt2 was exported for an input input of [1 to 64, 3, 4 or more, 8], got --shape " + shape in message
    shapes = ["--shape", "1x3x8x8", "--shape", "1x3x8x8"]
    assert "m.pt2 has 1 inputs, got 2 of --shape" in failure("export", "m.pt2", "x.onnx", *shapes, capsys=capsys)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnx and onnxscript")
def test_a_network_without_adder_layers(capsys: pytest.CaptureFixture[str]) -> None:
    name = module("from torch import nn\ndef make():\n    return nn.ReLU()")
    assert main(["export", f"{name}:make", "x.onnx", "--shape", "1x3", "--no-check"]) == 0
    assert f"{name}:make has no adder layer: is it the network that you mean?" in capsys.readouterr().out


def test_code_of_a_program_needs_trust(capsys: pytest.CaptureFixture[str], folder: pathlib.Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(folder / "ran"),)

    save_program("good.pt2")
    torch.save(((Hostile(),), {}), "payload")
    with zipfile.ZipFile("good.pt2") as source, zipfile.ZipFile("evil.pt2", "w") as target:
        for name in source.namelist():
            bad = name.endswith("sample_inputs/model.pt")
            target.writestr(name, pathlib.Path("payload").read_bytes() if bad else source.read(name))
    assert "add --trust if you know" in failure("export", "evil.pt2", "x.onnx", "--no-check", capsys=capsys)
    main(["export", "evil.pt2", "x.onnx", "--no-check", "--shape", "1x3x8x8", "--trust"])
    assert (folder / "ran").is_dir()


# ---- streams, and what needs no torch


def shell(command: str) -> "subprocess.CompletedProcess[str]":
    """`CLI` in the command stands for torch2trt-adder."""
    command = command.replace("CLI", f"'{sys.executable}' -m torch2trt_adder")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "arguments, code",
    [("--version", 1), ("--help", 1), ("", 1), ("build --help", 1), ("bench no.plan", 1), ("bench no.plan --json", 1)],
)
@pytest.mark.parametrize(
    "redirect, reason", [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_a_stdout_that_takes_nothing(arguments: str, code: int, redirect: str, reason: str) -> None:
    done = shell(f"CLI {arguments} {redirect}")
    assert done.returncode == code and done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"error: standard output cannot be written ({reason})."
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-"])
def test_a_stderr_that_takes_nothing(redirect: str) -> None:
    done = shell(f"CLI bench no.plan --json {redirect}")
    assert done.returncode == 1 and json.loads(done.stdout)["error"].startswith("no.plan cannot be read")
    done = shell(f"CLI bench no.plan {redirect}")
    assert done.returncode == 1 and done.stdout.splitlines() == ["FAILED | torch2trt-adder bench no.plan"]
    done = shell(f"CLI bench {redirect}")
    assert done.returncode == 2 and done.stdout == ""


def test_wrong_usage_as_json() -> None:
    done = shell("CLI build x.onnx --json")
    report = json.loads(done.stdout)
    assert done.returncode == 2 and "usage: torch2trt-adder build" in done.stderr
    assert "required: PLAN" in report["error"] and not report["passed"]


def test_stdout_is_only_json_whoever_writes_to_it() -> None:
    """Also where a library or a program that the model's code starts does."""
    name = module("import os\ndef make():\n    print('one')\n    os.system('echo two')\n    raise KeyError('three')")
    done = shell(f"CLI export {name}:make x.onnx --json")
    assert done.returncode == 1 and "three" in json.loads(done.stdout)["error"]
    assert "one\n" in done.stderr and "two\n" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["check", "--help"], ["build"], ["bench", "no.plan"], ["check", "network", "no.plan"]],
    ids=" ".join,
)
def test_answers_that_need_no_torch(arguments: list[str]) -> None:
    """torch takes seconds to load."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['/bin/torch2trt-adder', *{arguments}]\n"
        "from torch2trt_adder.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert 'torch2trt_adder' in sys.modules and not {'torch', 'numpy', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_package_is_whole_for_the_processes_of_a_model() -> None:
    """Those that it starts have the arguments of the command line, too."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['/bin/torch2trt-adder', 'info']\n"
        "import torch2trt_adder\n"
        "assert 'torch' not in sys.modules and torch2trt_adder.Adder2d(3, 4, 3) and not hasattr(torch2trt_adder, 'nothing')\n"
        "from torch2trt_adder import *; adder2d, convert"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_routes_are_those_of_convert() -> None:
    assert parser._ROUTES == routes.ROUTES


def test_sigterm_ends_it_as_usual() -> None:
    name = module("import time\nprint('waits', flush=True)\ntime.sleep(60)")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch2trt_adder", "export", f"{name}:make", "x.onnx"]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line == "waits\n" for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert process.wait(60) == -signal.SIGTERM and time.monotonic() - start < 30
    assert not pathlib.Path("x.onnx").exists()
