"""Search: scores configurations of a supernet within a limit, on one machine or many, and names a winner.

What is scored, and in which order, is the strategy's business; who scores it, the ledger's (`study`); how, `score`'s.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from ..comparison import Comparison, compare, whole_setting
from ..decomposition import attach_plan
from ..errors import SearchError
from ..folder import digest
from ..forms import Form
from ..goals import AnyLimit, Limit, Milliseconds, within
from ..plan import Plan
from ..progress import Display, display
from ..train.recalibrate import norms_of
from ..values import Setting
from .desk import Desk
from .result import SearchResult, Trial, Winner
from .score import ManyScores, Score, Scored, called
from .screen import Screen
from .space import Space, from_json
from .strategies import BreadthFirst, Hunt, Strategy
from .study import Entry, Ledger, Study, opened, optuna_study
from .supernet import Supernet

_SECONDS = 1.0
"""About how long each finalist is timed against the original."""

_STEP = 0.98
"""By how much at least a limit is tightened after finalists that took longer than it."""


def search(
    net: Supernet,
    score: Score,
    *,
    limit: Limit | Sequence[Limit] = (),
    strategy: Strategy | None = None,
    screen: Screen | Callable[[Mapping[str, Form]], float] | None = None,
    study: Study | str | None = None,
    seed: int = 0,
    finalists: int = 3,
    at_once: int = 16,
    progress: bool = False,
) -> SearchResult:
    """Find the configuration of a supernet with the best score within a limit. Nothing is trained; the supernet stays as it is.

        >>> result = lamina.search(net, score, limit=lamina.Milliseconds(4.0), study="sqlite:///search.db")
        >>> small = result.network

    The same call on another machine, with the same study in PostgreSQL, joins the search; a call after a crash goes on with it.
    Each configuration is scored once, whoever comes first; that of a worker which died is taken up by another.

    Args:
        net: A supernet, best a trained one.
        score: From a network in eval mode to a number, higher is better; a loss with its sign turned ranks better than an
            accuracy. Or `Scored`, which feeds each batch to many configurations. One that raises or returns NaN for a
            configuration fails that configuration only.
        limit: `Milliseconds`, `Macs` or `Parameters`, or several. Time is that of the space's table; the finalists are then
            measured whole.
        strategy: `BreadthFirst()` by default, `Exhaustive()`, or `Sampled("random" | "tpe" | "nsga2")`.
        screen: What ranks configurations before any is scored: a `Screen`, or a function from a configuration to its predicted
            loss.
        study: A database's URL, or a `Study`; None keeps the search in memory.
        seed: Of whatever is drawn.
        finalists: With a limit on time, so many of the best are measured as whole networks. Where all take longer than the
            table said, the search goes on with a limit that is tighter by as much.
        at_once: How many configurations a worker takes at a time where the score judges many together.
        progress: Show a progress bar.

    Raises:
        SearchError: The limit is below the cheapest configuration, the strategy does not suit the space, the study cannot be
            reached or is of another space, or every score failed.
        MissingExtra: Optuna is not installed.
    """
    limits = _limits(limit)
    strategy = strategy or BreadthFirst()
    if not isinstance(strategy, Strategy):
        raise SearchError(f"strategy is {strategy!r}; it is lamina.BreadthFirst(), Exhaustive() or Sampled(…)")
    for name, number in (("finalists", finalists), ("at_once", at_once)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise SearchError(f"{name} is {number!r}; it must be a whole number of 1 or more")
    if not (callable(score) or isinstance(score, ManyScores)):
        raise SearchError(f"score is {score!r}; give a function from a network to a number, or lamina.Scored(…)")
    if screen is not None and not isinstance(screen, Screen):
        screen = Screen(screen)
    where = Study(study) if isinstance(study, str) else study
    with opened(where) as ledger, display(progress) as shown:
        space = _joined(net, ledger, limits, (where and where.score) or called(score), shown)
        space.check(limits)
        with optuna_study(ledger) as plain:

            def explore(aims: tuple[AnyLimit, ...]) -> tuple[Trial, ...]:
                many = at_once if isinstance(score, ManyScores) else 1
                desk = Desk(net, score, space, aims, ledger, plain, many, seed, shown)
                hunt = Hunt(space, aims, seed, screen, desk.score, desk.ask)
                strategy.check(hunt)
                strategy.explore(hunt)
                desk.mend()
                return _trials(ledger.all(), space, aims)

            try:
                best, measured, over = _winner(net, space, limits, explore, finalists)
            except SearchError:
                if all(entry.score is None for entry in ledger.all()):
                    ledger.forgive()
                raise
        trials = _trials(ledger.all(), space, limits)
    plan = net.plan(best.config, goal=within(limits), rule=str(strategy))
    if measured is not None:
        plan = _with_measurement(plan, measured)
    statistics = score.recalibration if isinstance(score, Scored) else None
    network = net.extract(best.config, recalibration=statistics)
    return SearchResult(
        best=Winner(best.config, best.merit, best.cost, plan, measured),
        trials=trials,
        limits=limits,
        strategy=str(strategy),
        over=tuple(over),
        network=attach_plan(network, plan),
        recalibrated=statistics is not None and bool(norms_of(network)),
    )


def _limits(limit: Limit | Sequence[Limit]) -> tuple[AnyLimit, ...]:
    limits = tuple(limit) if isinstance(limit, Sequence) else (limit,)
    for each in limits:
        if not isinstance(each, Limit):
            raise SearchError(f"a limit is lamina.Milliseconds(…), Macs(…) or Parameters(…), not {each!r}")
    return limits  # type: ignore[return-value]


def _joined(net: Supernet, ledger: Ledger, limits: Sequence[AnyLimit], score: str, shown: Display) -> Space:
    """The space of a search with the times that its study goes by; the supernet goes by them too from then on."""
    weights = digest(dict(net.network.state_dict())) if ledger.shared else ""
    ledger.enter(net.space.fingerprint(), weights, score)
    if not any(isinstance(limit, Milliseconds) for limit in limits):
        return net.space
    here = whole_setting(net.dense_like(), net.example[0], net.blueprint.timing_mode)
    there = ledger.times(None)
    if there is None:
        # Times of another machine are of layers alone, and were asked for by name.
        if not net.space.timed or (net.space.whole.timing and net.space.setting != here):
            net.time(shown=shown)
        there = ledger.times(net.space.times())
    assert there is not None
    taken = Setting(**there["setting"])
    # Workers on other machines go by the times of the first one, as long as they run the network as it did.
    if there["whole"] is not None and dataclasses.replace(here, device_name=taken.device_name) != taken:
        raise SearchError(
            f"the study {ledger.study.name!r} in {ledger.place} goes by times taken on {taken}, and here it is {here}: search "
            "under the same conditions, or choose another name or database"
        )
    if there != net.space.times():
        net.adopt(net.space.with_times(there))
    return net.space


def _trials(entries: Sequence[Entry], space: Space, limits: Sequence[Limit]) -> tuple[Trial, ...]:
    found = []
    for entry in entries:
        config = from_json(json.loads(entry.forms))
        if config in space and space.allows(space.row(config), limits):
            found.append(Trial(config, space.cost(config), entry.score, entry.error, entry.seconds, entry.worker))
    return tuple(sorted(found, key=lambda trial: (trial.score is None, -trial.merit, trial.cost.macs)))


def _winner(
    net: Supernet,
    space: Space,
    limits: tuple[AnyLimit, ...],
    explore: Callable[[tuple[AnyLimit, ...]], tuple[Trial, ...]],
    finalists: int,
) -> tuple[Trial, Comparison | None, list[tuple[Trial, float]]]:
    """The best trial; where time is limited, the best whose network, measured whole, is within the limit.

    A whole network may take longer than the table says. Where all finalists do, the search goes on below the limit by as much.
    With the winner comes its measurement, and the finalists over the limit with their milliseconds.
    """
    scored = _scored(explore(limits), limits)
    time_limit = min(
        (limit for limit in limits if isinstance(limit, Milliseconds)), key=lambda limit: limit.value, default=None
    )
    if time_limit is None or space.whole.timing is None:
        return scored[0], None, []
    original, example, mode = net.dense_like(), net.example, net.blueprint.timing_mode
    aim, over = time_limit, list[tuple[Trial, float]]()
    while True:
        there = [trial.config for trial, _ in over]
        longer = []
        for trial in [trial for trial in scored if trial.config not in there][:finalists]:
            found = compare(original, net.extract(trial.config), example, mode=mode, seconds=_SECONDS)
            if found.after.median_ms <= time_limit.value:
                return trial, found, over
            over.append((trial, found.after.median_ms))
            longer.append(found.after.median_ms / aim.of(trial.cost))
        aim = Milliseconds(min(time_limit.value / median(longer or [1.0]), _STEP * aim.value))
        aims = tuple(aim if isinstance(limit, Milliseconds) else limit for limit in limits)
        try:
            space.check(aims)
        except SearchError as error:
            raise SearchError(
                f"none of the {len(over)} configurations that were measured as a whole is within {time_limit}; the fastest "
                f"takes {min(ms for _, ms in over):.4g} ms: raise the limit, or offer cheaper forms"
            ) from error
        scored = _scored(explore(aims), aims)


def _scored(trials: Sequence[Trial], limits: Sequence[Limit]) -> list[Trial]:
    """The trials that have a score; there must be some."""
    scored = [trial for trial in trials if trial.score is not None]
    if scored:
        return scored
    if trials:
        raise SearchError(f"the score failed for all {len(trials)} configurations; of the first: {trials[0].error}")
    raise SearchError(f"no configuration within {' and '.join(map(str, limits))} was found")


def _with_measurement(plan: Plan, measured: Comparison) -> Plan:
    assert plan.whole is not None
    whole = plan.whole.model_copy(
        update={
            "before": dataclasses.replace(plan.whole.before, timing=measured.before),
            "after": dataclasses.replace(plan.whole.after, timing=measured.after),
            "speedup": measured.speedup,
            "interval": measured.interval,
        }
    )
    return plan.model_copy(update={"whole": whole})
