"""Joins a form, its module and its factoriser: the one table that knows what a form's type means.

A new form is a dataclass in `forms`, a factoriser, a module, and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..factorize.block_term import block_term
from ..factorize.low_rank import low_rank
from ..forms import BlockTerm, Form, LowRank
from ..network.surgery import adopt
from ..network.walk import Layer
from ..values import Geometry
from .decomposed import BlockTermLayer, DecomposedLayer, LowRankLayer, memory_format


@final
@dataclass(frozen=True, slots=True)
class _Join:
    module: Callable[..., DecomposedLayer]
    factorise: Callable[[Tensor, Any], list[Tensor]]
    """Weight ``(O, I, *kernel)`` and form → the factors' weights, in the order of `DecomposedLayer.factors`."""


def _low_rank(W: Tensor, form: LowRank) -> list[Tensor]:
    return list(low_rank(W.flatten(1), form.rank))


def _block_term(W: Tensor, form: BlockTerm) -> list[Tensor]:
    factors = block_term(W, form.rank_in, form.rank_out, form.groups)
    return [factor for factor in (factors.reduce, factors.core, factors.expand) if factor is not None]


_JOINS: dict[type[Form], _Join] = {
    LowRank: _Join(LowRankLayer, _low_rank),
    BlockTerm: _Join(BlockTermLayer, _block_term),
}


def skeleton(geometry: Geometry, form: Form) -> DecomposedLayer:
    """The module of a form with parameters on the meta device: shapes, no values."""
    form.check(geometry)
    return _JOINS[type(form)].module(geometry, form, device="meta")


def factored(layer: Layer, form: Form) -> DecomposedLayer:
    """A layer of the network in a form, fitted to its weight; hooks, training flag, dtype, device and layout are kept.

    The new parameters have storage of their own; they require gradients as the ones they replace did.

    Raises:
        RankError: The form does not fit the layer.
    """
    module = skeleton(layer.geometry, form)
    fitted = _JOINS[type(form)].factorise(layer.reader.weight(layer.module).detach(), form)
    _fill(module, layer.module, fitted)
    adopt(module, layer.module)
    return module


def placeholder(layer: Layer, form: Form) -> DecomposedLayer:
    """A layer in a form whose factors are zeros that take no memory: to try whether the network's code gets on with it."""
    module = skeleton(layer.geometry, form)
    weight: nn.Parameter = layer.module.weight  # type: ignore[assignment]
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    for factor in module.factors():
        for name, parameter in list(factor.named_parameters()):
            setattr(factor, name, nn.Parameter(zero.expand(parameter.shape), requires_grad=weight.requires_grad))
    adopt(module, layer.module)
    return module


def random(geometry: Geometry, form: Form, like: nn.Module) -> DecomposedLayer:
    """A layer in a form with random weights, in dtype, device and layout like a dense layer: for timing."""
    module = skeleton(geometry, form)
    weight: nn.Parameter = like.weight  # type: ignore[assignment]
    shapes = [
        parameter.shape for factor in module.factors() for name, parameter in factor.named_parameters() if name == "weight"
    ]
    fitted = [random_weight(tuple(shape), weight.device) for shape in shapes]
    _fill(module, like, fitted)
    return module


def random_weight(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Normal entries, scaled so that activations keep their size: neither infinities nor denormals distort a timing."""
    values: Tensor = torch.randn(shape, device=device) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
    return values


def _fill(module: DecomposedLayer, old: nn.Module, fitted: list[Tensor]) -> None:
    weight: nn.Parameter = old.weight  # type: ignore[assignment]
    layout = memory_format(weight)
    for factor, values in zip(module.factors(), fitted, strict=True):
        shaped = values.reshape(factor.weight.shape).to(weight.device, weight.dtype)  # type: ignore[arg-type]
        factor.weight = nn.Parameter(shaped.contiguous(memory_format=layout), requires_grad=weight.requires_grad)
    bias: nn.Parameter | None = old.bias  # type: ignore[assignment]
    if bias is not None:
        module.factors()[-1].bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
