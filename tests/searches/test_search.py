"""Searches: the winner is that of looking at everything; each configuration is scored once; failures stay alone."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import linears
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lamina
from lamina.comparison import Comparison, whole_setting
from lamina.decomposition import plan_of
from lamina.errors import SearchError
from lamina.forms import Form, LowRank
from lamina.goals import Limit, Macs, Milliseconds, Parameters, Within
from lamina.searches.score import Scored
from lamina.searches.screen import Screen, score_drops, weight_errors
from lamina.searches.search import search
from lamina.searches.strategies import BreadthFirst, Exhaustive, Problem, Sampled, Solved, Strategy, neighbours
from lamina.supernet.space import Choice, Configuration, Row, Space, key
from lamina.supernet.supernet import Supernet
from lamina.values import Inference, Timing

from .. import supernets


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return linears.supernet()


def costing(space: Space, share: float) -> Macs:
    """A limit that this share of the configurations meets."""
    macs = sorted(space.cost(config).macs for config in space)
    return Macs(macs[int(share * (len(macs) - 1))])


def best_of(space: Space, limit: Limit | None) -> float:
    """By looking at everything."""
    return max(linears.worth(config) for config in space if limit is None or limit.allows(space.cost(config)))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_exhaustive_search_finds_the_best_that_the_limit_allows(supernet: Supernet, share: float) -> None:
    limit = costing(supernet.space, share)
    result = search(supernet, linears.score, limit=limit, strategy=Exhaustive())
    assert result.best.score == best_of(supernet.space, limit)
    allowed = [config for config in supernet.space if limit.allows(supernet.space.cost(config))]
    assert {key(trial.config) for trial in result.trials} == set(map(key, allowed))
    assert [trial.score for trial in result.trials] == sorted((linears.worth(c) for c in allowed), reverse=True)


STRATEGIES: list[Strategy] = [
    Solved(),
    BreadthFirst(beam=8, restarts=3),
    BreadthFirst(beam=2, pairs=False, restarts=12),
    Sampled("random", trials=81),
    Sampled("tpe", trials=40),
    Sampled("nsga2", trials=60),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_every_strategy_comes_to_the_best_of_a_small_space_and_stays_within_the_limit(
    supernet: Supernet, strategy: Strategy, share: float
) -> None:
    limit = costing(supernet.space, share)
    scored: Counter[str] = Counter()

    def score(model: nn.Module) -> float:
        scored[key(linears.active(model))] += 1
        return linears.score(model)

    result = search(supernet, score, limit=limit, strategy=strategy)
    assert set(scored.values()) == {1}
    assert set(scored) == {key(trial.config) for trial in result.trials}
    assert all(limit.allows(trial.cost) for trial in result.trials)
    assert result.best.score == best_of(supernet.space, limit)
    assert len(result.trials) <= getattr(strategy, "trials", math.inf)


def test_the_bar_shows_how_many_are_scored_and_the_best_and_changes_nothing(
    supernet: Supernet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    limit = costing(supernet.space, 0.2)
    plain, watched = (search(supernet, linears.score, limit=limit, strategy=Exhaustive(), progress=p) for p in (False, True))
    said, drawn = capsys.readouterr()
    assert (watched.best, [trial.config for trial in watched.trials]) == (plain.best, [trial.config for trial in plain.trials])
    assert said == "" and f"{len(watched.trials)}/?" in drawn and f"best {watched.best.score:.6g}" in drawn


def breadth_first_naively(space: Space, limit: Limit, beam: int) -> list[str]:
    """The paper's search from its description, in the order in which configurations are seen."""
    uniform = [config for config in space.uniforms() if limit.allows(space.cost(config))]
    frontier = [max(uniform, key=lambda config: space.cost(config).macs)]
    seen, best = [key(frontier[0])], linears.worth(frontier[0])
    while True:
        fresh: dict[str, Configuration] = {}
        for config in frontier:
            for other in space:
                moved = [b - a for a, b in zip(space.row(config), space.row(other), strict=True) if a != b]
                near = len(moved) == 1 or moved in ([1, -1], [-1, 1])
                if near and key(other) not in seen and limit.allows(space.cost(other)):
                    fresh[key(other)] = other
        seen += fresh
        if not fresh or max(map(linears.worth, fresh.values())) < best:
            return seen
        ranked = sorted(fresh.values(), key=lambda c: (-linears.worth(c), space.cost(c).macs, space.row(c)))
        frontier, best = ranked[:beam], linears.worth(ranked[0])


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_breadth_first_search_sees_what_the_description_says(supernet: Supernet, beam: int, share: float) -> None:
    limit = costing(supernet.space, share)
    result = search(supernet, linears.score, limit=limit, strategy=BreadthFirst(beam=beam))
    assert {key(trial.config) for trial in result.trials} == set(breadth_first_naively(supernet.space, limit, beam))


@pytest.mark.parametrize(
    "strategy", [*STRATEGIES[:4], BreadthFirst(candidates=4, restarts=2), Sampled("tpe", 20), Sampled("nsga2", 25)], ids=str
)
def test_the_same_seed_goes_the_same_way(supernet: Supernet, strategy: Strategy) -> None:
    limit = costing(supernet.space, 0.5)

    def way(seed: int) -> list[str]:
        seen = []

        def score(model: nn.Module) -> float:
            seen.append(key(linears.active(model)))
            return linears.score(model)

        search(supernet, score, limit=limit, strategy=strategy, seed=seed)
        return seen

    assert sorted(way(1)) == sorted(way(1))


def test_several_limits_hold_together(supernet: Supernet) -> None:
    space = supernet.space
    limits = (costing(space, 0.5), Parameters(sorted(space.cost(c).parameters for c in space)[40]))
    for strategy in (Exhaustive(), BreadthFirst(restarts=2), Sampled("random", 20), Sampled("tpe", 10)):
        result = search(supernet, linears.score, limit=limits, strategy=strategy)
        assert all(limit.allows(trial.cost) for limit in limits for trial in result.trials)
        assert result.best.plan.goal == Within(limits)


def test_the_front_holds_what_no_other_trial_beats(supernet: Supernet) -> None:
    result = search(supernet, linears.score, strategy=Exhaustive(), limit=())
    beaten = {
        key(a.config)
        for a in result.trials
        for b in result.trials
        if a.score is not None and b.score is not None
        if (b.score >= a.score and b.cost.macs < a.cost.macs) or (b.score > a.score and b.cost.macs <= a.cost.macs)
    }
    front = {key(trial.config) for trial in result.front}
    assert front.isdisjoint(beaten)
    points = {(t.score, t.cost.macs) for t in result.trials if key(t.config) not in beaten}
    assert {(t.score, t.cost.macs) for t in result.front} == points


def test_the_winner_has_a_plan_like_any_other_and_the_supernet_is_as_it_was(supernet: Supernet) -> None:
    supernet.train()
    config = supernet.sample(random.Random(3))
    supernet.set_active(config)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    limit = costing(supernet.space, 0.5)
    result = search(supernet, linears.score, limit=limit, strategy=Exhaustive())
    assert supernet.get_active() == config
    assert all(module.training for module in supernet.modules())
    assert all(torch.equal(before[name], value) for name, value in supernet.state_dict().items())
    supernet.eval()
    assert {name: layer.form for name, layer in result.best.plan.layers.items()} == result.best.config
    assert (result.best.plan.goal, result.best.plan.rule) == (limit, "exhaustive search")
    against, how, *_ = str(result).splitlines()
    assert against.endswith("of the original's MACs; not timed: a limit on time, or net.time(), tells how fast it is")
    assert how.startswith("exhaustive search within")


def test_the_score_sees_the_network_itself_in_eval_mode_without_gradients(supernet: Supernet) -> None:
    def score(model: nn.Module) -> float:
        assert type(model) is nn.Sequential
        assert not model.training
        assert not torch.is_grad_enabled()
        return 1.0

    supernet.train()
    assert not search(supernet, score, strategy=Sampled("random", 2), limit=()).failed
    supernet.eval()


@pytest.mark.parametrize(
    "strategy", [Exhaustive(), BreadthFirst(beam=81, restarts=1), Sampled("tpe", 30), Sampled("nsga2", 30)], ids=str
)
def test_a_score_that_fails_for_one_configuration_fails_that_one_only(supernet: Supernet, strategy: Strategy) -> None:
    calls: Counter[str] = Counter()

    def score(model: nn.Module) -> float:
        config = linears.active(model)
        calls[key(config)] += 1
        if config["2"] == LowRank(5):
            raise ValueError("does not like\nrank 5")
        return math.nan if config["4"] == LowRank(2) else linears.score(model)

    result = search(supernet, score, strategy=strategy, limit=())
    assert set(calls.values()) == {1}
    for trial in result.failed:
        says = "ValueError: does not like" if trial.config["2"] == LowRank(5) else "the score is nan"
        assert trial.error == says
    assert all(trial.config["2"] != LowRank(5) and trial.config["4"] != LowRank(2) for trial in result.scored)
    assert result.failed and result.scored
    assert result.best.config in [trial.config for trial in result.scored]


def test_a_score_that_fails_for_all_is_an_error_that_quotes_it(supernet: Supernet) -> None:
    def score(model: nn.Module) -> float:
        raise OSError("no such disk")

    with pytest.raises(SearchError, match="failed for all 81 configurations; of the first: OSError: no such disk"):
        search(supernet, score, strategy=Exhaustive(), limit=())


def additive(config: Mapping[str, Form]) -> float:
    return -sum(values[linears.FORMS.index(config[name])] for name, values in linears.WORTH.items())


SCREENS: dict[str, Any] = {
    "by layer": {n: {f: -v for f, v in zip(linears.FORMS, values, strict=True)} for n, values in linears.WORTH.items()},
    "by configuration": additive,
}


@pytest.mark.parametrize("loss", SCREENS.values(), ids=SCREENS)
def test_a_screen_leaves_over_the_configurations_of_least_predicted_loss(supernet: Supernet, loss: Any) -> None:
    limit = costing(supernet.space, 0.6)
    result = search(supernet, linears.score, limit=limit, strategy=Exhaustive(), screen=Screen(loss, survivors=7))
    allowed = [config for config in supernet.space if limit.allows(supernet.space.cost(config))]
    assert sorted(additive(trial.config) for trial in result.trials) == sorted(map(additive, allowed))[:7]


def test_the_candidates_of_a_round_are_those_of_least_predicted_loss(supernet: Supernet) -> None:
    seen: list[Configuration] = []

    def score(model: nn.Module) -> float:
        seen.append(linears.active(model))
        return -float(len(seen))  # nothing is as good: one round

    search(supernet, score, strategy=BreadthFirst(candidates=3), screen=additive, limit=())
    first, *others = seen
    near = sorted(
        additive(config) for config in map(supernet.space.configuration, neighbours(supernet.space, supernet.space.row(first)))
    )
    assert sorted(map(additive, others)) == near[:3]


def test_a_screen_of_a_space_that_is_too_large_to_walk_is_solved(monkeypatch: pytest.MonkeyPatch, supernet: Supernet) -> None:
    from lamina.searches import strategies

    limit, by_layer = costing(supernet.space, 0.6), SCREENS["by layer"]
    whole = search(supernet, linears.score, limit=limit, strategy=Exhaustive(), screen=Screen(by_layer, survivors=9))
    monkeypatch.setattr(strategies, "_WALKED", 10)
    solved = search(supernet, linears.score, limit=limit, strategy=Exhaustive(), screen=Screen(by_layer, survivors=9))
    predicted = [sorted(additive(trial.config) for trial in result.trials) for result in (whole, solved)]
    assert predicted[0] == pytest.approx(predicted[1])
    with pytest.raises(SearchError, match="the screen is a function, and the space holds 81 configurations"):
        search(supernet, linears.score, limit=limit, strategy=Exhaustive(), screen=Screen(additive, survivors=5))


@pytest.mark.parametrize("pairs", [False, True])
def test_neighbours_have_any_other_form_of_one_layer_or_trade_a_step(supernet: Supernet, pairs: bool) -> None:
    space = supernet.space
    for row in ((0, 1, 2, 1), (2, 2, 2, 2), (0, 0, 0, 0)):
        apart = {other: [b - a for a, b in zip(row, other, strict=True) if a != b] for other in map(space.row, space)}
        wanted = {other for other, steps in apart.items() if len(steps) == 1 or (pairs and sorted(steps) == [-1, 1])}
        found = list(neighbours(space, row, pairs=pairs))
        assert set(found) == wanted and len(found) == len(wanted)


def test_weight_errors_screen_without_data(supernet: Supernet) -> None:
    result = search(
        supernet, linears.score, strategy=Exhaustive(), screen=Screen(weight_errors(supernet), survivors=1), limit=()
    )
    assert result.best.config == supernet.space.uniform(99)


@pytest.mark.parametrize("at_once", [1, 5, 100])
def test_score_drops_are_what_a_score_falls_by_when_one_layer_changes(supernet: Supernet, at_once: int) -> None:
    start = supernet.space.uniform(1)
    falls = score_drops(supernet, linears.score, start, at_once=at_once)
    for name, forms in supernet.space.forms.items():
        for form in forms:
            assert falls[name][form] == linears.worth(start) - linears.worth(start | {name: form})
            assert falls[name][form] or form == start[name]


def test_score_drops_screen_by_few_scores(supernet: Supernet) -> None:
    limit, scored = costing(supernet.space, 0.3), 0

    def score(model: nn.Module) -> float:
        nonlocal scored
        scored += 1
        return linears.score(model)

    screen = Screen(score_drops(supernet, score), survivors=6)
    assert scored == 1 + 4 * 2
    result = search(supernet, score, limit=limit, strategy=Exhaustive(), screen=screen)
    assert result.best.score == best_of(supernet.space, limit)
    assert scored == 1 + 4 * 2 + 6


def test_a_form_whose_score_fails_is_screened_out_and_a_start_that_fails_is_an_error(supernet: Supernet) -> None:
    def score(model: nn.Module) -> float:
        return math.nan if linears.active(model)["2"] == LowRank(2) else linears.score(model)

    assert score_drops(supernet, score)["2"][LowRank(2)] == math.inf
    result = search(
        supernet, linears.score, strategy=Exhaustive(), screen=Screen(score_drops(supernet, score), survivors=54), limit=()
    )
    assert len(result.trials) == 54
    assert all(trial.config["2"] != LowRank(2) for trial in result.trials)
    with pytest.raises(SearchError, match="the score failed for the configuration to start from: the score is nan"):
        score_drops(supernet, score, supernet.space.uniform(0))
    with pytest.raises(SearchError, match="nowhere: no such layer"):
        score_drops(supernet, score, {"nowhere": LowRank(2)})


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(n, 3, 10, 12, generator=generator), torch.randint(0, 5, (n,), generator=generator)) for n in (4, 6, 3)]


class Counting:
    """Counts how often its batches are read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Any:
        for batch in data():
            self.read += 1
            yield batch


def negative_loss(output: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(output, target)


def test_many_configurations_are_scored_in_one_pass_as_each_alone(net: Supernet) -> None:
    loader = Counting()
    result = search(net, Scored(loader, negative_loss), strategy=Exhaustive(), at_once=16, limit=())
    assert loader.read == 3
    alone = search(net, lambda model: Scored(data(), negative_loss)(model), strategy=Exhaustive(), limit=())
    assert {key(t.config): t.score for t in result.trials} == pytest.approx({key(t.config): t.score for t in alone.trials})
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    assert result.best.score == pytest.approx(float(negative_loss(net.extract(result.best.config).eval()(x), y).detach()))


def test_statistics_are_those_of_the_configuration_that_is_scored(net: Supernet) -> None:
    inputs = [x for x, _ in data()]
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    result = search(net, Scored(data(), negative_loss, recalibration=inputs), strategy=Exhaustive(), limit=())
    for trial in result.trials[::5]:
        small = net.extract(trial.config)
        lamina.recalibrate(small, inputs)
        assert trial.score == pytest.approx(Scored(data(), negative_loss)(small), rel=1e-5)
    assert all(torch.equal(buffers[name], value) for name, value in net.named_buffers())


def test_a_metric_that_fails_for_one_configuration_leaves_the_others_their_pass(net: Supernet) -> None:
    lost = net.space.uniform(1)

    def metric(output: Tensor, target: Tensor) -> Tensor:
        if net.get_active() == lost:
            raise ValueError("no")
        return negative_loss(output, target)

    result = search(net, Scored(data(), metric), strategy=Exhaustive(), limit=())
    assert [trial.config for trial in result.failed] == [lost]
    assert len(result.scored) == net.space.size - 1


def timed(net: Supernet) -> Supernet:
    """A twin whose table knows times: 1, 2 and 4 ms for the forms of every layer, 20 ms for the original."""
    import dataclasses

    twin = copy.deepcopy(net)
    setting = dataclasses.asdict(whole_setting(net.network, net.example[0], Inference()))
    layers = {name: [[4e-3, 0.0, 9], [1e-3, 0.0, 9], [2e-3, 0.0, 9], [4e-3, 0.0, 9]] for name in twin.space.choices}
    twin.adopt(twin.space.with_times({"setting": setting, "whole": [20e-3, 0.0, 9], "layers": layers}))
    return twin


def fake_times(monkeypatch: pytest.MonkeyPatch, net: Supernet, slower: Callable[[Configuration], float]) -> list[Configuration]:
    """Whole networks take so many times what the table says; returns those that are measured, in their order."""
    import dataclasses

    measured: list[Configuration] = []
    real = lamina.compare

    def compare(model: nn.Module, small: nn.Module, example: Any, **_: Any) -> Comparison:
        found = real(model, small, example, seconds=1e-9)
        config: Configuration = {name: layer.form for name, layer in plan_of(small).layers.items() if name in net.space.choices}
        measured.append(config)
        expected = net.space.cost(config).timing
        assert expected is not None
        taken_s = slower(config) * expected.median_s
        whole = net.space.whole.timing
        assert whole is not None
        after = dataclasses.replace(found.after, median_s=taken_s)
        return dataclasses.replace(found, after=after, speedup=whole.median_s / taken_s if taken_s else 1e9)

    monkeypatch.setattr("lamina.searches.search.compare", compare)
    return measured


def milliseconds(net: Supernet, config: Configuration) -> float:
    return Milliseconds(1.0).of(net.space.cost(config))


def test_a_finalist_over_the_limit_when_measured_whole_is_dropped(monkeypatch: pytest.MonkeyPatch, supernet: Supernet) -> None:
    net = timed(supernet)
    with monkeypatch.context() as as_the_table_says:
        fake_times(as_the_table_says, net, lambda _: 1.0)
        first = search(net, linears.score, limit=Milliseconds(16.0), strategy=Exhaustive()).scored
    measured = fake_times(monkeypatch, net, lambda config: 5.0 if config == first[0].config else 0.5)
    result = search(net, linears.score, limit=Milliseconds(16.0), strategy=Exhaustive())
    assert measured == [first[0].config, first[1].config]
    assert [(trial.config, ms) for trial, ms in result.over] == [
        (first[0].config, pytest.approx(5 * milliseconds(net, first[0].config)))
    ]
    assert result.best.config == first[1].config
    assert result.best.measured is not None
    assert result.best.plan.whole is not None
    assert result.best.plan.whole.speedup == result.best.measured.speedup
    assert "over the limit when measured as a whole" in str(result)


@pytest.mark.parametrize("strategy", [Exhaustive(), BreadthFirst(beam=8, restarts=3), Sampled("tpe", trials=20)], ids=str)
@pytest.mark.parametrize("slower", [1.05, 1.3])
def test_where_networks_take_longer_than_the_table_says_the_search_goes_on_below_the_limit(
    monkeypatch: pytest.MonkeyPatch, supernet: Supernet, strategy: Strategy, slower: float
) -> None:
    net, limit = timed(supernet), 14.0
    measured = fake_times(monkeypatch, net, lambda _: slower)
    result = search(net, linears.score, limit=Milliseconds(limit), strategy=strategy)
    assert slower * milliseconds(net, result.best.config) <= limit
    assert all(ms > limit for _, ms in result.over)
    assert len(measured) == len(result.over) + 1 <= 4  # one round of finalists, then the tighter limit holds
    if isinstance(strategy, Exhaustive):
        within = [config for config in net.space if slower * milliseconds(net, config) <= limit]
        assert result.best.score == max(map(linears.worth, within))


def test_where_no_network_is_within_the_limit_when_measured_the_error_names_the_fastest(
    monkeypatch: pytest.MonkeyPatch, supernet: Supernet
) -> None:
    net = timed(supernet)
    measured = fake_times(monkeypatch, net, lambda _: 10.0)
    with pytest.raises(
        SearchError,
        match=r"none of the 3 configurations .* measured as a whole is within 10 ms; the fastest takes .* ms: raise",
    ):
        search(net, linears.score, limit=Milliseconds(10.0), strategy=Exhaustive())
    assert len(measured) == 3


def test_workers_of_a_study_go_by_the_times_that_the_first_one_wrote(
    net: Supernet, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.deepcopy(net)
    url = f"sqlite:///{tmp_path / 's.db'}"
    fake_times(monkeypatch, net, lambda _: 0.0)
    search(net, lambda model: 1.0, limit=Milliseconds(5e4), study=url)
    search(other, lambda model: 1.0, limit=Milliseconds(5e4), study=url)
    assert other.space.times() == net.space.times() is not None


def test_a_plot_shows_every_trial(supernet: Supernet, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    result = search(supernet, linears.score, limit=costing(supernet.space, 0.5), strategy=Exhaustive())
    figure = result.plot(tmp_path / "plot.png")
    (axes,) = figure.axes
    assert len(axes.collections[0].get_offsets()) == len(result.scored)
    assert (tmp_path / "plot.png").stat().st_size > 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a limit": ({"limit": 5}, r"a limit is lamina\.Speedup\(…\), Milliseconds\(…\), Macs\(…\) or Parameters\(…\), not 5"),
    "in a list": ({"limit": [5]}, "a limit is lamina.Speedup"),
    "below the cheapest": (
        {"limit": Macs(1)},
        "no configuration is within 1 MACs: the cheapest takes .* with all 4 layers rank 2",
    ),
    "strategy": ({"strategy": "tpe"}, "strategy is 'tpe'; it is lamina.Solved"),
    "finalists": ({"finalists": 0}, "finalists is 0; it must be"),
    "at once": ({"at_once": True}, "at_once is True; it must be"),
    "screen and sampler": (
        {"strategy": Sampled("tpe"), "screen": additive},
        "a screen does not go with 100 configurations by tpe",
    ),
    "too large": ({"strategy": Exhaustive(most=80)}, "the space holds 81 configurations, more than 80: choose Solved"),
    "screen without a layer": ({"strategy": Exhaustive(), "screen": Screen({"0": {}})}, "0: the screen has no loss for rank 2"),
}


@pytest.mark.parametrize(("options", "says"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_refused_in_one_line_before_anything_is_scored(
    supernet: Supernet, options: dict[str, Any], says: str
) -> None:
    calls: list[Row] = []
    with pytest.raises(SearchError, match=says) as caught:
        search(supernet, lambda model: calls.append(()) or 1.0, **{"limit": (), **options})  # type: ignore[func-returns-value]
    assert "\n" not in str(caught.value)
    assert calls == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: BreadthFirst(beam=0),
        lambda: BreadthFirst(restarts=-1),
        lambda: BreadthFirst(candidates=0),
        lambda: Sampled("grid"),  # type: ignore[arg-type]
        lambda: Sampled(trials=0),
        lambda: Screen(additive, survivors=0),
    ],
)
def test_a_strategy_of_numbers_that_make_no_sense_is_refused(make: Any) -> None:
    with pytest.raises(SearchError):
        make()


def test_a_score_that_is_no_function_is_refused(supernet: Supernet) -> None:
    with pytest.raises(SearchError, match=r"score is 0\.5; give a function"):
        search(supernet, 0.5, limit=())  # type: ignore[arg-type]


def test_data_without_a_batch_fail_the_score(net: Supernet) -> None:
    with pytest.raises(SearchError, match="the data of the score hold no batch"):
        search(net, Scored([], negative_loss), limit=())


def test_the_network_of_these_tests_has_norms() -> None:
    assert any(isinstance(module, nn.BatchNorm2d) for module in supernets.network().modules())


def test_the_network_that_is_found_is_the_one_that_was_scored(net: Supernet) -> None:
    """Its batch norms too, where the score estimates them for each configuration."""
    torch.manual_seed(0)
    batches = [(3 * torch.randn(16, 3, 10, 12) + 1, torch.randint(0, 5, (16,))) for _ in range(4)]

    def metric(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return -torch.nn.functional.cross_entropy(output, target)

    score = Scored(batches, metric, recalibration=[x for x, _ in batches])
    result = search(net, score, strategy=Exhaustive(), limit=())
    assert result.network is not None and result.recalibrated and "result.network" in str(result)
    assert score(result.network.eval()) == pytest.approx(result.best.score, abs=1e-6)
    again = net.extract(result.best.config, recalibration=[x for x, _ in batches])
    assert score(again.eval()) == pytest.approx(result.best.score, abs=1e-6)
    assert abs(score(net.extract(result.best.config).eval()) - result.best.score) > 1e-4
    assert lamina.decomposition.plan_of(result.network) == result.best.plan


@pytest.mark.parametrize("most", [1, 3, 9, 27])
def test_where_limits_pull_apart_whatever_is_within_them_is_found(most: int) -> None:
    """Time falls where parameters rise, so that few of 81 configurations are within both."""
    net = linears.supernet()
    space = net.space
    setting = whole_setting(net.dense_like(), net.example[0], Inference())

    def against(choice: Choice) -> Choice:
        times = [Timing(1e-3 * (len(choice.forms) - at), 0.0, 5, setting) for at in range(len(choice.forms))]
        return dataclasses.replace(
            choice,
            costs=tuple(dataclasses.replace(c, timing=t) for c, t in zip(choice.costs, times, strict=True)),
            dense=dataclasses.replace(choice.dense, timing=times[-1]),
        )

    whole = dataclasses.replace(space.whole, timing=Timing(1e-2, 0.0, 5, setting))
    space = Space({name: against(choice) for name, choice in space.choices.items()}, whole, setting)
    costs = sorted((space.cost(config) for config in space), key=lambda cost: cost.parameters)
    limits = [Parameters(float(costs[most * 2].parameters)), Milliseconds(1.0)]
    times = sorted(cost.timing.median_ms for cost in costs if cost.timing and cost.parameters <= limits[0].value)
    limits[1] = Milliseconds(times[min(most, len(times)) - 1])
    within = [config for config in space if space.allows(space.row(config), limits)]
    assert within
    found = space.dearest_within(limits)
    assert found in within and space.cost(found).parameters == max(space.cost(config).parameters for config in within)
    for strategy in (BreadthFirst(), Sampled("random", 3), Exhaustive()):
        hunt_scored: list[Row] = []

        def score(rows: Any, scored: list[Row] = hunt_scored) -> dict[Row, float]:
            scored.extend(rows)
            return dict.fromkeys(rows, 0.0)

        strategy.explore(Problem(space, tuple(limits), 0, None, net.losses, score, lambda kind, trials: None))
        assert hunt_scored and all(space.allows(row, limits) for row in hunt_scored)
    none = [Parameters(float(costs[0].parameters)), Milliseconds(times[0] * 0.999)]
    if space.dearest_within(none) is None:
        with pytest.raises(SearchError, match=r"no configuration is within"):
            space.check(none)
