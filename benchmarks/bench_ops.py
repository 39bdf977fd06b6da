"""Times the forward pass of adder2d on GPU and CPU, against its limit and against what else a user could call.

    python3 benchmarks/bench_ops.py --json result.json --plot result.png

GPU rows: milliseconds of one call with a cold second-level cache (median; 10th to 90th percentile in the JSON), 10^12
accumulated |x - w| a second (T/s), and that as a fraction of the ceiling, the best rate that ceiling.cu reaches in the
same run (bfloat16 is held against the ceiling of float16). Peers are the published formula, torch.cdist(p=1) and the
broadcast through torch.compile (the last two without the unfolding); convolutions of the same shape are the yardstick.
Every result is compared with the operator's definition in float64 before it is timed, by the rule in docs/numerics.md.
CPU rows: float32, on --threads threads. The exit code is 1 if a result was wrong or a call failed.
"""

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import ceiling
import peers
import torch
from layers import CPU_LAYERS, GPU_LAYERS, Layer
from timing import GpuTimer, Spread, cpu_time
from torch import Tensor

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import goals  # noqa: E402

import torch2trt_adder  # noqa: E402
from torch2trt_adder import library  # noqa: E402
from torch2trt_adder.numerics import definition, tolerance  # noqa: E402

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TINY = 0.05  # ms: below, a call is timed in a CUDA graph as well
Row = dict[str, Any]


# ---- what ran


def environment(with_gpu: bool) -> Row:
    facts = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "library": f"{library.path().name}, {library.path().stat().st_size} bytes",
    }
    if with_gpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nvidia_smi": nvidia_smi(),
        }
        try:
            facts["triton"] = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            facts["triton"] = None
    return facts


def cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def nvidia_smi() -> str:
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{fields}: unknown ({error})"
    return f"{fields}: {' | '.join((result.stdout or result.stderr).strip().splitlines())}"


# ---- one row


def as_json(spread: Spread) -> Row:
    return {"ms": spread.median, "p10": spread.p10, "p90": spread.p90, "runs": spread.runs}


def adder(x: Tensor, w: Tensor, layer: Layer) -> peers.Call:
    return lambda: torch2trt_adder.adder2d(x, w, None, *layer.geometry)


def check(x: Tensor, w: Tensor, layer: Layer) -> Tensor:
    """Our result; raises AssertionError where it leaves the bound around the definition in float64."""
    size = (layer.N, layer.K, layer.P, layer.P)
    torch.full(size, math.nan, dtype=x.dtype, device=x.device)  # freed at once: our output takes the same memory
    y = adder(x, w, layer)()
    definition.assert_forward(y, x, w, None, layer.geometry)
    return y


def measure_adder(name: str, layer: Layer, dtype_name: str, layout: str, timer: GpuTimer) -> Row:
    x, w = layer.tensors(DTYPES[dtype_name], "cuda", channels_last=layout == "channels_last")
    row: Row = {"layer": name, "shape": str(layer), "gmac": layer.macs / 1e9, "dtype": dtype_name, "layout": layout}
    check(x, w, layer)
    call = adder(x, w, layer)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    y = call()
    row["extra_bytes"] = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del y
    row |= as_json(timer.cold(call))
    row["tera"] = layer.macs / row["ms"] / 1e9
    if row["ms"] < TINY:
        row["graph"] = as_json(timer.replay(call))
    row["host_us"] = 1e3 * timer.host(call).median
    return row


def measure_conv2d(layer: Layer, timer: GpuTimer) -> Row:
    result: Row = {}
    for name, dtype, precision in (
        ("float32", torch.float32, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("float16", torch.float16, "ieee"),
    ):
        channels_last = dtype is torch.float16  # cuDNN's own order for tensor cores
        x, w = layer.tensors(dtype, "cuda", channels_last)
        w = w.contiguous(memory_format=torch.channels_last) if channels_last else w
        with peers.conv_precision(precision):
            call = peers.conv2d(x, w, layer)
            result[name] = as_json(timer.cold(call))
            if name == "float32":
                result[name]["host_us"] = 1e3 * timer.host(call).median
                if result[name]["ms"] < TINY:
                    result[name]["graph"] = as_json(timer.replay(call))
    return result


def peers_shown(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Pairs of dtype and peer. torch.cdist does not support half types."""
    dtypes = [dtype for dtype in ("float32", "float16") if dtype in args.dtypes]
    return [(dtype, peer) for dtype in dtypes for peer in args.peers if (dtype, peer) != ("float16", "cdist")]


def measure_peer(name: str, layer: Layer, dtype: torch.dtype, device: str, timer: GpuTimer | None) -> Row:
    """Milliseconds of a peer, or the reason why there are none."""
    try:
        x, w = layer.tensors(dtype, device)
        y = torch2trt_adder.adder2d(x, w, None, *layer.geometry).float()
        call, to_output = peers.PEERS[name](x, w, layer)
        error = ((to_output(call()).float() - y).abs().max() / y.abs().max()).item()
        # A peer rounds to its dtype more than once, and both sums may err.
        if not error < 8 * torch.finfo(dtype).eps + 2 * tolerance.sum_error(layer.CRS):
            return {"skipped": f"its result is off by {error:.1e}"}
        return as_json(timer.cold(call) if timer else cpu_time(call))
    except peers.Skipped as reason:
        return {"skipped": str(reason)}
    except torch.cuda.OutOfMemoryError as error:
        return {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:  # of torch.compile and its compilers: anything; the table says so
        return {"skipped": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]}


def measure_cpu(name: str, layer: Layer, peer_names: list[str], threads: int) -> Row:
    x, w = layer.tensors(torch.float32, "cpu")
    check(x, w, layer)
    torch.set_num_threads(threads)
    row: Row = {"layer": name, "shape": str(layer), "gmac": layer.macs / 1e9, "dtype": "float32", "threads": threads}
    row |= as_json(cpu_time(adder(x, w, layer)))
    row["gmacs"] = row["gmac"] / row["ms"] * 1e3
    row["conv2d"] = as_json(cpu_time(peers.conv2d(x, w, layer)))
    row["peers"] = {p: measure_peer(p, layer, torch.float32, "cpu", None) for p in peer_names if p != "compile"}
    return row


# ---- the run


class Run:
    """Rows as they come; writes the JSON after each, so that a run cut short has left what it measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.start = time.perf_counter()
        self.with_gpu = torch.cuda.is_available() and not args.cpu
        self.result: Row = {"environment": environment(self.with_gpu)}
        self.result |= {"ceiling": {}, "rows": [], "layers": {}, "cpu": []}
        self.errors: list[str] = []

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def save(self) -> None:
        if self.args.json:
            beside = self.args.json.with_name(self.args.json.name + ".partial")
            beside.write_text(json.dumps(self.result, indent=1))
            beside.replace(self.args.json)

    def fail(self, what: str, error: Exception) -> None:
        self.errors.append(f"{what}: {type(error).__name__}: {error}")
        print(f"FAILED {self.errors[-1]}", flush=True)

    def gpu(self, names: list[str]) -> None:
        torch.backends.cudnn.benchmark = True  # the yardstick at its best
        timer = GpuTimer()
        probes = self.measure_ceiling(None)
        for name in names:
            layer = GPU_LAYERS[name]
            rows: list[Row] = []
            for dtype in self.args.dtypes:
                for layout in self.args.layouts:
                    try:
                        rows.append(measure_adder(name, layer, dtype, layout, timer))
                    except Exception as error:  # reported, and the exit code is 1
                        self.fail(f"{name} {dtype} {layout}", error)
            self.result["rows"] += rows
            facts = self.result["layers"][name] = {"shape": str(layer), "gmac": layer.macs / 1e9, "peers": {}}
            try:
                facts["conv2d"] = measure_conv2d(layer, timer)
            except Exception as error:
                self.fail(f"{name} conv2d", error)
            self.save()
            times = ", ".join(f"{r['ms']:.4f}" for r in rows)
            print(f"[{self.seconds():4.0f} s] {name}: {times}", flush=True)
        # Peers come last, the ones that compile at the end: they take longest and may run into --limit.
        for dtype, peer in sorted(peers_shown(self.args), key=lambda item: item[1] == "compile"):
            for name in names:
                if self.seconds() > self.args.limit:
                    measured: Row = {"skipped": f"the run had taken its {self.args.limit:.0f} seconds (--limit)"}
                else:
                    measured = measure_peer(peer, GPU_LAYERS[name], DTYPES[dtype], "cuda", timer)
                self.result["layers"][name]["peers"].setdefault(dtype, {})[peer] = measured
            self.save()
            print(f"[{self.seconds():4.0f} s] {peer} {dtype}", flush=True)
        if probes is not None:
            self.measure_ceiling(probes)
        goals.add_fractions(self.result)
        self.save()

    def measure_ceiling(self, library_: Any) -> Any:
        """Measures the ceilings (again, at the end of the run: the best counts); returns ceiling.cu's library."""
        try:
            library_ = library_ or ceiling.build(torch.cuda.get_device_capability())
            probes = ceiling.measure(library_)
        except RuntimeError as error:
            self.fail("ceiling", error)
            return None
        multiprocessors = self.result["environment"]["multiprocessors"]
        for probe in probes:
            name = str(probe.dtype).removeprefix("torch.")
            best = self.result["ceiling"].setdefault(name, {"tera": 0.0, "probes": []})
            best["probes"].append({"name": probe.name, "tera": probe.tera, "megahertz": probe.megahertz})
            if probe.tera > best["tera"]:
                lanes = 64 if probe.dtype is torch.float32 else 128  # terms a cycle, each of two instructions
                issue = multiprocessors * lanes * probe.megahertz / 1e6
                best |= {"tera": probe.tera, "name": probe.name, "megahertz": probe.megahertz, "issue_limit": issue}
        return library_

    def cpu(self, names: list[str]) -> None:
        threads = torch.get_num_threads()
        for name in names:
            try:
                self.result["cpu"].append(measure_cpu(name, CPU_LAYERS[name], self.args.peers, self.args.threads))
            except Exception as error:
                self.fail(name, error)
            finally:
                torch.set_num_threads(threads)
            self.save()
        print(f"[{self.seconds():4.0f} s] {len(names)} layers on the CPU", flush=True)


# ---- report

SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def percent(row: Row, key: str) -> float | None:
    return 100 * row[key] if key in row else None


def milliseconds(measured: Row | None, width: int = 8) -> str:
    value = (measured or {}).get("ms")
    return cell(value, width, 4 if value is not None and value < 1 else 3 if value is not None and value < 100 else 1)


def print_gpu(result: Row, dtypes: list[str], shown: list[tuple[str, str]]) -> None:
    rows = {(r["layer"], r["dtype"], r["layout"]): r for r in result["rows"]}
    print("\nadder2d: ms, T/s, % of the ceiling (NHWC: in channels_last), us in a CUDA graph")
    print(f"{'layer':<15}", *(f"{SHORT[d]:>5} ms   T/s    % NHWC graph" for d in dtypes))
    for name in result["layers"]:
        line = [f"{name:<15}"]
        for dtype in dtypes:
            row, other = (rows.get((name, dtype, layout), {}) for layout in ("nchw", "channels_last"))
            graph = 1e3 * row["graph"]["ms"] if "graph" in row else None
            line += [milliseconds(row), cell(row.get("tera"), 5, 2), cell(percent(row, "of_ceiling"), 4, 0)]
            line += [cell(percent(other, "of_ceiling"), 4, 0), cell(graph, 5, 1)]
        print(*line)

    print("\npeers and conv2d, ms; adder2d's speed over the best peer's and over conv2d's (halves: conv2d in float16);")
    print("host time of a call of adder2d and of conv2d, us; memory beyond the output, MB")
    titles = [f"{SHORT[dtype] + ' ' + peer.removesuffix('erence'):>11}" for dtype, peer in shown]
    titles += ["conv f32", "    tf32", "     f16", *(f"{'/' + what:>5}" for what in ("peer", "conv") for _ in dtypes)]
    print(f"{'layer':<15}", *titles, "host conv   MB")
    for name, facts in result["layers"].items():
        conv = facts.get("conv2d", {})
        line = [f"{name:<15}"]
        line += [milliseconds(facts["peers"].get(dtype, {}).get(peer), 11) for dtype, peer in shown]
        line += [milliseconds(conv.get(kind)) for kind in ("float32", "tf32", "float16")]
        line += [cell(rows.get((name, dtype, "nchw"), {}).get("of_best_peer"), 5, 1) for dtype in dtypes]
        line += [cell(rows.get((name, dtype, "nchw"), {}).get("of_conv2d"), 5, 2) for dtype in dtypes]
        line += [cell(rows.get((name, "float32", "nchw"), {}).get("host_us"), 4, 0)]
        line += [cell(conv.get("float32", {}).get("host_us"), 4, 0)]
        line += [cell(max((r["extra_bytes"] / 1e6 for r in result["rows"] if r["layer"] == name), default=None), 4, 1)]
        print(*line)

    reasons: dict[str, list[str]] = {}
    for name, facts in result["layers"].items():
        for dtype, measured in facts["peers"].items():
            for peer, value in measured.items():
                if "skipped" in value:
                    reasons.setdefault(f"{peer} {dtype}: {value['skipped']}", []).append(name)
    for reason, names in reasons.items():
        print(f"left out: {reason} ({', '.join(names) if len(names) < 4 else f'{len(names)} layers'})")
    for dtype, best in result["ceiling"].items():
        limit = f"{best['issue_limit']:.2f} T/s that {best['megahertz']:.0f} MHz could issue"
        print(f"ceiling {dtype}: {best['tera']:.2f} T/s ({best['name']}), of {limit}")


def print_cpu(result: Row) -> None:
    names = sorted({peer for row in result["cpu"] for peer in row["peers"]})
    threads = result["cpu"][0]["threads"]
    print(f"\nCPU, float32, {threads} threads: ms and GMAC/s of adder2d; ms of the others")
    print(f"{'layer':<20}{'GMAC':>7}{'ms':>9}{'GMAC/s':>8}{'conv2d':>9}", *(f"{name:>10}" for name in names))
    for row in result["cpu"]:
        line = f"{row['layer']:<20}{row['gmac']:>7.4f} {milliseconds(row)}{row['gmacs']:>8.1f}"
        print(line, milliseconds(row["conv2d"]), *(f"{milliseconds(row['peers'][name]):>10}" for name in names))
        for name in names:
            if "skipped" in row["peers"][name]:
                print(f"  {name} left out: {row['peers'][name]['skipped']}")


def plot(result: Row, path: pathlib.Path) -> None:
    """Bars of every row against the ceilings; peers and convolution as marks on the same scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"float32": "C0", "float16": "C1", "bfloat16": "C2"}
    parts = [part for part in ("rows", "cpu") if result[part]]
    lengths = [len(result["layers"]) if part == "rows" else len(result["cpu"]) for part in parts]
    size = 11, 1.5 + 0.42 * sum(lengths)
    figure, axes = pyplot.subplots(
        len(parts), 1, figsize=size, height_ratios=lengths, squeeze=False, layout="constrained"
    )
    axes_of = dict(zip(parts, axes[:, 0], strict=True))
    if "rows" in axes_of:
        ax, names = axes_of["rows"], list(result["layers"])
        dtypes = [d for d in DTYPES if any(r["dtype"] == d and r["layout"] == "nchw" for r in result["rows"])]
        height = 0.8 / max(1, len(dtypes))
        for index, dtype in enumerate(dtypes):
            rows = [r for r in result["rows"] if r["dtype"] == dtype and r["layout"] == "nchw"]
            places = [names.index(r["layer"]) - 0.4 + (index + 0.5) * height for r in rows]
            ax.barh(places, [r["tera"] for r in rows], height, color=colours[dtype], label=f"adder2d {dtype}")
        for dtype, best in result["ceiling"].items():
            label = f"ceiling {dtype}, {best['tera']:.1f} T/s"
            ax.axvline(best["tera"], color=colours[dtype], linestyle="--", label=label)
        layers = list(enumerate(result["layers"].values()))
        conv = [(f["gmac"] / f["conv2d"]["float32"]["ms"], i) for i, f in layers if "conv2d" in f]
        if conv:
            ax.plot(*zip(*conv, strict=True), "k|", markersize=14, label="conv2d float32")
        found = [(i, f["gmac"], f["best_peer"]["float32"]["ms"]) for i, f in layers if "float32" in f["best_peer"]]
        best_peer = [(gmac / ms, i) for i, gmac, ms in found]
        if best_peer:
            ax.plot(*zip(*best_peer, strict=True), "rx", label="best peer float32")
        limits = [best["issue_limit"] for best in result["ceiling"].values()] + [r["tera"] for r in result["rows"]]
        ax.set(title=result["environment"]["gpu"], xlabel="10^12 accumulated |x - w| a second")
        ax.set(xlim=(0, 1.05 * max(limits)), ylim=(-0.6, len(names) - 0.4))
        ax.set_yticks(range(len(names)), [f"{n}  {result['layers'][n]['shape']}" for n in names], fontsize=8)
        ax.invert_yaxis()
        ax.legend(fontsize=8, loc="lower right")
    if "cpu" in axes_of:
        ax, rows = axes_of["cpu"], result["cpu"]
        ax.barh(range(len(rows)), [r["gmacs"] for r in rows], 0.7, label="adder2d")
        conv = [1e3 * r["gmac"] / r["conv2d"]["ms"] for r in rows]
        ax.plot(conv, range(len(rows)), "k|", markersize=14, label="conv2d")
        others = [[p["ms"] for p in r["peers"].values() if "ms" in p] for r in rows]
        marks = [(1e3 * r["gmac"] / min(ms), i) for i, (r, ms) in enumerate(zip(rows, others, strict=True)) if ms]
        if marks:
            ax.plot(*zip(*marks, strict=True), "rx", label="best peer")
        title = f"{result['environment']['cpu']}, {rows[0]['threads']} threads, float32"
        ax.set(title=title, xlabel="10^9 accumulated |x - w| a second")
        ax.set_yticks(range(len(rows)), [f"{r['layer']}  {r['shape']}" for r in rows], fontsize=8)
        ax.invert_yaxis()
        ax.legend(fontsize=8, loc="lower right")
    beside = path.with_name(f"partial-{path.name}")
    figure.savefig(beside, dpi=130)
    beside.replace(path)


# ---- command line


def select(patterns: list[str] | None, layers: dict[str, Layer]) -> list[str]:
    return [name for name in layers if patterns is None or any(fnmatch.fnmatch(name, p) for p in patterns)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME",
                        help="layers by name or pattern, e.g. 'r50-*' 'cpu-*'; default: all")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of GPU rows (default: all)")
    parser.add_argument("--layouts", nargs="+", choices=("nchw", "channels_last"), default=["nchw", "channels_last"])
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, default=list(peers.PEERS), metavar="PEER",
                        help=f"of {', '.join(peers.PEERS)}; default: all; without a name: none")  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="CPU rows only")
    parser.add_argument("--threads", type=int, default=2, help="of CPU rows (default: 2)")
    parser.add_argument("--limit", type=float, default=200, metavar="SECONDS",
                        help="no further peer is started after this time (default: 200)")  # fmt: skip
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="all numbers")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="bars against the limit (needs matplotlib)")
    args = parser.parse_args(argv)
    for pattern in args.rows or []:
        if not select([pattern], GPU_LAYERS | CPU_LAYERS):
            parser.error(f"no layer is called {pattern!r}; there are {', '.join(GPU_LAYERS | CPU_LAYERS)}")
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    for path in (args.json, args.plot):
        if path and not path.absolute().parent.is_dir():
            parser.error(f"the folder of {path} does not exist; create it first")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    run = Run(args)
    for key, value in run.result["environment"].items():
        print(f"{key}: {value}")
    gpu_names, cpu_names = select(args.rows, GPU_LAYERS), select(args.rows, CPU_LAYERS)
    if gpu_names and not run.with_gpu and not args.cpu:
        print("No GPU that this torch can use: CPU rows only.")
    with torch.no_grad():
        if cpu_names:
            run.cpu(cpu_names)
        if gpu_names and run.with_gpu:
            run.gpu(gpu_names)
    run.result["seconds"] = run.seconds()
    run.result["errors"] = run.errors
    run.result["goals"] = goals.goals(run.result)
    run.save()
    if run.result["rows"]:
        print_gpu(run.result, args.dtypes, peers_shown(args))
    if run.result["cpu"]:
        print_cpu(run.result)
    print()
    for goal in run.result["goals"]:
        if goal["verdict"] != "unknown" or run.with_gpu:
            print(f"{goal['verdict']:<8} {goal['goal']}: {goal['measured']}")
    for error in run.errors:
        print(f"FAILED {error}")
    print(f"{run.seconds():.0f} seconds")
    if args.plot:
        plot(run.result, args.plot)
    return 1 if run.errors else 0


if __name__ == "__main__":
    sys.exit(main())
