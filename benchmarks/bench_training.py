"""Times training: layers forward and backward, and whole steps, against convolutions and against the published rule.

    python3 benchmarks/bench_training.py --json training.json       # on the GPU, and the CPU row
    python3 benchmarks/bench_training.py --cpu                      # only the CPU row

Layers: forward and backward to input and weight of one layer with a cold second-level cache, between CUDA events;
dgrad is only the gradient of the input, in 10^12 accumulated terms a second (T/s) and as a fraction of what
ceiling.cu reaches in the same run. Steps: forward, loss, backward and SGD with momentum; the first time is the median
from one step to the next, host time included, the second only the GPU's, for a step that the host has enqueued
beforehand, the third that from one step to the next in a replayed CUDA graph, and the memory is the most allocated during
a step, weights and optimizer included. conv is the same
network with convolutions, in float32 without TF32 and in float16 under autocast; published is the rule of AdderNet's
code: unfolded columns and broadcasts, in torch. Gradients are compared with the definition in float64, by the rule in
docs/numerics.md, before a layer is timed, and those of a network with the published rule's. The exit code is 1 if a
result was wrong or a call failed.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import bench_ops
import ceiling
import peers
import torch
import torch.nn.functional as F
from layers import GPU_LAYERS, Layer
from timing import GpuTimer, Spread, warm_up
from torch import Tensor, nn

from torch2trt_adder import Adder2d, adder2d, scale_gradients, set_eta
from torch2trt_adder.models import addernet_mnist, cnn_twin, resnet20, resnet50
from torch2trt_adder.numerics import definition

Row = dict[str, Any]

R50 = ["r50-c64", "r50-c128", "r50-c256", "r50-c512"]
LAYERS = [*R50, "r20-stage1", "r20-stage2", "r20-stage3", "mnist2-b64"]
# Forward and backward by the best public CUDA extension, on an H200, in ms, its im2col included.
PUBLIC_EXTENSION = {"r50-c256": 11.0, "r20-stage1": 3.28}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int, int], int]] = {
    "resnet20": (resnet20, (256, 3, 32, 32), 10),
    "addernet_mnist": (addernet_mnist, (64, 1, 28, 28), 10),
    "resnet50": (resnet50, (32, 3, 224, 224), 1000),
}


# ---- the published rule


class _PublishedRule(torch.autograd.Function):
    """filters [K, CRS], columns [CRS, NPQ] -> [K, NPQ], each pass one broadcast over all three axes."""

    @staticmethod
    def forward(ctx, filters, columns):
        ctx.save_for_backward(filters, columns)
        return -(filters[:, :, None] - columns[None]).abs().sum(1)

    @staticmethod
    def backward(ctx, grad_output):
        filters, columns = ctx.saved_tensors
        grad_filters = ((columns[None] - filters[:, :, None]) * grad_output[:, None]).sum(2)
        grad_filters *= math.sqrt(filters.numel()) / 5 / grad_filters.norm().clamp(min=1e-12)
        grad_columns = ((filters[:, :, None] - columns[None]).clamp(-1, 1) * grad_output[:, None]).sum(0)
        return grad_filters, grad_columns


def published(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    """adder2d as AdderNet's code computes it, for square kernels without groups."""
    K, _, R, _ = w.shape
    N, _, H, _ = x.shape
    P = (H + 2 * padding - R) // stride + 1
    columns = F.unfold(x, R, 1, padding, stride).permute(1, 2, 0).reshape(w[0].numel(), -1)
    return _PublishedRule.apply(w.flatten(1), columns).view(K, P, P, N).permute(3, 0, 1, 2).contiguous()


class Published(nn.Module):
    """An Adder2d layer by the published rule, with that layer's parameter."""

    def __init__(self, layer: Adder2d) -> None:
        super().__init__()
        self.adder, self.stride, self.padding = layer.adder, layer.stride[0], layer.padding[0]

    def forward(self, x: Tensor) -> Tensor:
        return published(x, self.adder, self.stride, self.padding)


def with_published_rule(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Adder2d):
                setattr(parent, name, Published(child))
    return model


# ---- layers


def forward_backward(function: Callable[..., Tensor], x: Tensor, w: Tensor, dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(x, w), (x, w), dy)


def check_layer(x: Tensor, w: Tensor, dy: Tensor, layer: Layer) -> None:
    dx, dw = forward_backward(lambda x, w: adder2d(x, w, None, *layer.geometry), x, w, dy)()
    pair = tuple((v, v) for v in layer.geometry[:3])
    definition.assert_grad_input(dx, dy, x, w, (*pair, layer.groups))
    definition.assert_grad_weight(dw, dy, x, w, (*pair, layer.groups))


def measure_layer(name: str, layer: Layer, dtype: torch.dtype, timer: GpuTimer, with_published: bool) -> Row:
    row: Row = {"layer": name, "dtype": str(dtype).removeprefix("torch."), "gmac": layer.macs / 1e9}
    x, w = (t.requires_grad_() for t in layer.tensors(dtype, "cuda"))
    dy = torch.randn(layer.N, layer.K, layer.P, layer.P, device="cuda").to(dtype)
    check_layer(x, w, dy, layer)
    geometry = tuple([v, v] for v in layer.geometry[:3])
    args = (dy, x.detach(), w.detach(), *geometry, layer.groups)
    row["fwd_bwd"] = timer.cold(forward_backward(lambda x, w: adder2d(x, w, None, *layer.geometry), x, w, dy)).median
    row["forward"] = timer.cold(lambda: adder2d(x.detach(), w.detach(), None, *layer.geometry)).median
    row["dgrad"] = timer.cold(lambda: torch.ops.torch2trt_adder.adder2d_grad_input(*args)).median
    row["wgrad"] = timer.cold(lambda: torch.ops.torch2trt_adder.adder2d_grad_weight(*args)).median
    row["dgrad_tera"] = layer.macs / row["dgrad"] / 1e9
    with peers.conv_precision("ieee"):
        conv = forward_backward(lambda x, w: F.conv2d(x, w, None, *layer.geometry), x, w, dy)
        row["conv"] = timer.cold(conv).median
    if with_published and dtype is torch.float32:
        try:
            call = forward_backward(lambda x, w: published(x, w, layer.stride, layer.padding), x, w, dy)
            row["published"] = timer.cold(call).median
        except torch.cuda.OutOfMemoryError:
            row["published_skipped"] = "out of memory"
            torch.cuda.empty_cache()
    return row


# ---- steps


class Training:
    """One network in training: call it for one step."""

    def __init__(self, name: str, kind: str, amp: bool, device: str, channels_last: bool = False) -> None:
        build, size, classes = MODELS[name]
        torch.manual_seed(0)
        model = build()
        if kind == "conv":
            model = cnn_twin(model)
        elif kind == "published":
            model = with_published_rule(model)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=self.layout)
        self.device, self.amp = device, amp
        self.deferred = amp and kind == "adder"
        if self.deferred:
            set_eta(self.model, None)
        self.scaler = torch.amp.GradScaler(device, enabled=amp)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(size, generator=generator).to(device).contiguous(memory_format=self.layout)
        self.labels = torch.randint(0, classes, (size[0],), generator=generator).to(device)
        self.call: Callable[[Tensor], Tensor] = self.model

    def backward(self) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, dtype=torch.float16, enabled=self.amp):
            loss = F.cross_entropy(self.call(self.x), self.labels)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def __call__(self) -> None:
        self.backward()
        if self.deferred:
            self.scaler.unscale_(self.optimizer)
            scale_gradients(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()


def back_to_back(step: Callable[[], None], seconds: float = 2.0) -> Spread:
    """From one step to the next, as they follow each other in training."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    runs = max(10, min(100, int(seconds / (time.perf_counter() - start))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return Spread.of([a.elapsed_time(b) for a, b in itertools.pairwise(events)])


def in_a_graph(step: Callable[[], None]) -> Callable[[], None]:
    """The same step as one CUDA graph."""
    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def check_step(name: str) -> float:
    """The largest difference of a gradient from the published rule's, relative to its norm, in the first step."""
    ours, theirs = (Training(name, kind, False, "cuda") for kind in ("adder", "published"))
    losses = ours.backward(), theirs.backward()
    if not math.isclose(losses[0], losses[1], rel_tol=1e-3):
        raise AssertionError(f"{name}: loss {losses[0]:.6f}, and {losses[1]:.6f} by the published rule")
    worst = 0.0
    for (path, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        difference = ((a.grad - b.grad).norm() / b.grad.norm().clamp(min=1e-12)).item()
        if not difference < 0.02:
            raise AssertionError(
                f"{name}: the gradient of {path} differs by {difference:.3f} from the published rule's"
            )
        worst = max(worst, difference)
    return worst


def measure_step(name: str, kind: str, amp: bool, timer: GpuTimer, channels_last: bool, compiled: bool) -> Row:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    row: Row = {"model": name, "kind": kind, "amp": amp, "layout": "NHWC" if channels_last else "NCHW"}
    row["compiled"] = compiled
    with peers.conv_precision("ieee"):
        step = Training(name, kind, amp, "cuda", channels_last)
        if compiled:
            torch._dynamo.reset()
            step.call = torch.compile(step.model, fullgraph=True)
        spread = back_to_back(step)
        row |= {"step": spread.median, "step_p10": spread.p10, "step_p90": spread.p90}
        row["gpu"] = timer.cold(step).median
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        row["peak"] = torch.cuda.max_memory_allocated() - before
        if not amp:  # GradScaler reads from the GPU in each step
            row["graph"] = back_to_back(in_a_graph(step)).median
    return row


def measure_cpu(threads: int, rounds: int = 15) -> Row:
    """Steps of AdderNetMnist and of its twin, taken in turns, so that other load on the machine meets both."""
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    steps = {kind: Training("addernet_mnist", kind, False, "cpu") for kind in ("adder", "conv")}
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for round_ in range(rounds + 2):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 2:
                times[kind].append(1e3 * (time.perf_counter() - start))
    torch.set_num_threads(former)
    return {"threads": threads, **{kind: statistics.median(values) for kind, values in times.items()}}


# ---- report

Verdict = tuple[bool, str]


def goals(result: Row) -> list[Row]:
    """Each goal with its verdict: "met", "NOT MET" or "unknown"."""
    layers = {row["layer"]: row for row in result["layers"] if row["dtype"] == "float32"}
    plain = [row for row in result["steps"] if row["layout"] == "NCHW" and not row["compiled"]]
    steps = {(row["model"], row["kind"], row["amp"]): row for row in plain}

    def step(kind: str, key: str) -> float:
        return steps["resnet20", kind, False][key]

    def dgrad() -> Verdict:
        values = [layers[name]["dgrad_tera"] / result["ceiling"]["tera"] for name in R50]
        return min(values) >= 0.7, ", ".join(f"{100 * value:.1f} %" for value in values)

    def against_conv() -> Verdict:
        values = [layers[name]["fwd_bwd"] / layers[name]["conv"] for name in R50]
        return max(values) <= 1.5, ", ".join(f"{value:.2f}x" for value in values)

    def against_extension() -> Verdict:
        values = {name: ms / layers[name]["fwd_bwd"] for name, ms in PUBLIC_EXTENSION.items()}
        return min(values.values()) >= 12, ", ".join(f"{name} {value:.1f}x" for name, value in values.items())

    def step_against_conv() -> Verdict:
        ratio = step("adder", "step") / step("conv", "step")
        return ratio <= 2, f"{ratio:.2f}x ({step('adder', 'step'):.2f} and {step('conv', 'step'):.2f} ms)"

    def step_against_published() -> Verdict:
        slow = min(step("published", "step"), step("published", "graph"))
        key = {"model": "resnet20", "kind": "adder", "amp": False, "layout": "NHWC", "compiled": False}
        best = next((row["graph"] for row in result["steps"] if key.items() <= row.items()), None)
        if best is None:
            raise KeyError("adder in channels_last")
        return slow / best >= 40, (
            f"{slow / best:.1f}x ({slow:.1f} and {best:.2f} ms); contiguous {slow / step('adder', 'graph'):.1f}x, and without a "
            f"graph {slow / step('adder', 'step'):.1f}x"
        )

    def peak() -> Verdict:
        ratio = step("adder", "peak") / step("conv", "peak")
        return ratio <= 1.2, f"{ratio:.2f}x ({step('adder', 'peak') / 1e6:.0f} and {step('conv', 'peak') / 1e6:.0f} MB)"

    def cpu() -> Verdict:
        row = result["cpu"]
        ratio = row["adder"] / row["conv"]
        return ratio <= 4 and row["threads"] == 2, (
            f"{ratio:.2f}x ({row['adder']:.1f} and {row['conv']:.1f} ms, {row['threads']} threads)"
        )

    table = {
        "dgrad, ResNet-50 3x3, float32: >= 70 % of the ceiling": dgrad,
        "forward + backward of those: <= 1.5x conv2d float32": against_conv,
        "forward + backward: >= 12x the best public CUDA extension": against_extension,
        "step, ResNet-20, batch 256, float32: <= 2x the CNN's": step_against_conv,
        "in a CUDA graph and channels_last: >= 40x the published rule": step_against_published,
        "peak memory of that step: <= 1.2x the CNN's": peak,
        "CPU step, AdderNetMnist, batch 64, 2 threads: <= 4x the CNN's": cpu,
    }
    rows = []
    for goal, evaluate in table.items():
        try:
            met, measured = evaluate()
            rows.append({"goal": goal, "verdict": "met" if met else "NOT MET", "measured": measured})
        except KeyError as missing:
            rows.append({"goal": goal, "verdict": "unknown", "measured": f"not measured: {missing}"})
    return rows


def report(result: Row) -> None:
    limit = result["ceiling"].get("tera")
    if result["layers"]:
        print(
            "\nlayers, ms: forward + backward of adder2d, its passes, dgrad in T/s and % of the ceiling, and the others"
        )
        titles = ("fwd+bwd", "forward", "dgrad", "T/s", "%", "wgrad", "conv2d", "x conv", "published")
        print(f"{'layer':<12}{'dtype':<10}", *(f"{title:>9}" for title in titles))
        for row in result["layers"]:
            fraction = 100 * row["dgrad_tera"] / limit if limit and row["dtype"] == "float32" else None
            values = [row["fwd_bwd"], row["forward"], row["dgrad"], row["dgrad_tera"], fraction, row["wgrad"]]
            values += [row["conv"], row["fwd_bwd"] / row["conv"], row.get("published")]
            cells = (f"{'-':>9}" if value is None else f"{value:>9.3f}" for value in values)
            print(f"{row['layer']:<12}{row['dtype']:<10}", *cells)
    if limit:
        print(f"ceiling float32: {limit:.2f} T/s")
    if result["steps"]:
        print("\nsteps, ms: from step to step (10th to 90th percentile), on the GPU, in a CUDA graph; peak memory, MB")
        for row in result["steps"]:
            options = ["float16 autocast" if row["amp"] else "float32"]
            options += ["NHWC"] * (row["layout"] == "NHWC") + ["compiled"] * row["compiled"]
            print(
                f"{row['model']:<15}{row['kind']:<10}{' '.join(options):<28}{row['step']:>9.3f} "
                f"({row['step_p10']:.3f} to {row['step_p90']:.3f}) {row['gpu']:>9.3f} {row.get('graph', math.nan):>9.3f} "
                f"{row['peak'] / 1e6:>9.1f}"
            )
        for name, difference in result["checked"].items():
            print(f"{name}: gradients of the first step within {difference:.1e} of the published rule's")
    if result["cpu"]:
        row = result["cpu"]
        print(
            f"\nCPU, {row['threads']} threads: a step of AdderNetMnist, batch 64: {row['adder']:.1f} ms; of its twin "
            f"{row['conv']:.1f} ms"
        )
    print("\ngoals")
    for row in goals(result):
        print(f"{row['verdict']:<8}{row['goal']:<64}{row['measured']}")


# ---- command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="no GPU rows")
    parser.add_argument("--layers", nargs="*", choices=GPU_LAYERS, default=LAYERS, metavar="LAYER")
    parser.add_argument("--dtypes", nargs="*", choices=bench_ops.DTYPES, default=["float32", "float16"])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["resnet20", "addernet_mnist"])
    parser.add_argument("--no-published", action="store_true", help="leave the published rule out")
    parser.add_argument("--compile", action="store_true", help="steps through torch.compile as well")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU row (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="also write all numbers to this file")
    args = parser.parse_args()
    with_gpu = torch.cuda.is_available() and not args.cpu
    result: Row = {"environment": bench_ops.environment(with_gpu)}
    result |= {"ceiling": {}, "layers": [], "steps": [], "checked": {}, "cpu": {}}
    for name, value in result["environment"].items():
        print(f"{name}: {value}")
    errors: list[str] = []

    def attempt(what: str, measure: Callable[[], Any], store: Callable[[Any], object]) -> None:
        try:
            store(measure())
            print(f"[{time.perf_counter() - start:4.0f} s] {what}", flush=True)
        except Exception as error:  # reported, and the exit code is 1
            errors.append(f"{what}: {type(error).__name__}: {error}")
            print(f"FAILED {errors[-1]}", flush=True)

    start = time.perf_counter()
    if with_gpu:
        torch.backends.cudnn.benchmark = True  # the yardstick at its best
        timer = GpuTimer()

        def fp32_ceiling() -> Row:
            probes = ceiling.measure(ceiling.build(torch.cuda.get_device_capability()))
            return {"tera": max(probe.tera for probe in probes if probe.dtype is torch.float32)}

        attempt("ceiling", fp32_ceiling, result["ceiling"].update)
        for name in args.layers:
            for dtype in args.dtypes:
                measure = functools.partial(
                    measure_layer, name, GPU_LAYERS[name], bench_ops.DTYPES[dtype], timer, not args.no_published
                )
                attempt(f"{name} {dtype}", measure, result["layers"].append)
                torch.cuda.empty_cache()
        for name in args.models:
            heavy = name == "resnet50"  # the published rule would need hundreds of gigabytes
            kinds = [("adder", False), ("conv", False), ("adder", True), ("conv", True)]
            if not (heavy or args.no_published):
                attempt(f"{name} gradients", functools.partial(check_step, name), functools.partial(_put, result, name))
                kinds.append(("published", False))
            variants = [(kind, amp, False, False) for kind, amp in kinds]
            variants += [(kind, amp, True, False) for kind in ("adder", "conv") for amp in (False, True)]
            if args.compile:
                variants += [(kind, amp, False, True) for kind in ("adder", "conv") for amp in (False, True)]
            for kind, amp, channels_last, compiled in variants:
                options = f"{'float16' if amp else 'float32'}{' NHWC' * channels_last}{' compiled' * compiled}"
                measure = functools.partial(measure_step, name, kind, amp, timer, channels_last, compiled)
                attempt(f"{name} {kind} {options}", measure, result["steps"].append)
    attempt("CPU", lambda: measure_cpu(args.threads), result["cpu"].update)
    report(result)
    result["goals"] = goals(result)
    if args.json:
        beside = args.json.with_name(args.json.name + ".partial")
        beside.write_text(json.dumps(result, indent=1))
        beside.replace(args.json)
    if errors:
        print(*errors, sep="\n")
        sys.exit(1)


def _put(result: Row, name: str, difference: float) -> None:
    result["checked"][name] = difference


if __name__ == "__main__":
    main()
