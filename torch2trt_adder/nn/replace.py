"""Layers put in the place of others, with all that a caller has hung on them."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

# ---- putting layers in the place of others

# What a caller may have hung on a layer. The dicts themselves move, so that a handle's remove() still works.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

# What changes a layer's checkpoints by the names of its own parameters.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def replace_layers(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts new layers in the place of old ones, with their training mode and hooks; returns the network."""
    for old, new in layers.items():
        new.training = old.training
        for name in HOOKS:
            setattr(new, name, getattr(old, name))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in layers:
                parent._modules[name] = layers[child]
    return layers.get(model, model)


def lost_state(module: nn.Module, kept: Sequence[Tensor | None]) -> Iterator[str]:
    """What a layer in the place of `module` would lose, in words, when it has its hooks and the tensors `kept`."""
    known = {id(tensor) for tensor in kept}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in known:
            yield f"its parameter `{name}`"
    for name, _ in module.named_buffers(remove_duplicate=False):
        yield f"its buffer `{name}`"
    if "forward" in vars(module):
        yield "the `forward` that was set on it"
    if any(getattr(module, name, None) for name in _STATE_HOOKS):
        yield "its hooks on state_dict"
