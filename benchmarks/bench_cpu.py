"""Times the CPU forward pass beside what else a user could call: median over repeated runs, float32.

    python benchmarks/bench_cpu.py [--threads 2] [--seconds 1] [layer ...]

Peers: `reference` is the formula as AdderNet's published code computes it (unfold, one broadcast over all filters),
`cdist` is torch.cdist(p=1) on unfolded columns, `conv2d` is PyTorch's convolution of the same shape, as a yardstick.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import torch2trt_adder

# name: N, C, H = W, K, R = S, stride, padding, groups
LAYERS = {
    "resnet20-stage1": (8, 16, 32, 16, 3, 1, 1, 1),
    "resnet20-stage3": (8, 64, 8, 64, 3, 1, 1, 1),
    "resnet50-3x3-56": (1, 64, 56, 64, 3, 1, 1, 1),
    "resnet50-3x3-28": (1, 128, 28, 128, 3, 1, 1, 1),
    "resnet50-3x3-14": (1, 256, 14, 256, 3, 1, 1, 1),
    "resnet50-3x3-7": (1, 512, 7, 512, 3, 1, 1, 1),
    "resnet50-1x1-56": (1, 64, 56, 256, 1, 1, 0, 1),
    "stride-2": (8, 32, 32, 64, 3, 2, 1, 1),
    "depth-wise": (8, 64, 32, 64, 3, 1, 1, 64),
    "mnist-1": (64, 1, 28, 20, 5, 1, 0, 1),
    "mnist-2": (64, 20, 12, 50, 5, 1, 0, 1),
}
PEERS = "cdist", "reference", "conv2d"
TEMPORARY_LIMIT = 4 << 30  # bytes: a peer that would need more is left out


def reference(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    columns = F.unfold(x, w.shape[2:], padding=padding, stride=stride)  # [N, CRS, PQ]
    return -(columns[:, None] - w.flatten(1)[None, :, :, None]).abs().sum(2)


def cdist(x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
    columns = F.unfold(x, w.shape[2:], padding=padding, stride=stride)
    return -torch.cdist(w.flatten(1), columns.mT, p=1)


def median_ms(function: Callable[[], Tensor], seconds: float) -> float:
    """Median over as many runs as fit `seconds`, at least three, after one that does not count."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def cpu_name() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="*", metavar="layer", help=f"of {', '.join(LAYERS)}; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time per number")
    args = parser.parse_args()
    unknown = sorted(set(args.layers) - set(LAYERS))
    if unknown:
        parser.error(f"unknown layer {unknown[0]!r}; choose from {', '.join(LAYERS)}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    print(f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, float32 forward, median ms")
    print(f"{'layer':<16} {'N,C,HxW,K,RxS':<22} {'adder2d':>9} {'GMAC/s':>7}", *(f"{peer:>9}" for peer in PEERS))
    for name in args.layers or LAYERS:
        N, C, H, K, R, stride, padding, groups = LAYERS[name]
        x, w = torch.randn(N, C, H, H), torch.randn(K, C // groups, R, R)
        y = torch2trt_adder.adder2d(x, w, None, stride, padding, 1, groups)
        macs = y.numel() * w[0].numel()
        peers = {"cdist": cdist, "reference": reference} if groups == 1 else {}
        peers = {peer: f for peer, f in peers.items() if peer != "reference" or 8 * macs < TEMPORARY_LIMIT}
        for f in peers.values():
            torch.testing.assert_close(f(x, w, stride, padding).view_as(y), y, rtol=1e-4, atol=1e-3)
        ours = median_ms(lambda: torch2trt_adder.adder2d(x, w, None, stride, padding, 1, groups), args.seconds)
        other = {peer: median_ms(lambda: f(x, w, stride, padding), args.seconds) for peer, f in peers.items()}
        other["conv2d"] = median_ms(lambda: F.conv2d(x, w, None, stride, padding, 1, groups), args.seconds)
        shape = f"{N},{C},{H}x{H},{K},{R}x{R}"
        columns = (f"{other[peer]:>9.3f}" if peer in other else f"{'-':>9}" for peer in PEERS)
        print(f"{name:<16} {shape:<22} {ours:>9.3f} {macs / ours / 1e6:>7.1f}", *columns, flush=True)


if __name__ == "__main__":
    main()
