"""Branches: the families of forms of one layer that share weights, which are cut into *terms*.

    dense        the dense weight, alone
    ranks        LowRank, Separable, or BlockTerm in one group: the factors of a lower rank are corners of those of a higher one
    groups       BlockTerm of one pair of widths: the factors at fewer groups are those at more groups plus a correction

A branch says which terms a form is made of, composes its weights of them, and fits them to a dense weight. Which form runs, and
on what layers, is the business of `series`.

    O, I   output, input channels of a factor's weight     o, i   those of the form before
    Δ_m    term m of a factor                              φ      expansion of a core to fewer groups
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ..factorize.low_rank import low_rank
from ..factorize.metric import Metric, on_sides
from ..factorize.separable import separable
from ..factorize.series import METHODS, blocks, check_nested, expand
from ..factorize.tucker import hosvd
from ..forms import BlockTerm, Dense, Form, LowRank, Separable
from ..network.readers import reader_of
from ..values import Geometry
from .build import skeleton
from .decomposed import memory_format

Method = Literal["nested", "faithful"]


class Branch(nn.Module):
    """A family of forms of one layer that share their terms. The terms are its parameters, one tensor each."""

    def __init__(self, geometry: Geometry, forms: Sequence[Form]) -> None:
        super().__init__()
        self.geometry = geometry
        self.forms = tuple(forms)
        self._place = {form: place for place, form in enumerate(self.forms)}

    @abstractmethod
    def plain(self, form: Form) -> nn.Module:
        """The layer that a form of this branch becomes, its parameters on the meta device."""

    @abstractmethod
    def terms(self, form: Form) -> list[nn.Parameter]:
        """The terms that a form is made of."""

    @abstractmethod
    def composed(self, form: Form, normalise: bool) -> list[Tensor]:
        """The weights of a form's factors, in their order. Gradients reach the form's terms."""

    @abstractmethod
    def fitted(self, W: Tensor, method: Method, metric: Metric | None = None) -> dict[str, Tensor]:
        """Values for the terms, by name, from a weight ``(O, I, *kernel)``; by what an error costs, where that is known."""

    def _declare(self, name: str, shape: Sequence[int], **options: Any) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(tuple(shape), **options)))


@final
class DenseBranch(Branch):
    """The dense weight, as the layer stores it."""

    def __init__(self, geometry: Geometry, forms: Sequence[Form], **options: Any) -> None:
        super().__init__(geometry, forms)
        self._declare("weight", self.plain(forms[0]).weight.shape, **options)  # type: ignore[arg-type]

    def plain(self, form: Form) -> nn.Module:
        """A layer of the type that the series replaces."""
        O, I = self.geometry.out_channels, self.geometry.in_channels
        weight = torch.empty(O, I, *self.geometry.kernel, device="meta")
        return reader_of(self.geometry).dense(self.geometry, weight, weight.new_empty(O) if self.geometry.bias else None)

    def terms(self, form: Form) -> list[nn.Parameter]:
        """The weight."""
        return [self.weight]  # type: ignore[list-item]

    def composed(self, form: Form, normalise: bool) -> list[Tensor]:
        """The weight itself."""
        return [self.weight]  # type: ignore[list-item]

    def fitted(self, W: Tensor, method: Method, metric: Metric | None = None) -> dict[str, Tensor]:
        """Nothing is fitted: the weight in the layer's own shape."""
        weight: nn.Parameter = reader_of(self.geometry).dense(self.geometry, W, None).weight  # type: ignore[assignment]
        return {"weight": weight.detach()}


class _DecomposedBranch(Branch):
    """A family of forms with factors; ``shapes`` has the shape of each factor's weight at each form, by the factor's name."""

    def __init__(self, geometry: Geometry, forms: Sequence[Form]) -> None:
        super().__init__(geometry, forms)
        layers = [skeleton(geometry, form) for form in self.forms]
        self.shapes: dict[str, list[tuple[int, ...]]] = {
            name: [tuple(layer.get_submodule(name).weight.shape) for layer in layers]  # type: ignore[arg-type]
            for name, _ in layers[0].named_children()
        }

    def plain(self, form: Form) -> nn.Module:
        """The decomposed layer of a form."""
        return skeleton(self.geometry, form)


@final
class RankBranch(_DecomposedBranch):
    """Forms of rising ranks, of which a lower one's factors are corners of a higher one's.

    From one form to the next a factor's weight may grow in its first two dimensions, and the term is what it grows by:

        ┌──────────┬───────┐
        │  before  │ right │      ``right`` (o, Δi, *kernel)
        ├──────────┴───────┤
        │      below       │      ``below`` (Δo, i + Δi, *kernel)
        └──────────────────┘

    The bases of a truncated SVD and of a truncated higher-order SVD nest in this way.
    """

    def __init__(
        self,
        geometry: Geometry,
        forms: Sequence[Form],
        factorise: Callable[[Tensor, Any], list[Tensor]],
        **options: Any,
    ) -> None:
        super().__init__(geometry, forms)
        self._factorise = factorise
        for name, shapes in self.shapes.items():
            for m, (before, after) in enumerate(pairwise([(0, 0), *shapes])):
                (o, i), (O, I, *kernel) = before[:2], after
                if o and i < I:
                    self._declare(f"{name}_{m}_right", (o, I - i, *kernel), **options)
                if o < O:
                    self._declare(f"{name}_{m}_below", (O - o, I, *kernel), **options)

    def _term(self, name: str, m: int, side: str) -> nn.Parameter | None:
        return self._parameters.get(f"{name}_{m}_{side}")

    def terms(self, form: Form) -> list[nn.Parameter]:
        """Those up to the form's own, as far as a factor grows."""
        steps = range(self._place[form] + 1)
        found = (self._term(name, m, side) for name in self.shapes for m in steps for side in ("right", "below"))
        return [term for term in found if term is not None]

    def composed(self, form: Form, normalise: bool) -> list[Tensor]:
        """The corners put together. Each entry belongs to one term, so there is nothing to normalise."""
        weights: list[Tensor] = []
        for name in self.shapes:
            weight: Tensor | None = None
            for m in range(self._place[form] + 1):
                right, below = self._term(name, m, "right"), self._term(name, m, "below")
                if right is not None and weight is not None:
                    weight = torch.cat([weight, right], 1)
                if below is not None:
                    weight = below if weight is None else torch.cat([weight, below], 0)
            assert weight is not None
            weights.append(weight)
        return weights

    def fitted(self, W: Tensor, method: Method, metric: Metric | None = None) -> dict[str, Tensor]:
        """The factors of the highest ranks, cut up."""
        values: dict[str, Tensor] = {}
        roots = _Roots.of(metric, W)
        factors = roots.undone(self._factorise(roots.applied(W), self.forms[-1]))
        for (name, shapes), factor in zip(self.shapes.items(), factors, strict=True):
            factor = factor.reshape(shapes[-1])
            for m, (before, after) in enumerate(pairwise([(0, 0), *shapes])):
                (o, i), (O, I) = before[:2], after[:2]
                values[f"{name}_{m}_right"], values[f"{name}_{m}_below"] = factor[:o, i:I], factor[o:O, :I]
        return {name: value for name, value in values.items() if name in self._parameters}


@final
class GroupBranch(_DecomposedBranch):
    """Forms of one pair of widths and falling group counts: term m of each factor is what the fit at the mth count adds.

    arXiv 1912.00673, section 3. The terms are summed in weight space, where an earlier core is first written with the groups of
    a later one (`lamina.factorize.series.expand`).
    """

    def __init__(self, geometry: Geometry, forms: Sequence[BlockTerm], **options: Any) -> None:
        self.groups = tuple(form.groups for form in forms)
        check_nested(self.groups)
        super().__init__(geometry, forms)
        self.ranks = forms[0].rank_in, forms[0].rank_out
        self._scales: dict[Any, Tensor] = {}
        for name, shapes in self.shapes.items():
            for count, shape in zip(self.groups, shapes, strict=True):
                self._declare(f"{name}_{count}", shape, **options)

    def _terms(self, name: str, form: Form) -> list[nn.Parameter]:
        return [getattr(self, f"{name}_{count}") for count in self.groups[: self._place[form] + 1]]

    def terms(self, form: Form) -> list[nn.Parameter]:
        """Those of the form's own group count and of all larger ones."""
        return [term for name in self.shapes for term in self._terms(name, form)]

    def composed(self, form: Form, normalise: bool) -> list[Tensor]:
        """``Σ_{m ≤ r} φ(Δ_m)`` for each factor.

        Every entry of the sum passes its gradient to each term that has this entry, and one step moves the sum by all of them.
        Normalised, the gradient of an entry is divided by their number first.
        """
        weights: list[Tensor] = []
        for name in self.shapes:
            terms = self._terms(name, form)
            # The 1×1 factors have one shape at every group count.
            steps = tuple(pairwise(self.groups[: len(terms)])) if name == "core" else ((1, 1),) * (len(terms) - 1)
            if len(terms) == 1 or not torch.is_grad_enabled():
                weights.append(_sum(steps, terms))
            else:
                weights.append(_Sum.apply(self._scale(steps, terms[0]) if normalise else None, steps, *terms))
        return weights

    def _scale(self, steps: tuple[tuple[int, int], ...], first: Tensor) -> Tensor:
        """One divided by how many terms have each entry of their sum, ``(o, i, 1, …)``."""
        key = steps, first.shape, first.device, first.dtype
        if key in self._scales:
            return self._scales[key]
        shared = first.new_ones(*first.shape[:2], *[1] * (first.ndim - 2))
        for before, after in steps:
            shared = expand(shared, before, after) + 1
        if not torch.compiler.is_compiling():  # there tensors are no real ones
            self._scales[key] = 1 / shared
        return 1 / shared

    def fitted(self, W: Tensor, method: Method, metric: Metric | None = None) -> dict[str, Tensor]:
        """The terms of the series.

        What is undone is undone of each term, as their sum is. A core that reads or writes the layer's own channels in groups
        cannot take up a root that mixes them: no metric counts on such a side.
        """
        rank_in, rank_out = self.ranks
        roots = _Roots.of(metric, W, (rank_in is not None, rank_out is not None))
        series = METHODS[method](roots.applied(W), rank_in, rank_out, self.groups)
        by_factor = {
            "reduce": [on_sides(term, roots.near_inverse, None) for term in series.reduce],
            "core": series.core,
            "expand": [on_sides(term, None, roots.far_inverse) for term in series.expand],
        }
        return {
            f"{name}_{count}": term.reshape(shape)
            for name, shapes in self.shapes.items()
            for count, shape, term in zip(self.groups, shapes, by_factor[name], strict=True)
        }


@dataclass(frozen=True, slots=True)
class _Roots:
    """The roots of a metric of channels, which make it a plain norm, and their inverses; None for the identity."""

    near: Tensor | None = None
    far: Tensor | None = None
    near_inverse: Tensor | None = None
    far_inverse: Tensor | None = None

    @classmethod
    def of(cls, metric: Metric | None, W: Tensor, sides: tuple[bool, bool] = (True, True)) -> _Roots:
        """Those of the sides that are wanted."""
        if metric is None:
            return cls()
        metric = metric.of_channels().fitting(W)
        near, far = (side if wanted else None for side, wanted in zip((metric.inputs, metric.gradients), sides, strict=True))
        return cls(near and near.root, far and far.root, near and near.inverse, far and far.inverse)

    def applied(self, W: Tensor) -> Tensor:
        """The whitened weight."""
        return W if self.near is None and self.far is None else on_sides(W, self.near, self.far)

    def undone(self, factors: list[Tensor]) -> list[Tensor]:
        """The factors of the weight from those of the whitened one: its outer ones take up the inverses."""
        first, *rest = factors
        factors = [first if self.near_inverse is None else on_sides(first, self.near_inverse, None), *rest]
        *others, last = factors
        return [*others, last if self.far_inverse is None else on_sides(last, None, self.far_inverse)]


def _sum(steps: Sequence[tuple[int, int]], terms: Sequence[Tensor]) -> Tensor:
    """``Σ φ(Δ_m)``, laid out as the last term; ``steps`` has the group counts between terms. A single term is not copied."""
    total = terms[0]
    for (before, after), term in zip(steps, terms[1:], strict=True):
        if before == after:
            total = term + total
        else:
            wide = term.clone()
            blocks(wide, before, after).add_(total.unflatten(0, (after, before // after, -1)))  # type: ignore[no-untyped-call]
            total = wide
    return total


class _Sum(torch.autograd.Function):
    """The sum, whose gradient is scaled entry by entry before each term takes the part that it has.

    In one node, so that nothing is written twice: neither zeros to expand into, nor gradients that are then copied.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scale: Tensor | None, steps: tuple[tuple[int, int], ...], *terms: Tensor) -> Tensor:
        return _sum(steps, terms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scale, ctx.steps, *_ = inputs
        ctx.scaled = scale is not None
        if ctx.scaled:
            ctx.save_for_backward(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.scaled:
            gradient = gradient * ctx.saved_tensors[0]
        found = [gradient]
        for before, after in reversed(ctx.steps):
            if before != after:
                gradient = _flat(blocks(gradient, before, after), memory_format(gradient))
            found.append(gradient)
        return None, None, *reversed(found)


def _flat(parts: Tensor, layout: torch.memory_format) -> Tensor:
    """The blocks of a core as a core of its own, laid out as wished, in one copy."""
    if layout == torch.contiguous_format:
        return parts.flatten(0, 2)
    return parts.movedim(3, -1).flatten(0, 2).movedim(-1, 1)


def _dense(geometry: Geometry, forms: list[Dense], **options: Any) -> dict[str, Branch]:
    return {"dense": DenseBranch(geometry, forms, **options)}


def _of_ranks(name: str, factorise: Callable[[Tensor, Any], list[Tensor]]) -> Callable[..., dict[str, Branch]]:
    """One branch for all forms of a type that has one rank, whose bases nest."""

    def branches(geometry: Geometry, forms: list[Any], **options: Any) -> dict[str, Branch]:
        rising = sorted(forms, key=lambda form: form.rank)
        return {name: RankBranch(geometry, rising, factorise, **options)}

    return branches


def _block_term(geometry: Geometry, forms: list[BlockTerm], **options: Any) -> dict[str, Branch]:
    """One branch for each pair of widths that comes in groups; the rest, in one group each, in chains of rising ranks."""
    branches: dict[str, Branch] = {}
    grouped = dict.fromkeys((form.rank_in, form.rank_out) for form in forms if form.groups > 1)
    for ranks in grouped:
        family = sorted((f for f in forms if (f.rank_in, f.rank_out) == ranks), key=lambda form: -form.groups)
        name = "_".join("whole" if rank is None else str(rank) for rank in ranks)
        branches[f"groups_{name}"] = GroupBranch(geometry, family, **options)
    chains: list[list[BlockTerm]] = []
    single = [form for form in forms if (form.rank_in, form.rank_out) not in grouped]
    for form in sorted(single, key=lambda form: (form.rank_in or 0, form.rank_out or 0)):
        chain = next((chain for chain in chains if _extends(chain[-1], form)), None)
        if chain is None:
            chains.append([form])
        else:
            chain.append(form)
    for number, chain in enumerate(chains):
        branches[f"ranks_{number}"] = RankBranch(geometry, chain, _hosvd, **options)
    return branches


def _extends(low: BlockTerm, high: BlockTerm) -> bool:
    """Whether both leave the same sides whole and no rank of ``high`` is below that of ``low``."""
    pairs = ((low.rank_in, high.rank_in), (low.rank_out, high.rank_out))
    return all((a is None) == (b is None) and (a or 0) <= (b or 0) for a, b in pairs)


def _svd(W: Tensor, form: LowRank) -> list[Tensor]:
    return list(low_rank(W.flatten(1), form.rank))


def _separable(W: Tensor, form: Separable) -> list[Tensor]:
    return list(separable(W, form.rank))


def _hosvd(W: Tensor, form: BlockTerm) -> list[Tensor]:
    factors = hosvd(W, form.rank_in, form.rank_out)
    return [factor for factor in (factors.reduce, factors.core, factors.expand) if factor is not None]


# Forms of one type → their branches, by name.
BRANCHES: dict[type[Form], Callable[..., dict[str, Branch]]] = {
    Dense: _dense,
    LowRank: _of_ranks("low_rank", _svd),
    BlockTerm: _block_term,
    Separable: _of_ranks("separable", _separable),
}
