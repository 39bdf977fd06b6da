"""Compares TensorRT engines with PyTorch through every route, torch2trt and ONNX, on 1,000 random inputs.

    python3 benchmarks/check_routes.py                 # on a machine with a GPU, TensorRT, torch2trt and onnx
    python3 benchmarks/check_routes.py --route onnx    # without torch2trt

Three networks in float32 with a dynamic batch, fed in batches of 64 and a last one of 40: AdderNetMnist, ResNet-20, and
torchvision's ResNet-18 with its convolutions turned into adder layers; parameters are random, BatchNorm has the
statistics of such inputs. An engine may differ from PyTorch by what rounding explains in that network
(rounding.rounding_bounds), and may choose another class only where two classes are closer than that. The exit code is 1
if it differs by more, or if a route fails.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable

if __name__ == "__main__":
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # TF32's ten bits in convolutions would hide what is compared here

import torch
from torch import Tensor, nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from torch2trt_adder import adderize, convert
from torch2trt_adder.conversion import routes
from torch2trt_adder.models import addernet_mnist, resnet20
from torch2trt_adder.numerics import comparison, rounding

SAMPLES, BATCH = 1000, 64
# A bound above this share of the largest output says too little: a wrong tap moves outputs by their own size.
SHARP = 1e-2


class Skipped(Exception):
    """A network that cannot be had here; the text says why."""


def resnet18() -> nn.Module:
    try:
        import torchvision
    except Exception as error:  # RuntimeError where it was built for another torch
        raise Skipped(f"torchvision cannot be imported ({type(error).__name__}: {error})") from error
    return adderize(torchvision.models.resnet18(num_classes=10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "AdderNetMnist": (addernet_mnist, (1, 28, 28)),
    "ResNet-20": (resnet20, (3, 32, 32)),
    "adderized ResNet-18": (resnet18, (3, 64, 64)),
}


@torch.no_grad()
def calibrated(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """`model` in eval mode, with BatchNorm's mean statistics of the batches."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches
    model.train()
    for x in batches:
        model(x)
    return model.eval()


@dataclasses.dataclass
class Comparison:
    """The largest values over all samples; classes agree, or are too close to call."""

    difference: float = 0.0
    bound: float = 0.0
    largest: float = 0.0
    equal: int = 0
    ties: int = 0
    samples: int = 0
    beyond: int = 0  # batches that differ by more than their bound, or are not finite

    @property
    def reason(self) -> str:
        """Why the engine is wrong; empty where it is right."""
        if self.bound > SHARP * self.largest:
            return f"the bound is too wide: {self.bound / self.largest:.1e} of the largest output"
        if self.beyond:
            return f"{self.beyond} batches differ by more than rounding explains"
        if self.equal + self.ties < self.samples:
            return f"{self.samples - self.equal - self.ties} predictions differ by more than rounding explains"
        return ""


@torch.no_grad()
def compare(engine: Callable[[Tensor], Tensor], expected: list[tuple[Tensor, Tensor, float]]) -> Comparison:
    """An engine on inputs, for each of which come PyTorch's outputs and their bound."""
    found = Comparison()
    for x, y0, bound in expected:
        y = engine(x)
        assert y.shape == y0.shape and y.dtype is y0.dtype, (y.shape, y.dtype)
        measured = comparison.measure(y, y0, bound)
        found.beyond += measured.beyond > 0 or measured.compared < measured.total
        found.difference = max(found.difference, measured.difference)
        found.bound, found.largest = max(found.bound, bound), max(found.largest, measured.largest)
        classes = y.argmax(1)
        equal = classes == y0.argmax(1)
        # Each of the two outputs may be off by the bound.
        gap = y0.amax(1) - y0.gather(1, classes[:, None])[:, 0]
        found.equal += int(equal.sum())
        found.ties += int((~equal & (gap <= 2 * bound)).sum())
        found.samples += len(x)
    return found


def prepared(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor, float]]]:
    """A network on the GPU, with inputs, outputs and bounds."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = calibrated(make().cuda(), [torch.randn(BATCH, *shape, device="cuda") for _ in range(4)])
    batches = torch.randn(SAMPLES, *shape, device="cuda").split(BATCH)
    with torch.no_grad():
        return model, [(x, model(x), rounding.rounding_bounds(model, [x]).item()) for x in batches]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [route for route in routes.ROUTES if route != "auto"]
    parser.add_argument("--route", nargs="+", choices=names, default=names, help="default: every route")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no NVIDIA GPU here, which TensorRT needs", file=sys.stderr)
        return 1
    import tensorrt

    print(f"TensorRT {tensorrt.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    failures, start = [], time.perf_counter()
    heading = (
        f"{'route':<11}{'network':<21}{'TensorRT':<10}{'relative difference':>20}{'allowed':>9}{'predictions':>14}"
    )
    print(heading, "ties  convert", flush=True)
    for name in NETWORKS:
        try:
            model, expected = prepared(name)
        except Skipped as reason:
            print(f"{'':<11}{name:<21}left out: {reason}", flush=True)
            continue
        for route in options.route:
            label = f"{route:<11}{name:<21}{tensorrt.__version__:<10}"
            began = time.perf_counter()
            try:
                engine = convert(model, [expected[0][0][:8]], route=route, max_batch_size=BATCH)
                seconds = time.perf_counter() - began
                found = compare(engine, expected)
            except Exception as error:  # whatever it is, the other rows are wanted as well
                traceback.print_exc()
                failures.append(f"{route}, {name}: {type(error).__name__}: {error}")
                print(f"{label}FAILED", flush=True)
                continue
            shares = f"{found.difference / found.largest:>20.2e}{found.bound / found.largest:>9.1e}"
            print(f"{label}{shares}{found.equal:>6} of {found.samples}{found.ties:>6}{seconds:>7.1f} s", flush=True)
            if found.reason:
                failures.append(f"{route}, {name}: {found.reason}")
    print(f"{'FAILED' if failures else 'PASSED'} in {time.perf_counter() - start:.0f} s")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
