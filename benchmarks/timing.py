"""One timer for all benchmarks: warm-up, many repetitions, median and spread."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True)
class Spread:
    """Milliseconds of one call over repeated runs: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    runs: int

    @classmethod
    def of(cls, times: list[float]) -> "Spread":
        deciles = statistics.quantiles(times, n=10, method="inclusive")
        return cls(statistics.median(times), deciles[0], deciles[-1], len(times))


class GpuTimer:
    """Times calls on the current CUDA device.

    Args:
        seconds: measuring time to aim at for one number; there are 7 to 50 repetitions.
    """

    def __init__(self, seconds: float = 0.05) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.seconds = seconds
        # Writing this evicts what a call left in the second-level cache.
        self.flush = torch.empty(2 * max(properties.L2_cache_size, 32 << 20), dtype=torch.uint8, device="cuda")

    def cold(self, function: Callable[[], object]) -> Spread:
        """GPU time of one call that finds the second-level cache full of other data, between two CUDA events.

        The GPU spins before the first event until the host has enqueued the whole call: host time does not count.
        """
        host, estimate = self._warm_up(function)
        runs = self._runs(estimate)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, end in events:
            self.flush.zero_()
            torch.cuda._sleep(int(2e9 * min(50e-6 + 2 * host, 20e-3)))  # in cycles
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return Spread.of([start.elapsed_time(end) for start, end in events])

    def replay(self, function: Callable[[], object], calls: int = 20) -> Spread:
        """Time of one call among `calls` of them in a replayed CUDA graph: no launch gaps, and a warm cache."""
        _, estimate = self._warm_up(function)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        graph.replay()
        times = []
        for _ in range(self._runs(calls * estimate)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / calls)
        return Spread.of(times)

    def host(self, function: Callable[[], object], calls: int = 100) -> Spread:
        """Time in which a call returns to Python while the GPU still works."""
        self._warm_up(function)
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        return Spread.of(times)

    def _warm_up(self, function: Callable[[], object]) -> tuple[float, float]:
        """Seconds of a call on the host only, and with the GPU."""
        function()
        function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return host, time.perf_counter() - start

    def _runs(self, estimate: float) -> int:
        return max(7, min(50, int(self.seconds / estimate)))


def warm_up(step: Callable[[], object]) -> None:
    """Runs `step` three times on a stream of its own, as torch requires before a capture in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def cpu_time(function: Callable[[], object], seconds: float = 0.2) -> Spread:
    """Time of one call on the CPU: as many runs as fit `seconds`, at least three, after one that does not count."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 1e3 * seconds:
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return Spread.of(times)
