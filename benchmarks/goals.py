"""Fractions of limit and peers, and what the forward kernels are to reach on an H200."""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

R50 = ["r50-c64", "r50-c128", "r50-c256", "r50-c512"]
POINTWISE = ["r50-1x1-expand", "r50-1x1-reduce"]
R20 = ["r20-stage1", "r20-stage2", "r20-stage3"]
MNIST_B1 = ["mnist1-b1", "mnist2-b1"]
WORKSPACE = 64 << 20  # bytes, the bound of csrc/fprop.cu


class Missing(Exception):
    """A number that a goal needs was not measured."""


# ---- derived numbers


def add_fractions(result: Row) -> None:
    """Adds to each row its speed as a multiple of the ceiling, the best peer and conv2d; to each layer its best peers.

    Half types may as well convert to float32, and bfloat16 has no peers of its own: the best peer of a half type is the
    fastest of all.
    """
    for layer in result["layers"].values():
        found = {
            dtype: [(value["ms"], peer) for peer, value in values.items() if "ms" in value]
            for dtype, values in layer["peers"].items()
        }
        single, half = found.get("float32", []), found.get("float16", [])
        layer["best_peer"] = {}
        for dtype, times in (("float32", single), ("float16", single + half), ("bfloat16", single + half)):
            if times:
                layer["best_peer"][dtype] = dict(zip(("ms", "name"), min(times), strict=True))
    for row in result["rows"]:
        limit = result["ceiling"].get("float32" if row["dtype"] == "float32" else "float16")
        if limit:
            row["of_ceiling"] = row["tera"] / limit["tera"]
        layer = result["layers"][row["layer"]]
        best = layer["best_peer"].get(row["dtype"])
        if best:
            row["of_best_peer"] = best["ms"] / row["ms"]
        conv = layer.get("conv2d", {}).get("float32" if row["dtype"] == "float32" else "float16")
        if conv:
            row["of_conv2d"] = conv["ms"] / row["ms"]


# ---- goals


class Numbers:
    """The numbers of a result by name. Raises Missing for those that were not measured."""

    def __init__(self, result: Row) -> None:
        self.result = result
        self.rows = {(r["layer"], r["dtype"]): r for r in result["rows"] if r["layout"] == "nchw"}
        self.cpu = {row["layer"]: row for row in result["cpu"]}

    def __call__(self, layers: list[str], dtype: str, key: str) -> list[float]:
        values = [self.rows.get((layer, dtype), {}).get(key) for layer in layers]
        if None in values:
            raise Missing(f"{layers[values.index(None)]} {dtype} {key}")
        return values  # type: ignore[return-value]

    def conv2d(self, layers: list[str], kind: str) -> list[Row]:
        found = [self.result["layers"].get(layer, {}).get("conv2d", {}).get(kind) for layer in layers]
        if None in found:
            raise Missing(f"{layers[found.index(None)]} conv2d {kind}")
        return found

    def cpu_row(self, layer: str) -> Row:
        if layer not in self.cpu:
            raise Missing(layer)
        return self.cpu[layer]


def _percent(values: list[float]) -> str:
    return ", ".join(f"{100 * value:.1f} %" for value in values)


def _times(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}x" for value in values)


def _r50_float32(n: Numbers) -> tuple[bool, str]:
    values = n(R50, "float32", "of_ceiling")
    mean = sum(values) / len(values)
    return mean >= 0.85 and min(values) >= 0.80, f"{_percent(values)}; mean {100 * mean:.1f} %"


def _r50_conv2d(n: Numbers) -> tuple[bool, str]:
    ratios = [conv["ms"] / ms for conv, ms in zip(n.conv2d(R50, "float32"), n(R50, "float32", "ms"), strict=True)]
    return sum(ratio > 1 for ratio in ratios) >= 2, _times(ratios)


def _fractions(layers: list[str], dtype: str, least: float) -> Callable[[Numbers], tuple[bool, str]]:
    def evaluate(n: Numbers) -> tuple[bool, str]:
        values = n(layers, dtype, "of_ceiling")
        return min(values) >= least, _percent(values)

    return evaluate


def _speed_up(layers: list[str], dtype: str, over: str, least: float) -> Callable[[Numbers], tuple[bool, str]]:
    def evaluate(n: Numbers) -> tuple[bool, str]:
        ratios = [a / b for a, b in zip(n(layers, dtype, "tera"), n(layers, over, "tera"), strict=True)]
        return min(ratios) >= least, _times(ratios)

    return evaluate


def _batch1(n: Numbers) -> tuple[bool, str]:
    alone = n([f"{layer}-b1" for layer in R50], "float32", "tera")
    ratios = [a / b for a, b in zip(alone, n(R50, "float32", "tera"), strict=True)]
    return min(ratios) >= 0.5, _times(ratios)


def _mnist(n: Numbers) -> tuple[bool, str]:
    times = [1e3 * graph["ms"] for graph in n(MNIST_B1, "float32", "graph")]  # type: ignore[index]
    cold = [1e3 * ms for ms in n(MNIST_B1, "float32", "ms")]
    text = ", ".join(f"{t:.1f} us" for t in times) + f" (cold: {', '.join(f'{t:.1f}' for t in cold)})"
    return max(times) <= 6, text


def _cpu(n: Numbers) -> tuple[bool, str]:
    rows = [n.cpu_row("cpu-r20-stage1"), n.cpu_row("cpu-r50-c64")]
    if rows[0]["threads"] != 2:
        raise Missing("CPU rows on 2 threads")
    slower = rows[1]["ms"] / rows[1]["conv2d"]["ms"]
    text = f"{rows[0]['gmacs']:.1f} and {rows[1]['gmacs']:.1f} GMAC/s, {slower:.1f}x conv2d's time"
    return min(row["gmacs"] for row in rows) >= 25 and slower <= 4, text


def _peers(n: Numbers) -> tuple[bool, str]:
    rows = [row for row in n.result["rows"] if "of_best_peer" in row]
    if not rows:
        raise Missing("a row with a peer")
    worst = sorted(rows, key=lambda row: row["of_best_peer"])
    below = sum(row["of_best_peer"] < 5 for row in rows)
    text = ", ".join(f"{row['layer']} {row['dtype']} {row['of_best_peer']:.1f}x" for row in worst[:3])
    layers = {row["layer"]: n.result["layers"][row["layer"]]["peers"].get("float32", {}) for row in rows}
    without = sum("ms" not in measured.get("compile", {}) for measured in layers.values())
    text += f"; {without} layers without torch.compile" if without else ""
    return below == 0, f"{below} of {len(rows)} rows below 5x; lowest: {text}"


def _memory(n: Numbers) -> tuple[bool, str]:
    if not n.result["rows"]:
        raise Missing("a GPU row")
    worst = max(n.result["rows"], key=lambda row: row["extra_bytes"])
    name = f"{worst['layer']} {worst['dtype']} {worst['layout']}"
    return worst["extra_bytes"] <= WORKSPACE, f"at most {worst['extra_bytes'] / 1e6:.1f} MB ({name})"


def _host(n: Numbers) -> tuple[bool, str]:
    pairs = []
    for (layer, dtype), row in n.rows.items():
        conv = n.result["layers"][layer].get("conv2d", {}).get("float32")
        if dtype == "float32" and conv:
            pairs.append((row["host_us"] / conv["host_us"], layer, row["host_us"], conv["host_us"]))
    if not pairs:
        raise Missing("a float32 row with conv2d")
    ratio, layer, ours, conv_us = max(pairs)
    return ratio <= 2, f"at most {ratio:.2f}x ({layer}: {ours:.1f} us, conv2d {conv_us:.1f} us)"


GOALS: dict[str, Callable[[Numbers], tuple[bool, str]]] = {
    "float32, ResNet-50 3x3: mean >= 85 % of the ceiling, each >= 80 %": _r50_float32,
    "float32, ResNet-50 3x3: faster than conv2d float32 on two": _r50_conv2d,
    "float32, 1x1: >= 75 %": _fractions(POINTWISE, "float32", 0.75),
    "float32, ResNet-20: >= 65 %": _fractions(R20, "float32", 0.65),
    "float16, ResNet-50 3x3: >= 65 % of its ceiling": _fractions(R50, "float16", 0.65),
    "float16, ResNet-50 3x3: >= 1.5x our float32": _speed_up(R50, "float16", "float32", 1.5),
    "bfloat16, ResNet-50 3x3: >= 0.9x float16": _speed_up(R50, "bfloat16", "float16", 0.9),
    "batch 1, ResNet-50 3x3, float32: >= 0.5x the throughput of batch 32": _batch1,
    "AdderNetMnist at batch 1, float32, in a CUDA graph: <= 6 us": _mnist,
    "CPU, 2 threads: >= 25 GMAC/s, and within 4x of conv2d at 1x64x56x56": _cpu,
    "every row >= 5x the best peer": _peers,
    "memory beyond the output: a workspace of at most 64 MiB": _memory,
    "host time: <= 2x conv2d": _host,
}


def goals(result: Row) -> list[Row]:
    """Each goal with its verdict, "met", "NOT MET" or "unknown", and its numbers."""
    numbers = Numbers(result)
    table = []
    for goal, evaluate in GOALS.items():
        try:
            met, measured = evaluate(numbers)
            verdict = "met" if met else "NOT MET"
        except Missing as what:
            verdict, measured = "unknown", f"not measured: {what}"
        table.append({"goal": goal, "verdict": verdict, "measured": measured})
    return table
