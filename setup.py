"""Compiles csrc/ into torch2trt_adder/libtorch2trt_adder.so with nvcc and g++.

    pip install .                           # or -e . ; without a CUDA toolkit pip fetches nvcc for the build
    python setup.py build_ext --inplace     # the library alone, for development

Environment variables:
    TORCH2TRT_ADDER_ARCHS  GPU architectures: "90" or "80;90"; "native" for the GPUs of this machine; "all" for every
                           generation in ALL_ARCHS that nvcc knows. Default: "native" where the driver shows a GPU that
                           nvcc knows, as PyTorch's own extensions do, else "all".
    CUDA_HOME              the CUDA toolkit (11.8 or newer). Default: nvcc of PATH, /usr/local/cuda, or pip's wheels.
    CXX                    the host compiler. Default: g++.
    MAX_JOBS               compiler processes at a time. Default: the number of CPU cores.
"""

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "torch2trt_adder.libtorch2trt_adder"  # as a module path: torch2trt_adder/libtorch2trt_adder.so

# One release throughout: left free, pip pairs an nvcc with newer headers that it cannot read.
NVCC_WHEELS = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-runtime", "nvvm", "cuda-crt", "cuda-cccl")]

# One per generation: machine code also runs on later minor versions (80 serves 86 and 89), except on Jetson, which has
# its own numbers. The newest one is stored as PTX too, for GPUs to come.
ALL_ARCHS = {
    "x86_64": ["60", "70", "75", "80", "90", "100", "120"],
    "aarch64": ["53", "62", "72", "75", "80", "87", "90", "100", "101", "110", "120"],
}

CXX_FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall"]


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, PATH, /usr/local/cuda or the wheels of NVCC_WHEELS, in this order, else None."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.is_file():
            sys.exit(
                f"CUDA_HOME is {home}, but {nvcc} does not exist: point CUDA_HOME at a CUDA toolkit (11.8 or "
                "newer), or unset it to use nvcc from PATH, from /usr/local/cuda or from pip's wheels."
            )
        return nvcc
    found = shutil.which("nvcc")
    if found:
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in spec.submodule_search_locations] if spec else []
    places = [Path("/usr/local/cuda"), *(home for place in wheels for home in sorted(place.glob("cu[0-9]*")))]
    return next((home / "bin" / "nvcc" for home in places if (home / "bin" / "nvcc").is_file()), None)


def find_cxx() -> str:
    cxx = os.environ.get("CXX", "g++")
    if not shutil.which(shlex.split(cxx)[0]):
        sys.exit(
            f"The C++ compiler {cxx} was not found: install it (Debian, Ubuntu: apt install g++; Fedora: dnf "
            "install gcc-c++), or name another one in CXX."
        )
    return cxx


def run(command: list[str]) -> str:
    """Runs a compiler and returns what it printed; ends the build with that text where it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.exit(
            f"{shlex.join(command)}\n{result.stdout}\n{command[0]} failed with exit code {result.returncode}, see "
            "above."
        )
    return result.stdout


def gencode_flags(nvcc: Path) -> list[str]:
    """nvcc's -gencode flags for TORCH2TRT_ADDER_ARCHS; the newest architecture also as PTX, for GPUs to come."""
    known = re.findall(r"compute_(\d+)", run([str(nvcc), "--list-gpu-arch"]))
    asked = os.environ.get("TORCH2TRT_ADDER_ARCHS", "").strip()
    if not asked:
        archs = visible_archs()
        if archs and set(archs) <= set(known):
            print(
                f"Building for the GPUs of this machine ({', '.join(archs)}); TORCH2TRT_ADDER_ARCHS=all builds for "
                "every generation.",
                flush=True,
            )
        else:
            asked = "all"
    if asked == "all":
        archs = [arch for arch in ALL_ARCHS[platform.machine()] if arch in known]
        if "110" in archs and "101" in archs:
            archs.remove("101")  # two names of the same chip
    elif asked == "native":
        archs = visible_archs()
        if not archs:
            sys.exit(
                "TORCH2TRT_ADDER_ARCHS is native, but the driver shows no GPU here: name the architecture, "
                "e.g. TORCH2TRT_ADDER_ARCHS=90."
            )
    elif asked:
        archs = [arch.replace(".", "") for arch in re.split(r"[;,\s]+", asked) if arch]
    for arch in archs:
        if re.sub(r"[a-z]$", "", arch) not in known:
            sys.exit(
                f"TORCH2TRT_ADDER_ARCHS names {arch!r}, which {nvcc} does not know: choose from "
                f"{', '.join(known)} (e.g. TORCH2TRT_ADDER_ARCHS='80;90'), or use a CUDA toolkit that knows it."
            )
    archs = sorted(set(archs), key=lambda arch: int(re.sub(r"\D", "", arch)))
    targets = {arch: f"sm_{arch}" for arch in archs}
    targets[archs[-1]] = f"[sm_{archs[-1]},compute_{archs[-1]}]"
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets.items()]


def visible_archs() -> list[str]:
    """The compute capabilities of the GPUs that the CUDA driver shows, as ["80", "90"]; empty without a driver or GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")  # there on servers and on Jetson, which has no nvidia-smi
    except OSError:
        return []
    count, archs = ctypes.c_int(), set()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for device in range(count.value):
        value = ctypes.c_int()
        digits = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, ..._MINOR
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return []
            digits.append(str(value.value))
        archs.add("".join(digits))
    return sorted(archs, key=int)


def compression_flags(versions: str) -> list[str]:
    """Kernels are stored compressed, at a quarter of their size. Older drivers cannot read the newer way."""
    major = int(re.search(r"release (\d+)\.", versions)[1])
    return ["--compress-mode=size"] if major >= 13 else ["-Xfatbin=-compress-all"]


def build_library(library: Path) -> None:
    """Compiles csrc/ into the shared library `library`. Objects stay in build/objects, named by what went into them."""
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit(
            "nvcc was not found: install a CUDA toolkit (11.8 or newer) and set CUDA_HOME or PATH, or install the "
            f"nvcc wheels: pip install {shlex.join(NVCC_WHEELS)}. `pip install .` does the latter by itself."
        )
    cxx = find_cxx()
    jobs = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
    common_flags = ["-c", "-std=c++17", f"-I{ROOT / 'csrc'}"]
    cpp = shlex.split(cxx), [*common_flags, *CXX_FLAGS]
    versions = run([str(nvcc), "--version"]) + run([*cpp[0], "--version"])
    device_flags = [*gencode_flags(nvcc), *compression_flags(versions)]
    cu = [str(nvcc), "-ccbin", cxx], [*common_flags, "-O3", *device_flags, f"-Xcompiler={','.join(CXX_FLAGS)}"]
    headers = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))
    common = hashlib.sha256(b"".join(path.read_bytes() for path in headers) + versions.encode())
    objects = ROOT / "build" / "objects"
    objects.mkdir(parents=True, exist_ok=True)

    def compile_source(source: Path) -> Path:
        compiler, flags = cu if source.suffix == ".cu" else cpp
        digest = common.copy()
        digest.update(repr(flags).encode() + source.read_bytes())
        target = objects / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            threads = [f"--threads={jobs}"] if source.suffix == ".cu" else []
            command = [*compiler, *flags, *threads, str(source), "-o", str(partial)]
            print(shlex.join(command), flush=True)
            print(run(command), end="", flush=True)
            partial.replace(target)
            for old in sorted(objects.glob(f"{source.stem}-*.o"), key=lambda path: path.stat().st_mtime)[:-4]:
                old.unlink(missing_ok=True)
        return target

    # .cu first: they take longest.
    sources = [*sorted((ROOT / "csrc").rglob("*.cu")), *sorted((ROOT / "csrc").rglob("*.cpp"))]
    with ThreadPoolExecutor(jobs) as pool:
        compiled = list(pool.map(compile_source, sources))

    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.so")
    # The wheels keep the CUDA runtime in lib, while nvcc looks into lib64.
    print(
        run(
            [
                *cu[0],
                "-shared",
                "-cudart=static",
                f"-L{nvcc.parent.parent / 'lib'}",
                "-Xcompiler=-pthread",
                f"-Xlinker=--version-script={ROOT / 'csrc' / 'exports.map'},--no-undefined",
                *map(str, compiled),
                "-o",
                str(partial),
            ]
        ),
        end="",
    )
    partial.replace(library)


class BuildLibrary(build_ext):
    """build_ext with our compilers and our file name: the library knows no Python, so its name carries no ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        build_library(Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self) -> None:
        # A process may have the old file loaded, so the new one replaces it by renaming.
        target = ROOT / self.get_ext_filename(LIBRARY)
        partial = target.with_suffix(f".{os.getpid()}.so")
        shutil.copy(Path(self.build_lib, self.get_ext_filename(LIBRARY)), partial)
        partial.replace(target)


class BuildWheel(bdist_wheel):
    """One wheel per platform serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if platform.system() != "Linux" or platform.machine() not in ALL_ARCHS:
    sys.exit(
        f"torch2trt_adder builds on Linux on {' and '.join(ALL_ARCHS)}; this is {platform.system()} on "
        f"{platform.machine()}."
    )

setup(
    ext_modules=[Extension(LIBRARY, sources=[])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
    # pip installs these for the build; setup.py itself, run by hand, must not.
    setup_requires=NVCC_WHEELS if find_nvcc() is None and Path(sys.argv[0]).name != "setup.py" else [],
)
