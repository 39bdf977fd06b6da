"""Child processes, with the package that this process imported."""

import os
import pathlib
import subprocess
import sys
from typing import Any

from torch2trt_adder import library

ROOT = pathlib.Path(__file__).resolve().parents[1]  # of the checkout
PACKAGES = pathlib.Path(library.__file__).resolve().parents[1]  # of the checkout, or where the package is installed


def environment(*folders: pathlib.Path) -> dict[str, str]:
    """The environment of a Python that imports from `folders` and then from where this process took the package."""
    path = [*map(str, folders), str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        library.ENVIRONMENT_VARIABLE: str(library.path()),
    }


def run(*command: object, folders: tuple[pathlib.Path, ...] = (), **options: Any) -> "subprocess.CompletedProcess[str]":
    """Runs a command; `options` are those of subprocess.run."""
    options = {"timeout": 600, "env": environment(*folders), **options}
    return subprocess.run([str(c) for c in command], check=False, capture_output=True, text=True, **options)


def run_python(script: str, *arguments: object, **options: Any) -> str:
    """Runs a script in a new process and returns what it printed; fails with its error where it fails."""
    done = run(sys.executable, "-c", script, *arguments, **options)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr}"
    return done.stdout
