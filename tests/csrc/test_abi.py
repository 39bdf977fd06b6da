"""csrc/tensorrt/abi.h against what TensorRT's own headers gave (abi_slots.txt; docs/tensorrt-abi.md says how)."""

import os
import pathlib
import shlex
import subprocess

import pytest
from processes import ROOT

HERE = pathlib.Path(__file__).resolve().parent


def _measured() -> dict[int, str]:
    """The output of abi_slots.cpp with TensorRT's headers, by version."""
    parts = (HERE / "abi_slots.txt").read_text().split("version ")[1:]
    return {int(part.split("\n", 1)[0]): f"version {part}" for part in parts}


MEASURED = _measured()


@pytest.mark.parametrize("version", MEASURED)
def test_declarations_are_those_of_tensorrt(version: int, tmp_path: pathlib.Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    program = tmp_path / "abi_slots"
    source = HERE / "abi_slots.cpp"
    flags = ["-std=c++17", f"-I{ROOT / 'csrc'}", f"-DVERSION={version}"]
    built = subprocess.run([*compiler, *flags, source, "-o", program], check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == MEASURED[version].splitlines()
