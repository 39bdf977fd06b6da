"""An engine's layers and times."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..export.format import OP_TYPE
from .engine import Engine

# ---- look inside


def layers(engine: Engine) -> list[dict[str, Any]]:
    """The layers of an engine: ``name``, ``type``, ``adder`` (whether it is an adder layer), ``precision`` of its outputs.

    Engines of `build_engine` have all of these, others perhaps only names.
    """
    trt = engine.trt
    text = engine.engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    found = []
    for layer in json.loads(text, strict=False)["Layers"]:  # TensorRT 8.6 does not escape control characters
        if isinstance(layer, str):
            layer = {"Name": layer}
        name, kind = layer["Name"], layer.get("LayerType", "")
        outputs = [output.get("Format/Datatype", "") for output in layer.get("Outputs", [])]
        ours = layer.get("PluginType") == OP_TYPE or re.search(r":adder2d_\d+$", name) is not None
        found.append(
            {
                "name": name,
                "type": kind,
                # Layers that convert an adder layer's input also end with its name.
                "adder": ours and ("plugin" in kind.lower() if kind else not name.startswith("Reformat")),
                "precision": ", ".join(dict.fromkeys(outputs)),
            }
        )
    return found


def profile(engine: Engine, tensors: Sequence[Tensor], runs: int = 20) -> dict[str, float]:
    """Milliseconds of each layer, the mean of `runs` calls after 3 others, by TensorRT's own profiler."""
    base: Any = engine.trt.IProfiler
    times: defaultdict[str, float] = defaultdict(float)

    class Profiler(base):
        def __init__(self) -> None:
            base.__init__(self)

        def report_layer_time(self, layer: str, milliseconds: float) -> None:
            times[layer] += milliseconds

    engine.run_with_profiler(Profiler(), tensors, runs, others=3)
    return {name: total / runs for name, total in times.items()}


def latencies(network: Callable[..., Any], inputs: Sequence[Tensor], runs: int = 200) -> list[float]:
    """Milliseconds on the GPU of `runs` calls after `runs` / 4 others, sorted."""
    times = []
    with torch.no_grad():
        for i in range(runs + runs // 4):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            network(*inputs)
            end.record()
            end.synchronize()
            if i >= runs // 4:
                times.append(start.elapsed_time(end))
    return sorted(times)
