"""Runs the example: what reaches each layer, how often, and whether the layer computes what can be read off it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from ..values import Use, dtype_name
from .walk import Layer


@final
@dataclass(slots=True)
class Observation:
    """What a layer's calls looked like: the distinct uses with their number of calls, and the input's memory format.

    ``apart`` is how far the layer's outputs lay from those of a plain layer with its geometry, weight and bias, relative to
    their size; more than rounding means that something was done to the layer which nobody can read off it.
    """

    uses: dict[Use, int] = field(default_factory=dict)
    channels_last: bool = False
    apart: float = 0.0

    def record(self, inputs: Tensor, output: Tensor, weight: torch.dtype) -> bool:
        """Count one call of a layer whose weight has a dtype; whether it is the first of its kind."""
        dtype = None if inputs.dtype == weight else dtype_name(inputs.dtype)
        use = Use(_shape(inputs), _shape(output), input_dtype=dtype, autocast=autocast_on(inputs.device.type))
        self.uses[use] = self.uses.get(use, 0) + 1
        self.channels_last = is_channels_last(inputs)
        return self.uses[use] == 1

    def as_uses(self, weight: float = 1.0) -> tuple[Use, ...]:
        """The distinct uses, most frequent first."""
        by_calls = sorted(self.uses.items(), key=lambda item: -item[1])
        return tuple(replace(use, calls=calls, weight=weight) for use, calls in by_calls)


def autocast_on(device: str) -> str:
    """The dtype of the autocast that is on for a type of device, or ``off``."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # the meta device has none
    return dtype_name(torch.get_autocast_dtype(device)) if on else "off"


def _shape(tensor: Tensor) -> tuple[int, ...]:
    if not tensor.is_nested:
        return tuple(tensor.shape)
    # Samples of unequal length, as `nn.TransformerEncoder` makes them from a padding mask: their rows, one below the other.
    width = tensor.size(-1)
    return tensor.numel() // width, width


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a 4- or 5-dimensional tensor lies channels last and not also contiguous."""
    if tensor.ndim not in (4, 5) or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)


def observing(layer: Layer, seen: Observation) -> Any:
    """Let a layer's calls be recorded; the handle ends it."""
    rebuilt, dtype = layer.rebuilt(), layer.parameter.dtype

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(inputs, Tensor) and isinstance(output, Tensor) and seen.record(inputs, output, dtype):
            seen.apart = max(seen.apart, _apart(output, _answer(rebuilt, inputs)))

    # Before all other hooks, which may change the output.
    return layer.module.register_forward_hook(record, with_kwargs=True, prepend=True)


def _answer(plain: nn.Module, inputs: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            answer: Tensor = plain(inputs)
    except Exception:  # the layer did answer
        return None
    return answer


def _apart(output: Tensor, expected: Tensor | None) -> float:
    """How many times the rounding of their dtype two outputs lie apart; infinite where they cannot be compared."""
    if expected is None or output.dtype != expected.dtype or _shape(output) != _shape(expected):
        return float("inf")
    if output.is_meta or _equal(output, expected):
        return 0.0
    a, b = (_flat(t.detach()) for t in (output, expected))
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b).norm()
    size = torch.where(b.isfinite(), b, 0.0).norm().clamp_min(1e-300)
    return float((difference / size).nan_to_num(torch.inf)) / torch.finfo(output.dtype).eps


def _equal(output: Tensor, expected: Tensor) -> bool:
    return not output.is_nested and output.layout == expected.layout == torch.strided and torch.equal(output, expected)


def _flat(tensor: Tensor) -> Tensor:
    whole = torch.cat([t.flatten() for t in tensor.unbind()]) if tensor.is_nested else tensor
    return whole.to_dense().double()


ROUNDING = 64.0
"""How many times its dtype's rounding a layer may lie from a plain one: kernels sum in different orders."""


def oddity(seen: Observation) -> str | None:
    """Why a layer that was observed cannot be decomposed; None where it computes what can be read off it."""
    if seen.apart <= ROUNDING:
        return None
    return "it does not compute what its weight, bias and attributes say: it was patched, or changed after it was made"
