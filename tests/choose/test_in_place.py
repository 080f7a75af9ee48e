"""What structures keep of what they save alone: found by whole networks, surer with each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.choose.in_place import shares_kept


def test_nothing_known_is_all_kept() -> None:
    assert shares_kept([]) == ({}, 1.0)
    assert shares_kept([({}, 0.0, 1.0)]) == ({}, 1.0)


@pytest.mark.parametrize("truth", [0.3, 0.8, 1.0, 1.6])
def test_one_sure_trial_of_one_structure_says_its_share(truth: float) -> None:
    kept, shared = shares_kept([({"ranks": 10.0}, 10 * truth, 0.01)])
    assert kept["ranks"] == pytest.approx(truth, abs=1e-3)
    assert min(truth, 1) - 1e-3 <= shared <= max(truth, 1) + 1e-3  # what others keep is less sure


def test_several_trials_tell_structures_apart() -> None:
    def saved(ranks: float, groups: float) -> tuple[dict[str, float], float, float]:
        return {"ranks": ranks, "groups": groups}, 0.95 * ranks + 0.5 * groups, 0.05

    kept, shared = shares_kept([saved(10, 10), saved(4, 16), saved(18, 1)])
    assert kept["ranks"] == pytest.approx(0.95, abs=0.03) and kept["groups"] == pytest.approx(0.5, abs=0.03)
    assert 0.5 < shared < 0.95


def test_what_was_seen_is_foretold_again() -> None:
    trials = [({"a": 5.0, "b": 3.0}, 6.0, 0.05), ({"a": 1.0, "b": 8.0}, 5.0, 0.05), ({"a": 2.0, "c": 2.0}, 3.5, 0.05)]
    kept, _ = shares_kept(trials)
    for promised, found, noise in trials:
        assert sum(kept[each] * seconds for each, seconds in promised.items()) == pytest.approx(found, abs=3 * noise)


def test_a_disturbed_trial_says_little() -> None:
    kept, _ = shares_kept([({"a": 10.0}, 2.0, 50.0)])
    assert kept["a"] > 0.9
    sure, _ = shares_kept([({"a": 10.0}, 2.0, 50.0), ({"a": 10.0}, 7.0, 0.1)])
    assert sure["a"] == pytest.approx(0.7, abs=0.01)


seconds = st.floats(0, 1e3)


@given(
    st.lists(st.tuples(st.dictionaries(st.sampled_from("abc"), seconds), st.floats(-1e3, 1e3), st.floats(1e-3, 10)), max_size=8)
)
def test_shares_stay_within_reason(trials: list[tuple[dict[str, float], float, float]]) -> None:
    kept, shared = shares_kept(trials)
    assert all(0.1 <= share <= 3 for share in [*kept.values(), shared])
    assert set(kept) == {name for promised, *_ in trials for name in promised}
