"""Rules on staircases: times are computed, with noise drawn from a seed; no clock is looked at."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from lamina import AtRatio, BlockTerm, Dense, Energy, Evbmf, Geometry, GoalError, LargestStep, LowRank, Plateau, Setting, Timing
from lamina.choose.ratio import aligned
from lamina.choose.rules import Question, Rule
from lamina.choose.spectra import Spectrum, form_of, spectra
from lamina.forms import Form
from lamina.network.walk import walk

SETTING = Setting("cpu", "a CPU", "float32", "contiguous", 1, "inference")
LAYER = Geometry("Linear", 1024, 1024, False)


@dataclass
class Staircase:
    """A question whose times follow from the rank, times ``1 + noise`` in each of the repeats."""

    time_of: Callable[[int], float]
    ranks: Sequence[int]
    dense: float = 1.0
    noise: float = 0.0
    bursts: float = 0.0
    seed: int = 0
    repeats: int = 9
    geometry: Geometry = LAYER
    squares: Sequence[Sequence[float]] = ()
    ratio: float = 1.0
    asked: list[Form] = field(default_factory=list)

    @property
    def path(self) -> tuple[Form, ...]:
        return tuple(LowRank(rank) for rank in self.ranks)

    @property
    def aligned(self) -> tuple[Form, ...]:
        return aligned(self.geometry, self.path)

    def spectra(self) -> tuple[Spectrum, ...]:
        assert self.squares, "a rule of times looked at the weight"
        return tuple(Spectrum(tuple(each), len(each), len(each)) for each in self.squares)

    def times(self, forms: Sequence[Form]) -> dict[Form, Timing]:
        self.asked += forms
        return {form: self._time(form) for form in forms}

    def _time(self, form: Form) -> Timing:
        draw = random.Random(f"{self.seed} {form}")
        true = self.dense if form == Dense() else self.time_of(getattr(form, "rank", 0))
        true *= 1.4 if draw.random() < self.bursts and form != Dense() else 1
        runs = [true * (1 + self.noise * abs(draw.gauss(0, 1))) for _ in range(self.repeats)]
        middle = median(runs)
        return Timing(middle, median(abs(run - middle) for run in runs), self.repeats, SETTING)


def stairs(width: int, height: float = 0.1, slope: float = 0.0) -> Callable[[int], float]:
    """A time that rises by ``height`` above each multiple of ``width``, and a little with each rank."""
    return lambda rank: 0.1 + height * -(-rank // width) + slope * rank


def cliff(edge: int, low: float = 0.5, high: float = 0.7) -> Callable[[int], float]:
    return lambda rank: low if rank <= edge else high


def as_question(staircase: Staircase) -> Question:
    return staircase


WINDOW = range(309, 243, -1)
TIMED: list[Rule] = [LargestStep(), Plateau()]


def steps_naively(time_of: Callable[[int], float], ranks: Sequence[int]) -> int:
    """The rank below the largest step, straight from the definition ``argmax_r t(r + 1) − t(r)``."""
    saved = {rank: time_of(rank + 1) - time_of(rank) for rank in ranks[1:]}
    return max(saved, key=lambda rank: saved[rank])


@pytest.mark.parametrize("seed", range(30))
def test_largest_step_is_the_argmax_of_the_time_saved_by_each_step(seed: int) -> None:
    draw = random.Random(seed)
    table = {rank: draw.uniform(0.1, 0.9) for rank in range(1, 400)}
    staircase = Staircase(table.__getitem__, WINDOW)
    assert LargestStep().choose(staircase).form == LowRank(steps_naively(table.__getitem__, WINDOW))


def test_largest_step_times_every_rank_of_the_window_and_the_dense_layer() -> None:
    staircase = Staircase(stairs(64), WINDOW)
    LargestStep().choose(staircase)
    assert set(staircase.asked) == {*staircase.path, Dense()}
    assert len(staircase.asked) == len(staircase.path) + 1


def test_on_the_papers_staircase_both_rules_take_rank_256() -> None:
    for rule in TIMED:
        assert rule.choose(Staircase(cliff(256, 0.5, 0.6), WINDOW)).form == LowRank(256)


@pytest.mark.parametrize("edge", [250, 256, 263, 271, 288, 300, 308])
@pytest.mark.parametrize("rule", TIMED, ids=["largest step", "plateau"])
def test_without_noise_both_rules_find_a_cliff_wherever_it_stands(rule: Rule, edge: int) -> None:
    assert rule.choose(Staircase(cliff(edge), WINDOW)).form == LowRank(edge)


def hits(rule: Rule, edge: int, noise: float, bursts: float = 0.0) -> int:
    """In how many of 100 noisy measurements a rule finds the edge of the plateau."""
    found = 0
    for seed in range(100):
        staircase = Staircase(cliff(edge, 0.5, 0.6), WINDOW, noise=noise, bursts=bursts, seed=seed)
        found += rule.choose(staircase).form == LowRank(edge)
    return found


@pytest.mark.parametrize("edge", [256, 271])
def test_where_other_work_falls_on_some_ranks_plateau_finds_the_edge_and_largest_step_is_fooled(edge: int) -> None:
    assert hits(LargestStep(), edge, 0.02, bursts=0.03) <= 40
    assert hits(Plateau(), edge, 0.02, bursts=0.03) >= 75


@pytest.mark.parametrize("edge", [256, 271])
def test_under_noise_of_a_quarter_of_the_step_plateau_is_right_nearly_always(edge: int) -> None:
    assert hits(Plateau(), edge, 0.05) >= 90


def test_under_noise_plateau_gives_up_less_than_a_step_of_time() -> None:
    """Where it misses the edge, what it takes is still nearly as fast as the best there is."""
    for seed in range(100):
        form = Plateau().choose(Staircase(cliff(256, 0.5, 0.7), WINDOW, noise=0.1, seed=seed)).form
        assert isinstance(form, LowRank)
        assert cliff(256, 0.5, 0.7)(form.rank) == 0.5


def test_plateau_asks_for_far_fewer_ranks_than_the_path_holds() -> None:
    for time_of in (stairs(64), stairs(32), cliff(271), lambda rank: rank / 1000, lambda rank: 0.5):
        staircase = Staircase(time_of, WINDOW)
        Plateau().choose(staircase)
        assert len(set(staircase.asked)) <= len(staircase.path) / 3


def test_plateau_bisects_a_long_path_in_a_logarithmic_number_of_timings() -> None:
    staircase = Staircase(cliff(777), range(1000, 500, -1))
    assert Plateau().choose(staircase).form == LowRank(777)
    assert len(set(staircase.asked) - set(staircase.aligned)) <= 14


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_on_a_flat_curve_plateau_keeps_the_largest_rank(noise: float) -> None:
    for seed in range(20):
        assert Plateau().choose(Staircase(lambda rank: 0.5, WINDOW, noise=noise, seed=seed)).form == LowRank(309)


@pytest.mark.parametrize("slack", [0.03, 0.1])
@pytest.mark.parametrize("power", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_where_time_only_follows_the_rank_plateau_stays_at_the_ratio(slack: float, power: float, noise: float) -> None:
    for seed in range(20 if noise else 1):
        staircase = Staircase(lambda rank: (rank / 1000) ** power, WINDOW, noise=noise, seed=seed)
        assert Plateau(slack=slack).choose(staircase).form == LowRank(309)


def test_on_a_staircase_that_follows_the_rank_plateau_takes_the_first_foot_and_does_not_slide_down() -> None:
    assert Plateau().choose(Staircase(stairs(16, 0.02), WINDOW)).form == LowRank(304)
    assert Plateau().choose(Staircase(stairs(32, 0.04), WINDOW)).form == LowRank(288)


def test_of_two_cliffs_the_one_is_taken_that_saves_more_than_its_weights() -> None:
    def two(rank: int) -> float:
        return 0.2 if rank <= 256 else 0.5 if rank <= 296 else 0.55

    assert Plateau().choose(Staircase(two, WINDOW)).form == LowRank(256)


def test_where_larger_ranks_are_faster_plateau_takes_the_largest() -> None:
    assert Plateau().choose(Staircase(lambda rank: 1 - rank / 1000, WINDOW)).form == LowRank(309)


def test_a_wider_gate_takes_a_larger_form() -> None:
    ranks = []
    for gate in (0.0, 3.0, 100.0):
        form = Plateau(gate=gate).choose(Staircase(lambda rank: rank / 1000, WINDOW, noise=0.05)).form
        assert isinstance(form, LowRank)
        ranks.append(form.rank)
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] == 309


@pytest.mark.parametrize("rule", TIMED, ids=["largest step", "plateau"])
def test_a_path_of_one_form_is_taken_where_it_is_faster(rule: Rule) -> None:
    assert rule.choose(Staircase(lambda rank: 0.5, [16])).form == LowRank(16)
    assert rule.choose(Staircase(lambda rank: 1.5, [16])).form == Dense()


@pytest.mark.parametrize("rule", TIMED, ids=["largest step", "plateau"])
@pytest.mark.parametrize("dense", [0.0999, 0.3])
def test_a_layer_that_no_rank_makes_faster_stays_dense_and_says_how_slow_it_would_be(rule: Rule, dense: float) -> None:
    choice = rule.choose(Staircase(stairs(64), WINDOW, dense=dense))
    assert choice.form == Dense()
    assert choice.reason.startswith("no rank is faster")


@pytest.mark.parametrize("rule", TIMED, ids=["largest step", "plateau"])
def test_what_takes_as_long_as_the_dense_layer_is_no_gain(rule: Rule) -> None:
    assert rule.choose(Staircase(lambda rank: 1.0, WINDOW, dense=1.0)).form == Dense()


def taken(rule: Rule, takes: float) -> int:
    """In how many of 100 measurements with noise of 2 % a rule takes a form where every form takes this share of the time."""
    squares = [[1.0, *[1e-6] * 1023]]
    asked = (Staircase(lambda rank: takes, WINDOW, noise=0.02, seed=seed, squares=squares) for seed in range(100))
    return sum(rule.choose(each).form != Dense() for each in asked)


@pytest.mark.parametrize("rule", [*TIMED, Energy(0.5)], ids=["largest step", "plateau", "energy"])
def test_noise_is_no_gain_and_a_gain_is_seen_through_it(rule: Rule) -> None:
    assert taken(rule, 1.0) <= 5 and taken(rule, 0.9) == 100


@pytest.mark.parametrize("rule", [*TIMED, Energy(0.5)], ids=["largest step", "plateau", "energy"])
def test_a_machine_that_drifts_puts_no_doubt_on_a_ratio(rule: Rule) -> None:
    """The dense layer's times are apart by a tenth, the ratios to it by a thousandth: each is a form's, in one round."""

    class Drifting(Staircase):
        def _time(self, form: Form) -> Timing:
            return Timing(1.0, 0.1, 9, SETTING) if form == Dense() else Timing(0.95, 0.001, 9, SETTING)

    assert rule.choose(Drifting(lambda rank: 0.95, WINDOW, squares=[[1.0, *[1e-6] * 1023]])).form != Dense()


@pytest.mark.parametrize("rule", TIMED, ids=["largest step", "plateau"])
def test_without_noise_a_gain_of_less_than_a_hundredth_is_none(rule: Rule) -> None:
    assert rule.choose(Staircase(lambda rank: 0.98, WINDOW)).form != Dense()
    choice = rule.choose(Staircase(lambda rank: 0.995, WINDOW))
    assert choice.form == Dense() and choice.reason.startswith("no rank is faster beyond doubt: ")


@pytest.mark.parametrize("rule", [AtRatio(), *TIMED], ids=["at ratio", "largest step", "plateau"])
@pytest.mark.parametrize("seed", range(10))
def test_what_a_rule_takes_is_on_offer_and_a_timed_rules_gain_was_measured(rule: Rule, seed: int) -> None:
    staircase = Staircase(stairs(32, 0.05), range(200, 100, -1), noise=0.2, seed=seed)
    form = rule.choose(staircase).form
    assert form in {*staircase.path, *staircase.aligned, Dense()}
    if rule.timed and form != Dense():
        times = staircase.times([form, Dense()])
        assert times[form].median_s < times[Dense()].median_s


def test_at_ratio_takes_the_first_form_and_asks_for_no_time() -> None:
    staircase = Staircase(stairs(64), WINDOW)
    choice = AtRatio().choose(staircase)
    assert choice.form == LowRank(309)
    assert "not timed" in choice.reason
    assert staircase.asked == []
    assert not AtRatio().timed


@pytest.mark.parametrize("seed", range(5))
def test_a_rule_answers_the_same_question_alike(seed: int) -> None:
    for rule in TIMED:
        one, two = (rule.choose(Staircase(stairs(32), WINDOW, noise=0.1, seed=seed)) for _ in range(2))
        assert one == two


@pytest.mark.parametrize(("slack", "gate"), [(-0.1, 3), (0.1, -1), (float("nan"), 3), ("1", 3), (0.1, None), (True, 3)])
def test_a_slack_or_gate_that_is_negative_or_no_number_is_refused(slack: Any, gate: Any) -> None:
    with pytest.raises(GoalError, match="must not be negative"):
        Plateau(slack, gate)


def test_rules_print_with_their_settings() -> None:
    assert [str(rule) for rule in (AtRatio(), LargestStep(), Plateau())] == [
        "AtRatio()",
        "LargestStep()",
        "Plateau(slack=0.03, gate=3.0)",
    ]


# ---- rules of the spectrum ----

CONV = Geometry("Conv2d", 64, 32, True, (3, 3), (1, 1), (1, 1), (1, 1))


def falling(size: int, decay: float) -> list[float]:
    return [decay**n for n in range(size)]


def weighed(rule: Rule, *squares: Sequence[float], geometry: Geometry = LAYER, **options: float) -> tuple[Form, str]:
    choice = rule.choose(as_question(Staircase(lambda rank: 0.5, WINDOW, geometry=geometry, squares=squares, **options)))  # type: ignore[arg-type]
    return choice.form, choice.reason


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_energy_takes_the_smallest_rank_that_holds_the_share(share: float, decay: float) -> None:
    squares = [*falling(40, decay), *[0.0] * 984]
    form, reason = weighed(Energy(share), squares)
    assert isinstance(form, LowRank) and f"hold {share:g} of the weight" in reason
    assert sum(squares[: form.rank]) >= share * sum(squares) * (1 - 1e-9)
    assert sum(squares[: form.rank - 1]) < share * sum(squares)


def test_energy_holds_its_share_on_each_side_of_a_convolution_and_leaves_a_full_side_whole() -> None:
    steep, flat = [1.0, 1.0, *[0.0] * 30], [1.0] * 64
    assert weighed(Energy(0.9), steep, [*flat[:4], *[0.0] * 60], geometry=CONV)[0] == BlockTerm(2, 4)
    assert weighed(Energy(1.0), steep, flat, geometry=CONV)[0] == BlockTerm(2, None)
    assert weighed(Energy(1.0), flat[:32], flat, geometry=CONV)[0] == Dense()


def test_a_side_stays_whole_where_it_has_fewer_weights_so() -> None:
    assert form_of(CONV, (31, 8)) == BlockTerm(None, 8)
    assert form_of(CONV, (8, 63)) == BlockTerm(8, None)
    assert form_of(CONV, (31, 63)) == Dense()


@pytest.mark.parametrize("rule", [Energy(0.9), Evbmf(0.9)], ids=str)
def test_the_ratio_is_the_least_that_a_rule_of_the_spectrum_must_gain(rule: Rule) -> None:
    """Of a flat spectrum of 1024 both take 922, more than half; of one that is steep few."""
    flat = [1.0] * 1024
    form, reason = weighed(rule, flat)
    assert form == Dense() and reason.endswith(" make it no smaller")
    steep = [1.0] * 200 + [1e-9] * 824
    for ratio, taken in ((1.0, True), (2.5, True), (2.6, False)):
        form, _ = weighed(Energy(0.999), steep, ratio=ratio)
        assert form == (LowRank(200) if taken else Dense())
    assert weighed(Energy(0.999), steep, ratio=3)[1].endswith("rank 200, make it 2.56 times smaller, not 3")


def test_evbmf_goes_no_further_down_than_its_floor() -> None:
    draw = random.Random(0)
    noise = sorted((draw.gauss(1, 0.01) for _ in range(1024)), reverse=True)
    assert weighed(Evbmf(), noise)[0] == LowRank(103)
    assert weighed(Evbmf(0.25), noise)[0] == LowRank(256)
    assert weighed(Evbmf(0), noise)[0] == LowRank(1)
    assert weighed(Evbmf(0.25), [0.0] * 1024)[0] == LowRank(256)


def test_evbmf_takes_what_stands_out_of_the_noise() -> None:
    # The squares of a square matrix of noise fill up a quarter circle; thirty values stand far above it.
    noise = [4 * (1 - n / 994) for n in range(994)]
    assert weighed(Evbmf(0), [100.0] * 30 + noise)[0] == LowRank(30)


@pytest.mark.parametrize("rule", [Energy(0.5), Evbmf()], ids=str)
def test_a_rank_of_the_spectrum_that_is_no_faster_is_not_taken(rule: Rule) -> None:
    choice = rule.choose(as_question(Staircase(lambda rank: 1.5, WINDOW, squares=[[1.0, *[1e-6] * 1023]])))
    assert choice.form == Dense() and "takes 1.50 of the dense time" in choice.reason


def test_a_weight_of_zeros_keeps_one_rank() -> None:
    assert weighed(Energy(0.9), [0.0] * 1024)[0] == LowRank(1)


@pytest.mark.parametrize("make", [lambda: Energy(0), lambda: Energy(1.01), lambda: Energy(float("nan")), lambda: Energy(True)])
def test_a_share_that_is_none_is_refused(make: Callable[[], Rule]) -> None:
    with pytest.raises(GoalError, match=r"share is .* a number from above 0 to 1"):
        make()


@pytest.mark.parametrize("make", [lambda: Evbmf(-0.1), lambda: Evbmf(2), lambda: Evbmf("0.1")])  # type: ignore[arg-type]
def test_a_floor_that_is_none_is_refused(make: Callable[[], Rule]) -> None:
    with pytest.raises(GoalError, match=r"floor is .* a number from 0 to 1"):
        make()


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 9), lambda: nn.Conv2d(6, 9, 1), lambda: nn.Conv2d(6, 9, (3, 2)), lambda: nn.Conv1d(1, 9, 4)]
)
def test_the_spectrum_of_a_layer_is_that_of_the_unfoldings_of_its_weight(make: Callable[[], nn.Module]) -> None:
    layer = walk(make()).layers[""]
    W = layer.weight.detach().double()
    sides = [W.flatten(1)] if layer.geometry.pointwise else [W.movedim(1, 0).flatten(1), W.flatten(1)]
    for found, wanted in zip(spectra(layer), sides, strict=True):
        assert (found.rows, found.columns) == tuple(wanted.shape)
        torch.testing.assert_close(torch.tensor(found.squares, dtype=torch.float64), torch.linalg.svdvals(wanted).square())
