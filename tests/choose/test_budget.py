"""The budget: exact against brute force, within every limit, and said where there is none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from lamina.choose import budget
from lamina.choose.budget import Row, Solution, solution, solve

NUMBERS = st.floats(-5, 5).map(lambda x: round(x, 3))


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, list[float]], list[Row]]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    names = [f"layer {number}" for number in range(len(sizes))]
    losses = {
        name: draw(st.lists(st.floats(0, 1).map(lambda x: round(x, 3)), min_size=size, max_size=size))
        for name, size in zip(names, sizes, strict=True)
    }
    rows = [
        Row(
            {name: draw(st.lists(NUMBERS, min_size=size, max_size=size)) for name, size in zip(names, sizes, strict=True)},
            draw(NUMBERS),
            draw(st.booleans()),
        )
        for _ in range(draw(st.integers(0, 3)))
    ]
    return losses, rows


def brute(losses: dict[str, list[float]], rows: Sequence[Row]) -> float | None:
    answers = [
        dict(zip(losses, each, strict=True))
        for each in itertools.product(*(range(len(options)) for options in losses.values()))
    ]
    allowed = [a for a in answers if all(row.of(a) <= row.most + 1e-9 for row in rows)]
    return min((sum(losses[name][i] for name, i in a.items()) for a in allowed), default=None)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_it_finds_the_least_loss_within_all_limits_or_says_that_there_is_none(
    problem: tuple[dict[str, list[float]], list[Row]],
) -> None:
    losses, rows = problem
    answer, least = solve(losses, rows), brute(losses, rows)
    if answer is None:
        assert least is None
        return
    assert answer.keys() == losses.keys()
    for row in rows:
        assert row.of(answer) <= row.most + 1e-4
    lost = sum(losses[name][i] for name, i in answer.items())
    # An answer on a limit's edge is within the solver's tolerance where brute force says no.
    assert least is None or lost <= least * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_neither_the_unit_of_a_limit_nor_that_of_the_loss_changes_the_answer(scale: float) -> None:
    losses = {"a": [0.0, 0.3, 0.5], "b": [0.0, 0.1, 0.9]}
    costs = {"a": [0.0, -2.0, -3.0], "b": [0.0, -1.0, -4.0]}
    row = Row({name: [c * scale for c in each] for name, each in costs.items()}, -3.0 * scale)
    assert solve({name: [loss / scale for loss in each] for name, each in losses.items()}, [row]) == {"a": 1, "b": 1}


def test_a_late_row_binds_as_any_other() -> None:
    losses = {"a": [0.0, 0.3], "b": [0.0, 0.1]}
    gain = Row({"a": [0.0, -1.0], "b": [0.0, -1.0]}, -1.0)
    one = Row({"a": [0.0, -1.0], "b": [0.0, 2.0]}, 0.0, late=True)
    assert solve(losses, [gain]) == {"a": 0, "b": 1}
    assert solve(losses, [gain, one]) == {"a": 1, "b": 0}


def test_of_a_solver_that_has_no_answer_in_its_time_a_choice_within_the_limits_is_still_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = {"a": [0.0, 1.0, 3.0], "b": [0.0, 2.0, 5.0], "c": [0.0, 1.5, 4.0]}
    row = Row({"a": [0.0, -3.0, -5.1], "b": [0.0, -4.0, -7.3], "c": [0.0, -3.1, -6.2]}, -10.55)
    monkeypatch.setattr(budget, "_whole", lambda *_: (None, -math.inf))
    answer = solve(losses, [row])
    assert answer is not None and row.of(answer) <= row.most
    assert solve(losses, [Row(row.costs, -100.0)]) is None


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([1e-1, 1e-2, 1e-4]))
def test_the_gap_that_is_told_is_proved_and_within_the_one_asked_for(
    problem: tuple[dict[str, list[float]], list[Row]], gap: float
) -> None:
    losses, rows = problem
    found, least = solution(losses, rows, gap=gap), brute(losses, rows)
    if found is None or least is None:
        return
    lost = sum(losses[name][i] for name, i in found.options.items())
    assert lost * (1 - found.gap) <= least + 1e-6  # an answer on a limit's edge is within the solver's tolerance
    assert found.gap <= gap + 1e-6 or lost < 1e-3


@pytest.mark.parametrize("answered", [False, True])
def test_of_a_solver_whose_time_is_up_the_gap_that_it_reached_is_told(monkeypatch: pytest.MonkeyPatch, answered: bool) -> None:
    losses = {"a": [0.0, 1.0, 3.0], "b": [0.0, 2.0, 5.0]}
    row = Row({"a": [0.0, -3.0, -5.1], "b": [0.0, -4.0, -7.3]}, -4.5)
    assert solution(losses, [row]) == Solution({"a": 2, "b": 0}, 0.0)

    def stopped(aim: NDArray[np.float64], *, constraints: Any, **_: Any) -> Any:
        """The dearest answer or none; it knows only that none loses less than 2, in the solver's unit of the largest loss."""
        of_layers = constraints[0].A.toarray()
        dearest = np.array([max(np.flatnonzero(layer), key=lambda place: aim[place]) for layer in of_layers])
        x = np.isin(np.arange(len(aim)), dearest).astype(float)
        return SimpleNamespace(x=x if answered else None, status=1, mip_gap=0.75, mip_dual_bound=2 / 5)

    monkeypatch.setattr("scipy.optimize.milp", stopped)
    found = solution(losses, [row])
    assert found and found.options == {"a": 1, "b": 1}  # what was at hand, and loses less than what it answered
    assert found.gap == pytest.approx(1 / 3)  # of 3; with shares of options allowed 1.75 is least, which proves less


def test_nothing_to_choose_is_within_what_asks_for_nothing() -> None:
    assert solve({}, [Row({}, 0.0)]) == {}
    assert solve({}, [Row({}, -1.0)]) is None
