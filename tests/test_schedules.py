"""Freezing schedules are values: they say which group rests when, and for which share of the time."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from lamina import FreezingError, SequentialFreezing, VanillaFreezing
from lamina.schedules import AnySchedule, Schedule

SCHEDULES = {
    "every epoch": SequentialFreezing(),
    "every third epoch, inner first": SequentialFreezing(period=3, first="inner"),
    "every 10 steps": SequentialFreezing(period=10, unit="steps"),
    "unfrozen at the end": SequentialFreezing(unfrozen_last=2),
    "without the head": SequentialFreezing(exclude=("head", "stem.*")),
    "vanilla": VanillaFreezing(),
    "vanilla without the head": VanillaFreezing(exclude=("head",)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_comes_back_from_json(schedule: Schedule) -> None:
    text = json.dumps(dataclasses.asdict(schedule))
    assert TypeAdapter(AnySchedule).validate_json(text) == schedule
    assert hash(schedule) == hash(dataclasses.replace(schedule))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_shares_of_the_phases_sum_to_one(schedule: Schedule) -> None:
    assert sum(phase.share for phase in schedule.phases()) == 1


@given(period=st.integers(1, 5), first=st.sampled_from(["outer", "inner"]), unit=st.sampled_from(["epochs", "steps"]))
def test_over_whole_turns_each_phase_has_the_share_it_says(period: int, first: str, unit: str) -> None:
    schedule = SequentialFreezing(period=period, unit=unit, first=first)  # type: ignore[arg-type]
    turns = 6 * period
    at = [(n, 0) if unit == "epochs" else (0, n) for n in range(turns)]
    seen = Counter(schedule.resting(epoch, step, None) for epoch, step in at)
    assert {group: count / turns for group, count in seen.items()} == {p.resting: p.share for p in schedule.phases()}


@pytest.mark.parametrize(
    ("schedule", "epochs", "expected"),
    [
        (SequentialFreezing(), None, [0, 1, 0, 1, 0, 1]),
        (SequentialFreezing(first="inner"), None, [1, 0, 1, 0, 1, 0]),
        (SequentialFreezing(period=2), 6, [0, 0, 1, 1, 0, 0]),
        (SequentialFreezing(unfrozen_last=2), 6, [0, 1, 0, 1, None, None]),
        (VanillaFreezing(), None, [0, 0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_the_groups_rest_in_turn(schedule: Schedule, epochs: int | None, expected: list[int | None]) -> None:
    assert [schedule.resting(epoch, 7 * epoch, epochs) for epoch in range(6)] == expected


def test_a_period_in_steps_looks_at_steps_alone_but_for_the_unfrozen_end() -> None:
    schedule = SequentialFreezing(period=3, unit="steps", unfrozen_last=1)
    assert [schedule.resting(0, step, 2) for step in range(8)] == [0, 0, 0, 1, 1, 1, 0, 0]
    assert {schedule.resting(1, step, 2) for step in range(8)} == {None}


NONSENSE = {
    "period 0": (lambda: SequentialFreezing(period=0), "period is 0"),
    "half a period": (lambda: SequentialFreezing(period=0.5), "period is 0.5"),  # type: ignore[arg-type]
    "a true period": (lambda: SequentialFreezing(period=True), "period is True"),
    "minutes": (lambda: SequentialFreezing(unit="minutes"), "'epochs' or 'steps'"),  # type: ignore[arg-type]
    "core first": (lambda: SequentialFreezing(first="core"), "'outer' or 'inner'"),  # type: ignore[arg-type]
    "minus one unfrozen": (lambda: SequentialFreezing(unfrozen_last=-1), "unfrozen_last is -1"),
    "a bare pattern": (lambda: SequentialFreezing(exclude="head"), "tuple of patterns"),  # type: ignore[arg-type]
    "numbers as patterns": (lambda: VanillaFreezing(exclude=(1,)), "tuple of patterns"),  # type: ignore[arg-type]
    "unfrozen, but when": (lambda: SequentialFreezing(unfrozen_last=1).check(None), "pass epochs="),
    "only unfrozen": (lambda: SequentialFreezing(unfrozen_last=3).check(3), "would freeze nothing in 3 epochs"),
    "no epochs": (lambda: VanillaFreezing().check(0), "0 epochs are no training"),
}


@pytest.mark.parametrize(("make", "message"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused_with_what_would_do(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FreezingError, match=message):
        make()


def test_a_schedule_says_what_it_does() -> None:
    assert str(SequentialFreezing()) == "sequential freezing every epoch, outer first"
    assert str(SequentialFreezing(period=50, unit="steps", first="inner")) == "sequential freezing every 50 steps, inner first"
    assert str(SequentialFreezing(unfrozen_last=1)).endswith("last epoch unfrozen")
    assert str(VanillaFreezing(exclude=("head", "stem"))) == "vanilla freezing, without head, stem"
    assert [str(phase) for phase in SequentialFreezing().phases()] == ["outer factors rest", "inner factors rest"]


def test_excluded_layers_are_those_that_a_pattern_matches() -> None:
    schedule = SequentialFreezing(exclude=("head", "layer?.0.*"))
    assert [schedule.concerns(name) for name in ("head", "layer1.0.conv1", "layer1.1.conv1", "heads")] == [
        False,
        False,
        True,
        True,
    ]
    assert schedule.idle_pattern(["head", "layer1.1.conv1"]) == "layer?.0.*"
    assert schedule.idle_pattern(["head", "layer1.0.conv1"]) is None
