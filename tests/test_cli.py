"""The command `torch2trt-adder`, run as users run it."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from torch2trt_adder import __version__, cli
from torch2trt_adder.models import addernet_mnist


def run(*arguments: str, folder: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    root = pathlib.Path(__file__).resolve().parents[1]
    # The package of this checkout or the installed one, whichever this process imported.
    path = pathlib.Path(cli.__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch2trt_adder", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))}
    return subprocess.run(command, cwd=folder or root, env=environment, capture_output=True, text=True, timeout=600)


def test_help_names_the_verbs() -> None:
    for result in (run("--help"), run()):
        assert result.returncode == 0
        assert all(text in result.stdout for text in ("demo", "info", "torch2trt(model, [x])", "exit codes"))


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["demo", "--epochs", "0"], ["demo", "--epochs", "many"], ["info", "--no"]]
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
    assert re.fullmatch(
        r"error: the checkpoint cannot be written to file/x\.pth \(.*\); name another file with --checkpoint\n",
        result.stderr,
    )
    assert result.stdout.splitlines()[-1] == "FAILED | torch2trt-adder demo --checkpoint file/x.pth"


def test_demo(tmp_path: pathlib.Path) -> None:
    result = run("demo", "--epochs", "2", "--checkpoint", "out/digits.pth", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "PASSED | torch2trt-adder demo --epochs 2 --checkpoint out/digits.pth"
    accuracy = float(re.search(r"Accuracy on the other 360 digits: ([\d.]+)%", result.stdout)[1])
    assert accuracy > 50  # two epochs; guessing gives 10
    assert (
        len(re.findall(r"^Layer conv\d on the CPU against the definition in float64", result.stdout, re.MULTILINE)) == 2
    )
    assert "44/44" in result.stderr  # the progress bar at its end
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["digits.pth"]
    addernet_mnist().load_state_dict(torch.load(tmp_path / "out" / "digits.pth", weights_only=True))
    if cli.converter.missing() is None:
        assert re.search(r"^TensorRT +\d+\.\d% +[\d.]+ ms +[\d.]+ ms$", result.stdout, re.MULTILINE)
    else:
        assert "With an NVIDIA GPU and TensorRT, the demo would go on to convert" in result.stdout
