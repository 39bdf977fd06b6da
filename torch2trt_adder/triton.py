"""A model repository for NVIDIA's Triton Inference Server."""

import pathlib
import re
import shlex
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
        ValueError: `plan` is not one, or would be replaced; or `name` has other characters than letters, digits, _ and -.
        OSError: a file cannot be read or written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"{name!r} cannot be a model's name; give --name letters, digits, _ and -.")
    folder = folder.resolve()
    model, config, start = folder / name / "1" / "model.plan", folder / name / "config.pbtxt", folder / "start.sh"
    plugin = folder / library.FILE_NAME
    outputs = {"the model": model, "its configuration": config, "the start script": start}
    inputs = {"the plan": plan}
    if not embedded:
        outputs["the copy of the plugin library"], inputs["the plugin library"] = plugin, library.path()
    files.check_apart(outputs, inputs)
    for path in outputs.values():
        files.check_writable(path)
    data = files.read(plan)
    try:
        version = engine.plan_version(data)
    except ValueError as error:
        raise ValueError(f"{plan} is {error}: build one with torch2trt-adder build.") from error
    option = "version-compatible=true" if embedded else f'plugins="$folder/{library.FILE_NAME}"'
    if not embedded:
        files.write(plugin, files.read(library.path()), executable=True)
    files.write(model, data)
    files.write(config, f'name: "{name}"\nplatform: "tensorrt_plan"\n'.encode())
    files.write(start, _START.format(option=option).encode(), executable=True)
    command = shlex.quote(str(start))
    built = ".".join(map(str, version)) if version else "an unknown version"
    print(
        f"{folder}: model {name}, a plan of TensorRT {built}; the server must have the same. Start it with\n  {command}"
    )
    return {"folder": str(folder), "model": name, "tensorrt": built, "command": command}
