"""Goals: what can be asked for, and what cannot."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from pydantic_core import to_json

from lamina import Cost, GoalError, LaminaError, Macs, Milliseconds, Parameters, Ratio, Setting, Speedup, Timing
from lamina.goals import Limit, Within, goal_of, limits_in


@pytest.mark.parametrize("value", [1, 1.0, 2.5, 1e6])
def test_a_ratio_of_one_or_more_is_a_goal(value: float) -> None:
    assert Ratio(value).value == value


@pytest.mark.parametrize("value", [0.99, 0, -2, math.nan, math.inf, "2", None, True, np.float32(0.5)], ids=str)
def test_any_other_ratio_is_refused_in_one_line_that_quotes_it(value: object) -> None:
    with pytest.raises(GoalError) as caught:
        Ratio(value)  # type: ignore[arg-type]
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Ratio, Speedup, Milliseconds, Macs, Parameters], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "value", [np.float32(2), np.float64(2), np.int64(2), Fraction(2)], ids=lambda value: type(value).__name__
)
def test_a_number_of_any_kind_is_taken_as_pythons_own_and_can_be_written(kind: Any, value: Any) -> None:
    goal = kind(value)
    assert goal == kind(2) and type(goal.value) in (int, float)
    assert to_json(goal)


@pytest.mark.parametrize("kind", [Ratio, Speedup, Milliseconds, Macs, Parameters], ids=lambda kind: kind.__name__)
def test_a_number_too_large_for_a_float_is_refused(kind: Any) -> None:
    with pytest.raises(GoalError, match="is not possible"):
        kind(10**400)


def test_a_refused_goal_is_caught_as_any_error_of_lamina_and_as_a_value_error() -> None:
    assert issubclass(GoalError, LaminaError)
    assert issubclass(GoalError, ValueError)


def test_a_ratio_prints_as_it_is_said() -> None:
    assert str(Ratio(2.0)) == "ratio 2"
    assert str(Ratio(1.5)) == "ratio 1.5"


LIMITS = {Milliseconds: "4 ms", Macs: "581 M MACs", Parameters: "11.2 M parameters"}
COST = Cost(11_200_000, 581_000_000, Timing(4e-3, 1e-5, 9, Setting("cpu", "x", "float32", "contiguous", 1, "inference")))


@pytest.mark.parametrize(("kind", "text"), LIMITS.items(), ids=LIMITS.values())
def test_a_limit_allows_what_costs_no_more_and_prints_as_it_is_said(kind: type[Limit], text: str) -> None:
    limit = kind(1).at(COST)
    assert limit.of(COST) == limit.value
    assert str(limit) == text
    assert limit.allows(COST)
    assert not type(limit)(limit.value * 0.999).allows(COST)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", LIMITS, ids=LIMITS.values())
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "4"], ids=str)
def test_a_limit_takes_a_positive_number(kind: type[Limit], value: object) -> None:
    with pytest.raises(GoalError, match=f"{kind.__name__} takes a positive number"):
        kind(value)  # type: ignore[call-arg]


def test_time_cannot_be_limited_where_it_was_not_measured() -> None:
    with pytest.raises(GoalError, match="these costs hold no time"):
        Milliseconds(1.0).allows(Cost(1, 1))


def test_several_limits_print_together() -> None:
    assert str(Within((Milliseconds(4.0), Macs(2e9)))) == "4 ms and 2 G MACs"
    assert str(Within()) == "no limit"


@pytest.mark.parametrize("value", [1, 0.5, 0, -2, math.nan, math.inf, True, "2", None], ids=str)
def test_a_speed_up_is_above_one(value: object) -> None:
    with pytest.raises(GoalError, match="a number, time before / after, above 1"):
        Speedup(value)  # type: ignore[arg-type]


def test_a_speed_up_is_a_time_once_the_network_was_timed() -> None:
    (limit,) = (each.absolute(COST) for each in limits_in(Speedup(2)))
    assert limit == Milliseconds(2.0)
    assert str(Speedup(1.5)) == "speed-up 1.5"
    with pytest.raises(GoalError, match="these costs hold no time"):
        Speedup(2).absolute(Cost(1, 1))


def test_several_limits_are_one_goal_and_each_keeps_its_meaning() -> None:
    goal = goal_of([Speedup(2), Parameters(1e6)])
    assert str(goal) == "speed-up 2 and 1 M parameters"
    assert tuple(each.absolute(COST) for each in limits_in(goal)) == (Milliseconds(2.0), Parameters(1e6))
    assert goal_of([Macs(5)]) == Macs(5) and goal_of(Ratio(2)) == Ratio(2)


@pytest.mark.parametrize("asked", [2, "speedup", [], [Ratio(2), Macs(5)], [2], None, Speedup, Ratio], ids=str)
def test_what_is_no_goal_is_refused_in_one_line(asked: object) -> None:
    with pytest.raises(GoalError, match="is no goal: give") as caught:
        goal_of(asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "asked", [torch.zeros(2, 3), torch.zeros(40), [torch.zeros(40)], "x" * 99], ids=["lines", "long", "list", "text"]
)
def test_what_takes_long_to_write_is_named_by_its_type(asked: object) -> None:
    """As an example is that stands where the goal should."""
    with pytest.raises(GoalError, match=f"^a {type(asked).__name__} is no goal: give"):
        goal_of(asked)
