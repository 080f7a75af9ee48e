"""Goals: what can be asked for, and what cannot."""

from __future__ import annotations

import math

import pytest

from lamina import GoalError, LaminaError, Ratio


@pytest.mark.parametrize("value", [1, 1.0, 2.5, 1e6])
def test_a_ratio_of_one_or_more_is_a_goal(value: float) -> None:
    assert Ratio(value).value == value


@pytest.mark.parametrize("value", [0.99, 0, -2, math.nan, math.inf, "2", None], ids=str)
def test_any_other_ratio_is_refused_in_one_line_that_quotes_it(value: object) -> None:
    with pytest.raises(GoalError) as caught:
        Ratio(value)  # type: ignore[arg-type]
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_goal_is_caught_as_any_error_of_lamina_and_as_a_value_error() -> None:
    assert issubclass(GoalError, LaminaError)
    assert issubclass(GoalError, ValueError)


def test_a_ratio_prints_as_it_is_said() -> None:
    assert str(Ratio(2.0)) == "ratio 2"
    assert str(Ratio(1.5)) == "ratio 1.5"
