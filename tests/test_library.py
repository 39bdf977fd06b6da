"""library.py: what a user reads when the shared library is missing or wrong."""

import ctypes

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


def test_packed_bytes_are_the_struct():
    problem = library.PROBLEM.pack(*range(1, 29))
    params = library.Adder2dParams.from_buffer_copy(problem + library.POINTERS.pack(31, 32, 33, 34, 35, 36))
    assert (params.N, params.W, params.K, params.Q, params.stride_h, params.groups) == (1, 4, 5, 9, 10, 16)
    assert (params.x_type, params.reserved, *params.x_stride, *params.y_stride) == (17, 20, *range(21, 29))
    assert (params.x, params.w, params.b, params.y, params.workspace, params.workspace_bytes) == tuple(range(31, 37))


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
