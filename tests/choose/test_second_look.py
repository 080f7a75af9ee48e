"""Forms that are doubted by their times alone, and what a whole network says of them: a fake tells, no clock is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from lamina import Dense, LowRank
from lamina.choose.second_look import with_doubted
from lamina.forms import Form
from lamina.plan import PlannedLayer
from lamina.values import Cost, Geometry, Setting, Timing

SETTING = Setting("cpu", "a CPU", "float32", "contiguous", 1, "inference")
LAYER = Geometry("Linear", 64, 64, False)


def layer(form: Form, alone: float) -> PlannedLayer:
    before, after = (Cost(1, 1, Timing(seconds, 0.0, 9, SETTING)) for seconds in (1.0, alone))
    return PlannedLayer(geometry=LAYER, uses=(), form=form, reason="by its time alone", before=before, after=after)  # type: ignore[arg-type]


@dataclass
class Network:
    """A dense network of ten seconds, of which each decomposed layer saves as much."""

    saves: Mapping[str, float]
    noise: float = 0.0
    tried: list[set[str]] = field(default_factory=list)

    def trial(self, forms: Mapping[str, Form]) -> tuple[list[float], list[float]]:
        self.tried.append(set(forms))
        after = 10.0 - sum(self.saves[name] for name in forms)
        return [10.0] * 9, [after * (1 + self.noise * (at % 2)) for at in range(9)]


PLANNED = {"sure": layer(LowRank(8), 0.5), **{name: layer(Dense(), 1.0) for name in "abcd"}}
DOUBTED = {name: layer(LowRank(4), alone) for name, alone in zip("abcd", (1.3, 0.98, 1.02, 1.1), strict=True)}


def test_what_pays_in_its_place_is_taken_however_long_it_takes_alone() -> None:
    network = Network({"sure": 4.0, **dict.fromkeys("abcd", 0.5)})
    found = with_doubted(network, PLANNED, DOUBTED)
    assert all(each.form == LowRank(4) for name, each in found.items() if name in "abcd")
    assert found["sure"] == PLANNED["sure"]
    assert found["a"].reason == (
        "rank 4 takes 1.30 of the dense time alone, and pays in its place: such layers make the whole network ×2.50, "
        "without them it is ×1.67"
    )


def test_where_all_do_not_pay_those_that_took_the_least_time_alone_are_tried() -> None:
    network = Network({"sure": 4.0, "a": -3.0, "d": -3.0, "b": 1.0, "c": 1.0})
    found = with_doubted(network, PLANNED, DOUBTED)
    assert {name for name, each in found.items() if each.decomposed} == {"sure", "b", "c"}
    assert network.tried == [{"sure"}, {"sure", *"abcd"}, {"sure", *"bc"}]


@pytest.mark.parametrize(
    "network", [Network(dict.fromkeys([*PLANNED], 0.0)), Network({"sure": 4.0, **dict.fromkeys("abcd", 0.1)}, 0.5)]
)
def test_what_does_not_pay_beyond_doubt_stays_dense(network: Network) -> None:
    assert with_doubted(network, PLANNED, DOUBTED) == PLANNED


def test_where_nothing_is_doubted_nothing_is_timed() -> None:
    network = Network({"sure": 4.0})
    assert with_doubted(network, PLANNED, {}) == PLANNED and not network.tried


def test_where_all_are_doubted_the_dense_network_is_what_they_are_held_against() -> None:
    planned = {name: PLANNED[name] for name in "abcd"}
    network = Network(dict.fromkeys("abcd", 0.5))
    assert {name for name, each in with_doubted(network, planned, DOUBTED).items() if each.decomposed} == {*"abcd"}
    assert network.tried == [{*"abcd"}]
