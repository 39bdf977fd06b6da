"""The command `torch2trt-adder`, run as users run it."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import processes
import pytest
import torch
from processes import ROOT

from torch2trt_adder import __version__, library
from torch2trt_adder.cli import commands, main
from torch2trt_adder.conversion import routes
from torch2trt_adder.export import runtime
from torch2trt_adder.trt import builder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch2trt_adder", *arguments]


def run(*arguments: str, folder: pathlib.Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return processes.run(*command(*arguments), cwd=folder, env=environment())


def environment() -> dict[str, str]:
    """A user's: without the variable that names the library, unless this process has it."""
    given = processes.environment()
    if library.ENVIRONMENT_VARIABLE not in os.environ:
        del given[library.ENVIRONMENT_VARIABLE]
    return given


VERBS = ("demo", "info", "convert", "export", "build", "check", "bench", "inspect", "triton")


def test_help_names_the_verbs() -> None:
    for result in (run("--help"), run()):
        assert result.returncode == 0
        assert all(text in result.stdout for text in (*VERBS, "torch2trt(model, [x])", "exit codes"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["demo", "--epochs", "0"],
        ["demo", "--epochs", "many"],
        ["info", "--no"],
        ["export", "model:make"],
        ["export", "model:make", "x.onnx", "--shape", "1,3,8,8"],
        ["export", "model:make", "x.onnx", "--dynamic", "batch=0"],
        ["build", "x.onnx", "x.plan", "--range", "batch=1:8"],
        ["convert", "model:make", "x.plan", "--dynamic", "batch=1:8:64"],
        ["convert", "model:make", "x.plan", "--route", "other"],
        ["export", "model:make", "x.onnx", "--shape", "0x3x8x8"],
        ["check", "x.onnx", "x.plan", "--rtol", "inf"],
        ["check", "x.onnx", "x.plan", "--rtol", "-1"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2 and "usage: torch2trt-adder" in result.stderr and "Traceback" not in result.stderr


def test_version() -> None:
    assert run("--version").stdout == f"torch2trt-adder {__version__}\n"


def test_info() -> None:
    result = run("info")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"torch2trt-adder {__version__} | Python ") and f"torch {torch.__version__}" in lines[0]
    assert lines[-1] == "PASSED | torch2trt-adder info"
    for name in ("torch ", "GPU", "library", "TensorRT", "torch2trt "):
        assert any(line.startswith(name) for line in lines[1:-1]), name


def test_a_failure_is_one_sentence(tmp_path: pathlib.Path) -> None:
    """Told before the training, without a traceback."""
    (tmp_path / "file").touch()
    result = run("demo", "--checkpoint", "file/x.pth", folder=tmp_path)
    assert result.returncode == 1
    assert re.fullmatch(r"error: file/x\.pth cannot be written \(.*\); name another file.*\n", result.stderr)
    assert result.stdout.splitlines()[-1] == "FAILED | torch2trt-adder demo --checkpoint file/x.pth"


def test_info_shows_all_of_a_broken_installation() -> None:
    os.environ[library.ENVIRONMENT_VARIABLE] = "/nowhere/lib.so"
    try:
        result = run("info", "--json")
    finally:
        del os.environ[library.ENVIRONMENT_VARIABLE]
    report = json.loads(result.stdout)
    assert result.returncode == 1 and not report["passed"]
    assert "was looked for at /nowhere/lib.so and is not there: build it" in report["error"]
    assert report["result"]["library"]["state"] == "/nowhere/lib.so"
    assert "cannot be used" in report["result"]["library"]["allows"] and "torch_tensorrt" in report["result"]


def test_ctrl_c(folder: pathlib.Path) -> None:
    """One sentence and the last line, on both outputs, and nothing half written."""
    waits = ["export", "network:waits", "x.onnx", "--shape", "1x3x8x8", "--json"]
    with subprocess.Popen(
        command(*waits), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:  # fmt: skip
        line = next(line for line in process.stderr if line == "the network is made\n")
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert line and process.returncode == 130
    assert err.endswith(f"error: interrupted\nFAILED | torch2trt-adder {' '.join(waits)}\n") and "Traceback" not in err
    report = json.loads(out)
    assert report["error"] == "interrupted" and not report["passed"]
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["empty.pt2", "network.py"]


def test_a_reader_that_leaves(folder: pathlib.Path) -> None:
    """`torch2trt-adder info | head -1`"""
    pipe = f"{shlex.join(command('info'))} | head -1"
    done = processes.run("sh", "-c", pipe, cwd=folder, env=environment(), timeout=60)
    assert done.stdout.startswith("torch2trt-adder ") and done.stderr == ""


def test_an_unexpected_failure_has_its_last_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load", lambda: {}["nothing"])
    for options in ([], ["--debug"]):
        assert main(["info", "--json", *options]) == 1
        shown = capsys.readouterr()
        assert shown.err.endswith(f"FAILED | {' '.join(['torch2trt-adder', 'info', '--json', *options])}\n")
        assert ("Traceback" in shown.err) == bool(options)
        report = json.loads(shown.out)
        assert report["error"].startswith("the model's code raised KeyError: 'nothing' (at ") and not report["passed"]
        assert re.search(r"test_cli\.py:\d+\); --debug shows the traceback\.$", report["error"])


# ---- export, build, and what needs a GPU

MODEL = """
import torch
from torch import nn
from torch2trt_adder import Adder2d

def adders():
    torch.manual_seed(0)
    network = nn.Sequential(Adder2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Adder2d(8, 4, 3))
    network[1].running_mean.fill_(-30)  # about those of 27 distances: the network depends on what the first layer computes
    network[1].running_var.fill_(20)
    return network

def others():
    network = adders()
    torch.nn.init.normal_(network[0].adder)
    return network

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))

def wrong():
    return 3

def raises():
    raise KeyError("weights")

def waits():
    import sys, time
    print("the network is made", file=sys.stderr, flush=True)
    time.sleep(60)
    return adders()
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "network.py").write_text(MODEL)
    (tmp_path / "empty.pt2").touch()
    return tmp_path


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnx, onnxscript and onnxruntime")
def test_export_as_json(folder: pathlib.Path) -> None:
    torch.save(dict(network_from(folder).state_dict()), folder / "weights.pth")
    arguments = ["export", "network:adders", "out/model.onnx", "--shape", "2x3x9x8", "--dynamic", "0=batch"]
    result = run(*arguments, "--checkpoint", "weights.pth", "--json", folder=folder)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed"] and report["versions"]["torch"] == torch.__version__
    result_of = report["result"]
    assert result_of.pop("inputs") == {"input": ["batch", 3, 9, 8]}
    assert list(result_of.pop("outputs").values()) == [["batch", 4, 7, 6]]
    assert result_of == {"file": "out/model.onnx", "adder_nodes": 2, "nodes": 4, "opset": 17, "checked": True}
    assert "Inputs: input [batch, 3, 9, 8].\n" in result.stderr
    assert "PASSED | torch2trt-adder export network:adders" in result.stderr
    assert [path.name for path in (folder / "out").iterdir()] == ["model.onnx"]


def network_from(folder: pathlib.Path) -> torch.nn.Module:
    namespace: dict = {}
    exec((folder / "network.py").read_text(), namespace)
    return namespace["adders"]()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["export", "network", "x.onnx"], r"'network' is not a model: name a function as package\.module:function"),
        (
            ["export", "nowhere:make", "x.onnx"],
            r"the function nowhere:make cannot be found \(No module named 'nowhere'\)",
        ),
        (["export", "network:make", "x.onnx"], "the function network:make cannot be found"),
        (["export", "network:wrong", "x.onnx"], r"network:wrong\(\) must return a torch\.nn\.Module, got int"),
        (["export", "network:raises", "x.onnx"], r"network:raises\(\) raised KeyError: 'weights'"),
        (["export", "network:adders", "x.onnx"], "input shapes are unknown: give one --shape for each input"),
        (["export", "network:adders", "x.onnx", "--checkpoint", "no.pth"], r"no\.pth cannot be read \(No such file"),
        (["export", "no.pt2", "x.onnx"], r"no\.pt2 cannot be read \(No such file"),
        (["export", "no.onnx", "x.onnx"], r"no\.onnx is an ONNX file already; name a function or a \.pt2 file"),
        (
            ["export", "empty.pt2", "x.onnx", "--half"],
            r"empty\.pt2 has its parameters and types already; --checkpoint and --half",
        ),
        (
            ["export", "network:adders", "network.py/x.onnx", "--shape", "1x3x8x8"],
            r"cannot be written \(.*\); name another",
        ),
    ],
)
def test_failures_are_sentences(
    arguments: list[str],
    message: str,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "network", raising=False)  # of another test's folder
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].startswith("FAILED | torch2trt-adder export")
    assert re.search(f"^error: .*{message}", shown.err, re.MULTILINE) and "Traceback" not in shown.err
    assert not (folder / "x.onnx").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_convert_without_a_gpu(folder: pathlib.Path) -> None:
    result = run("convert", "network:adders", "x.plan", "--shape", "1x3x8x8", "--json", folder=folder)
    report = json.loads(result.stdout)
    assert result.returncode == 1 and not report["passed"]
    assert re.search("finds no NVIDIA GPU here.*use a machine with a GPU", report["error"])


# tensorrt-rtx has the parser and builder of TensorRT 11, and works without a GPU. One process runs several commands.
WITH_RTX = """
import contextlib, io, json, sys, tensorrt_rtx
sys.modules["tensorrt"] = tensorrt_rtx
from torch2trt_adder.cli import main
done = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    done.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""


def with_rtx(commands: list[list[str]], folder: pathlib.Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install tensorrt-rtx")
    return json.loads(processes.run_python(WITH_RTX, json.dumps(commands), cwd=folder).splitlines()[-1])


def start(repository: pathlib.Path, *options: str) -> list[str]:
    """The arguments that a repository's start.sh gives to tritonserver."""
    server = repository.parent / "bin" / "tritonserver"
    server.parent.mkdir(exist_ok=True)
    server.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    server.chmod(0o755)
    environment = {**os.environ, "PATH": f"{server.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([repository / "start.sh", *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnx and onnxscript")
def test_build_and_triton(folder: pathlib.Path) -> None:
    """A plan on a CPU, and a model repository of it; without a GPU the plan is refused by name."""
    good = [
        ["export", "network:plain", "x.onnx", "--shape", "2x3x8x8", "--dynamic", "0=batch", "--no-check"],
        ["build", "x.onnx", "x.plan", "--range", "batch=1:2:8", "--fp16", "--json"],
        ["triton", "repository", "x.plan", "--name", "digits", "--json"],
        ["triton", "other", "x.plan", "--embedded"],
    ]
    bad = [["triton", "no", "x.onnx"], ["triton", "no", "none.plan"], ["triton", "no", "x.plan", "--name", "a/b"]]
    on_a_gpu = [["bench", "x.plan"], ["inspect", "x.plan"], ["check", "network:plain", "x.plan"]]
    on_a_gpu = [] if torch.cuda.is_available() else on_a_gpu
    done = with_rtx([*good, *bad, *on_a_gpu], folder)
    assert [code for code, *_ in done] == [0] * len(good) + [1] * len(bad + on_a_gpu), done
    assert json.loads(done[1][1])["result"] == {"file": "x.plan", "bytes": (folder / "x.plan").stat().st_size}
    root = folder / "repository"
    written = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    library = "libtorch2trt_adder.so"
    assert written == {"digits/1/model.plan", "digits/config.pbtxt", library, "start.sh"}
    assert (root / "digits/config.pbtxt").read_text() == 'name: "digits"\nplatform: "tensorrt_plan"\n'
    assert json.loads(done[2][1])["result"]["command"] == str(root / "start.sh")
    moved = folder / "mounted elsewhere"
    root.rename(moved)
    started = [
        f"--model-repository={moved}",
        f"--backend-config=tensorrt,plugins={moved / library}",
        "--http-port=8080",
    ]
    assert start(moved, "--http-port=8080") == started
    moved.rename(root)
    assert (root / "digits/1/model.plan").read_bytes() == (folder / "x.plan").read_bytes()
    assert not (folder / "other" / library).exists()
    assert "--backend-config=tensorrt,version-compatible=true" in start(folder / "other")

    assert all(err.startswith("error: ") for *_, err in done[len(good) :]) and not (folder / "no").exists()
    assert all("x.plan needs an NVIDIA GPU" in err for *_, err in done[len(good + bad) :])


# ---- check and convert of files, with a stand-in for the engine


class StandIn:
    """An engine with inputs a and b, outputs y and z in the other order than the file, of any batch from 1 to 4."""

    input_names, output_names = ["b", "a"], ["z", "y"]
    _dtypes = {"a": torch.float32, "b": torch.float32}
    _profile = {"a": [(n, 3) for n in (1, 2, 4)], "b": [(n, 2) for n in (1, 2, 4)]}

    def dtype_of(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def profile_shapes(self, name: str) -> list[tuple[int, ...]]:
        return self._profile[name]

    def __init__(self, wrong: Callable = lambda a, y: y) -> None:
        self.wrong, self.batches = wrong, []

    def __call__(self, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.batches.append(len(a))
        return 2 * b, self.wrong(a, -a)


@pytest.fixture
def two_inputs(tmp_path: pathlib.Path) -> pathlib.Path:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[n, 3] a, float[n, 2] b) => (float[n, 3] y, float[n, 2] z) { y = Neg (a) z = Add (b, b) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "two.onnx")
    return tmp_path / "two.onnx"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Puts a StandIn in the place of every engine that a verb loads, and the CPU in that of the GPU."""
    draw = commands.random_inputs

    def use(runner: StandIn) -> StandIn:
        usual, dtypes = [runner.profile_shapes(name)[1] for name in runner.input_names], [torch.float32] * 2
        monkeypatch.setattr(commands, "_load", lambda plan, shapes, host_code: (runner, shapes or usual, dtypes))
        monkeypatch.setattr(
            commands, "random_inputs", lambda shapes, dtypes, device, seed: draw(shapes, dtypes, "cpu", seed)
        )
        return runner

    return use


def check(source: pathlib.Path, shapes: Sequence[Any] = ()) -> dict:
    return commands.check(str(source), pathlib.Path("x.plan"), shapes, 5, None, None, False, False, False, False)


def test_check_goes_by_names_and_to_the_ends(
    two_inputs: pathlib.Path, stand_in: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    runner = stand_in(StandIn())
    result = check(two_inputs)
    assert result["relative_difference"] == 0 and result["constant_outputs"] == []
    assert runner.batches == [2, 2, 2, 1, 4]  # 5 samples of the usual shapes, and both ends
    runner.batches.clear()
    check(two_inputs, [(3, 2), (3, 3)])
    assert runner.batches == [3, 3]
    for wrong, message in (
        (lambda a, y: y + 0.1, "the engine differs from .*two.onnx by .*, more than the 1.00e-03 allowed"),
        (lambda a, y: y if len(a) < 4 else y.roll(1, 0), "the engine differs from"),
        (lambda a, y: y / 0, "values that are infinite or NaN only in the engine"),
        (lambda a, y: y[:, :2], r"output 1 is \[2, 2\] in x\.plan and \[2, 3\] in .*two\.onnx"),
    ):
        stand_in(StandIn(wrong))
        with pytest.raises(RuntimeError, match=message):
            check(two_inputs)
    stand_in(StandIn())
    run = runtime.run_onnxruntime

    def run_small(session: object, tensors: list) -> list:
        if len(tensors[0]) == 4:
            raise RuntimeError("no memory")
        return run(session, tensors)

    monkeypatch.setattr(runtime, "run_onnxruntime", run_small)
    assert check(two_inputs)["relative_difference"] == 0
    assert "Not compared for inputs of [4, 2], [4, 3]: RuntimeError: no memory" in capsys.readouterr().out
    other = StandIn()
    other.input_names, other._profile = ["b", "x"], {**other._profile, "x": other._profile["a"]}
    stand_in(other)
    with pytest.raises(RuntimeError, match="x.plan is not an engine of .*: it has b, x, the file a, b"):
        check(two_inputs)


def test_check_of_nothing_is_no_success(tmp_path: pathlib.Path, stand_in: Callable) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] a, float[n, 2] b) => (float[n, 3] y, float[n, 2] z)
    { zero = Constant <value = float {0.0}> () none = Div (zero, zero) y = Mul (a, none) z = Mul (b, none) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "nan.onnx")
    stand_in(StandIn())
    with pytest.raises(RuntimeError, match="nothing to compare: every output of .*nan.onnx is empty, infinite or NaN"):
        check(tmp_path / "nan.onnx")


def test_check_says_what_it_cannot_see(
    tmp_path: pathlib.Path, stand_in: Callable, capsys: pytest.CaptureFixture
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[n, 3] a, float[n, 2] b) => (float[n, 3] y, float[n, 2] z)
    { low = Constant <value = float {-9.0}> () high = Constant <value = float {-8.0}> () y = Clip (a, low, high) z = Add (b, b) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "dead.onnx")
    stand_in(StandIn(lambda a, y: torch.full_like(a, -8)))
    assert check(tmp_path / "dead.onnx")["constant_outputs"] == [1]
    assert "Output 1 is the same for every input" in capsys.readouterr().out


def test_convert_of_a_file_leaves_no_wrong_engine(
    two_inputs: pathlib.Path, stand_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build_engine(source: pathlib.Path, plan: pathlib.Path, ranges: dict, fp16: bool, fuse: bool) -> None:
        built.append(ranges)
        plan.write_bytes(b"an engine")

    monkeypatch.setattr(routes, "missing", lambda route: None)
    monkeypatch.setattr(builder, "build_engine", build_engine)
    plan = two_inputs.with_suffix(".plan")

    def convert(dynamic: dict, checkpoint: pathlib.Path | None = None) -> dict:
        return commands.convert(str(two_inputs), plan, [], dynamic, checkpoint, False, False, "auto", False)

    stand_in(StandIn(lambda a, y: y + 1))
    with pytest.raises(RuntimeError, match="the engine differs from"):
        convert({0: (1, 2, 4)})
    stand_in(StandIn())
    for arguments, message in (
        ([{}], r"axis 0 of input 'a' is dynamic in .*: give --dynamic 0=1:8:64"),
        ([{0: (1, 2, 4), 1: (3, 3, 3)}], "--dynamic names axis 1, but the dynamic axes of .*two.onnx are: 0"),
        ([{0: (1, 2, 4)}, two_inputs], "has its parameters and types already; --checkpoint and --half"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(*arguments)
    assert [path.name for path in two_inputs.parent.iterdir()] == ["two.onnx"]
    assert convert({0: (1, 2, 4)})["relative_difference"] == 0
    assert plan.read_bytes() == b"an engine" and built[-1] == {"a:0": (1, 2, 4), "b:0": (1, 2, 4)}


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize("route", ["torch2trt", "onnx"])
def test_every_verb_on_a_gpu(route: str, folder: pathlib.Path) -> None:
    reason = routes.missing(route)
    if reason is not None:
        pytest.skip(reason)

    def result(*arguments: str) -> dict:
        done = run(*arguments, "--json", folder=folder)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["result"]

    convert = ["convert", "network:adders", "x.plan", "--shape", "4x3x9x8", "--dynamic", "0=1:4:8", "--route", route]
    assert result(*convert)["route"] == route
    checked = result("check", "network:adders", "x.plan", "--samples", "1000")
    assert checked["relative_difference"] <= checked["allowed"] < 1e-2
    assert checked["agree"] >= 0.999 * checked["predictions"] > 0
    times = result("bench", "x.plan", "--shape", "8x3x9x8", "--cuda-graph")["milliseconds"]
    assert 0 < times["min"] <= times["p50"] <= times["p90"] <= times["p99"] <= times["max"]
    assert result("inspect", "x.plan")["adder_layers"] == 2
    failed = run("check", "network:others", "x.plan", "--json", folder=folder)  # other weights
    assert failed.returncode == 1 and json.loads(failed.stdout)["result"]["relative_difference"] > 1e-2


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_files_on_a_gpu(folder: pathlib.Path) -> None:
    """export and build in two steps, and convert from a .pt2 and from the .onnx file."""
    if routes.missing("onnx") is not None:
        pytest.skip(routes.missing("onnx"))
    model, x = network_from(folder).eval(), torch.randn(2, 3, 9, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "model.pt2")
    for arguments in (
        ["export", "network:adders", "x.onnx", "--shape", "2x3x9x8", "--dynamic", "0=batch", "--no-check"],
        ["build", "x.onnx", "x.plan", "--range", "batch=1:4:8", "--timing-cache", "t.cache", "--workspace", "256"],
        ["check", "network:adders", "x.plan"],
        ["convert", "x.onnx", "y.plan", "--dynamic", "0=1:4:8"],
        ["check", "network:adders", "y.plan"],
        ["convert", "model.pt2", "z.plan", "--dynamic", "0=1:4:8"],
        ["check", "network:adders", "z.plan"],
        ["triton", "repository", "z.plan"],
    ):
        done = run(*arguments, folder=folder)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
