"""The state of a network: its tensors by name, as the network's own code gives and takes them, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..values import closest
from .copying import copy_together
from .memory import tensors_of
from .running import first_line
from .surgery import way_back


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What ``model.state_dict()`` answers.

    Raises:
        ArtifactError: Some of it is no tensor.
    """
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ArtifactError(f"{name}: the network keeps a {type(value).__name__} there; safetensors holds tensors alone")
    return state


def names_in(state: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Under which names each tensor of a state stands, by the ``id`` of the tensor: tied ones under several.

    Args:
        state: What ``state_dict(keep_vars=True)`` gives; an ``id`` means something while it is kept.
    """
    found: dict[int, list[str]] = {}
    for name, tensor in state.items():
        found.setdefault(id(tensor), []).append(name)
    return found


@contextmanager
def taken(model: nn.Module, state: Mapping[str, Tensor], source: str, fresh: Collection[nn.Module] = ()) -> Iterator[None]:
    """Load a whole state by the network's own ``load_state_dict``, strictly; then hold what the network says against it.

    The tensors get storage of their own first, so that an error, within the context too, leaves the network as it was; what the
    network's code does to the contents of lists and dicts of its own is not undone.

    Args:
        model: The network; its state has the same names, shapes and dtypes.
        state: The state.
        source: Where it comes from, for messages.
        fresh: Modules of the network that were just made: what they hold before is not worth keeping.

    Raises:
        ArtifactError: Something is missing, left over or does not fit, or the network does not say afterwards what it was
            given; the message names the first.
    """
    with _undone_on_error(model, fresh):
        _forbid_misfit(state_of(model), state, source)
        try:
            with torch.inference_mode(False), torch.no_grad():
                model.load_state_dict(dict(state), strict=True)
        except Exception as error:  # the network's own code may raise anything
            raise ArtifactError(f"{source}: the network does not take its state: {first_line(error)}") from error
        for name, tensor in state_of(model).items():
            if name not in state or not _same_bits(tensor, state[name]):
                raise ArtifactError(f"{source}: {name} is not what was loaded: the network's own code changed it")
        yield


def _forbid_misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in wanted.items():
        if name not in given:
            raise ArtifactError(f"{source}: {name} is missing{closest(name, [n for n in given if n not in wanted])}")
        if given[name].shape != tensor.shape:
            raise ArtifactError(
                f"{source}: {name} has shape {tuple(given[name].shape)}, this network wants {tuple(tensor.shape)}"
            )
        if given[name].dtype != tensor.dtype:
            raise ArtifactError(
                f"{source}: {name} is {given[name].dtype}, this network's is {tensor.dtype}: convert the base model first"
            )
    for name in given:
        if name not in wanted:
            raise ArtifactError(f"{source}: {name} has no place in this network")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if not a.is_cuda and torch.equal(a, b):
        return True
    a, b = (t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


@contextmanager
def _undone_on_error(model: nn.Module, fresh: Collection[nn.Module]) -> Iterator[None]:
    """Put every tensor of a network on new storage, with the same values; after an error bring everything back."""
    known = {id(module) for new in fresh for module in new.modules()}
    undo: list[Callable[[], None]] = []
    try:
        for module in (m for m in model.modules() if id(m) not in known):
            undo.append(way_back(module))
            undo += [_refilled(t) for t in (module._parameters, module._buffers) if isinstance(t, dict)]  # a script has none
        _on_own_storage(list(model.modules()), known, undo)
        yield
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _refilled(table: dict[str, Any]) -> Callable[[], None]:
    entries = dict(table)

    def refill() -> None:
        table.clear()
        table.update(entries)

    return refill


def _on_own_storage(modules: list[nn.Module], known: set[int], undo: list[Callable[[], None]]) -> None:
    tensors = {
        id(t): t
        for module in modules
        for t in tensors_of(module)
        # The biases of fresh modules were the network's before.
        if t.layout == torch.strided and t.is_leaf and (id(module) not in known or t.ndim == 1)
    }
    fresh = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    together: dict[int, Any] = {}
    copy_together(tensors.values(), together)
    fresh |= {key: together[key].detach() for key in tensors.keys() & together.keys()}
    for key, tensor in tensors.items():
        if not tensor.is_inference():
            undo.append(_moved(tensor, fresh[key]))
    # Nobody may write into these outside of inference mode, whatever their storage: others take their places.
    others = {key: _like(tensor, fresh[key]) for key, tensor in tensors.items() if tensor.is_inference()}
    tables: list[dict[str, Any]] = [t for module in modules for t in (module._parameters, module._buffers)]
    for table in tables if others else ():
        table.update({name: others[id(tensor)] for name, tensor in table.items() if id(tensor) in others})


def _moved(tensor: Tensor, values: Tensor) -> Callable[[], None]:
    before = tensor.data
    tensor.data = values

    def move_back() -> None:
        tensor.data = before

    return move_back


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
