"""The structure of a network: names, types, shapes, and which tensors are one; never values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .memory import overlapping


def fingerprint(model: nn.Module, instead: Mapping[nn.Module, nn.Module] | None = None) -> str:
    """A hash of every module's name and type, of every parameter's and buffer's name and shape, and of what shares memory.

    Buffers that are not saved are left out: they are caches, whose shapes may follow the last input.

    Two networks of the same code have the same fingerprint, whatever their weights, dtype and device.

    Args:
        model: The network.
        instead: Modules for which others are read in their place, as if they had been exchanged.
    """
    modules = list(_named(model, "", instead or {}))
    lines = [f"{name} {type(module).__qualname__}" for name, module in modules]
    tensors = [
        (f"{name}.{key}" if name else key, tensor)
        for table in ("_parameters", "_buffers")
        for name, module in modules
        for key, tensor in getattr(module, table).items()
        if tensor is not None and not (table == "_buffers" and key in getattr(module, "_non_persistent_buffers_set", ()))
    ]
    for name, tensor in tensors:
        shape = "lazy" if isinstance(tensor, UninitializedBuffer | UninitializedParameter) else "×".join(map(str, tensor.shape))
        lines.append(f"{name} {shape}")
    return hashlib.sha256("\n".join([*lines, *_shared(tensors)]).encode()).hexdigest()


def _named(module: nn.Module, name: str, instead: Mapping[nn.Module, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Modules under all their names, as `named_modules(remove_duplicate=False)` has them."""
    module = instead.get(module, module)
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _named(child, f"{name}.{key}" if name else key, instead)


def _shared(tensors: list[tuple[str, Tensor]]) -> list[str]:
    """A line for each group of names whose tensors are one, or overlap in memory."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    together = [sorted(name for tensor in group for name in names[id(tensor)]) for group in overlapping(t for _, t in tensors)]
    inside = {name for group in together for name in group}
    together += [each for each in names.values() if len(each) > 1 and not inside & set(each)]
    return sorted("shared " + " ".join(group) for group in together)
