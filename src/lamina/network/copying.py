"""Copies of a network, with modules exchanged on the way.

Two kinds: `cloned`, which shares nothing with the network, and `shadow`, whose parameters lie on the network's own storage and
which costs no memory. Whatever lamina tries, it tries on a shadow: the network may be in use meanwhile, and is only read.

A copy follows every way in which the network holds a module or a tensor: its tables, lists, helper objects, bound methods. It
cannot follow a closure, which goes on calling the original; `watch` finds that out.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import LaminaError
from .memory import Place, overlapping, tensors_of, whole_place
from .running import Looking
from .surgery import HOOKS
from .wrappers import run_uncompiled

Exchanged = Mapping[nn.Module, nn.Module]


def cloned(
    model: nn.Module, exchanged: Exchanged | None = None, otherwise: str = "move it out of the network first"
) -> nn.Module:
    """A copy of a network with modules exchanged on the way; what is exchanged is not copied.

    Tensors are copied by value, also those that `copy.deepcopy` refuses (results of autograd, as old ``weight_norm`` leaves
    them), and share memory where they shared it. The new modules' hooks, which `adopt` gave them, are copied too.

    Args:
        model: The network; it is only read.
        exchanged: Modules that others take the place of; by default none.
        otherwise: What to do where it cannot be copied, for the message.

    Raises:
        LaminaError: The network holds something that cannot be copied.
    """
    exchanged = exchanged or {}
    memo = _memo(exchanged)
    kept = [module for module in model.modules() if id(module) not in memo]
    for tensor in (t for module in kept for t in tensors_of(module) if not t.is_leaf or t.layout != torch.strided):
        memo[id(tensor)] = tensor.detach().clone()
    copy_together((t for module in kept for t in tensors_of(module)), memo)
    try:
        result: nn.Module = copy.deepcopy(model, memo)
        _copy_slots(model, memo)
        _bind_hooks(exchanged, memo)
        for parameter in (p for module in kept for p in module._parameters.values() if p is not None and vars(p)):
            if id(parameter) in memo:  # else it is a factor of a layer that was exchanged
                vars(memo[id(parameter)]).update(copy.deepcopy(vars(parameter), memo))  # which deepcopy leaves behind
    except Exception as error:
        raise LaminaError(f"the network cannot be copied ({type(error).__name__}: {error}); {otherwise}") from error
    return result


def shadow(
    model: nn.Module,
    exchanged: Exchanged | None = None,
    apart: frozenset[Place] = frozenset(),
    held: Collection[Tensor] = (),
) -> nn.Module:
    """A copy of a network whose parameters lie on the network's own storage, to be run in the network's stead.

    Buffers are copied, since a run may write into them, except where they share memory with a parameter. What cannot be copied,
    such as a lock, is shared. What is compiled inside runs uncompiled.

    Args:
        model: The network; it is only read.
        exchanged: Modules that others take the place of.
        apart: Storages of parameters that are copied after all, since a run writes into them.
        held: More tensors whose storage is not copied, wherever the network holds a part of it.
    """
    exchanged = exchanged or {}
    memo = _memo(exchanged)
    # Of exchanged modules too: the network may hold their parameters elsewhere.
    parameters = {id(p): p for module in model.modules() for p in module._parameters.values() if p is not None}
    lent = frozenset(at for p in parameters.values() if (at := whole_place(p))) - apart
    storages: _Storages = {}
    for weight in held:
        _let_become(weight.untyped_storage(), weight.untyped_storage(), memo)
    for tensor in [*parameters.values(), *(t for module in model.modules() for t in tensors_of(module))]:
        if id(tensor) in memo:
            continue
        if whole_place(tensor) is None:
            memo[id(tensor)] = tensor if id(tensor) in parameters or tensor.is_meta else tensor.detach().clone()
        else:
            memo[id(tensor)] = alias(tensor, _storage_for(tensor, storages, memo, lent))
    with _Lending(lent | {at for weight in held if (at := whole_place(weight))}):
        try:
            attempt = dict(memo)
            result: nn.Module = copy.deepcopy(model, attempt)
            memo = attempt
        except Exception:
            result = _module_by_module(model, memo)
        _copy_slots(model, memo)
        _bind_hooks(exchanged, memo)
    run_uncompiled(result)
    return result


@final
class _Lending(Looking):
    """A clone of what is lent is no copy: so parameters are copied that no table of a module names."""

    def __init__(self, lent: frozenset[Place]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lent = lent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default and whole_place(args[0]) in self.lent:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def _memo(exchanged: Exchanged) -> dict[int, Any]:
    """What `copy.deepcopy` must not copy, and what stands for it; whoever holds a layer's bias holds the new one's."""
    memo: dict[int, Any] = {id(old): new for old, new in exchanged.items()}
    for old, new in exchanged.items():
        before, after = getattr(old, "bias", None), getattr(new, "bias", None)
        if isinstance(before, nn.Parameter) and isinstance(after, nn.Parameter):
            memo[id(before)] = after
    return memo


def copy_together(tensors: Iterable[Tensor], memo: dict[int, Any]) -> None:
    """Copy those of some tensors that share memory, so that the copies share theirs; into a memo of `copy.deepcopy`."""
    storages: _Storages = {}
    for tensor in chain.from_iterable(overlapping(tensors)):
        memo[id(tensor)] = alias(tensor, _storage_for(tensor, storages, memo))


_Storages = dict[Place | None, torch.UntypedStorage]


def _storage_for(
    tensor: Tensor, storages: _Storages, memo: dict[int, Any], lent: frozenset[Place] = frozenset()
) -> torch.UntypedStorage:
    """Where a tensor's copy lies: on its own storage where that is lent, else on a copy of it, one for all that share it."""
    at = whole_place(tensor)
    if at not in storages:
        storage = tensor.untyped_storage()
        storages[at] = storage if at in lent else storage.clone()  # type: ignore[no-untyped-call]
        _let_become(storage, storages[at], memo)
    return storages[at]


def _let_become(old: torch.UntypedStorage, new: torch.UntypedStorage, memo: dict[int, Any]) -> None:
    # Here PyTorch looks up what became of a storage, whatever tensor `copy.deepcopy` comes upon.
    memo.setdefault("torch", {})[old._cdata] = new  # type: ignore[call-overload]


def alias(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """A tensor of the same kind at the same place of a storage; attributes and the demand for gradients go along."""
    its_own = storage._cdata == tensor.untyped_storage()._cdata
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return tensor.detach() if its_own else tensor.detach().clone()
    if its_own and not tensor.is_inference():
        new = tensor.detach()
    else:
        with torch.no_grad():
            new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            new.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.is_conj():
            new = new.conj()
        if tensor.is_neg():
            new = torch._neg_view(new)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    elif tensor.is_leaf and tensor.requires_grad:
        new.requires_grad_()
    vars(new).update(vars(tensor))
    return new


def _copy_slots(model: nn.Module, memo: dict[int, Any]) -> None:
    # `nn.Module` copies its dict alone.
    for module in model.modules():
        for kind in type(module).__mro__:
            for name in kind.__dict__.get("__slots__", ()):
                twin = memo.get(id(module))
                if hasattr(module, name) and type(twin) is type(module):
                    setattr(twin, name, _copied(getattr(module, name), memo))


def _bind_hooks(exchanged: Exchanged, memo: dict[int, Any]) -> None:
    # A hook may be a method of the network: the copy's layers call the copy.
    for new in exchanged.values():
        for table in HOOKS:
            if hooks := new.__dict__[table]:
                new.__dict__[table] = copy.deepcopy(hooks, memo)


def _module_by_module(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a network that `copy.deepcopy` refuses: attributes that cannot be copied are shared."""
    twins = [(module, copy.copy(module)) for module in model.modules() if id(module) not in memo]
    memo |= {id(module): twin for module, twin in twins}
    for _, twin in twins:
        for name, value in list(vars(twin).items()):
            vars(twin)[name] = _copied(value, memo)
    result: nn.Module = memo[id(model)]
    return result


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    attempt = dict(memo)  # a copy that fails half way leaves halves of objects in its memo
    try:
        new = copy.deepcopy(value, attempt)
    except Exception:
        return value
    memo.update(attempt)
    return new
