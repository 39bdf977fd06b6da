"""The build: what the shared library exports and needs, the wheel around it, and what a build that cannot work says."""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from processes import ROOT

import torch2trt_adder
from torch2trt_adder import library

PACKAGE = ROOT / "torch2trt_adder"

HEADER = (ROOT / "csrc" / "adder2d.h").read_text()
EXPORTS = {
    *re.findall(r'visibility\("default"\)\)\) [^(]*?(\w+)\(', HEADER),  # the operator's
    "adder2d_register_plugin",  # for plugin.py
    *("getCreators", "getPluginCreators", "setLoggerFinder"),  # for TensorRT
}

needs_nvcc = pytest.mark.skipif(
    not (os.environ.get("CUDA_HOME") or shutil.which("nvcc") or os.path.exists("/usr/local/cuda/bin/nvcc")),
    reason="no nvcc on this machine",
)


def tool(name: str, *arguments: object) -> str:
    """What a tool of binutils prints; they come with g++."""
    if shutil.which(name) is None:
        pytest.skip(f"no {name} on this machine")
    return subprocess.run([name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def setup(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *map(str, arguments)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


# ---- the library


def test_exports_exactly_the_interface():
    assert {"adder2d_fprop", "adder2d_fprop_cpu"} < EXPORTS
    lines = tool("nm", "--dynamic", "--defined-only", library.path()).splitlines()
    assert {line.split()[-1] for line in lines} == EXPORTS


def test_needs_nothing_but_the_system():
    needed = re.findall(r"NEEDED.*\[(.*)\]", tool("readelf", "--dynamic", library.path()))
    system = r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux-[\w-]+)\.so\.\d+"
    assert needed
    assert [name for name in needed if not re.fullmatch(system, name)] == []


def test_undefined_symbols_are_the_systems():
    """So nothing of TensorRT, torch, Python or the CUDA runtime is looked up when the library is loaded."""
    lines = [line.split() for line in tool("nm", "--dynamic", "--undefined-only", library.path()).splitlines()]
    undefined = [name for kind, name in lines if kind == "U"]  # the rest is weak
    assert any(name.startswith("malloc@") for name in undefined)
    assert [name for name in undefined if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)] == []


def test_libstdcxx_of_common_python_distributions_is_new_enough():
    versions = re.findall(r"GLIBCXX_(\d+)\.(\d+)\.(\d+)", tool("nm", "--dynamic", library.path()))
    assert max(tuple(map(int, version)) for version in versions) <= (3, 4, 25)  # that of torch's own wheels


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set on this architecture")
@pytest.mark.parametrize("isa, registers", [("Baseline", "xmm"), ("Avx2", "ymm"), ("Avx512", "zmm")])
def test_contains_the_kernel_of_each_instruction_set(isa, registers):
    names = re.findall(rf"\S*{len(isa)}{isa}3run\S*", tool("nm", library.path()))
    assert len(names) >= 8
    for name in names:
        code = tool("objdump", "--no-show-raw-insn", f"--disassemble={name}", library.path())
        assert re.search(rf"subps .*%{registers}", code), name
        assert set(re.findall(r"%([xyz]mm)\d", code)) <= {"xmm", registers}, name


# ---- the wheel


@needs_nvcc
def test_wheel(tmp_path):
    result = setup(
        "build", "--build-base", tmp_path / "build", "egg_info", "--egg-base", tmp_path, "bdist_wheel", "-d", tmp_path
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"torch2trt_adder-{torch2trt_adder.__version__}-py3-none-linux_{platform.machine()}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
        assert names == modules | {"torch2trt_adder/libtorch2trt_adder.so", "torch2trt_adder/py.typed"}
        assert archive.read("torch2trt_adder/libtorch2trt_adder.so")[:4] == b"\x7fELF"
        info = f"torch2trt_adder-{torch2trt_adder.__version__}.dist-info"
        assert "torch2trt-adder = torch2trt_adder.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        assert "Requires-Dist: torch>=2.4" in archive.read(f"{info}/METADATA").decode()


def test_source_distribution(tmp_path):
    """It holds all that its own tests, examples and documents need."""
    result = setup("-q", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    folders = ("torch2trt_adder", "csrc", "benchmarks", "docs", "examples", "tests")
    wanted = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert {"README.md", "LICENSE", "pyproject.toml", "setup.py", "torch2trt_adder/py.typed"} <= names
    assert wanted - names == set()


# ---- for which GPUs it builds

# Stands in for the NVIDIA driver, which shows what GPUs there are.
DRIVER = """
extern "C" {
int cuInit(unsigned) { return STATUS; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { *value = attribute == 75 ? MAJOR : 0; return 0; }
}
"""


def gencode_flags(tmp_path: pathlib.Path, archs: str, major: int = 9, status: int = 0) -> str:
    """What setup.py prints, and the flags that it gives nvcc, on a machine whose driver shows two GPUs `major`.0."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    subprocess.run(
        ["g++", "-shared", "-fPIC", f"-DMAJOR={major}", f"-DSTATUS={status}", "driver.cpp", "-o", "libcuda.so.1"],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    code = (
        "import runpy, sys; sys.argv = ['setup.py', '--version']; build = runpy.run_path('setup.py'); "
        "print(*build['gencode_flags'](build['find_nvcc']()))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "TORCH2TRT_ADDER_ARCHS": archs},
    ).stdout  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("archs", ["", "native"])
def test_builds_for_the_visible_gpus(tmp_path, archs):
    printed = gencode_flags(tmp_path, archs)
    assert printed.endswith("-gencode=arch=compute_90,code=[sm_90,compute_90]\n")
    assert ("TORCH2TRT_ADDER_ARCHS=all" in printed) == (archs == "")


@needs_nvcc
@pytest.mark.parametrize("archs, major, status", [("all", 9, 0), ("", 99, 0), ("", 9, 100)])
def test_builds_for_all_generations(tmp_path, archs, major, status):
    """Where it is asked to, where nvcc does not know the GPU, and where the driver shows none."""
    printed = gencode_flags(tmp_path, archs, major, status)
    assert {"arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90"} <= set(re.findall(r"arch=\S+", printed))


# ---- builds that cannot work


def failing_build(tmp_path: pathlib.Path, **environment: str) -> str:
    result = setup("-q", "build_ext", "--build-lib", tmp_path, **environment)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert list(tmp_path.rglob("*.so")) == []
    return result.stderr


def test_cuda_home_without_nvcc(tmp_path):
    stderr = failing_build(tmp_path, CUDA_HOME=str(tmp_path), PATH="")
    assert f"CUDA_HOME is {tmp_path}, but {tmp_path}/bin/nvcc does not exist: point CUDA_HOME at" in stderr


@pytest.mark.skipif(os.path.exists("/usr/local/cuda/bin/nvcc"), reason="/usr/local/cuda has an nvcc")
def test_no_nvcc(tmp_path):
    stderr = failing_build(tmp_path, CUDA_HOME="", PATH="")
    assert "nvcc was not found: install a CUDA toolkit" in stderr and "pip install 'nvidia-cuda-nvcc==" in stderr


@needs_nvcc
def test_no_host_compiler(tmp_path):
    stderr = failing_build(tmp_path, CXX="no-such-g++")
    assert "The C++ compiler no-such-g++ was not found: install it" in stderr


@needs_nvcc
def test_unknown_architecture(tmp_path):
    stderr = failing_build(tmp_path, TORCH2TRT_ADDER_ARCHS="80;20")
    assert "TORCH2TRT_ADDER_ARCHS names '20'" in stderr and "choose from" in stderr and "80" in stderr


@needs_nvcc
def test_native_architecture_without_gpu(tmp_path):
    stderr = failing_build(tmp_path, TORCH2TRT_ADDER_ARCHS="native", CUDA_VISIBLE_DEVICES="-1")
    assert "the driver shows no GPU here: name the architecture" in stderr
