"""Networks inside wrappers: names and structure are those of the network itself."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# What torch.compile, FSDP and activation checkpointing call the module they wrap.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, out of ``torch.compile`` and DDP."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def plain(name: str) -> str:
    """A module's or parameter's name without the wrappers in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
