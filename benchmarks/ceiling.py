"""Compiles ceiling.cu for the GPU at hand and measures the rates that it can reach."""

import ctypes
import dataclasses
import os
import pathlib
import shutil
import subprocess
import tempfile

import torch


@dataclasses.dataclass(frozen=True)
class Probe:
    """What one probe of ceiling.cu reached."""

    name: str
    dtype: torch.dtype  # float32 or float16
    tera: float  # 10^12 accumulated |x - w| a second
    megahertz: float  # the multiprocessors' clock meanwhile


def nvcc() -> str:
    """nvcc of CUDA_HOME, PATH or the usual place. Raises RuntimeError where there is none."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    found = found or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise RuntimeError("nvcc was not found: set CUDA_HOME to a CUDA toolkit to have the ceiling measured.")
    return found


def build(capability: tuple[int, int]) -> ctypes.CDLL:
    """ceiling.cu as a loaded library. Raises RuntimeError with the compiler's words where that fails."""
    source = pathlib.Path(__file__).with_name("ceiling.cu")
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "ceiling.so")
        arch = f"-arch=sm_{capability[0]}{capability[1]}"
        command = [nvcc(), arch, "-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-o", library, str(source)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {result.stdout.strip()}")
        loaded = ctypes.CDLL(library)
    loaded.ceiling_name.restype = loaded.ceiling_measure.restype = ctypes.c_char_p
    return loaded


def measure(library: ctypes.CDLL) -> list[Probe]:
    """All probes on the current device. Raises RuntimeError where one fails."""
    torch.cuda.synchronize()
    probes = []
    for index in range(library.ceiling_count()):
        rate, megahertz = ctypes.c_double(), ctypes.c_double()
        name = library.ceiling_name(index).decode()
        error = library.ceiling_measure(index, ctypes.byref(rate), ctypes.byref(megahertz))
        if error:
            raise RuntimeError(f"the probe {name!r} of ceiling.cu failed: {error.decode()}.")
        dtype = torch.float16 if library.ceiling_is_half(index) else torch.float32
        probes.append(Probe(name, dtype, rate.value / 1e12, megahertz.value))
    return probes
