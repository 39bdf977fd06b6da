"""Times TensorRT engines of AdderNets: fused and not, float32 and float16, beside the same network with convolutions.

    python3 benchmarks/bench_engine.py --json engines.json --plot engines.png
    python3 benchmarks/bench_engine.py --networks resnet20 --batches 1 32 256     # needs a GPU, TensorRT and onnx
    python3 benchmarks/bench_engine.py --route torch2trt                          # or torch2trt

Each engine is built for one batch, and compared with PyTorch before it is timed: an engine that differs by more than
rounding explains is an error. Milliseconds: "call" is one call from Python between CUDA events, "graph" one among several
in a replayed CUDA graph (medians; 10th and 90th percentiles in the JSON), "adders" and "others" what TensorRT's profiler
says of the adder layers and of all other layers, whose sum is more than "graph", since each layer waits for the one before;
"layers" counts adder and other layers (constants left out), and of these the copies between formats or types. "fused" engines
let adder layers compute the BatchNorm, residual sum and ReLU that follow them. conv is the network with convolutions, on
TensorRT's own kernels. The last rows are PyTorch without TensorRT: the network, and what fuse() makes of it.
Networks have random weights and BatchNorm statistics of random inputs. TF32 is as TensorRT and PyTorch have it by default;
NVIDIA_TF32_OVERRIDE=0 turns it off. Engines that are not begun within --limit seconds are named and left out. The exit code
is 1 if a result was wrong or a call failed.
"""

import argparse
import copy
import functools
import gc
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import bench_ops
import torch
from check_routes import calibrated
from timing import GpuTimer, Spread
from torch import Tensor, nn

from torch2trt_adder import convert, fuse
from torch2trt_adder.export.exporter import export_onnx
from torch2trt_adder.models import addernet_mnist, cnn_twin, resnet20, resnet50
from torch2trt_adder.numerics.rounding import rounding_bounds
from torch2trt_adder.trt import inspection
from torch2trt_adder.trt.builder import build_engine
from torch2trt_adder.trt.engine import Engine

Row = dict[str, Any]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "mnist": (addernet_mnist, (1, 28, 28)),
    "resnet20": (resnet20, (3, 32, 32)),
    "resnet50": (resnet50, (3, 224, 224)),
}
# In the order of what they tell, as far as the time goes.
USUAL = [("resnet20", 256), ("resnet50", 32), ("mnist", 1), ("resnet20", 1)]
KINDS = ["fused", "unfused", "conv"]
CALLS = 5  # in one CUDA graph


# ---- networks and engines


class Network:
    """One network on the GPU, with an input, what PyTorch computes of it, and how far an engine may be from that."""

    def __init__(self, name: str, batch: int, conv: bool) -> None:
        make, size = NETWORKS[name]
        torch.manual_seed(0)
        model = make()
        model = (cnn_twin(model) if conv else model).cuda()
        self.name, self.batch = name, batch
        examples = min(batch, 32) if name == "resnet50" else 64
        self.model = calibrated(model, [torch.randn(examples, *size, device="cuda") for _ in range(2)])
        self.x = torch.randn(batch, *size, device="cuda")
        self.file: pathlib.Path | None = None
        with torch.no_grad():
            self.expected = self.model(self.x)
        self.bounds: dict[bool, float] = {}

    def bound(self, fp16: bool) -> float:
        if fp16 not in self.bounds:
            self.bounds[fp16] = rounding_bounds(self.model, [self.x], fp16).item()
        return self.bounds[fp16]


def build(network: Network, fp16: bool, fused: bool, route: str, folder: pathlib.Path) -> Engine:
    if route == "torch2trt":
        module = convert(network.model, [network.x], route=route, fp16_mode=fp16, fuse=fused)
        return Engine(bytes(module.engine.serialize()))
    if network.file is None:
        path = folder / f"{network.name}-{network.batch}-{type(network.model).__name__}.onnx"
        network.file = export_onnx(network.model, [network.x], path, check=False)
    plan = build_engine(
        network.file,
        folder / "engine.plan",
        fp16=fp16,
        fuse=fused,
        timing_cache=folder / "timing.cache",
        progress=False,
    )
    return Engine(plan)


@torch.no_grad()
def compare(row: Row, y: Tensor, expected: Tensor, bound: float) -> None:
    """Adds the largest difference to the row; raises AssertionError where rounding does not explain it."""
    assert y.shape == expected.shape, f"shape {list(y.shape)} instead of {list(expected.shape)}"
    difference = (y.double() - expected.double()).abs().max().item()
    largest = expected.abs().max().item()
    row |= {"difference": difference / largest, "allowed": bound / largest}
    assert difference <= bound, (
        f"it differs from PyTorch by {difference:.3g}, beyond {bound:.3g} (largest {largest:.3g})"
    )


def measure(row: Row, call: Callable[[], object], timer: GpuTimer) -> None:
    """Adds the times of one call, alone and in a CUDA graph."""
    times = inspection.latencies(call, [], runs=max(20, min(200, int(500 / max(row["estimate_ms"], 0.1)))))
    row["call"] = bench_ops.as_json(Spread.of(times))
    row["graph"] = bench_ops.as_json(timer.replay(call, CALLS))


def measure_engine(network: Network, kind: str, fp16: bool, route: str, folder: pathlib.Path, timer: GpuTimer) -> Row:
    row: Row = {"network": network.name, "batch": network.batch, "kind": kind, "dtype": "fp16" if fp16 else "fp32"}
    start = time.perf_counter()
    engine = build(network, fp16, kind == "fused", route, folder)
    row["build_s"] = time.perf_counter() - start
    compare(row, engine(network.x), network.expected, network.bound(fp16))
    row["estimate_ms"] = estimate(lambda: engine(network.x))
    measure(row, lambda: engine(network.x), timer)
    layers = [layer for layer in inspection.layers(engine) if layer["type"] != "Constant"]
    profile = inspection.profile(engine, [network.x], runs=max(3, min(20, int(200 / max(row["estimate_ms"], 0.1)))))
    names = {layer["name"] for layer in layers if layer["adder"]}
    row["adders_ms"] = sum(ms for name, ms in profile.items() if name in names)
    row["others_ms"] = sum(ms for name, ms in profile.items() if name not in names)
    row["adder_layers"], row["other_layers"] = len(names), len(layers) - sum(layer["adder"] for layer in layers)
    row["copies"] = sum(not la["adder"] and "reformat" in f"{la['type']} {la['name']}".lower() for la in layers)
    row["layers"] = [la | {"ms": profile.get(la["name"])} for la in layers]
    return row


def estimate(call: Callable[[], object]) -> float:
    """Milliseconds of a call, roughly."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / 3


@torch.no_grad()
def measure_eager(network: Network, timer: GpuTimer) -> list[Row]:
    """PyTorch without TensorRT. float16 sums of the network that is not fused pass 65504: only its times mean something."""
    rows = []
    for fp16 in (False, True):
        for fused in (True, False):
            model, x = fuse(network.model) if fused else copy.deepcopy(network.model), network.x
            row: Row = {"network": network.name, "batch": network.batch, "dtype": "fp16" if fp16 else "fp32"}
            row["kind"] = f"{'fused' if fused else 'unfused'}, eager"
            if fp16:
                model, x = model.half(), x.half()
            if fused:
                wide = copy.deepcopy(model).float() if fp16 else network.model  # the parameters as they were rounded
                compare(row, model(x).float(), wide(x.float()), rounding_bounds(wide, [x.float()], fp16).item())
            row["estimate_ms"] = estimate(functools.partial(model, x))
            measure(row, functools.partial(model, x), timer)
            rows.append(row)
    return rows


# ---- the whole run


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.perf_counter()
        import tensorrt

        facts = {
            "tensorrt": tensorrt.__version__,
            "route": args.route,
            "tf32": os.environ.get("NVIDIA_TF32_OVERRIDE", "on"),
        }
        self.result: Row = {"environment": bench_ops.environment(True) | facts, "engines": [], "eager": []}
        self.errors: list[str] = []
        self.left_out: list[str] = []
        self.timer = GpuTimer(args.seconds)

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def fail(self, what: str, error: Exception) -> None:
        self.errors.append(f"{what}: {type(error).__name__}: {error}")
        print(f"FAILED {self.errors[-1]}", file=sys.stderr, flush=True)

    def engines(self, folder: pathlib.Path) -> None:
        largest = max((batch for name, batch in self.args.cells if name == "resnet20"), default=None)
        for conv in (False, True):  # convolutions come last: their builds take longest, and are known
            kinds = [kind for kind in self.args.kinds if (kind == "conv") == conv]
            for name, batch in self.args.cells if kinds else ():
                network = self.cell(name, batch, kinds, folder)
                if network is not None and not conv and (name, batch) == ("resnet20", largest):
                    self.eager(network)
                del network
                gc.collect()
                torch.cuda.empty_cache()

    def cell(self, name: str, batch: int, kinds: list[str], folder: pathlib.Path) -> Network | None:
        """The engines of one network and batch, as far as the time goes; the network, where there is one."""
        network = None
        for dtype in self.args.dtypes:
            for kind in kinds:
                what = f"{name} b{batch} {dtype} {kind}"
                if self.seconds() > self.args.limit:
                    self.left_out.append(what)
                    continue
                try:
                    network = network or Network(name, batch, kind == "conv")
                    row = measure_engine(network, kind, dtype == "fp16", self.args.route, folder, self.timer)
                except Exception as error:  # the other rows are wanted, too
                    self.fail(what, error)
                    continue
                self.result["engines"].append(row)
                print(line(row), flush=True)
        return network

    def eager(self, network: Network) -> None:
        try:
            self.result["eager"] = measure_eager(network, self.timer)
        except Exception as error:
            self.fail(f"{network.name} b{network.batch} in PyTorch", error)
        for row in self.result["eager"]:
            print(line(row), flush=True)

    def save(self) -> None:
        self.result |= {"seconds": self.seconds(), "errors": self.errors, "left_out": self.left_out}
        if self.args.json:
            beside = self.args.json.with_name(f"partial-{self.args.json.name}")
            beside.write_text(json.dumps(self.result, indent=1))
            beside.replace(self.args.json)
        if self.args.plot and self.result["engines"]:
            plot(self.result, self.args.plot)


# ---- output

HEADING = (
    f"{'network':<10}{'batch':>5} {'type':<5}{'kind':<15}{'call':>8}{'graph':>8}{'adders':>8}{'others':>8}"
    f"{'layers':>12}{'copies':>7}{'difference':>11}{'allowed':>9}{'build':>8}"
)


def line(row: Row) -> str:
    text = f"{row['network']:<10}{row['batch']:>5} {row['dtype']:<5}{row['kind']:<15}"
    text += f"{row['call']['ms']:>8.3f}{row['graph']['ms']:>8.3f}"
    if "adders_ms" in row:
        text += f"{row['adders_ms']:>8.3f}{row['others_ms']:>8.3f}{row['adder_layers']:>6} +{row['other_layers']:>4}"
        text += f"{row['copies']:>7}"
    else:
        text += " " * 35
    if "difference" in row:
        text += f"{row['difference']:>11.1e}{row['allowed']:>9.1e}"
    return text + (f"{row['build_s']:>6.1f} s" if "build_s" in row else "")


def plot(result: Row, path: pathlib.Path) -> None:
    """A bar for each engine: adder layers and others by the profiler, stacked; a mark at the time in a CUDA graph."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = list(dict.fromkeys((row["network"], row["batch"]) for row in result["engines"]))
    figure, axes = pyplot.subplots(
        1, len(cells), figsize=(1.5 + 3.2 * len(cells), 4.5), squeeze=False, layout="constrained"
    )
    for ax, (network, batch) in zip(axes[0], cells, strict=True):
        rows = [row for row in result["engines"] if (row["network"], row["batch"]) == (network, batch)]
        rows.sort(key=lambda row: (row["dtype"] != "fp32", KINDS[::-1].index(row["kind"])))
        places = range(len(rows))
        adders, others = [row["adders_ms"] for row in rows], [row["others_ms"] for row in rows]
        ax.bar(places, adders, 0.7, color="C0", label="adder layers")
        ax.bar(places, others, 0.7, bottom=adders, color="C1", label="other layers")
        ax.plot(places, [row["graph"]["ms"] for row in rows], "k_", markersize=22, label="in a CUDA graph")
        ax.set_xticks(places, [f"{row['kind']}\n{row['dtype']}" for row in rows], fontsize=7)
        ax.set(title=f"{network}, batch {batch}", ylabel="ms" if ax is axes[0][0] else "")
    axes[0][0].legend(fontsize=8)
    environment = result["environment"]
    figure.suptitle(f"{environment['gpu']}, TensorRT {environment['tensorrt']}", fontsize=10)
    beside = path.with_name(f"partial-{path.name}")
    figure.savefig(beside, dpi=130)
    beside.replace(path)


# ---- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="default: those of the usual rows")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="of each network, e.g. 1 32 256")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "fp16"), default=["fp32", "fp16"])
    parser.add_argument("--no-fuse", action="store_true", help="engines that are not fused only")
    parser.add_argument("--no-conv", action="store_true", help="leave the networks with convolutions out")
    parser.add_argument(
        "--route", choices=("onnx", "torch2trt"), help="default: onnx, or torch2trt where onnx is missing"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.1, help="of measuring for one time in a CUDA graph (default: 0.1)"
    )
    parser.add_argument("--limit", type=float, default=200, metavar="SECONDS",
                        help="no further engine is begun after this time (default: 200)")  # fmt: skip
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="all numbers")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="stacked bars (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.batches and min(args.batches) < 1:
        parser.error(f"--batches must be at least 1, got {min(args.batches)}")
    for path in (args.json, args.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"the folder of {path} does not exist; create it first")
    chosen = [cell for cell in USUAL if args.networks is None or cell[0] in args.networks]
    names = list(dict.fromkeys(name for name, _ in chosen))
    args.cells = [(name, batch) for name in names for batch in args.batches] if args.batches else chosen
    args.kinds = [
        kind for kind in KINDS if not (args.no_fuse and kind == "fused") and not (args.no_conv and kind == "conv")
    ]
    if args.route is None:
        args.route = (
            "onnx" if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript") else "torch2trt"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no NVIDIA GPU here, which TensorRT needs", file=sys.stderr)
        return 1
    run = Run(args)
    for key, value in run.result["environment"].items():
        print(f"{key}: {value}")
    print(f"\n{HEADING}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run.engines(pathlib.Path(folder))
    run.save()
    if run.left_out:
        print(f"\nLeft out, since {args.limit:.0f} seconds had passed: {', '.join(run.left_out)}")
    print(f"\n{'FAILED' if run.errors else 'PASSED'} in {run.seconds():.0f} s")
    for error in run.errors:
        print(error, file=sys.stderr)
    return 1 if run.errors else 0


if __name__ == "__main__":
    sys.exit(main())
