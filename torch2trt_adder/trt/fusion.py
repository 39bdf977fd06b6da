"""Adder layers of a TensorRT network take over what follows them: BatchNorm, a residual sum, ReLU or limits.

One pass over an INetworkDefinition serves torch2trt and ONNX files. A layer that takes over BatchNorm keeps its sums, which
pass float16's 65504 in wide layers, inside the plugin, so that its input and output may be float16. TensorRT drops the
layers that nothing reads afterwards.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from . import api, plugin
from .chains import Chain, Graph, Magnitudes, find_chains

# A float16 output may reach this only: the values of other inputs than the example's may be larger.
LARGEST = 65504 / 16
# Results of BatchNorm rarely lie more than 8 standard deviations from their mean.
DEVIATIONS = 8


@dataclasses.dataclass(frozen=True)
class Fused:
    """One adder layer and what it has taken over."""

    name: str
    scale: bool
    residual: bool
    limits: bool
    float16: bool  # the output, that of fp16 mode


@dataclasses.dataclass(frozen=True)
class Report:
    """What `fuse` has done; `exposed` are the adder layers whose sums still leave the plugin, or that pass `LARGEST`."""

    adders: int
    fused: Sequence[Fused]
    exposed: Sequence[Any]

    def __str__(self) -> str:
        if not self.adders:
            return ""
        counts = {
            "BatchNorm": sum(each.scale for each in self.fused),
            "residual": sum(each.residual for each in self.fused),
            "ReLU or limits": sum(each.limits for each in self.fused),
            "float16 output": sum(each.float16 for each in self.fused),
        }
        parts = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{len(self.fused)} of {self.adders} fused" + (f": {parts}" if parts else "")


Replace = Callable[[Any, Any, Chain, Sequence[Any], bool], Any]


def fuse(
    network: Any,
    adders: Mapping[str, Mapping[str, Any]],
    *,
    trt: ModuleType,
    half: bool = False,
    largest: Mapping[str, float] | None = None,
    replace: Replace | None = None,
) -> Report:
    """Replaces the adder layers of a network by ones that compute what follows them as well.

    A value that another layer reads, or that is an output of the network, ends what a layer can take over. The new layer has
    the name of the old one, and its output the name of the tensor that it replaces.

    Args:
        network: an ``INetworkDefinition`` with its outputs marked.
        adders: by the name of each adder layer, its ``stride``, ``padding``, ``dilation`` and ``groups``.
        trt: the TensorRT module.
        half: float16 mode. Layers that take over BatchNorm then write float16 where only adder layers read it directly and
            their values are known to stay below `LARGEST`; other layers get a cast to float32.
        largest: magnitudes of tensors by name, as far as they are known.
        replace: makes the layer, of (network, old layer, chain, [x, residual or None], whether the output is float16) by
            default a plugin layer.

    Raises:
        RuntimeError: TensorRT refuses a layer.
    """
    pass_ = _Pass(network, adders, trt, half, largest or {}, replace or _plugin_layer(adders, trt))
    return pass_.run()


def _plugin_layer(adders: Mapping[str, Mapping[str, Any]], trt: ModuleType) -> Replace:
    def replace(network: Any, old: Any, chain: Chain, inputs: Sequence[Any], half: bool) -> Any:
        x, residual = inputs
        name = old.name
        geometry = {key: adders[name][key] for key in ("stride", "padding", "dilation", "groups")}
        made = plugin.create(
            name,
            **geometry,
            output_type=trt.DataType.HALF if half else trt.DataType.FLOAT,
            trt=trt,
            scale=chain.scale is not None,
            residual=residual is not None,
            lower=chain.lower,
            upper=chain.upper,
        )
        tensors = [x, old.get_input(1), old.get_input(2)]
        if chain.scale is not None and chain.shift is not None:
            for role, array in (("scale", chain.scale), ("shift", chain.shift)):
                tensors.append(plugin.add_constant(network, role, array.astype(np.float32), name, trt))
        return plugin.add_layer(network, tensors if residual is None else [*tensors, residual], made, None)

    return replace


class _Pass:
    def __init__(
        self,
        network: Any,
        adders: Mapping[str, Mapping[str, Any]],
        trt: ModuleType,
        half: bool,
        largest: Mapping[str, float],
        replace: Replace,
    ) -> None:
        self.network, self.adders, self.trt, self.replace = network, adders, trt, replace
        self.graph = Graph(network)
        # In float16 mode casts are TensorRT's choice or ours, and may not be safe; in a file they are what is wanted.
        self.chains = find_chains(self.graph, adders, trt, casts=not half)
        self.magnitudes = Magnitudes(self.graph, largest, LARGEST, trt)
        self.typed = api.is_strongly_typed(trt)
        self.dead = {id(node) for chain in self.chains for node in (chain.adder, *chain.nodes)}
        self.residuals = {chain.residual.name for chain in self.chains if chain.residual is not None}
        self.half = {chain.end.name: self._is_half(chain, half) for chain in self.chains}
        self.outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        self.made: dict[str, Any] = {}  # by the old name of a chain's end, the new layer's output
        self.casts: dict[str, Any] = {}

    def run(self) -> Report:
        fused, exposed = [], []
        for chain in self.chains:
            half, exposes = self.half[chain.end.name], self._exposes(chain)
            layer = self._replace(chain)
            fused.append(Fused(layer.name, chain.scale is not None, chain.residual is not None, chain.limited, half))
            if exposes:
                exposed.append(layer)
        replaced = {id(chain.adder) for chain in self.chains}
        exposed += [n.layer for n in self.graph.nodes if n.layer.name in self.adders and id(n) not in replaced]
        self._rewire()
        self._rename()
        return Report(len(self.adders), fused, exposed)

    # ---- types

    def _largest(self, chain: Chain) -> float:
        """The magnitude of the output; infinity where it is not known."""
        return min(max(abs(chain.lower), abs(chain.upper)), self.magnitudes.of(chain.end))

    def _exposes(self, chain: Chain) -> bool:
        """Whether values that may pass float16's range leave the layer: raw sums, or a BatchNorm known to be so large."""
        largest = self._largest(chain)
        return largest > LARGEST and (chain.scale is None or largest != math.inf)

    def _is_half(self, chain: Chain, half: bool) -> bool:
        if self._was_half(chain):
            return True
        if not half or chain.scale is None or chain.end.name in self.graph.outputs or self._largest(chain) > LARGEST:
            return False
        # A layer whose input has to stay in float32 computes in float32 from end to end.
        if self.magnitudes.of(chain.adder.inputs[0]) > LARGEST:
            return False
        return chain.end.name in self.residuals or any(
            self._source(node.inputs[0]).name == chain.end.name
            for node in self.graph.nodes
            if node.layer.name in self.adders
        )

    def _was_half(self, chain: Chain) -> bool:
        return chain.rounded or bool(chain.adder.outputs[0].dtype == self.trt.DataType.HALF)  # a network in float16

    def _source(self, itensor: Any) -> Any:
        """What an adder layer may read in the place of `itensor`: the value before a cast to float16 or float32."""
        node = self.graph.producer.get(itensor.name)
        types = (self.trt.DataType.FLOAT, self.trt.DataType.HALF)
        if node is None or node.kind != "CAST" or node.inputs[0].dtype not in types or itensor.dtype not in types:
            return itensor
        return node.inputs[0]

    def _current(self, itensor: Any) -> Any:
        """The tensor that an adder layer reads now in the place of `itensor`."""
        source = self._source(itensor)
        if source.dtype == self.trt.DataType.HALF:  # the plugin reads float16 as it is
            return self.made.get(source.name, source)
        chain = next((chain for chain in self.chains if chain.end.name == source.name), None)
        if chain is None or source.name not in self.made:
            return itensor
        if source.name == itensor.name:
            return self.made[source.name]
        # What passes float16's range is read before its cast, and so is what is float16 already.
        return self.made[source.name] if self.half[source.name] or self._largest(chain) > LARGEST else itensor

    # ---- rewiring

    def _replace(self, chain: Chain) -> Any:
        old, end = chain.adder.layer, chain.end.name
        residual = None if chain.residual is None else self._current(chain.residual)
        x = self._current(chain.adder.inputs[0])
        layer = self.replace(self.network, old, chain, [x, residual], self.half[end])
        name = old.name
        old.name = f"{name}.unfused"
        layer.name = name
        output = layer.get_output(0)
        self.made[end] = output
        return layer

    def _rewire(self) -> None:
        """Lets all that read the end of a chain read the new layer's output."""
        for chain in self.chains:
            for node, j in self.graph.consumers[chain.end.name]:
                if id(node) not in self.dead:
                    node.layer.set_input(j, self._for_consumer(chain, node, j))
        for node in self.graph.nodes:
            if node.layer.name in self.adders and id(node) not in self.dead:
                current = self._current(node.inputs[0])
                if current is not node.inputs[0]:
                    node.layer.set_input(0, current)

    def _for_consumer(self, chain: Chain, node: Any, j: int) -> Any:
        name = chain.end.name
        output = self.made[name]
        adder = node.layer.name in self.adders and j == 0
        if not self.half[name] or self._was_half(chain) or adder or node.kind == "CAST":
            return output
        if name not in self.casts:
            self.casts[name] = self._to_float32(output, name)
        return self.casts[name]

    def _to_float32(self, itensor: Any, name: str) -> Any:
        if self.typed:
            layer = self.network.add_cast(itensor, self.trt.DataType.FLOAT)
        else:
            layer = self.network.add_identity(itensor)
            layer.set_output_type(0, self.trt.DataType.FLOAT)
        layer.name = f"{name}:to_float32"
        return layer.get_output(0)

    def _rename(self) -> None:
        """Gives the new tensors the names of those that they replace, and marks all outputs anew, in their order."""
        marked = [self.network.get_output(i) for i in range(len(self.outputs))]
        remark = any(name in self.made for name in self.outputs)
        for output in marked if remark else ():
            self.network.unmark_output(output)
        for chain in self.chains:
            name = chain.end.name
            chain.end.name = f"{name}.unfused"
            self.made[name].name = name
        for old, name in zip(marked, self.outputs) if remark else ():
            new = self.made.get(name)
            self.network.mark_output(old if new is None else new)
            if new is not None and not self.typed:
                new.dtype = old.dtype
