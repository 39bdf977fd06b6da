"""What follows the adder layers of a TensorRT network: BatchNorm, a residual sum, ReLU or limits; how large it becomes."""

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

import numpy as np

# ---- the network as a graph


@dataclasses.dataclass
class Node:
    """One layer. `kind` is the name of its LayerType: layers of a derived class hide it."""

    layer: Any
    kind: str
    inputs: list[Any]
    outputs: list[Any]
    position: int = -1  # in topological order; -1 on a cycle, as loops have


class Graph:
    """Producers, consumers and topological order of an INetworkDefinition, by names of tensors."""

    def __init__(self, network: Any) -> None:
        self.nodes: list[Node] = []
        self.producer: dict[str, Node] = {}
        self.consumers: dict[str, list[tuple[Node, int]]] = defaultdict(list)
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            inputs = [layer.get_input(j) for j in range(layer.num_inputs)]
            node = Node(layer, layer.type.name, inputs, [layer.get_output(j) for j in range(layer.num_outputs)])
            self.nodes.append(node)
            for j, itensor in enumerate(inputs):
                if itensor is not None:
                    self.consumers[itensor.name].append((node, j))
            for itensor in node.outputs:
                self.producer[itensor.name] = node
        self.outputs = {network.get_output(i).name for i in range(network.num_outputs)}
        self.inputs = [network.get_input(i).name for i in range(network.num_inputs)]
        self.sources = {network.get_input(i).name: frozenset({i}) for i in range(network.num_inputs)}
        self._sort()

    def _sort(self) -> None:
        """Sets every node's position, and the network inputs that every tensor depends on."""
        place = {id(node): i for i, node in enumerate(self.nodes)}
        names = [{t.name for t in node.inputs if t is not None and t.name in self.producer} for node in self.nodes]
        missing = [len(each) for each in names]
        ready = [i for i, count in enumerate(missing) if count == 0]  # in the order of the network where that is one
        for position in range(len(self.nodes)):
            if not ready:
                return
            node = self.nodes[heapq.heappop(ready)]
            node.position = position
            reached = frozenset().union(*(self.sources.get(t.name, ()) for t in node.inputs if t is not None))
            for itensor in node.outputs:
                self.sources[itensor.name] = reached
                for i in {place[id(consumer)] for consumer, _ in self.consumers[itensor.name]}:
                    missing[i] -= 1
                    if missing[i] == 0:
                        heapq.heappush(ready, i)

    def constant(self, itensor: Any, trt: ModuleType) -> np.ndarray | None:
        """The value of a tensor that is a constant, perhaps reshaped or cast; None where it is not."""
        node = self.producer.get(itensor.name)
        if node is None or min(itensor.shape, default=1) < 0:
            return None
        if node.kind == "CONSTANT":
            node.layer.__class__ = trt.IConstantLayer
            return np.array(node.layer.weights).reshape(tuple(itensor.shape))
        if node.kind == "SHUFFLE":
            node.layer.__class__ = trt.IShuffleLayer
            permutations = node.layer.first_transpose, node.layer.second_transpose
            if any(
                p[i] != i for p, like in zip(permutations, (node.inputs[0], itensor)) for i in range(len(like.shape))
            ):
                return None
        elif node.kind not in ("IDENTITY", "CAST", "SQUEEZE", "UNSQUEEZE"):
            return None
        value = self.constant(node.inputs[0], trt)
        return None if value is None else value.reshape(tuple(itensor.shape))


# ---- chains


@dataclasses.dataclass
class Chain:
    """What an adder layer can take over: y = clamp(scale * (bias - sum) + shift + residual, lower, upper)."""

    adder: Node
    end: Any  # the ITensor whose value the new layer computes
    nodes: list[Node] = dataclasses.field(default_factory=list)
    scale: np.ndarray | None = None  # [K], float64
    shift: np.ndarray | None = None
    residual: Any = None
    lower: float = -math.inf
    upper: float = math.inf
    rounded: bool = False  # the result is cast to float16 at the end, where nothing may follow

    @property
    def limited(self) -> bool:
        return self.lower != -math.inf or self.upper != math.inf

    def limit(self, lower: float, upper: float) -> None:
        """Applies min(max(y, lower), upper) after the limits so far."""
        self.lower, self.upper = (min(max(limit, lower), upper) for limit in (self.lower, self.upper))


def find_chains(graph: Graph, adders: Collection[str], trt: ModuleType, casts: bool = False) -> list[Chain]:
    """The chain of each adder layer, those layers that must come first in front. A layer belongs to one chain at most.

    With `casts`, a chain may end with a cast to float16.
    """
    chains, taken = [], set[int]()
    for node in sorted((n for n in graph.nodes if n.layer.name in adders), key=lambda n: n.position):
        if node.position < 0:
            continue
        chain = Chain(node, node.outputs[0])
        while _extend(graph, chain, taken, trt, casts):
            taken.add(id(chain.nodes[-1]))
        if chain.nodes:
            chains.append(chain)
    return sorted(chains, key=lambda chain: chain.nodes[-1].position)


def _extend(graph: Graph, chain: Chain, taken: Collection[int], trt: ModuleType, casts: bool) -> bool:
    """Lets the chain take the only consumer of its end, where it can."""
    consumers = graph.consumers[chain.end.name]
    if chain.rounded or chain.end.name in graph.outputs or len(consumers) != 1:
        return False
    node, _ = consumers[0]
    if id(node) in taken or node.position < 0 or len(node.outputs) != 1:
        return False
    match node.kind:
        case "SCALE":
            extended = _take_scale(chain, node, trt)
        case "ELEMENTWISE":
            extended = _take_elementwise(graph, chain, node, trt)
        case "ACTIVATION":
            extended = _take_activation(chain, node, trt)
        case "CAST" if casts:
            chain.rounded = extended = node.outputs[0].dtype == trt.DataType.HALF
        case _:
            extended = False
    if extended:
        chain.nodes.append(node)
        chain.end = node.outputs[0]
    return extended


def _take_scale(chain: Chain, node: Node, trt: ModuleType) -> bool:
    layer = node.layer
    layer.__class__ = trt.IScaleLayer
    channels = layer.mode == trt.ScaleMode.CHANNEL and layer.channel_axis == 1
    power = np.asarray(layer.power)
    if not (channels or layer.mode == trt.ScaleMode.UNIFORM) or not bool((power == 1).all()):
        return False
    scale, shift = (np.asarray(weights, np.float64) for weights in (layer.scale, layer.shift))
    return _take_affine(chain, scale if scale.size else np.ones(1), shift if shift.size else np.zeros(1))


def _take_affine(chain: Chain, scale: np.ndarray, shift: np.ndarray) -> bool:
    """Applies scale * y + shift, of [K] or one number each."""
    filters = chain.adder.outputs[0].shape[1]
    if chain.residual is not None or chain.limited or filters < 1 or {scale.size, shift.size} - {1, filters}:
        return False
    scale, shift = np.broadcast_to(scale.ravel(), filters), np.broadcast_to(shift.ravel(), filters)
    before = (np.ones(filters), np.zeros(filters)) if chain.scale is None else (chain.scale, chain.shift)
    composed = before[0] * scale, before[1] * scale + shift
    limit = float(np.finfo(np.float32).max)
    if not all(bool((np.abs(array) <= limit).all()) for array in composed):  # float32 does not hold it, or NaN
        return False
    chain.scale, chain.shift = composed
    return True


def _take_elementwise(graph: Graph, chain: Chain, node: Node, trt: ModuleType) -> bool:
    node.layer.__class__ = trt.IElementWiseLayer
    operation, first = node.layer.op.name, node.inputs[0].name == chain.end.name
    other = node.inputs[1 if first else 0]
    shapes = [tuple(itensor.shape) for itensor in (chain.end, node.outputs[0], other)]
    if shapes[0] != shapes[1]:
        return False
    value = graph.constant(other, trt)
    if value is not None:
        number = value.size == 1 or (value.ndim == 4 and value.size == value.shape[1])
        return number and _take_constant(chain, operation, value.astype(np.float64).ravel(), first)
    if operation != "SUM" or shapes[2] != shapes[0] or chain.residual is not None or chain.limited:
        return False
    if other.dtype not in (trt.DataType.FLOAT, trt.DataType.HALF):
        return False
    # Extents known at run time only might be broadcast there; not where both come from the same inputs.
    if min(shapes[0]) < 0 and not graph.sources[other.name] <= graph.sources[chain.adder.outputs[0].name]:
        return False
    chain.residual = other
    return True


def _take_constant(chain: Chain, operation: str, value: np.ndarray, first: bool) -> bool:
    one, zero = np.ones(1), np.zeros(1)
    match operation:
        case "SUM":
            return _take_affine(chain, one, value)
        case "SUB":
            return _take_affine(chain, one, -value) if first else _take_affine(chain, -one, value)
        case "PROD":
            return _take_affine(chain, value, zero)
        case "DIV" if first and bool((value != 0).all()):
            return _take_affine(chain, 1 / value, zero)
        case "MAX" | "MIN" if value.size == 1 and not np.isnan(value).any():
            limits = (float(value[0]), math.inf) if operation == "MAX" else (-math.inf, float(value[0]))
            chain.limit(*limits)
            return chain.limited
    return False


def _take_activation(chain: Chain, node: Node, trt: ModuleType) -> bool:
    layer = node.layer
    layer.__class__ = trt.IActivationLayer
    kind = type(layer).type.__get__(layer).name  # hidden by ILayer's own `type` elsewhere
    if kind == "RELU":
        chain.limit(0.0, math.inf)
        return True
    if kind == "CLIP" and layer.alpha <= layer.beta:
        chain.limit(float(layer.alpha), float(layer.beta))
        return chain.limited
    return False


# ---- magnitudes


class Magnitudes:
    """How large the values of tensors become, as far as that is known; infinity where it is not.

    The network's inputs are taken for `ordinary`, since float16 mode may round them anyway.
    """

    def __init__(self, graph: Graph, known: Mapping[str, float], ordinary: float, trt: ModuleType) -> None:
        self._trt = trt
        self._known = {name: known.get(name, ordinary) for name in graph.inputs}
        for node in sorted((n for n in graph.nodes if n.position >= 0), key=lambda n: n.position):
            for itensor in node.outputs:
                measured = known.get(itensor.name)
                derived = self._derive(graph, node) if measured is None else measured
                self._known[itensor.name] = derived

    def of(self, itensor: Any) -> float:
        return self._known.get(itensor.name, math.inf)

    def _derive(self, graph: Graph, node: Node) -> float:
        if node.kind == "CONSTANT":
            value = graph.constant(node.outputs[0], self._trt)
            return float(np.abs(value).max()) if value is not None and value.size else 0.0
        bounds = [self.of(itensor) for itensor in node.inputs[:2] if itensor is not None]
        if node.kind in ("POOLING", "SHUFFLE", "IDENTITY", "CAST", "SLICE", "SQUEEZE", "UNSQUEEZE"):
            return bounds[0] if bounds else math.inf
        if node.kind == "CONCATENATION":
            return max(self.of(itensor) for itensor in node.inputs)
        if node.kind == "ACTIVATION":
            node.layer.__class__ = self._trt.IActivationLayer
            kind = type(node.layer).type.__get__(node.layer).name
            if kind == "CLIP":
                return float(max(abs(node.layer.alpha), abs(node.layer.beta)))
            if kind in ("SIGMOID", "TANH"):
                return 1.0
            return bounds[0] if kind == "RELU" else math.inf
        if node.kind == "ELEMENTWISE":
            node.layer.__class__ = self._trt.IElementWiseLayer
            name = node.layer.op.name
            if name in ("SUM", "SUB"):
                return sum(bounds)
            if name in ("MIN", "MAX"):
                return max(bounds)
            return bounds[0] * bounds[1] if name == "PROD" and 0 not in bounds else math.inf
        return math.inf
