"""`torch2trt-adder demo`: trains a small AdderNet on handwritten digits, checks it, and converts it if it can."""

import importlib.util
import io
import os
import pathlib
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..conversion import converter, routes
from ..models import addernet_mnist
from ..nn import training
from ..nn.adder2d import Adder2d
from ..numerics import tolerance
from ..trt import inspection
from ..utils import files
from ..utils.progress import elapsed

_BATCH = 64
_TEST_IMAGES = 360  # a fifth of the 1,797 digits

# Half the paper's rate. The linear layers set the limit, whose 800 inputs have about unit variance: at 0.1 the loss rises
# in the first steps, at 0.2 to up to 2.5 times its start, and there rounding decides whether it comes back.
_LEARNING_RATE = 0.05


def run(epochs: int, checkpoint: pathlib.Path, seed: int = 0) -> dict[str, Any]:
    """Trains, shows the accuracy, writes the checkpoint, checks the layers, and with a GPU and TensorRT the engine.

    Args:
        epochs: passes over the training digits.
        checkpoint: the file to write; one that exists is only replaced after a training that did not diverge.
        seed: of the first parameters and of the order of the digits.

    Returns:
        What it shows.

    Raises:
        RuntimeError: the training diverged (training.DivergedError), or a layer or the engine computes something else
            than it should.
        OSError: the checkpoint cannot be written.
    """
    complaint = "the checkpoint cannot be written to {path} ({reason}); name another file with --checkpoint"
    files.check_writable(checkpoint, complaint)  # now: nobody wants to hear of it after the training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    images, labels = _digits()
    test_images, test_labels = images[:_TEST_IMAGES], labels[:_TEST_IMAGES]
    model = addernet_mnist()
    print(f"Training {type(model).__name__} on {len(images) - _TEST_IMAGES} handwritten digits, on {_name(device)}.")
    _train(model.to(device), images[_TEST_IMAGES:].to(device), labels[_TEST_IMAGES:].to(device), epochs)
    model.cpu().eval()
    training.check_parameters(model)
    accuracy = _accuracy(model, test_images, test_labels)
    print(f"Accuracy on the other {_TEST_IMAGES} digits: {accuracy:.1%}.")
    _save(model, checkpoint)
    print(f"Checkpoint: {checkpoint}.")
    result: dict[str, Any] = {"accuracy": accuracy, "checkpoint": str(checkpoint), "engine": None}
    for name, error, bound in _layer_errors(model, test_images[:16]):
        print(
            f"Layer {name} on the CPU against the definition in float64: largest relative error {error:.1e}, allowed "
            f"{bound:.1e}."
        )
        if not error <= bound:
            raise RuntimeError(
                f"layer {name} differs from the definition by {error:.1e}, more than rounding explains ({bound:.1e})"
            )
    reason = routes.missing()
    if reason is None:
        result["engine"] = _compare_with_engine(model.cuda(), test_images.cuda(), test_labels.cuda())
    else:
        print(
            "With an NVIDIA GPU and TensorRT, the demo would go on to convert this network to a TensorRT "
            f"engine and compare its accuracy and latency with PyTorch's. {reason}"
        )
    result["next"] = _next_commands(checkpoint, engine=reason is None)
    print("\n    ".join(["Next, with the network in that checkpoint:", *result["next"]]))
    return result


def _next_commands(checkpoint: pathlib.Path, engine: bool) -> list[str]:
    """What to type next in the same shell and folder; with `engine` where this machine can build TensorRT engines."""
    program = _program()
    network = "torch2trt_adder.models:addernet_mnist"
    weights = f"--checkpoint {shlex.quote(str(checkpoint))}"
    stem = checkpoint if checkpoint.suffix in (".onnx", ".plan") else checkpoint.with_suffix("")  # never the same file
    onnx, plan = (shlex.quote(f"{stem}{suffix}") for suffix in (".onnx", ".plan"))
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    commands = [f"{shlex.quote(sys.executable)} -m pip install {' '.join(absent)}"] if absent else []
    commands.append(f"{program} export {network} {onnx} {weights} --shape 1x1x28x28 --dynamic 0=batch")
    if engine:
        commands += [
            f"{program} convert {network} {plan} {weights} --shape 1x1x28x28 --dynamic 0=1:8:{_BATCH}",
            f"{program} check {network} {plan} {weights}",
            f"{program} bench {plan}",
        ]
    return commands


def _program() -> str:
    """The words by which this shell starts the command line: as it was started just now."""
    typed = pathlib.Path(sys.argv[0])
    if typed.name == "torch2trt-adder":
        found = shutil.which(typed.name)
        return typed.name if found is not None and os.path.samefile(found, typed) else shlex.quote(str(typed))
    return f"{shlex.quote(sys.executable)} -m torch2trt_adder"


def _digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8x8 digits as [1797, 1, 28, 28] images of mean 0 and variance 1, and their labels, shuffled."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None], size=(28, 28), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ((images - images.mean()) / images.std())[order], torch.tensor(digits.target)[order]


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """SGD with momentum and a cosine schedule, as published, on images that are moved a little.

    The adder layers' gradients carry a learning rate of their own, so one rate serves all layers.

    Raises:
        training.DivergedError: with the epoch and batch whose loss is not finite.
    """
    steps = len(images) // _BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    model.train()
    with elapsed("Training", epochs * steps, "batches") as progress:
        for epoch in range(epochs):
            order = torch.randperm(len(images)).to(images.device)
            for number, batch in enumerate(order[: steps * _BATCH].split(_BATCH), 1):
                loss = F.cross_entropy(model(_moved(images[batch])), labels[batch])
                value = training.check_loss(loss.detach(), epoch + 1, number)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.step(f"epoch {epoch + 1}/{epochs}, loss {value:.3f}")


def _moved(images: Tensor) -> Tensor:
    """Each of the images [N, 1, H, W] moved by up to two pixels, around the edge."""
    N, _, H, W = images.shape
    down, right = torch.randint(-2, 3, (2, N, 1)).to(images.device)
    rows = (torch.arange(H, device=images.device) + down) % H  # [N, H]
    columns = (torch.arange(W, device=images.device) + right) % W
    return images[torch.arange(N, device=images.device)[:, None, None], 0, rows[:, :, None], columns[:, None]][:, None]


@torch.no_grad()
def _predictions(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch).argmax(1) for batch in images.split(_BATCH)])


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (_predictions(model, images) == labels).float().mean().item()


def _save(model: nn.Module, path: pathlib.Path) -> None:
    data = io.BytesIO()
    torch.save(model.state_dict(), data)
    files.write(path, data.getvalue())


@torch.no_grad()
def _layer_errors(model: nn.Module, images: Tensor) -> list[tuple[str, float, float]]:
    """For each adder layer: name, largest relative error against float64, and the largest that rounding explains."""
    errors = []

    def compare(name: str) -> Callable[[Adder2d, tuple[Tensor], Tensor], None]:
        def hook(layer: Adder2d, inputs: tuple[Tensor], output: Tensor) -> None:
            exact = reference.adder2d(
                inputs[0].double(),
                layer.adder.double(),
                None,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
            )
            bound = tolerance.relative_error(layer.adder[0].numel(), output.dtype)  # all terms have one sign
            errors.append((name, ((output - exact) / exact).abs().max().item(), bound))

        return hook

    handles = [
        layer.register_forward_hook(compare(name))
        for name, layer in model.named_modules()
        if isinstance(layer, Adder2d)
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return errors


def _compare_with_engine(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    print(f"Converting to a TensorRT engine for batches of 1 to {_BATCH}.")
    engine = converter.convert(model, [images[:_BATCH]], max_batch_size=_BATCH)
    agree = int((_predictions(model, images) == _predictions(engine, images)).sum())
    print(f"{'':<10}{'accuracy':>10}{'batch 1':>12}{f'batch {_BATCH}':>12}   (latency, median of 100 runs)")
    result: dict[str, Any] = {"agree": agree, "predictions": len(images)}
    for name, network in (("PyTorch", model), ("TensorRT", engine)):
        one, many = (_latency(network, images[:batch]) for batch in (1, _BATCH))
        accuracy = _accuracy(network, images, labels)
        result[name] = {"accuracy": accuracy, "milliseconds": {"1": one, str(_BATCH): many}}
        print(f"{name:<10}{accuracy:>10.1%}{one:>9.3f} ms{many:>9.3f} ms")
    print(f"Predictions agree on {agree} of {len(images)} digits.")
    return result


def _latency(network: nn.Module, images: Tensor) -> float:
    """Milliseconds on the GPU, median of 100 runs after 25 others."""
    return statistics.median(inspection.latencies(network, [images], runs=100))


def _name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU ({torch.get_num_threads()} threads)"
    )
