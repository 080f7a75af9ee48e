"""What structures keep of what they save alone, and what each layer costs beside: found by whole networks, surer with each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.choose.in_place import InPlace, Trial, in_place


def foretold(found: InPlace, promised: dict[str, float], layers: int) -> float:
    return sum(found.saved_s(each, seconds) + found.each_s for each, seconds in promised.items()) - layers * found.each_s


def test_nothing_known_is_all_kept() -> None:
    assert in_place([]) == in_place([Trial({}, 0, 0.0, 1.0)]) == InPlace({}, 1.0, 0.0)
    assert InPlace().saved_s("ranks", 3.0) == 3.0


@pytest.mark.parametrize("truth", [0.3, 0.8, 1.0, 1.6])
def test_one_sure_trial_of_one_structure_is_foretold(truth: float) -> None:
    found = in_place([Trial({"ranks": 10.0}, 5, 10 * truth, 0.01)])
    assert foretold(found, {"ranks": 10.0}, 5) == pytest.approx(10 * truth, abs=1e-2)
    assert min(truth, 1) - 1e-3 <= found.kept["ranks"] <= max(truth, 1) + 1e-3
    assert min(truth, 1) - 1e-3 <= found.otherwise <= max(truth, 1) + 1e-3  # what others keep is less sure
    assert found.each_s >= 0 and (found.each_s == 0) == (truth >= 1)


def test_several_trials_tell_structures_apart() -> None:
    def saved(ranks: float, groups: float) -> Trial:
        return Trial({"ranks": ranks, "groups": groups}, 10, 0.95 * ranks + 0.5 * groups, 0.05)

    found = in_place([saved(10, 10), saved(4, 16), saved(18, 1)])
    assert found.kept["ranks"] == pytest.approx(0.95, abs=0.03) and found.kept["groups"] == pytest.approx(0.5, abs=0.03)
    assert 0.5 < found.otherwise < 0.95 and found.each_s < 0.05


def test_several_trials_tell_what_each_layer_costs_from_what_all_keep() -> None:
    trials = [
        Trial({"ranks": seconds}, layers, 0.9 * seconds - 0.2 * layers, 0.02) for seconds, layers in ((20, 30), (15, 8), (9, 2))
    ]
    found = in_place(trials)
    assert found.each_s == pytest.approx(0.2, abs=0.02) and found.kept["ranks"] == pytest.approx(0.9, abs=0.03)
    assert found.saved_s("ranks", 0.2) < 0 < found.saved_s("ranks", 0.3)  # so a layer that saves little is not worth it


def test_what_was_seen_is_foretold_again() -> None:
    trials = [
        Trial({"a": 5.0, "b": 3.0}, 4, 6.0, 0.05),
        Trial({"a": 1.0, "b": 8.0}, 4, 5.0, 0.05),
        Trial({"a": 2.0, "c": 2.0}, 2, 3.5, 0.05),
    ]
    found = in_place(trials)
    for trial in trials:
        assert foretold(found, dict(trial.promised), trial.layers) == pytest.approx(trial.saved_s, abs=3 * trial.noise_s)


def test_a_disturbed_trial_says_little() -> None:
    assert in_place([Trial({"a": 10.0}, 5, 2.0, 50.0)]).kept["a"] > 0.9
    found = in_place([Trial({"a": 10.0}, 5, 2.0, 50.0), Trial({"a": 10.0}, 5, 7.0, 0.1)])
    assert foretold(found, {"a": 10.0}, 5) == pytest.approx(7, abs=0.1)


seconds = st.floats(0, 1e3)


@given(
    st.lists(
        st.builds(
            Trial,
            st.dictionaries(st.sampled_from("abc"), seconds),
            st.integers(0, 100),
            st.floats(-1e3, 1e3),
            st.floats(1e-3, 10),
        ),
        max_size=8,
    )
)
def test_shares_stay_within_reason(trials: list[Trial]) -> None:
    found = in_place(trials)
    assert all(0.1 <= share <= 3 for share in [*found.kept.values(), found.otherwise])
    assert set(found.kept) == {name for trial in trials for name in trial.promised}
    promised = sum(sum(trial.promised.values()) for trial in trials)
    assert 0 <= found.each_s <= 3 * promised + 1e-9
