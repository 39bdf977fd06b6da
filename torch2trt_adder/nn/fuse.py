"""``fuse`` folds BatchNorm, residual sums and ReLU into the adder layers before them, for inference."""

import copy
import dataclasses
import warnings

import torch
from torch import Tensor, fx, nn

from . import eval_mode
from .adder2d import Adder2d
from .adopt import adopted_copy
from .fuse_graph import (
    NORMS,
    Limits,
    Modules,
    Norm,
    Tracer,
    disturbed,
    fold,
    functional_layer,
    is_adder,
    limits_of_call,
    limits_of_module,
    name_of_call,
    name_of_limits,
    norm_of_call,
    norm_of_module,
    passes,
    residual_of,
)
from .fused import FusedAdder2d
from .replace import HOOKS


@dataclasses.dataclass
class FusionReport:
    """What `fuse` did, for printing.

    Attributes:
        fused: by the path of an adder layer, what it computes besides.
        left: by the path of an adder layer, or of a module with some, why it stayed as it was.
    """

    fused: dict[str, str] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} adder layers fused, {len(self.left)} left"]
        lines += [f"  {path}: with {what}" for path, what in self.fused.items()]
        lines += [f"  {path}: left, since {reason}" for path, reason in self.left.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, inplace: bool = False) -> nn.Module:
    """A network for inference whose adder layers include the BatchNorm, residual sum and ReLU that follow them.

    Each chain adder layer -> BatchNorm [-> + residual] [-> ReLU, ReLU6, Hardtanh or clamp] becomes one `FusedAdder2d`,
    whether it is written with modules, functions or methods. The outputs are those of `model` up to rounding: sums stay
    in float32 until the end of the chain, so a float16 network is finite where its adder layers' sums pass 65504.
    Third-party adder layers (see `adopt`) are included.

    A layer stays as it is where the chain is interrupted: something else reads a value inside it; one of its modules
    has hooks, is used more than once, or is a subclass; the BatchNorm has no running statistics; the layer is float64.
    torch.fx traces the network. Parts that it cannot trace keep their code, and what these contain is fused part by
    part; an nn.Sequential there must be run as a whole. The attribute ``fusion_report`` of the result lists everything.

    The result can be compiled, exported and converted. Its parameters require no gradients: train `model`, then fuse it.

    Args:
        model: a network in eval mode.
        inplace: True takes over the tensors and layers of `model`, which must not be used any more; False copies them.

    Returns:
        A module called like `model`, with an attribute ``fusion_report`` (a `FusionReport`; print it). It is a
        torch.fx.GraphModule where the network can be traced.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or a ScriptModule.
        ValueError: a layer in training mode that computes something else there, named by its path.

    Warns:
        UserWarning: nothing could be fused.
    """
    eval_mode.check_model("fuse", model)
    report = FusionReport()
    try:
        adopted = adopted_copy(model)
    except ValueError as error:
        adopted = model
        report.left["third-party layers"] = str(error).removeprefix("adopt: ")
    result = _Fuser(adopted if inplace else _copy(adopted), report).run()
    result.requires_grad_(False)
    result.fusion_report = report  # type: ignore[assignment]
    if not report.fused:
        warnings.warn(
            f"fuse: nothing in {type(model).__name__} could be fused; print the attribute fusion_report of the result for "
            "the reasons.",
            stacklevel=2,
        )
    return result


def _copy(model: nn.Module) -> nn.Module:
    # Weights that hooks compute cannot be copied by deepcopy.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, computed)


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


class _Fuser:
    """Works on a network that it may change."""

    def __init__(self, model: nn.Module, report: FusionReport) -> None:
        self.model, self.report = model, report
        self.paths: dict[nn.Module, str] = {}
        self.uses: dict[nn.Module, int] = {}  # places in the tree of modules
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(module, path)
            self.uses[module] = self.uses.get(module, 0) + 1
        self.opaque: dict[nn.Module, str] = {}  # modules whose code torch.fx cannot trace, and why
        self.graphs: dict[nn.Module, fx.Graph] = {}
        self.results: dict[nn.Module, nn.Module] = {}

    def run(self) -> nn.Module:
        self._trace(self.model)
        result = self._fuse(self.model)
        for module, path in self.paths.items():
            if isinstance(module, Adder2d) and path not in self.report.fused and path not in self.report.left:
                self.report.left[path] = self._why_unseen(path)
        return result

    def _why_unseen(self, path: str) -> str:
        parts = path.split(".")
        parents = [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]
        for module, reason in self.opaque.items():
            if self.paths[module] in parents and not isinstance(module, nn.ModuleList | nn.ModuleDict):
                return f"torch.fx cannot trace {self._name(module)}: {reason}"
        return "the network does not call it, or not as a module"

    def _name(self, module: nn.Module) -> str:
        return self.paths[module] or type(module).__name__

    # ---- tracing

    def _trace(self, module: nn.Module) -> bool:
        """Whether the module's code can be traced, with those modules inside as they are that cannot."""
        if module in self.graphs:
            return True
        if module in self.opaque:
            return False
        reason = self._try_trace(module)
        if reason is not None:
            children = [self._trace(child) for child in module.children()]  # all of them
            if not all(children):
                reason = self._try_trace(module)
            if reason is not None:
                self.opaque[module] = reason
        return reason is None

    def _try_trace(self, module: nn.Module) -> str | None:
        tracer = Tracer(lambda m: m in self.opaque or has_hooks(m))
        try:
            self.graphs[module] = tracer.trace_module(module)
        except Exception as error:  # it is the network's code that runs
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return None

    # ---- fusing

    def _fuse(self, module: nn.Module) -> nn.Module:
        """What replaces a module that is called as a whole."""
        if module not in self.results:
            self.results[module] = module  # for networks that contain themselves
            self.results[module] = self._fused(module)
        return self.results[module]

    def _fused(self, module: nn.Module) -> nn.Module:
        if not any(isinstance(inner, Adder2d) for inner in module.modules()) or isinstance(module, Adder2d):
            return module
        if type(module).forward is nn.Sequential.forward:
            self._fuse_sequential(module)
        elif module not in self.opaque and self._trace(module):
            return self._fuse_graph(module, self.graphs[module])
        else:
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = self._fuse(child)
        return module

    def _usable(self, module: nn.Module) -> str | None:
        """Why a module cannot become part of a fused layer, or None."""
        if has_hooks(module) or "forward" in vars(module):
            return f"{self._name(module)} has hooks or a `forward` of its own"
        if self.uses[module] > 1:
            return f"{self._name(module)} is used in {self.uses[module]} places"
        return None

    def _layer(self, module: nn.Module) -> Adder2d | str:
        """An adder layer that can be fused, or why it cannot."""
        if type(module) is not Adder2d or "adder" not in module._parameters:
            return "it is a subclass, pruned or parametrized"
        return self._usable(module) or module

    def _norm(self, module: nn.Module) -> Norm | str:
        if type(module) not in NORMS:
            return f"a {type(module).__name__} follows it, not a BatchNorm2d"
        return self._usable(module) or norm_of_module(module)

    def _fuse_sequential(self, sequence: nn.Module) -> None:
        children = [(name, child) for name, child in sequence._modules.items() if child is not None]
        for at, (name, child) in enumerate(children):
            if not isinstance(child, Adder2d):
                if sequence._modules[name] is child:  # else it has become part of a layer
                    sequence._modules[name] = self._fuse(child)
                continue
            rest = [item for item in children[at + 1 :] if not passes(item[1])]
            layer = self._layer(child)
            norm = self._norm(rest[0][1]) if rest else "no BatchNorm follows it"
            folded = layer if isinstance(layer, str) else norm if isinstance(norm, str) else fold(layer, norm)
            if isinstance(layer, str) or isinstance(folded, str):
                self.report.left[self.paths[child]] = str(folded)
                continue
            limits = limits_of_module(rest[1][1]) if len(rest) > 1 and not has_hooks(rest[1][1]) else None
            sequence._modules[name] = FusedAdder2d(layer, *folded, *(limits or (None, None)))
            for other, _ in rest[: 1 if limits is None else 2]:
                sequence._modules[other] = nn.Identity()
            self.report.fused[self.paths[child]] = _describe(None, limits)

    def _fuse_graph(self, root: nn.Module, graph: fx.Graph) -> nn.Module:
        modules = dict(root.named_modules(remove_duplicate=False))
        calls: dict[nn.Module, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                calls[modules[node.target]] = calls.get(modules[node.target], 0) + 1
        for module, count in calls.items():
            self.uses[module] = max(self.uses[module], count)
        prefix = f"{self.paths[root]}." if self.paths[root] else ""
        fused: dict[str, str] = {}
        for node in reversed(list(graph.nodes)):  # of two layers whose outputs are added, the later one adds
            if is_adder(node, modules):
                by_module = node.op == "call_module"
                path = prefix + (node.target if by_module else name_of_call(node))
                layer = self._layer(modules[node.target]) if by_module else functional_layer(node, root)
                chain = layer if isinstance(layer, str) else self._chain(layer, node, modules, root)
                if isinstance(chain, str):
                    self.report.left[path] = chain
                    continue
                target = node.target if by_module else _free_name(root, f"fused_{node.name}")
                modules[target] = chain.replace(graph, root, target)
                fused[path] = _describe(chain.residual, chain.limits)
        self.report.fused.update(reversed(fused.items()))
        for node in graph.nodes:
            if node.op == "call_module":
                _set_submodule(root, node.target, self._fuse(modules[node.target]))
        result = fx.GraphModule(root, graph, type(root).__name__)
        for name, value in vars(root).items():
            if name in HOOKS or name not in vars(result):
                setattr(result, name, value)
        return result

    def _chain(self, layer: Adder2d, node: fx.Node, modules: Modules, root: nn.Module) -> "_Chain | str":
        """The operations after an adder layer that can become part of it, or why there are none."""
        chain = _Chain(layer, [node])
        user = chain.follow(modules)
        if user is None:
            return (
                f"its output is used in {len(node.users)} places" if len(node.users) != 1 else "no BatchNorm follows it"
            )
        if user.op == "call_module":
            norm = self._norm(modules[str(user.target)])
        elif user.op == "call_function" and user.target is torch.nn.functional.batch_norm:
            norm = norm_of_call(user, root)
        else:
            norm = f"{user.name} follows it, not a BatchNorm2d"
        folded = norm if isinstance(norm, str) else fold(layer, norm)
        if isinstance(folded, str):
            return folded
        chain.scale, chain.shift = folded
        chain.accept(user)

        user = chain.follow(modules)
        residual = None if user is None else residual_of(user, chain.value)
        if user is not None and isinstance(residual, fx.Node) and not disturbed(node, user, chain.input, modules):
            chain.accept(user)
            chain.residual, chain.sum = residual, user
            user = chain.follow(modules)
        if user is not None and user.args[:1] == (chain.value,):
            if user.op == "call_module":
                module = modules[str(user.target)]
                chain.limits = None if has_hooks(module) else limits_of_module(module)
            else:
                chain.limits = limits_of_call(user)
            if chain.limits is not None:
                chain.accept(user)
        return chain


@dataclasses.dataclass
class _Chain:
    """An adder layer's node and those after it that become one, in order."""

    layer: Adder2d
    nodes: list[fx.Node]
    scale: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    shift: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    residual: fx.Node | None = None
    sum: fx.Node | None = None  # that adds it
    limits: Limits | None = None
    skipped: list[fx.Node] = dataclasses.field(default_factory=list)

    @property
    def input(self) -> fx.Node:
        value = self.nodes[0].args[0] if self.nodes[0].args else self.nodes[0].kwargs["input"]
        assert isinstance(value, fx.Node)
        return value

    @property
    def value(self) -> fx.Node:
        """What the next operation reads."""
        return (self.skipped or self.nodes)[-1]

    def follow(self, modules: Modules) -> fx.Node | None:
        """The only operation that reads the chain's value, past those that return it as it is; or None."""
        self.skipped = []
        while len(self.value.users) == 1:
            (user,) = self.value.users
            if (
                user.op != "call_module"
                or not passes(modules[str(user.target)])
                or has_hooks(modules[str(user.target)])
            ):
                return None if user.op == "output" else user
            self.skipped.append(user)
        return None

    def accept(self, user: fx.Node) -> None:
        self.nodes += [*self.skipped, user]
        self.skipped = []

    def replace(self, graph: fx.Graph, root: nn.Module, target: str) -> FusedAdder2d:
        """Puts one FusedAdder2d in the place of the nodes."""
        module = FusedAdder2d(self.layer, self.scale, self.shift, *(self.limits or (None, None)))
        _set_submodule(root, target, module)
        # Without a residual it runs where the layer ran; with one, where that is added.
        place = self.nodes[0] if self.sum is None else self.sum
        with graph.inserting_before(place):
            fused = graph.call_module(target, (self.input,) if self.residual is None else (self.input, self.residual))
        self.nodes[-1].replace_all_uses_with(fused)
        for node in reversed(self.nodes):
            read = [other for other in node.all_input_nodes if other.op == "get_attr"]
            graph.erase_node(node)
            for other in read:
                if not other.users:
                    graph.erase_node(other)
        return module


def _describe(residual: fx.Node | None, limits: Limits | None) -> str:
    parts = ["BatchNorm", "" if residual is None else "residual", "" if limits is None else name_of_limits(limits)]
    return ", ".join(part for part in parts if part)


def _set_submodule(root: nn.Module, target: str, module: nn.Module) -> None:
    parent, _, name = target.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def _free_name(root: nn.Module, name: str) -> str:
    while hasattr(root, name):
        name += "_"
    return name
