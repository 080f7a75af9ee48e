"""Screens: cheap predictions of a configuration's loss, which say what is worth scoring.

A loss that is a sum over layers ranks millions of configurations in a second. It comes from the fits alone (`weight_errors`),
or from the scores of the few configurations that differ from one in a single layer (`score_drops`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

from ..errors import SearchError
from ..forms import Form
from ..supernet.space import Losses, Row, Space
from ..supernet.supernet import Supernet
from .score import Score, scores_of


@final
@dataclass(frozen=True, slots=True)
class Screen:
    """A cheap prediction that goes before the score, and how many configurations it leaves over.

    Args:
        loss: From a configuration to its predicted loss, lower is better; or for each layer its share at each form, which is
            added up over the layers: that ranks millions in a second. `weight_errors` makes one without any data,
            `score_drops` one from the scores of a few configurations; ``"scores"`` has the search make these, so that they
            stand in its study and its workers share them.
        survivors: How many are scored, those of the least predicted loss.

    Raises:
        SearchError: Nothing would survive.
    """

    loss: Callable[[Mapping[str, Form]], float] | Losses | Literal["scores"]
    survivors: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss != "scores":
            raise SearchError(f"loss is {self.loss!r}; it is a function, losses by layer and form, or 'scores'")
        if isinstance(self.survivors, bool) or not isinstance(self.survivors, int) or self.survivors < 1:
            raise SearchError(f"survivors is {self.survivors!r}; it must be a whole number of 1 or more")

    def of(self, space: Space, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The predicted loss of many rows ``(N, L)``: ``(N,)``."""
        if callable(self.loss):
            return np.array([self.loss(space.configuration(row)) for row in rows.tolist()], dtype=np.float64)
        assert not isinstance(self.loss, str), "the search has made it losses"
        total = np.zeros(len(rows))
        for layer, (name, choice) in enumerate(space.choices.items()):
            try:
                values = np.array([self.loss[name][form] for form in choice.forms])
            except KeyError as error:
                raise SearchError(f"{name or 'the network'}: the screen has no loss for {error.args[0]}") from error
            total += values[rows[:, layer]]
        return total


def weight_errors(net: Supernet) -> dict[str, dict[Form, float]]:
    """The squared weight errors ``‖W − Ŵ‖²`` of a supernet's fits before any training, layer by layer: a `Screen` without data.

    Within one kind of form their sum ranked configurations better than trained supernets did; a group and a rank it does not
    compare.
    """
    return {name: dict(zip(layer.forms, layer.errors, strict=True)) for name, layer in net.blueprint.layers.items()}


def score_drops(
    net: Supernet, score: Score, config: Mapping[str, Form] | None = None, *, at_once: int = 16
) -> dict[str, dict[Form, float]]:
    """How much the score drops when a single layer of a configuration takes another form: a `Screen` from few scores.

        >>> screen = lamina.Screen(lamina.score_drops(net, score), survivors=50)

    As many configurations are scored as there are forms in all layers together; their sum predicts all others, as far as layers
    act independently.

    Args:
        net: A supernet, best a trained one. It stays as it is.
        score: As `search` takes it, higher is better.
        config: The configuration to start from; by default each layer's dearest form.
        at_once: How many configurations are scored together where the score judges many.

    Returns:
        Layer name → form → by how much the score drops, 0 for the form in ``config`` and infinite where the score failed.

    Raises:
        SearchError: The configuration is of another space, or its own score failed.
    """
    space = net.space
    start = space.row(space.uniforms()[-1] if config is None else config)

    def scores(rows: Sequence[Row]) -> dict[Row, float]:
        parts = [[space.configuration(row) for row in rows[i : i + at_once]] for i in range(0, len(rows), at_once)]
        outcomes = [outcome for part in parts for outcome in scores_of(net, score, part)]
        if outcomes[0].score is None:
            raise SearchError(f"the score failed for the configuration to start from: {outcomes[0].error}")
        return {row: -math.inf if each.score is None else each.score for row, each in zip(rows, outcomes, strict=True)}

    return drops(space, start, scores)


def drops(space: Space, start: Row, score: Callable[[Sequence[Row]], Mapping[Row, float]]) -> dict[str, dict[Form, float]]:
    """How much the score drops from a row to those that differ in one layer.

    Args:
        space: The space.
        start: The row to start from.
        score: Scores rows, the start first; a row whose score failed has −∞.

    Raises:
        SearchError: The start's own score failed.
    """
    changed = [
        (layer, form)
        for layer, choice in enumerate(space.choices.values())
        for form in range(len(choice.forms))
        if form != start[layer]
    ]
    rows = [(*start[:layer], form, *start[layer + 1 :]) for layer, form in changed]
    found = score([start, *rows])
    if not math.isfinite(found[start]):
        raise SearchError("the score failed for the configuration that all others are compared with, each layer's dearest form")
    losses = {name: {form: 0.0 for form in choice.forms} for name, choice in space.choices.items()}
    for (layer, form), row in zip(changed, rows, strict=True):
        name = space.names[layer]
        losses[name][space.choices[name].forms[form]] = found[start] - found[row]
    return losses
