"""The first command: `torch2trt-adder demo` as it is, what it leads to, and what a training that diverges leaves."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from torch2trt_adder import library, load_checkpoint
from torch2trt_adder.cli import demo, main
from torch2trt_adder.conversion import routes
from torch2trt_adder.models import addernet_mnist
from torch2trt_adder.nn import training

CHECKPOINT = "my digits.pth"  # the space must be quoted in what is printed


def shell(folder: pathlib.Path, command: str) -> subprocess.CompletedProcess[str]:
    """As typed in a shell whose current folder it is, with the package that this process imported."""
    packages = pathlib.Path(library.__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        command, check=False, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, subprocess.CompletedProcess[str]]:
    """The demo as users start it, with all its epochs; and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, shell(folder, f"{sys.executable} -m torch2trt_adder demo --checkpoint '{CHECKPOINT}' --json")


def test_accuracy_and_checkpoint(done: tuple[pathlib.Path, subprocess.CompletedProcess[str]]) -> None:
    folder, result = done
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)["result"]
    assert report["accuracy"] >= 0.97 and report["checkpoint"] == CHECKPOINT
    shown = result.stderr
    assert f"\nPASSED | torch2trt-adder demo --checkpoint '{CHECKPOINT}' --json\n" in shown
    (accuracy,) = re.findall(r"Accuracy on the other 360 digits: ([\d.]+)%", shown)
    assert round(100 * report["accuracy"], 1) == float(accuracy)
    assert len(re.findall(r"^Layer conv\d on the CPU against the definition in float64", shown, re.MULTILINE)) == 2
    assert re.search(r"\b(\d+)/\1\b", shown)  # the progress at its end
    if routes.missing() is None:
        assert re.search(r"^TensorRT +\d+\.\d% +[\d.]+ ms +[\d.]+ ms$", shown, re.MULTILINE)
        assert report["engine"]["TensorRT"]["milliseconds"]["1"] > 0
    else:
        assert "With an NVIDIA GPU and TensorRT" in shown and report["engine"] is None
    assert [path.name for path in folder.iterdir() if path.suffix not in (".onnx", ".plan")] == [CHECKPOINT]
    images, labels = demo._digits()
    model = load_checkpoint(addernet_mnist(), folder / CHECKPOINT).eval()
    assert demo._accuracy(model, images[:360], labels[:360]) == pytest.approx(report["accuracy"], abs=2 / 360)


def test_the_next_commands_work_as_printed(done: tuple[pathlib.Path, subprocess.CompletedProcess[str]]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"the first of the next commands installs {package}")
    folder, result = done
    commands = json.loads(result.stdout)["result"]["next"]
    lines = result.stderr.split("Next, with the network in that checkpoint:\n", 1)[1].splitlines()
    assert [line.strip() for line in lines[: len(commands)]] == commands
    verbs = [command.split(" -m torch2trt_adder ", 1)[1].split()[0] for command in commands]
    engine = ["convert", "check", "bench"] if routes.missing() is None else []
    assert verbs == ["export", *engine]
    for command in commands:
        ran = shell(folder, command)
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
    assert (folder / "my digits.onnx").exists()


def test_the_next_commands_never_overwrite_the_checkpoint() -> None:
    for name in ("net.onnx", "net.plan", "a.b/net", "net"):
        files = {word for command in demo._next_commands(pathlib.Path(name), True) for word in command.split()}
        assert name in files and any(word.endswith(".onnx") for word in files - {name})
        assert sum(command.split().count(name) for command in demo._next_commands(pathlib.Path(name), True)) == 3


def test_the_next_commands_start_as_this_one_was(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README starts it in a virtual environment that is not on the PATH."""
    program = tmp_path / "a venv" / "torch2trt-adder"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "demo"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert demo._program() == f"'{program}'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert demo._program() == "torch2trt-adder"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "__main__.py"), "demo"])
    assert demo._program() == f"{sys.executable} -m torch2trt_adder"


# ---- a training that diverges


@pytest.fixture
def precious(tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkpoint of an earlier run, where the demo would write its own."""
    file = tmp_path / "digits.pth"
    file.write_bytes(b"an earlier checkpoint")
    return file


def test_a_loss_that_is_not_finite_is_the_reason_and_ends_it(
    precious: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_LEARNING_RATE", 1e9)
    assert main(["demo", "--epochs", "1", "--checkpoint", str(precious)]) == 1
    shown = capsys.readouterr()
    assert "error: the loss became " in shown.err
    assert "in epoch 1, batch " in shown.err and "training diverged; lower the learning rate." in shown.err
    assert "Accuracy" not in shown.out and "Layer" not in shown.out + shown.err
    assert precious.read_bytes() == b"an earlier checkpoint" and list(precious.parent.iterdir()) == [precious]


def test_a_last_step_that_diverges_ends_it_as_well(
    precious: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No loss shows what the last step did."""

    def train(model: nn.Module, *_: object) -> None:
        nn.init.constant_(model.fc2.bias[3:], torch.nan)

    monkeypatch.setattr(demo, "_train", train)
    assert main(["demo", "--checkpoint", str(precious)]) == 1
    assert "error: parameter fc2.bias is not finite (7 of 10 values): training diverged" in capsys.readouterr().err
    assert precious.read_bytes() == b"an earlier checkpoint"


def test_the_loss_never_rises_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does, rounding decides whether the training comes back: its start is ln 10, about 2.3."""
    images, labels = demo._digits()
    seen: list[float] = []

    def check_loss(loss: torch.Tensor, epoch: int, batch: int) -> float:
        seen.append(float(loss))
        return seen[-1]

    monkeypatch.setattr(training, "check_loss", check_loss)
    for seed in range(3):
        torch.manual_seed(seed)
        demo._train(addernet_mnist(), images[:1024], labels[:1024], 1)
    assert len(seen) == 3 * 16 and max(seen) < 2.6


@pytest.mark.parametrize("seed", ["-1", str(2**63), "x"])
def test_a_seed_that_cannot_be(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--seed", seed])
    assert ended.value.code == 2 and "argument --seed" in capsys.readouterr().err


# ---- the guards, for any training loop


@pytest.mark.parametrize("loss, name", [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")])
def test_check_loss(loss: float, name: str) -> None:
    assert training.check_loss(torch.tensor(1.5), 1, 1) == 1.5 and training.check_loss(0.25, 1, 1) == 0.25
    for value in (loss, torch.tensor([loss], dtype=torch.bfloat16)):
        with pytest.raises(training.DivergedError, match=f"^the loss became {name} in epoch 2, batch 17: training div"):
            training.check_loss(value, 2, 17)


def test_check_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor([-torch.inf, 0.0]))
    training.check_parameters(model)
    model[1].running_var[0] = torch.nan
    with pytest.raises(training.DivergedError, match=r"^buffer 1\.running_var is not finite \(1 of 2 values\)"):
        training.check_parameters(model)
    nn.init.constant_(model[0].weight, torch.inf)
    with pytest.raises(training.DivergedError, match=r"^parameter 0\.weight is not finite \(6 of 6 values\)"):
        training.check_parameters(model)
