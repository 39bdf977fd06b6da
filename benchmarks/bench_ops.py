"""Times the forward pass of adder2d on the GPU and on the CPU, against its limit and against what else a user could call.

    python3 benchmarks/bench_ops.py --json result.json --plot result.png

GPU rows: milliseconds of one call with a cold second-level cache (median; 10th to 90th percentile in the JSON), 10^12
accumulated |x - w| a second, and that as a fraction of the ceiling, the best rate that ceiling.cu reaches in the same run
(bfloat16 is held against the ceiling of float16). Peers are the published formula, torch.cdist(p=1) and the broadcast
through torch.compile (the last two without the unfolding); convolutions of the same shape are the yardstick. Every result
is compared with the operator's definition in float64 before it is timed, by the rule of tests/conftest.py, which needs
pytest. CPU rows: float32, on --threads threads. The exit code is 1 if a result was wrong or a call failed.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402
import goals  # noqa: E402

import torch2trt_adder  # noqa: E402
from torch2trt_adder import library  # noqa: E402

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
    conftest.assert_forward(y, x, w, None, layer.geometry)
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


def measure_peer(name: str, layer: Layer, dtype: torch.dtype, device: str, timer: GpuTimer | None) -> Row:
    """Milliseconds of a peer, or the reason why there are none."""
    try:
        x, w = layer.tensors(dtype, device)
        y = torch2trt_adder.adder2d(x, w, None, *layer.geometry).float()
        call, to_output = peers.PEERS[name](x, w, layer)
        error = ((to_output(call()).float() - y).abs().max() / y.abs().max()).item()
        if not error < 4 * torch.finfo(dtype).eps * math.sqrt(layer.CRS):
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
        self.result: Row = {"environment": environment(self.with_gpu), "ceiling": {}, "rows": [], "layers": {}, "cpu": []}
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
            times = ", ".join(f"{r['dtype']} {r['layout']} {r['ms']:.4f} ms" for r in rows)
            print(f"[{self.seconds():4.0f} s] {name}: {times}", flush=True)
        # Peers come last, the ones that compile at the end: they take longest and may run into --limit.
        plan = [(dtype, peer) for dtype in ("float32", "float16") if dtype in self.args.dtypes for peer in self.args.peers]
        for dtype, peer in sorted(plan, key=lambda item: item[1] == "compile"):
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
                lanes = 64 if probe.dtype is torch.float32 else 128  # accumulated terms a cycle, of two instructions each
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


def cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def milliseconds(measured: Row | None) -> str:
    value = (measured or {}).get("ms")
    return cell(value, 8, 4 if value is not None and value < 1 else 3)


def print_gpu(result: Row, dtypes: list[str], peer_names: list[str]) -> None:
    rows = {(r["layer"], r["dtype"], r["layout"]): r for r in result["rows"]}
    print("\nadder2d: ms, T/s and % of the ceiling; % of it in channels_last; us of a call in a CUDA graph")
    print(f"{'layer':<15}{'GMAC':>6}", *(f" {d:>10}: ms {'T/s':>6} {'%':>3} {'nhwc':>4} {'graph':>5}" for d in dtypes))
    for name, facts in result["layers"].items():
        line = f"{name:<15}{facts['gmac']:>6.3f}"
        for dtype in dtypes:
            row, other = rows.get((name, dtype, "nchw"), {}), rows.get((name, dtype, "channels_last"), {})
            percent = [None if "of_ceiling" not in r else 100 * r["of_ceiling"] for r in (row, other)]
            graph = (row or other).get("graph")
            line += f"  {milliseconds(row):>13} {cell(row.get('tera'), 6, 2)} {cell(percent[0], 3, 0)} {cell(percent[1], 4, 0)} "
            line += cell(1e3 * graph["ms"] if graph else None, 5, 1)
        print(line)
    print("\npeers, ms; our factor over the best of them; conv2d, ms; us of the host in one call of adder2d and of conv2d; MB")
    titles = [f"{p if d == 'float32' else p + '16':>11}" for d in ("float32", "float16") for p in peer_names if (d, p) != ("float16", "cdist")]
    print(f"{'layer':<15}", *titles, *(f"{'x ' + d:>10}" for d in dtypes), " conv2d     tf32     fp16  host conv extra")
    for name, facts in result["layers"].items():
        line = [f"{name:<15}"]
        for dtype in ("float32", "float16"):
            for peer in peer_names:
                if (dtype, peer) != ("float16", "cdist"):
                    line.append(f"{milliseconds(facts['peers'].get(dtype, {}).get(peer)):>11}")
        for dtype in dtypes:
            line.append(cell(rows.get((name, dtype, "nchw"), {}).get("of_best_peer"), 10, 1))
        conv = facts.get("conv2d", {})
        line += [milliseconds(conv.get(kind)) for kind in ("float32", "tf32", "float16")]
        ours = rows.get((name, "float32", "nchw"), {})
        extra = max((r["extra_bytes"] for r in result["rows"] if r["layer"] == name), default=None)
        line += [cell(ours.get("host_us"), 4, 0), cell(conv.get("float32", {}).get("host_us"), 4, 0)]
        print(*line, cell(None if extra is None else extra / 1e6, 5, 1))
    reasons: dict[str, list[str]] = {}
    for name, facts in result["layers"].items():
        for dtype, measured in facts["peers"].items():
            for peer, value in measured.items():
                if "skipped" in value:
                    reasons.setdefault(f"{peer} {dtype}: {value['skipped']}", []).append(name)
    for reason, names in reasons.items():
        print(f"left out: {reason} ({', '.join(names) if len(names) < 4 else f'{len(names)} layers'})")
    for dtype, best in result["ceiling"].items():
        print(
            f"ceiling {dtype}: {best['tera']:.2f} T/s ({best['name']}), {100 * best['tera'] / best['issue_limit']:.0f} % of the "
            f"issue limit at {best['megahertz']:.0f} MHz"
        )


def print_cpu(result: Row) -> None:
    names = sorted({peer for row in result["cpu"] for peer in row["peers"]})
    threads = result["cpu"][0]["threads"]
    print(f"\nCPU, float32, {threads} threads: ms and GMAC/s of adder2d; ms of the others")
    print(f"{'layer':<20}{'GMAC':>7}{'ms':>9}{'GMAC/s':>8}{'conv2d':>9}", *(f"{name:>10}" for name in names))
    for row in result["cpu"]:
        line = f"{row['layer']:<20}{row['gmac']:>7.4f} {milliseconds(row)}{row['gmacs']:>8.1f} {milliseconds(row['conv2d'])}"
        print(line, *(f"{milliseconds(row['peers'][name]):>10}" for name in names))
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
    figure, axes = pyplot.subplots(
        len(parts), 1, figsize=(11, 1.5 + 0.42 * sum(lengths)), height_ratios=lengths, squeeze=False, layout="constrained"
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
            ax.axvline(best["tera"], color=colours[dtype], linestyle="--", label=f"ceiling {dtype}, {best['tera']:.1f} T/s")
        conv = [(f["gmac"] / f["conv2d"]["float32"]["ms"], i) for i, f in enumerate(result["layers"].values()) if "conv2d" in f]
        ax.plot(*zip(*conv, strict=True), "k|", markersize=14, label="conv2d float32") if conv else None
        best_peer = [(f["gmac"] / f["best_peer"]["float32"]["ms"], i) for i, f in enumerate(result["layers"].values())
                     if f.get("best_peer", {}).get("float32")]  # fmt: skip
        ax.plot(*zip(*best_peer, strict=True), "rx", label="best peer float32") if best_peer else None
        limit = max([best["issue_limit"] for best in result["ceiling"].values()] + [r["tera"] for r in result["rows"]])
        ax.set(title=result["environment"]["gpu"], xlabel="10^12 accumulated |x - w| a second", xlim=(0, 1.05 * limit))
        ax.set_yticks(range(len(names)), [f"{n}  {result['layers'][n]['shape']}" for n in names], fontsize=8)
        ax.invert_yaxis()
        ax.legend(fontsize=8, loc="lower right")
    if "cpu" in axes_of:
        ax, rows = axes_of["cpu"], result["cpu"]
        ax.barh(range(len(rows)), [r["gmacs"] for r in rows], 0.7, label="adder2d")
        ax.plot([1e3 * r["gmac"] / r["conv2d"]["ms"] for r in rows], range(len(rows)), "k|", markersize=14, label="conv2d")
        others = [[p["ms"] for p in r["peers"].values() if "ms" in p] for r in rows]
        marks = [(1e3 * r["gmac"] / min(ms), i) for i, (r, ms) in enumerate(zip(rows, others, strict=True)) if ms]
        ax.plot(*zip(*marks, strict=True), "rx", label="best peer") if marks else None
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
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="layers by name or pattern, e.g. 'r50-*' 'cpu-*'; default: all")
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
        print_gpu(run.result, args.dtypes, args.peers)
    if run.result["cpu"]:
        print_cpu(run.result)
    print()
    for goal in run.result["goals"]:
        print(f"{goal['verdict']:<8} {goal['goal']}: {goal['measured']}")
    for error in run.errors:
        print(f"FAILED {error}")
    print(f"{run.seconds():.0f} seconds")
    if args.plot:
        plot(run.result, args.plot)
    return 1 if run.errors else 0


if __name__ == "__main__":
    sys.exit(main())
