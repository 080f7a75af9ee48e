"""The structure of a network: names, types and shapes, never values."""

from __future__ import annotations

import hashlib

from torch import nn
from torch.nn.parameter import UninitializedParameter


def fingerprint(model: nn.Module) -> str:
    """A hash of every module's name and type and of every parameter's and buffer's name and shape.

    Buffers that are not saved are left out: they are caches, whose shapes may follow the last input.

    Two networks of the same code have the same fingerprint, whatever their weights, dtype and device.
    """
    lines = [f"{name} {type(module).__qualname__}" for name, module in model.named_modules(remove_duplicate=False)]
    unsaved = {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules(remove_duplicate=False)
        for buffer in getattr(module, "_non_persistent_buffers_set", ())
    }
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if name in unsaved:
                continue
            shape = "lazy" if isinstance(tensor, UninitializedParameter) else "×".join(map(str, tensor.shape))
            lines.append(f"{name} {shape}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
