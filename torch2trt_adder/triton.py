"""A model repository for NVIDIA's Triton Inference Server."""

import pathlib
import shlex
import shutil
from typing import Any

from . import engine, files, library


# Wherever the folder is mounted; options of tritonserver go through.
_START = """#!/bin/sh
folder=$(cd "$(dirname "$0")" && pwd)
exec tritonserver --model-repository="$folder" --backend-config=tensorrt,{option} "$@"
"""


def write_repository(folder: pathlib.Path, plan: pathlib.Path, name: str, embedded: bool = False) -> dict[str, Any]:
    """Writes ``NAME/config.pbtxt``, ``NAME/1/model.plan``, the plugin library and ``start.sh`` into `folder`.

    The configuration leaves inputs and outputs to Triton's auto-completion, which reads them from the plan: so the
    repository can be made on a machine without a GPU.

    Args:
        folder: the repository; other models in it stay.
        plan: an engine, built by the TensorRT of the Triton container and on the kind of GPU that will serve it.
        name: of the model.
        embedded: the plan carries its plugin (``embed_plugin=True``): no library is written.

    Raises:
        RuntimeError: no plan, or a name that cannot be a folder's.
        OSError: a file that cannot be read or written.
    """
    if not name or name != pathlib.PurePath(name).name or name.startswith("."):
        raise RuntimeError(f"{name!r} cannot be a model's name; give --name letters, digits, _ and -.")
    data = files.read(plan)
    try:
        version = engine.plan_version(data)
    except ValueError as error:
        raise RuntimeError(f"{plan} is {error}: build one with torch2trt-adder build.") from error
    folder = folder.resolve()
    config = f'name: "{name}"\nplatform: "tensorrt_plan"\n'
    if embedded:
        option = "version-compatible=true"
    else:
        plugin = folder / library.FILE_NAME
        files.write(plugin, files.read(library.path()))
        shutil.copymode(library.path(), plugin)
        option = f'plugins="$folder/{library.FILE_NAME}"'
    files.write(folder / name / "1" / "model.plan", data)
    files.write(folder / name / "config.pbtxt", config.encode())
    files.write(folder / "start.sh", _START.format(option=option).encode())
    (folder / "start.sh").chmod(0o755)
    command = shlex.quote(str(folder / "start.sh"))
    built = ".".join(map(str, version)) if version else "an unknown version"
    print(f"{folder}: model {name}, a plan of TensorRT {built}; the server must have the same. Start it with\n  {command}")
    return {"folder": str(folder), "model": name, "tensorrt": built, "command": command}
