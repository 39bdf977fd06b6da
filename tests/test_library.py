"""library.py: what a user reads when the shared library is missing or wrong."""

import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

import torch2trt_adder
from torch2trt_adder import library

PACKAGE = pathlib.Path(torch2trt_adder.__file__).parent


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
    assert library.Adder2dWgradParams.channels_last.offset == ctypes.sizeof(library.Adder2dParams)
    assert library.WGRAD.size + ctypes.sizeof(library.Adder2dParams) == ctypes.sizeof(library.Adder2dWgradParams)


def test_packed_bytes_are_the_struct():
    problem = library.PROBLEM.pack(*range(1, 29))
    params = library.Adder2dParams.from_buffer_copy(problem + library.POINTERS.pack(31, 32, 33, 34, 35, 36, 37, 38))
    assert (params.N, params.W, params.K, params.Q, params.stride_h, params.groups) == (1, 4, 5, 9, 10, 16)
    assert (params.x_type, params.reserved, *params.x_stride, *params.y_stride) == (17, 20, *range(21, 29))
    assert (params.x, params.w, params.b, params.y, params.workspace, params.workspace_bytes) == tuple(range(31, 37))
    assert (params.epilogue, params.packed_w) == (37, 38)

    layer = problem + library.POINTERS.pack(31, 32, 33, 34, 35, 36, 37, 38)
    params = library.Adder2dWgradParams.from_buffer_copy(layer + library.WGRAD.pack(*range(1, 7), 7.5, 8, 9))
    assert (params.layer.N, params.layer.workspace_bytes, params.channels_last, params.reserved) == (1, 36, 1, 2)
    assert (*params.convolved_stride, params.eta, params.convolved, params.dw) == (3, 4, 5, 6, 7.5, 8, 9)


LAYER = {"N": 2, "C": 6, "H": 6, "W": 7, "K": 3, "R": 3, "S": 3, "P": 4, "Q": 5, "groups": 1, "w_type": 0}
LAYER |= dict.fromkeys(("stride_h", "stride_w", "dil_h", "dil_w"), 1)
WGRAD = {"channels_last": 0, "reserved": 0, "eta": 0.2}


def wgrad_params(**changes):
    layer, wgrad = ({name: changes.get(name, value) for name, value in part.items()} for part in (LAYER, WGRAD))
    return library.Adder2dWgradParams(library.Adder2dParams(**layer), **wgrad)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"N": -1}, r"input must be \[N >= 0, C >= 1, H >= 1, W >= 1\], got \[-1, 6, 6, 7\]"),
        ({"S": 0}, "weight must have K, R, S >= 1, got K 3, R 3, S 0"),
        ({"Q": 6}, "the output must be 4x5, got 4x6"),
        ({"w_type": 3}, "types must be .* got x 0, w 3, y 0"),
        ({"channels_last": 2}, "channels_last must be 0 or 1, got 2"),
        ({"reserved": 1}, "reserved must be 0, got 1"),
        ({"eta": -0.5}, "eta must be finite and not below 0, got -0.5"),
        ({"eta": float("nan")}, "eta must be finite and not below 0, got -?nan"),
        ({"eta": float("inf")}, "eta must be finite and not below 0, got inf"),
        (
            {"H": 1 << 16, "P": (1 << 16) - 2, "W": 1 << 16, "Q": (1 << 16) - 2},
            "one output map must be below 2\\^31 elements",
        ),
        ({"C": 1 << 30}, "one filter must be below 2\\^31 elements"),
    ],
)
def test_wgrad_check(change, reason):
    loaded = library.load()
    assert loaded.adder2d_wgrad_check(ctypes.byref(wgrad_params())) is None
    bad = ctypes.byref(wgrad_params(**change))
    assert re.search(reason, loaded.adder2d_wgrad_check(bad).decode())
    assert loaded.adder2d_wgrad_takes(bad) == 0
    assert loaded.adder2d_wgrad_workspace(bad) == 0
    assert loaded.adder2d_wgrad(bad, None) == 1


def test_wgrad_without_its_workspace():
    params = wgrad_params()
    assert library.load().adder2d_wgrad_workspace(ctypes.byref(params)) == 3 * (8 + 4)  # squares and a sum a filter
    params.convolved = 1  # not looked at
    assert library.load().adder2d_wgrad(ctypes.byref(params), None) == 1


def test_wgrad_without_a_convolution():
    """Three filters are too few for a kernel of our own, which a caller must have asked before."""
    params = wgrad_params()
    assert library.load().adder2d_wgrad_takes(ctypes.byref(params)) == 0
    params.layer.workspace_bytes = 1 << 20
    assert library.load().adder2d_wgrad(ctypes.byref(params), None) == 1


def test_missing(fresh_load, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH2TRT_ADDER_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(
        RuntimeError, match=r"looked for at .*nothing\.so and is not there: build it with `pip install \.`"
    ):
        fresh_load()


def test_a_relative_override(fresh_load, monkeypatch, tmp_path):
    """A bare name, which the dynamic linker would look up in the system's folders."""
    shutil.copy(library.path(), tmp_path / "renamed.so")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH2TRT_ADDER_LIBRARY", "renamed.so")
    assert fresh_load()._name == str(tmp_path.resolve() / "renamed.so")


# ---- Python started in a clone, whose package folder has no library


@pytest.fixture
def clone(tmp_path) -> pathlib.Path:
    """A clone after `pip install .`: the sources, and the *.egg-info that the build left in it."""
    folder = tmp_path / "clone"
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    info = folder / "torch2trt_adder.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_text(
        f"Metadata-Version: 2.1\nName: torch2trt_adder\nVersion: {torch2trt_adder.__version__}\n"
    )
    return folder


@pytest.fixture
def install(tmp_path) -> Callable[..., pathlib.Path]:
    """Makes a folder of packages as pip leaves it, and returns it."""

    def make(version: str = torch2trt_adder.__version__, library_too: bool = True) -> pathlib.Path:
        site = tmp_path / f"site-{version}"
        shutil.copytree(PACKAGE, site / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        if library_too:
            shutil.copy(library.path(), site / PACKAGE.name / library.FILE_NAME)
        info = site / f"torch2trt_adder-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch2trt_adder\nVersion: {version}\n")
        return site

    return make


def python(clone: pathlib.Path, site: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the clone's folder, where the installed packages come after the folder itself."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("TORCH2TRT_ADDER_LIBRARY", None)
    return subprocess.run([sys.executable, *arguments], cwd=clone, env=environment, capture_output=True, text=True)


COMPUTE = """
import torch, torch2trt_adder
from torch2trt_adder import library
y = torch2trt_adder.adder2d(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3))
print(torch2trt_adder.__file__, library.path(), y.item(), sep="\\n")
"""


def test_in_a_clone_the_installed_library_serves(clone, install):
    site = install()
    result = python(clone, site, "-c", COMPUTE)
    assert result.returncode == 0, result.stderr
    imported, file, y = result.stdout.split()
    assert imported == str(clone / "torch2trt_adder" / "__init__.py")
    assert file == str(site / "torch2trt_adder" / library.FILE_NAME) and float(y) == -18


def test_in_a_clone_its_own_library_comes_first(clone, install):
    own = clone / "torch2trt_adder" / library.FILE_NAME
    shutil.copy(library.path(), own)
    result = python(clone, install(), "-c", COMPUTE)
    assert result.stdout.split()[1:] == [str(own), "-18.0"], result.stderr


@pytest.mark.parametrize("version, library_too", [("0.0.1", True), (torch2trt_adder.__version__, False)])
def test_in_a_clone_without_a_library_that_fits(clone, install, version, library_too):
    """The sentence lists both places; one that holds another version's library says so."""
    site = install(version, library_too)
    result = python(clone, site, "-c", COMPUTE)
    assert result.returncode == 1
    other = f" (of version 0.0.1, while {clone}/torch2trt_adder is version {torch2trt_adder.__version__})"
    assert (
        f"looked for at {clone}/torch2trt_adder/{library.FILE_NAME} and {site}/torch2trt_adder/{library.FILE_NAME}"
        f"{other if version == '0.0.1' else ''}"
    ) in result.stderr
    assert "is not there: build it with `pip install .`" in result.stderr


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
