"""A sum over layers that predicts scores, learnt from scores: Bayesian linear regression with a prior of one's own.

    y   scores of rows seen        X   one column a form of each layer, 1 where the row has it
    score ≈ c − s · prior − X w,   w ~ N(0, τ² V),   noise ~ N(0, σ²)

The prior is a loss of each form, whose unit is unknown, hence s. V lets a form stray in proportion to what its layer's prior
spans: a layer that is thought to hardly matter may err by little. Posterior draws are those of a draw from the prior, corrected
by what it misses of the data (Matheron's rule; Hoffman and Ribak, Astrophysical Journal 380, 1991): no covariance of all forms
is ever formed, only one of the rows seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from ..forms import Form
from ..supernet.space import Losses, Row, Space

_NOISES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""σ² over the mean prior variance of a row, of which the likeliest is taken."""
_JITTER = 0.5
"""How far a form's loss may stray before anything is scored: a factor of e^±0.5 in most draws."""
_FLOOR = 0.05
"""The least that a layer may stray, as a share of the mean layer: one that is thought not to matter at all may yet."""


@final
@dataclass(slots=True)
class Additive:
    """Losses by layer and form, believed at first, then corrected by scores. All that is drawn follows from the seed."""

    space: Space
    losses: Losses
    seed: int
    rows: list[Row] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    _never: list[NDArray[np.bool_]] = field(default_factory=list)
    _rng: np.random.Generator = field(init=False)
    _prior: list[NDArray[np.float64]] = field(init=False)
    _spans: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        prior = []
        for name, choice in self.space.choices.items():
            values = np.array([self.losses[name][form] for form in choice.forms], dtype=np.float64)
            finite = values[np.isfinite(values)]
            # What is never to be chosen may have been scored all the same: to learn from it, it is thought three times as bad.
            self._never.append(~np.isfinite(values))
            worst = finite.min(initial=0.0) + 3 * (np.ptp(finite) if len(finite) else 0.0)
            prior.append(np.where(self._never[-1], worst, values) - finite.min(initial=0.0))
        self._prior = prior
        spans = np.array([np.ptp(values) for values in prior])
        scale = spans.mean() or 1.0
        self._spans = np.maximum(spans, _FLOOR * scale) / scale

    def learn(self, found: Mapping[Row, float]) -> None:
        """Take scores up; failed ones, which are −∞, tell nothing of the sum."""
        for row, score in found.items():
            if math.isfinite(score):
                self.rows.append(row)
                self.scores.append(score)

    def believed(self) -> dict[str, dict[Form, float]]:
        """The losses as they are thought to be."""
        if len(self.rows) < 2:
            return self._named(self._prior)
        return self._named(self._fit(draw=False))

    def drawn(self) -> dict[str, dict[Form, float]]:
        """Losses as they may be as well."""
        if len(self.rows) < 2:
            return self._named([values * np.exp(_JITTER * self._rng.standard_normal(len(values))) for values in self._prior])
        return self._named(self._fit(draw=True))

    def _named(self, tables: list[NDArray[np.float64]]) -> dict[str, dict[Form, float]]:
        return {
            name: dict(zip(choice.forms, map(float, np.where(never, math.inf, values - values.min())), strict=True))
            for (name, choice), values, never in zip(self.space.choices.items(), tables, self._never, strict=True)
        }

    def _fit(self, draw: bool) -> list[NDArray[np.float64]]:
        y = np.array(self.scores)
        unit = y.std() or 1.0
        y = (y - y.mean()) / unit
        prior = np.array([sum(v[i] for v, i in zip(self._prior, row, strict=True)) for row in self.rows])
        size = prior.std() or 1.0
        rows = np.array(self.rows)
        # Rows covary by the layers in which they have the same form.
        same = np.einsum("l,nml->nm", self._spans**2, (rows[:, None] == rows[None]).astype(np.float64))
        mean = float(np.diag(same).mean())
        # What is common to all rows and the prior's unit are free, up to one standard deviation of the scores each.
        free = np.stack([np.ones(len(y)), -(prior - prior.mean()) / size], 1)
        best: tuple[float, float, float] | None = None
        for stray in (0.01, 0.1, 1.0):
            for noise in _NOISES:
                K = free @ free.T + stray / mean * same + noise * stray * np.eye(len(y))
                sign, size_of = np.linalg.slogdet(K)
                likely = -0.5 * (float(y @ np.linalg.solve(K, y)) + size_of)
                if sign > 0 and (best is None or likely > best[0]):
                    best = (likely, stray, noise)
        assert best is not None
        _, stray, noise = best
        K = free @ free.T + stray / mean * same + noise * stray * np.eye(len(y))
        deviations = self._spans * math.sqrt(stray / mean)
        if draw:
            first = self._rng.standard_normal(2)
            w0 = [d * self._rng.standard_normal(len(v)) for d, v in zip(deviations, self._prior, strict=True)]
            y = y - free @ first - np.array([sum(w[i] for w, i in zip(w0, row, strict=True)) for row in self.rows])
            y = y - math.sqrt(noise * stray) * self._rng.standard_normal(len(y))
        else:
            first, w0 = np.zeros(2), [np.zeros(len(v)) for v in self._prior]
        missing = np.linalg.solve(K, y)
        scale = first[1] + float(free[:, 1] @ missing)
        tables = []
        for layer, (values, start, deviation) in enumerate(zip(self._prior, w0, deviations, strict=True)):
            own = np.array([missing[rows[:, layer] == i].sum() for i in range(len(values))])
            tables.append(max(scale, 0.0) * values / size - start - deviation**2 * own)
        return tables
