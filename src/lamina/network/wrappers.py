"""Networks inside wrappers: names and structure are those of the network itself."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import LaminaError
from ..values import quoted

# What torch.compile, FSDP and activation checkpointing call the module they wrap.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, out of ``torch.compile`` and DDP.

    Raises:
        LaminaError: It is no network.
    """
    if not isinstance(model, nn.Module):
        named = isinstance(model, type) and issubclass(model, nn.Module)
        instead = f"call it to make one: {model.__name__}(…)" if named else "give a torch.nn.Module"
        raise LaminaError(f"{quoted(model)} is no network: {instead}")
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif _is_compiled(model):
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def compiled_in(model: nn.Module) -> list[str]:
    """Names of the modules, the network's own among them, that ``torch.compile`` wraps or ``module.compile()`` changed."""
    modules = model.named_modules()
    return [name for name, module in modules if _is_compiled(module) or getattr(module, "_compiled_call_impl", None)]


def run_uncompiled(model: nn.Module) -> None:
    """Let what ``torch.compile`` wraps inside a network run as it is; for a copy, which forgets ``module.compile()`` by itself.

    Each copy would be compiled anew, until the compiler has seen enough of them and goes on without a word. Only the copy is
    changed, where `torch.compiler.set_stance` would be heard by whoever else runs meanwhile, and by what is to be compiled.
    """
    for module in model.modules():
        if _is_compiled(module):
            vars(module)["forward"] = module._modules["_orig_mod"]


def _is_compiled(model: nn.Module) -> bool:
    # By name: to import the type loads the compiler.
    return type(model).__name__ == "OptimizedModule" and type(model).__module__.startswith("torch._dynamo")


def plain(name: str) -> str:
    """A module's or parameter's name without the wrappers in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
