"""Joins a form, its module and its factoriser: the one table that knows what a form's type means.

A new form is a dataclass in `forms`, a factoriser, a module, and one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..factorize.block_term import block_term, refit
from ..factorize.low_rank import left_out, low_rank
from ..factorize.metric import Metric
from ..factorize.separable import left_out_separable, separable
from ..factorize.tucker import left_out_of_sides
from ..factorize.weighted import (
    price_of_ranks,
    price_of_separable,
    price_of_sides,
    weighted_block_term,
    weighted_low_rank,
    weighted_separable,
    whitened,
)
from ..forms import BlockTerm, Form, LowRank, Separable
from ..network.readers import plain
from ..network.surgery import adopt
from ..network.walk import Layer
from ..values import Geometry
from .decomposed import BlockTermLayer, DecomposedLayer, LowRankLayer, SeparableLayer, laid_out, memory_format, stored_in


@final
@dataclass(frozen=True, slots=True)
class _Join:
    module: Callable[..., DecomposedLayer]
    factorise: Callable[[Tensor, Any, Metric | None], list[Tensor]]
    """Weight ``(O, I, *kernel)``, form and metric → the factors' weights, in the order of `DecomposedLayer.factors`."""
    losses: Callable[[Tensor, Sequence[Any], Metric | None], list[float]]
    """Weight and forms → about the share of the weight's squared norm that each leaves out, or the error in a metric."""
    needs_fit: Callable[[Any], bool]
    """Whether a form's loss is known only once it was fitted."""


def _low_rank(W: Tensor, form: LowRank, metric: Metric | None) -> list[Tensor]:
    W = W.flatten(1)
    return list(low_rank(W, form.rank) if metric is None else weighted_low_rank(W, form.rank, metric))


def _block_term(W: Tensor, form: BlockTerm, metric: Metric | None) -> list[Tensor]:
    asked = form.rank_in, form.rank_out, form.groups
    if metric is None:
        factors = block_term(W, *asked)
    else:
        factors = weighted_block_term(W, *asked, metric, tucker_sweeps=_SWEEPS_ON_PATCHES)
    return [factor for factor in (factors.reduce, factors.core, factors.expand) if factor is not None]


def _low_rank_losses(W: Tensor, forms: Sequence[LowRank], metric: Metric | None) -> list[float]:
    W = W.flatten(1)
    left = (left_out(W) if metric is None else price_of_ranks(W, metric)).tolist()
    return [left[form.rank] for form in forms]


def _separable(W: Tensor, form: Separable, metric: Metric | None) -> list[Tensor]:
    return list(separable(W, form.rank) if metric is None else weighted_separable(W, form.rank, metric))


def _separable_losses(W: Tensor, forms: Sequence[Separable], metric: Metric | None) -> list[float]:
    left = (left_out_separable(W) if metric is None else price_of_separable(W, metric)).tolist()
    return [left[form.rank] for form in forms]


_SWEEPS_ON_PATCHES = 3
_PRICING_SWEEPS = 4


def _foretold(W: Tensor, form: BlockTerm, metric: Metric | None) -> float:
    """About what a fit leaves out, from its first sweeps: as many again tell where it goes.

    What is still to be gained about halves when the sweeps double, so the whole fit lies as far below the second look as that
    lies below the first. On trained layers this is 2 to 8 % above the whole fit, where the first look alone is 9 to 26 %
    above it, and the bound of ranks 2 to 4 % above theirs: so neither kind of form looks dearer than it is beside the other.
    """
    asked = form.rank_in, form.rank_out, form.groups
    if metric is None:
        return _from_two_looks(W, asked)
    if form.rank_in and form.rank_out:
        # Such a fit of the whitened weight goes over into one of the weight, and back.
        white, square = whitened(W, metric)
        return _from_two_looks(white, asked) * square
    return metric.error(W.double() - weighted_block_term(W, *asked, metric).composed().double())


def _from_two_looks(W: Tensor, asked: tuple[int | None, int | None, int]) -> float:
    first = block_term(W, *asked, sweeps=_PRICING_SWEEPS)
    early, late = (fit.left_out(W) for fit in (first, refit(W, first, sweeps=_PRICING_SWEEPS)))
    return max(2 * late - early, 0.0)


def _block_term_losses(W: Tensor, forms: Sequence[BlockTerm], metric: Metric | None) -> list[float]:
    left: Tensor | None = None
    if any(form.groups == 1 for form in forms):
        left = left_out_of_sides(W) if metric is None else price_of_sides(W, metric)
    return [
        _foretold(W, form, metric) if left is None or form.groups > 1 else float(left[form.rank_out or -1, form.rank_in or -1])
        for form in forms
    ]


_JOINS: dict[type[Form], _Join] = {
    LowRank: _Join(LowRankLayer, _low_rank, _low_rank_losses, lambda form: False),
    BlockTerm: _Join(BlockTermLayer, _block_term, _block_term_losses, lambda form: form.groups > 1),
    Separable: _Join(SeparableLayer, _separable, _separable_losses, lambda form: False),
}


def needs_fit(form: Form) -> bool:
    """Whether the loss of a form is known only once it was fitted: not one spectrum of many forms, but a fit each."""
    return type(form) in _JOINS and _JOINS[type(form)].needs_fit(form)


def losses(layer: Layer, forms: Iterable[Form], metric: Metric | None = None) -> dict[Form, float]:
    """How much of a layer's weight each form leaves out, as a share of its squared norm, or of its size in a metric; 0: exact.

    Methods: one factorisation prices all ranks, from spectra; a core in groups is fitted. What it says of ranks is that of the
    truncated higher-order SVD, an upper bound of what `factored` leaves out; of groups it is an estimate from a few sweeps.

    Args:
        layer: The layer.
        forms: What it may become.
        metric: What an error costs; of patches it is taken by its channels, in which all ranks are priced at once. The size of
            a weight is then what it would cost to lose all of it.
    """
    metric = metric and metric.of_channels()
    forms = list(dict.fromkeys(forms))
    found = {form: 0.0 for form in forms if form.is_exact(layer.geometry)}
    groups = _groups(layer, metric)
    # A weight that costs nothing at all leaves nothing out.
    size = 1.0 if metric is None else _size(groups) or 1.0
    for kind, join in _JOINS.items():
        asked = [form for form in forms if type(form) is kind and form not in found]
        if asked:
            left = _losses_of_groups(join, groups, asked)
            found |= {form: each / size for form, each in zip(asked, left, strict=True)}
    return found


def size_of(layer: Layer, metric: Metric) -> float:
    """What it would cost to lose all of a layer's weight: the error of it in a metric of channels."""
    return _size(_groups(layer, metric))


def _size(groups: Iterable[tuple[Tensor, Metric | None]]) -> float:
    return sum(metric.error(W) for W, metric in groups if metric is not None)


def _groups(layer: Layer, metric: Metric | None, weight: Tensor | None = None) -> list[tuple[Tensor, Metric | None]]:
    """The weight of each group of a layer ``(O, I, *kernel)``, mostly of one, and what an error of it costs."""
    P = layer.geometry.groups
    metrics: Sequence[Metric | None] = [None] * P if metric is None else metric.of_groups(P)
    return list(zip((layer.weight.detach() if weight is None else weight).chunk(P), metrics, strict=True))


def _losses_of_groups(join: _Join, groups: Sequence[tuple[Tensor, Metric | None]], forms: Sequence[Form]) -> list[float]:
    """What forms leave out of all groups: the sum of their errors, or each one's share by its own of the squared norm."""
    each = [join.losses(W, forms, metric) for W, metric in groups]
    if len(each) == 1:
        return each[0]
    squares = torch.stack([W.double().square().sum() for W, _ in groups])
    shares = (squares / squares.sum().clamp_min(1e-300)).tolist()
    counts = [share if metric is None else 1.0 for share, (_, metric) in zip(shares, groups, strict=True)]
    return [sum(count * one for count, one in zip(counts, of_form, strict=True)) for of_form in zip(*each, strict=True)]


def skeleton(geometry: Geometry, form: Form) -> DecomposedLayer:
    """The module of a form with parameters on the meta device: shapes, no values."""
    form.check(geometry)
    return _JOINS[type(form)].module(geometry, form)


def factored(
    layer: Layer, form: Form, metric: Metric | None = None, own_bias: bool = False, weight: Tensor | None = None
) -> DecomposedLayer:
    """A layer of the network in a form, fitted to its weight; hooks, training flag, dtype, device and layout are kept.

    The new parameters have storage of their own; they require gradients as the ones they replace did. With ``own_bias`` the
    bias is the very one of the layer, which somebody else may hold too. With a metric the fit is the best in it. With a
    ``weight``, ``(O, I, *kernel)``, it is fitted to that one.

    Raises:
        RankError: The form does not fit the layer.
    """
    module = skeleton(layer.geometry, form)
    # Factors are found in full precision, whatever the caller's network runs in.
    with torch.autocast(layer.parameter.device.type, enabled=False):
        each = [_JOINS[type(form)].factorise(W, form, own) for W, own in _groups(layer, metric, weight)]
    fitted = each[0] if len(each) == 1 else [torch.cat(parts) for parts in zip(*each, strict=True)]
    _hold(module, layer.module, [stored_in(f, W) for f, W in zip(module.factors(), fitted, strict=True)], own_bias)
    adopt(module, layer.module, plain(layer.geometry))
    return module


def placeholder(layer: Layer, form: Form) -> DecomposedLayer:
    """A layer in a form with small random factors that take no memory: to try whether the network's code gets on with it."""
    module = skeleton(layer.geometry, form)
    return _standing_in(layer, module, [_hankel(p.shape, layer.parameter) for p in _weights_of(module)])


def exact(layer: Layer, form: Form, identities: dict[Any, Tensor]) -> DecomposedLayer:
    """A layer at full rank that computes what it did: one factor is its own weight, the others are identities.

    Args:
        layer: The layer; its weight is only read.
        form: The form whose full rank it is.
        identities: Identity matrices by what they are; missing ones are added, so that layers share them.
    """
    geometry, like = layer.geometry, layer.parameter
    module = skeleton(geometry, form.at_full_rank(geometry))

    def identity(size: int) -> Tensor:
        key = size, like.dtype, like.device
        if key not in identities:
            identities[key] = torch.eye(size, dtype=like.dtype, device=like.device)
        return identities[key]

    weights = module.exactly(layer.weight.detach(), identity)
    return _standing_in(layer, module, [stored_in(f, weight) for f, weight in zip(module.factors(), weights, strict=True)])


def _standing_in(layer: Layer, module: DecomposedLayer, weights: list[Tensor]) -> DecomposedLayer:
    """Give a skeleton its weights and a layer's own bias, hooks and attributes: for a trial, so nothing is copied."""
    _replace_weights(module, layer.module, weights)
    if layer.bias is not None:
        module.factors()[-1].bias = _like(layer.bias, layer.bias.detach())
    adopt(module, layer.module, plain(layer.geometry))
    return module


def empty(layer: Layer, form: Form) -> DecomposedLayer:
    """A layer in a form whose factors have no values yet, to be loaded into; the bias is the layer's own."""
    module = skeleton(layer.geometry, form)
    weights = [torch.empty(p.shape, device=layer.parameter.device) for p in _weights_of(module)]
    _hold(module, layer.module, weights, own_bias=True)
    adopt(module, layer.module, plain(layer.geometry))
    return module


def _hankel(shape: torch.Size, like: Tensor) -> Tensor:
    """A weight in which every entry depends on the sum of its indices alone: as good as random, of full rank, and tiny."""
    generator = torch.Generator("cpu").manual_seed(0)  # not the global one, whose state is the user's
    values = torch.randn(sum(shape) - len(shape) + 1, generator=generator, device="cpu") / max(1, shape[1:].numel()) ** 0.5
    hankel: Tensor = values.to(like.device, like.dtype).as_strided(shape, (1,) * len(shape))
    return hankel


def random(geometry: Geometry, form: Form, like: nn.Module, draw: Callable[[Tensor], Tensor] | None = None) -> DecomposedLayer:
    """A layer in a form with random weights, in dtype, device and layout like a dense layer: for timing.

    Args:
        geometry: That of the dense layer.
        form: The form.
        like: The dense layer.
        draw: Gives the weights, each of the shape and the strides of a tensor without values; by default they are drawn.
    """
    module = skeleton(geometry, form)
    weight: nn.Parameter = like.weight  # type: ignore[assignment]
    if draw is None:
        weights = [random_weight(tuple(p.shape), weight.device) for p in _weights_of(module)]
    else:
        weights = [draw(laid_out(p.detach(), memory_format(weight))) for p in _weights_of(module)]
    _hold(module, like, weights)
    return module


def random_weight(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Normal entries, scaled so that activations keep their size: neither infinities nor denormals distort a timing."""
    values: Tensor = torch.randn(shape, device=device) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
    return values


def _weights_of(module: DecomposedLayer) -> list[nn.Parameter]:
    return [factor.weight for factor in module.factors()]  # type: ignore[misc]


def _hold(module: DecomposedLayer, old: nn.Module, weights: list[Tensor], own_bias: bool = False) -> None:
    """Give the factors weights as they hold them, in the old layer's dtype and layout, and a bias."""
    weight: nn.Parameter = old.weight  # type: ignore[assignment]
    layout = memory_format(weight)
    _replace_weights(module, old, [laid_out(values.to(weight.device, weight.dtype), layout) for values in weights])
    bias: nn.Parameter | None = old.bias  # type: ignore[assignment]
    if bias is not None:
        module.factors()[-1].bias = bias if own_bias else _like(bias, bias.detach().clone())


def _replace_weights(module: DecomposedLayer, old: nn.Module, weights: list[Tensor]) -> None:
    for factor, values in zip(module.factors(), weights, strict=True):
        factor.weight = _like(old.weight, values)  # type: ignore[arg-type]


def _like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter that trains as another one does, and has the marks that the user has put on that one."""
    # Of a network built in inference mode; a copy made outside of it can be trained.
    values = values.clone() if values.is_inference() else values
    new = nn.Parameter(values, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    return new
