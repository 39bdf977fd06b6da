"""library.py: what a user reads when the shared library is missing or wrong."""

import ctypes
import re

import pytest

from torch2trt_adder import library


@pytest.fixture
def fresh_load():
    """load() as in a new process."""
    library.load.cache_clear()
    yield library.load
    library.load.cache_clear()


def test_struct_matches_header():
    assert library.load().adder2d_params_size() == ctypes.sizeof(library.Adder2dParams)
    assert library.PROBLEM.size + library.POINTERS.size == ctypes.sizeof(library.Adder2dParams)
    assert library.PROBLEM.size == library.Adder2dParams.x.offset
    assert library.load().adder2d_dgrad_params_size() == ctypes.sizeof(library.Adder2dDgradParams)
    assert library.Adder2dDgradParams.dx_type.offset == ctypes.sizeof(library.Adder2dParams)
    assert library.DGRAD.size + ctypes.sizeof(library.Adder2dParams) == ctypes.sizeof(library.Adder2dDgradParams)
    assert library.load().adder2d_wgrad_params_size() == ctypes.sizeof(library.Adder2dWgradParams)
    assert library.WGRAD.size == library.Adder2dWgradParams.dy.offset
    assert library.WGRAD.size + library.POINTERS.size == ctypes.sizeof(library.Adder2dWgradParams)


def test_packed_bytes_are_the_struct():
    problem = library.PROBLEM.pack(*range(1, 29))
    params = library.Adder2dParams.from_buffer_copy(problem + library.POINTERS.pack(31, 32, 33, 34, 35, 36))
    assert (params.N, params.W, params.K, params.Q, params.stride_h, params.groups) == (1, 4, 5, 9, 10, 16)
    assert (params.x_type, params.reserved, *params.x_stride, *params.y_stride) == (17, 20, *range(21, 29))
    assert (params.x, params.w, params.b, params.y, params.workspace, params.workspace_bytes) == tuple(range(31, 37))

    problem = library.WGRAD.pack(*range(1, 19), 19.5)
    params = library.Adder2dWgradParams.from_buffer_copy(problem + library.POINTERS.pack(31, 32, 33, 34, 35, 36))
    assert (params.N, params.Q, params.C, params.S, params.channels_last, params.w_type) == (1, 4, 5, 7, 8, 10)
    assert (*params.dy_stride, *params.convolved_stride, params.eta) == (*range(11, 19), 19.5)
    assert (params.dy, params.convolved, params.w, params.dw, params.workspace) == tuple(range(31, 36))


WGRAD = {"N": 2, "K": 3, "P": 4, "Q": 5, "C": 6, "R": 3, "S": 3, "eta": 0.2}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"N": -1}, r"dy must be \[N >= 0, K >= 1, P >= 1, Q >= 1\], got \[-1, 3, 4, 5\]"),
        ({"S": 0}, "weight must have C, R, S >= 1, got C 6, R 3, S 0"),
        ({"channels_last": 2}, "channels_last must be 0 or 1, got 2"),
        ({"w_type": 3}, "types must be .* got dy 0, w 3"),
        ({"eta": -0.5}, "eta must be finite and not below 0, got -0.5"),
        ({"eta": float("nan")}, "eta must be finite and not below 0, got -?nan"),
        ({"eta": float("inf")}, "eta must be finite and not below 0, got inf"),
        ({"P": 1 << 16, "Q": 1 << 15}, "one output map must be below 2\\^31 elements"),
        ({"C": 1 << 30}, "one filter must be below 2\\^31 elements"),
    ],
)
def test_wgrad_check(change, reason):
    loaded = library.load()
    assert loaded.adder2d_wgrad_check(ctypes.byref(library.Adder2dWgradParams(**WGRAD))) is None
    bad = library.Adder2dWgradParams(**WGRAD | change)
    assert re.search(reason, loaded.adder2d_wgrad_check(ctypes.byref(bad)).decode())
    assert loaded.adder2d_wgrad_workspace(ctypes.byref(bad)) == 0
    assert loaded.adder2d_wgrad_finish(ctypes.byref(bad), None) == 1


def test_wgrad_without_its_workspace():
    params = library.Adder2dWgradParams(**WGRAD)
    assert library.load().adder2d_wgrad_workspace(ctypes.byref(params)) == 3 * (8 + 4)  # squares and a sum a filter
    assert library.load().adder2d_wgrad_finish(ctypes.byref(params), None) == 1


def test_missing(fresh_load, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH2TRT_ADDER_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(
        RuntimeError, match=r"looked for at .*nothing\.so and is not there: build it with `pip install \.`"
    ):
        fresh_load()


def test_not_a_library(fresh_load, monkeypatch, tmp_path):
    file = tmp_path / "text.so"
    file.write_text("no ELF")
    monkeypatch.setenv("TORCH2TRT_ADDER_LIBRARY", str(file))
    with pytest.raises(RuntimeError, match=r"text\.so cannot be used .*build it"):
        fresh_load()


def test_other_version_of_the_header(fresh_load, monkeypatch):
    class Longer(library.Adder2dParams):
        _fields_ = [("more", ctypes.c_int64)]

    monkeypatch.setattr(library, "Adder2dParams", Longer)
    size = ctypes.sizeof(Longer)
    with pytest.raises(
        RuntimeError, match=rf"another version of adder2d\.h \(Adder2dParams has {size - 8} bytes there, {size} here\)"
    ):
        fresh_load()
