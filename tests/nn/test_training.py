"""Training: where the adaptive scaling is applied, mixed precision, several processes, accuracy, the example."""

import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import warm_up
from processes import ROOT, run
from torch import Tensor, nn

from torch2trt_adder import Adder2d, scale_gradients, set_eta
from torch2trt_adder.models import addernet_mnist, cnn_twin

EXAMPLE = ROOT / "examples" / "train_cifar.py"


class Net(nn.Module):
    """Two adder layers without BatchNorm, so that a batch may be cut in pieces."""

    def __init__(self, eta: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = Adder2d(1, 8, 3, eta=eta)
        self.conv2 = Adder2d(8, 8, 3, padding=1, bias=True, eta=eta)
        self.fc = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x) / 9 + 1.1)
        return self.fc(F.relu(self.conv2(x) / 72 + 1.1).flatten(1))


def batch(device: torch.device | str = "cpu", size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 1, 8, 8, generator=generator)
    return x.to(device), torch.randint(0, 4, (size,), generator=generator).to(device)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def assert_same(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-5) -> None:
    names = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, names[name], rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def train_plainly(model: nn.Module, device: torch.device | str = "cpu", steps: int = 4) -> nn.Module:
    """Whole batches, scaling inside backward(): the published code's way."""
    set_eta(model.to(device), 0.2)
    optimizer, (x, labels) = sgd(model), batch(device)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model


# ---- scaling just before the step


def test_scaling_before_the_step_equals_scaling_in_backward():
    model, (x, labels) = Net(), batch()
    optimizer = sgd(model)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        scale_gradients(model)
        optimizer.step()
    assert_same(model, train_plainly(Net()), rtol=1e-6)


def test_grad_scaler(device):
    """GradScaler multiplies the loss and divides the gradients, here by 65536; the weights must not notice."""
    model, (x, labels) = Net().to(device), batch(device)
    optimizer, scaler = sgd(model), torch.amp.GradScaler(device.type, init_scale=2.0**16)
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), labels)).backward()
        scaler.unscale_(optimizer)
        scale_gradients(model)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**16  # no step was skipped
    assert_same(model, train_plainly(Net(), device))


def test_grad_scaler_undoes_the_scaling_in_backward():
    """Why scale_gradients exists: the norm that backward() sets does not depend on the loss scale."""
    model, (x, labels) = Net(eta=0.2), batch()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(F.cross_entropy(model(x), labels)).backward()
    scaler.unscale_(optimizer)
    adder = model.conv1.adder
    assert math.isclose(adder.grad.norm(), 0.2 * math.sqrt(adder.numel()) / 2**16, rel_tol=1e-5)


def test_grad_scaler_skips_a_step_that_overflows():
    model, (x, labels) = Net(), batch()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(F.cross_entropy(model(x), labels) * 1e38).backward()
    scaler.unscale_(optimizer)
    scale_gradients(model)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_gradient_accumulation():
    model, (x, labels) = Net(), batch()
    optimizer = sgd(model)
    for _ in range(4):
        optimizer.zero_grad()
        for part in range(4):
            (F.cross_entropy(model(x[part::4]), labels[part::4]) / 4).backward()
        scale_gradients(model)
        optimizer.step()
    assert_same(model, train_plainly(Net()), rtol=1e-4)


def test_as_a_hook_of_the_optimizer():
    model, (x, labels) = Net(), batch()
    optimizer = sgd(model)
    optimizer.register_step_pre_hook(lambda *_: scale_gradients(model))
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    assert_same(model, train_plainly(Net()), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(device, dtype):
    """Mixed precision with a GradScaler trains, and gives every adder gradient the norm of the rule."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(Adder2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Adder2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 36, 4)),
    ).to(device)
    set_eta(model, None)
    x, labels = batch(device)
    optimizer, scaler = sgd(model), torch.amp.GradScaler(device.type, init_scale=2.0**10)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            assert model[0](x).dtype is dtype
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scale_gradients(model)
        for layer in (model[0], model[3]):
            assert layer.adder.grad.dtype is torch.float32
            assert math.isclose(layer.adder.grad.norm(), 0.2 * math.sqrt(layer.adder.numel()), rel_tol=1e-4)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---- several processes


def _ddp_worker(rank: int, backend: str, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(_train_half(rank, device), f"{folder}/{rank}.pt")
    # In this order, and with nothing left that holds the group: its threads must end before the process does.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _train_half(rank: int, device: torch.device) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(Net().to(device))
    optimizer, (x, labels) = sgd(model), batch(device)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rank::2]), labels[rank::2]).backward()
        scale_gradients(model)
        optimizer.step()
    return model.module.cpu().state_dict()


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def test_distributed_data_parallel(backend, tmp_path):
    """Half a batch on each of two processes gives the weights that the whole batch gives on one."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, and there is {torch.cuda.device_count()}")
    if not torch.distributed.is_available() or not getattr(torch.distributed, f"is_{backend}_available")():
        pytest.skip(f"this torch has no {backend}")
    torch.multiprocessing.spawn(_ddp_worker, (backend, str(tmp_path)), nprocs=2)
    expected = train_plainly(Net(), "cuda:0" if backend == "nccl" else "cpu").cpu()
    for rank in (0, 1):
        model = Net()
        model.load_state_dict(torch.load(tmp_path / f"{rank}.pt", weights_only=True))
        assert_same(model, expected, rtol=1e-4)


# ---- the twin and the accuracy


@pytest.mark.gpu
def test_step_in_a_cuda_graph():
    """A captured step, replayed, leaves the parameters that the same steps launched one by one leave."""

    def trained(steps: int, captured: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layers = Adder2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Adder2d(16, 10, 3, padding=1)
        model = nn.Sequential(*layers).cuda().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x = torch.randn(32, 8, 16, 16, device="cuda").to(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (32,), device="cuda")

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x).mean((2, 3)), labels).backward()
            optimizer.step()

        warm_up(step)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for _ in range(steps):
            step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    start, expected, replayed = trained(0, False), trained(4, False), trained(4, True)
    assert not any(torch.equal(a, b) for a, b in zip(start, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))


def test_cnn_twin():
    model = addernet_mnist().double()
    twin = cnn_twin(model)
    assert [type(layer) for layer in (twin.conv1, twin.conv2)] == [nn.Conv2d, nn.Conv2d]
    assert twin.conv2.weight.shape == model.conv2.adder.shape and twin.conv2.weight.dtype is torch.float64
    assert isinstance(model.conv1, Adder2d) and twin.fc1.weight is not model.fc1.weight
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    assert twin(x).shape == model(x).shape
    layer = cnn_twin(Adder2d(4, 6, (3, 2), (2, 1), (1, 0), True, (1, 2), 2))
    assert (layer.stride, layer.padding, layer.dilation, layer.groups) == ((2, 1), (1, 0), (1, 2), 2)
    assert layer.bias is not None


@pytest.fixture
def run_example(capsys: pytest.CaptureFixture) -> Iterator[Callable[..., str]]:
    """Runs the example in this process, on one thread; returns what it printed, or with error=True why it ended."""
    spec = importlib.util.spec_from_file_location("train_cifar", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def run(*arguments: str, error: bool = False) -> str:
        capsys.readouterr()
        if not error:
            example.main([*arguments, "--device", "cpu"])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            example.main([*arguments, "--device", "cpu"])
        assert ended.value.code not in (None, 0)
        return capsys.readouterr().err + str(ended.value.code)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one waits for the first wherever cores are shared with other work
    yield run
    torch.set_num_threads(threads)


def test_accuracy_within_a_point_of_the_twin(run_example, tmp_path):
    """AdderNetMnist and its CNN twin, same recipe, on scikit-learn's digits: mean test accuracy of the last epochs."""
    accuracy = {}
    for layers in ("adder", "conv"):
        run_example(
            *("--data", "digits", "--model", "addernet_mnist", "--layers", layers, "--epochs", "10"),
            *("--output", str(tmp_path / layers)),
        )
        history = json.loads((tmp_path / layers / "history.json").read_text())
        accuracy[layers] = sum(entry["test_accuracy"] for entry in history[-3:]) / 3
    assert accuracy["conv"] > 0.95
    assert accuracy["adder"] >= accuracy["conv"] - 0.01, accuracy


# ---- examples/train_cifar.py

TINY = ("--data", "digits", "--model", "addernet_mnist", "--samples", "64", "--batch", "16", "--epochs", "3")


def load(folder: pathlib.Path) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.mark.parametrize("options", [(), ("--amp", "bfloat16", "--accumulate", "2", "--channels-last")])
def test_example_resumes_exactly(run_example, options, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_example(*TINY, *options, "--output", str(whole))
    output = run_example(*TINY, *options, "--output", str(parts), "--stop-after", "1")
    assert "Stopped after 1 epochs; --resume goes on." in output and len(load(parts)["history"]) == 1
    output = run_example(*TINY, *options, "--output", str(parts), "--resume")
    assert "epochs 2 to 3" in output and "Best test accuracy" in output
    expected, resumed = load(whole), load(parts)
    for name, tensor in expected["model"].items():
        assert torch.equal(resumed["model"][name], tensor), name
    for mine, theirs in zip(resumed["history"], expected["history"], strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    names = {"last.pt", "best.pt", "history.json"}
    assert names <= {path.name for path in parts.iterdir()} <= names | {"history.png"}
    model = addernet_mnist()
    model.load_state_dict(torch.load(parts / "best.pt", weights_only=True))


def test_example_as_a_program(tmp_path):
    """ResNet-20 in mixed precision, started as a user starts it."""
    arguments = ["--data", "digits", "--samples", "64", "--batch", "32", "--epochs", "1", "--amp", "float16"]
    command = [sys.executable, str(EXAMPLE), *arguments, "--device", "cpu", "--output", str(tmp_path)]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert "resnet20 (adder) on digits: 64 training and 360 test images" in result.stdout


def test_example_plot(run_example, tmp_path):
    pytest.importorskip("matplotlib")
    run_example(*TINY, "--output", str(tmp_path))
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_example_diverges(run_example, tmp_path):
    """What the first epoch wrote stays as it was; the reason comes with the epoch and the batch."""
    run_example(*TINY, "--output", str(tmp_path), "--stop-after", "1")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    state = load(tmp_path)
    state["model"]["fc1.weight"][0, 0] = torch.inf  # as a step that went too far leaves it
    torch.save(state, tmp_path / "last.pt")
    before[tmp_path / "last.pt"] = (tmp_path / "last.pt").read_bytes()
    message = run_example(*TINY, "--output", str(tmp_path), "--resume", error=True)
    assert (
        "train_cifar: the loss became NaN in epoch 2, batch 1: training diverged; lower the learning rate. " in message
    )
    assert (
        f"Begin again with a lower --lr, in another --output; {tmp_path}/last.pt is still that of epoch 1." in message
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_example_diverges_in_its_first_epoch(run_example, tmp_path):
    message = run_example(*TINY, "--output", str(tmp_path), "--lr", "1e9", error=True)
    assert "in epoch 1, batch " in message and "with a lower --lr, in another --output." in message
    assert list(tmp_path.iterdir()) == []


def test_example_last_step_diverges(run_example, tmp_path):
    """One step an epoch: no loss of the epoch shows what it did."""
    arguments = ("--samples", "16", "--batch", "16", "--output", str(tmp_path))
    message = run_example(*TINY, *arguments, "--lr", "3e38", "--eta", "100", error=True)
    assert "is not finite" in message and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", r"last\.pt is empty; copy"),
        ({"epoch": 3}, r"last\.pt was not written by this program; give another --output"),
    ],
)
def test_example_resumes_from_a_bad_file(run_example, tmp_path, content, reason):
    last = tmp_path / "last.pt"
    last.write_bytes(content) if isinstance(content, bytes) else torch.save(content, last)
    assert re.search(reason, run_example(*TINY, "--output", str(tmp_path), "--resume", error=True))


def test_example_errors(run_example, tmp_path):
    run = functools.partial(run_example, *TINY, "--output", str(tmp_path), error=True)
    assert f"there is no {tmp_path}/last.pt to resume from; leave --resume away" in run("--resume")
    assert "64 images are less than one step of 9 batches of 16" in run("--accumulate", "9")
    run_example(*TINY, "--output", str(tmp_path), "--stop-after", "1")
    assert "last.pt is there already; --resume goes on from it" in run()
    assert "this run began with --lr 0.1, and cannot go on with 0.5" in run("--resume", "--lr", "0.5")
    assert "must be 1 or more, got 0" in run("--epochs", "0")
    assert "must be finite and not below 0, got nan" in run("--lr", "nan")
    (tmp_path / "file").touch()
    assert "cannot be made" in run_example(*TINY, "--output", str(tmp_path / "file"), error=True)
