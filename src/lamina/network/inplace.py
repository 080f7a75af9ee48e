"""Exchanges the layers of a network where they are, all or none, in the memory of the network and its largest layer.

Each dense weight waits on disk until the last layer is exchanged. As each layer stays the same object, whoever holds it holds
the new one. Then every weight must be gone from memory: nobody can read what is not there. Where one is still held by somebody,
a list of weights or an optimizer, it must be proved that the network does not read it.
"""

from __future__ import annotations

import copy
import gc
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from ..errors import LaminaError
from .attention import Attention, parts_of
from .surgery import adopt, become, way_back
from .walk import Layer


def exchange(
    layers: Iterable[Layer],
    make: Callable[[Layer], nn.Module],
    finish: Callable[[Mapping[str, Tensor]], None],
    *,
    on_disk: bool = True,
) -> None:
    """Let layers become others, largest first; an error undoes it all.

    Args:
        layers: The layers.
        make: What one becomes; called when its turn has come.
        finish: Called when all are exchanged, with the weights that are still held by somebody, by title: it raises where the
            network reads one.
        on_disk: Whether dense weights wait on disk, or in memory.

    Raises:
        LaminaError: The dense weights cannot be kept on disk; or one cannot be brought back after an error, and the message
            names the folder in which it lies. What ``make`` and ``finish`` raise goes through.
    """
    done: list[_WayBack] = []
    closing: list[Callable[[], None]] = []
    layers = list(layers)
    try:
        folder = Path(tempfile.mkdtemp(prefix="lamina-")) if on_disk else None
    except OSError as error:
        raise _no_room(error) from error
    try:
        for holder in dict.fromkeys(layer.holder for layer in layers if layer.holder is not None):
            closing.append(way_back(holder))
            become(holder, adopt(Attention(holder, _called(holder, layers)), holder))
        for layer in sorted(layers, key=lambda layer: -layer.geometry.parameters):
            new = make(layer)
            keep = _in_memory if folder is None else partial(_on_disk, folder / f"{len(done)}.safetensors")
            done.append(_WayBack.of(layer, keep))
            become(layer.module, new)
            done[-1].parameters["weight"] = None
        finish(_still_held(done))
    except BaseException as error:
        lost = [f"{way.title} ({why})" for way in reversed(done) if (why := way.take())]
        for close in reversed(closing):
            close()
        if lost and folder:
            raise LaminaError(
                f"{', '.join(lost)}: could not be brought back after {type(error).__name__}: {error}; the dense weights lie in "
                f"{folder}"
            ) from error
        _remove(folder)
        if folder and isinstance(error, OSError | SafetensorError):
            raise _no_room(error) from error
        raise
    _remove(folder)


def _called(holder: nn.MultiheadAttention, layers: Iterable[Layer]) -> dict[str, nn.Module]:
    """The projections of an attention: the layers that become others themselves, the rest in memory of their own."""
    own = {layer.part: layer.module for layer in layers if layer.holder is holder}
    return {name: copy.deepcopy(part) for name, part in parts_of(holder).items() if name not in own} | own


def _remove(folder: Path | None) -> None:
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


# Takes a weight and its gradient, and gives what gives them back.
_Keep = Callable[[dict[str, Tensor]], Callable[[], dict[str, Tensor]]]


def _on_disk(path: Path, tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return lambda: load_file(path)


def _in_memory(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    return lambda: tensors


def _no_room(error: Exception) -> LaminaError:
    return LaminaError(f"working in place keeps the dense weights in {tempfile.gettempdir()} meanwhile: {error}")


def _still_held(done: Sequence[_WayBack]) -> dict[str, Tensor]:
    if any(way.is_held() for way in done):
        gc.collect()  # what only a cycle holds
    return {way.title: held for way in done if way.is_held() and (held := way.held()) is not None}


def _references(storage: StorageWeakRef) -> int:
    count: int = torch._C._storage_Use_Count(storage.cdata)
    return count


@cache
def _references_of_one() -> int:
    """How many references a storage has that a single tensor holds, once it was looked at."""
    tensor = torch.empty(1)
    return _references(StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]


@final
@dataclass(frozen=True, slots=True)
class _WayBack:
    """Brings one dense layer back whose weight was taken away."""

    title: str
    turn: Callable[[], None]
    parameters: dict[str, nn.Parameter | None]
    """The dense layer's table, in which the weight is missing."""
    weight: TensorWeakRef
    """Whoever else holds the weight keeps it alive; then that very object comes back."""
    storage: StorageWeakRef
    lies: tuple[Any, ...]
    """Offset, shape and strides of the weight in its storage."""
    own: int
    """References to the weight's storage that are kept here."""
    like: nn.Parameter
    """The weight on the meta device: its layout, attributes, and whether it trains."""
    device: torch.device
    kept: Callable[[], dict[str, Tensor]]

    @classmethod
    def of(cls, layer: Layer, keep: _Keep) -> _WayBack:
        weight = layer.parameter
        tensors = {"weight": weight.detach()} if weight.grad is None else {"weight": weight.detach(), "grad": weight.grad}
        like = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        vars(like).update(vars(weight))
        return cls(
            title=layer.title,
            turn=way_back(layer.module),
            parameters=layer.module._parameters,
            weight=TensorWeakRef(weight),
            storage=StorageWeakRef(weight.untyped_storage()),  # type: ignore[no-untyped-call]
            lies=(weight.storage_offset(), weight.shape, weight.stride()),
            own=_references_of_one() if keep is _in_memory else 0,
            like=like,
            device=weight.device,
            kept=keep(tensors),
        )

    def is_held(self) -> bool:
        """Whether somebody else still holds the weight, or a view of it."""
        gone: bool = self.storage.expired()  # type: ignore[no-untyped-call]
        return self.weight() is not None or (not gone and _references(self.storage) > self.own)

    def held(self) -> Tensor | None:
        """The weight, found by what somebody else holds of it."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            return None
        empty = torch.empty(0, dtype=self.like.dtype, device=self.device)
        return empty.set_(storage, *self.lies)

    def take(self) -> str | None:
        """Bring the layer back; what went wrong, or None."""
        try:
            weight = self.weight()
            self.parameters["weight"] = self._restored() if weight is None else weight
        except Exception as error:  # the other layers can still be brought back
            return f"{type(error).__name__}: {error}"
        self.turn()
        return None

    def _restored(self) -> nn.Parameter:
        stored = {name: torch.empty_like(self.like, device=self.device).copy_(value) for name, value in self.kept().items()}
        held = self.held()  # a view of it may be
        weight = nn.Parameter(stored["weight"] if held is None else held, requires_grad=self.like.requires_grad)
        weight.grad = stored.get("grad")
        vars(weight).update(vars(self.like))
        return weight
