"""What all tests share: markers and named problems. Results are compared by torch2trt_adder.numerics."""

import dataclasses
import importlib.util
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# ---- markers

_MARKERS = {
    "gpu": "needs an NVIDIA GPU and a CUDA build of torch",
    "tensorrt": "needs the tensorrt package",
    "torch2trt": "needs the torch2trt package",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in _MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = {"gpu": torch.cuda.is_available()}
    there.update({name: importlib.util.find_spec(name) is not None for name in ("tensorrt", "torch2trt")})
    for item in items:
        for name, meaning in _MARKERS.items():
            if item.get_closest_marker(name) and not there[name]:
                item.add_marker(pytest.mark.skip(reason=meaning))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


# ---- Ctrl-C


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---- CUDA graphs


def warm_up(step: Callable[[], object]) -> None:
    """Runs it three times on a stream of its own, as torch asks for before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


# ---- named problems

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: x [N, C, H, W], w [K, C / groups, R, S]."""

    name: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair, int]:
        return self.stride, self.padding, self.dilation, self.groups

    def tensors(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, w, b: normal draws, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(seed)
        sizes = (self.N, self.C, self.H, self.W), (self.K, self.C // self.groups, self.R, self.S), (self.K,)
        x, w, b = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
        return x.contiguous(memory_format=memory_format), w, b


# Odd sizes on purpose: none is a multiple of a tile.
CASES = [
    Case("pointwise", 2, 7, 5, 9, 5, 1, 1),
    Case("first_layer", 3, 1, 13, 11, 20, 5, 5),
    Case("three_by_three", 2, 16, 11, 9, 17, 3, 3, padding=(1, 1)),
    Case("stride_two", 3, 19, 15, 14, 33, 3, 3, stride=(2, 2), padding=(1, 1)),
    Case("per_axis", 2, 6, 17, 12, 10, 3, 2, stride=(2, 3), padding=(0, 2), dilation=(2, 1)),
    Case("stride_beyond_kernel", 2, 5, 14, 13, 6, 2, 1, stride=(3, 4)),
    Case("depthwise", 2, 23, 9, 10, 23, 3, 3, padding=(1, 1), groups=23),
    Case("depthwise_multiplier", 2, 5, 9, 10, 15, 3, 3, stride=(2, 1), groups=5),
    Case("groups", 1, 24, 7, 7, 36, 3, 3, padding=(1, 1), dilation=(1, 2), groups=3),
    Case("kernel_is_image", 131, 3, 4, 5, 7, 4, 5),
    Case("one_filter", 2, 5, 8, 8, 1, 3, 3),
    Case("one_row", 1, 3, 1, 37, 5, 1, 3, padding=(0, 1)),
    Case("mostly_padding", 1, 2, 3, 3, 3, 2, 2, padding=(4, 5)),
    Case("wide", 2, 512, 7, 7, 129, 3, 3, padding=(1, 1)),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param
