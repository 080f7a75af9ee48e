"""Search: scores configurations of a supernet within a limit, on one machine or many, and names a winner.

What is scored, and in which order, is the strategy's business; who scores it, the ledger's (`study`); how, `score`'s.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from ..comparison import Comparison, compare, whole_setting
from ..decomposition import attach_plan
from ..errors import SearchError
from ..folder import digest
from ..forms import Form
from ..goals import AnyLimit, Budget, Limit, Milliseconds, in_time, within
from ..plan import Plan
from ..progress import Display, display
from ..supernet.space import Space, from_json, key
from ..supernet.supernet import Supernet
from ..train.recalibrate import norms_of
from ..values import Setting
from .result import SearchResult, Trial, Winner
from .score import ManyScores, Score, Scored, called
from .screen import Screen, drops
from .strategies import Problem, Solved, Strategy
from .study import Entry, Ledger, Study, opened
from .trials import write_trials
from .worker import Worker

_SECONDS = 1.0
"""About how long each finalist is timed against the original."""

_STEP = 0.98
"""By how much at least a limit on the table's times is tightened after finalists that all took longer than allowed."""

_LOOSER = 1.02
"""By how much a limit on the table's times must rise for the search to go on with it: else what was asked for is filled."""

_ROUNDS = 5
"""How often the table's limit is corrected by networks that were measured whole, at most."""


def search(
    net: Supernet,
    score: Score,
    *,
    limit: Budget | Sequence[Budget] | None = None,
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
        limit: `Speedup`, `Milliseconds`, `Macs` or `Parameters`, or several; by default the original's own time, so that
            nothing slower is named best. ``()``: no limit. Times are those of the space's table, and finalists are then
            measured whole.
        strategy: `Solved()` by default, `BreadthFirst()`, `Exhaustive()`, or `Sampled("random" | "tpe" | "nsga2")`.
        screen: What ranks configurations before any is scored: a `Screen`, or a function from a configuration to its predicted
            loss.
        study: A database's URL, or a `Study`; None keeps the search in memory.
        seed: Of whatever is drawn.
        finalists: With a limit on time, so many of the best are measured as whole networks at a time. Where they take longer or
            shorter than the table said, the search goes on with a limit that is tighter, or wider, by as much.
        at_once: How many configurations a worker takes at a time where the score judges many together.
        progress: Show a progress bar.

    Raises:
        SearchError: The limit is below the cheapest configuration, the strategy does not suit the space, the study cannot be
            reached or is of another space, or every score failed.
        MissingExtra: Optuna is not installed.
    """
    asked = _budgets(limit)
    strategy = strategy or Solved()
    if not isinstance(strategy, Strategy):
        raise SearchError(f"strategy is {strategy!r}; it is lamina.Solved(), BreadthFirst(), Exhaustive() or Sampled(…)")
    for name, number in (("finalists", finalists), ("at_once", at_once)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise SearchError(f"{name} is {number!r}; it must be a whole number of 1 or more")
    if not (callable(score) or isinstance(score, ManyScores)):
        raise SearchError(f"score is {score!r}; give a function from a network to a number, or lamina.Scored(…)")
    if screen is not None and not isinstance(screen, Screen):
        screen = Screen(screen)
    where = Study(study) if isinstance(study, str) else study
    with opened(where) as ledger, display(progress) as shown:
        space = _joined(net, ledger, asked, (where and where.score) or called(score), shown)
        limits = _limits(space, asked)
        space.check(limits)
        widest = limits

        def explore(aims: tuple[AnyLimit, ...]) -> tuple[Trial, ...]:
            many = at_once if isinstance(score, ManyScores) else 1
            worker = Worker(net, score, space, aims, ledger, many, seed, shown)
            first = screen
            if screen is not None and screen.loss == "scores":
                start = space.row(space.uniforms()[-1])
                first = Screen(drops(space, start, worker.score), screen.survivors)
            problem = Problem(space, aims, seed, first, net.losses, worker.score, worker.ask)
            strategy.check(problem)
            strategy.explore(problem)
            return _trials(ledger.all(), space, aims)

        try:
            best, measured, over, widest = _winner(net, limits, explore, finalists, own_time=asked is None)
        except SearchError:
            if all(entry.score is None for entry in ledger.all()):
                ledger.forgive()
            raise
        finally:
            write_trials(ledger, space)
        trials = _trials(ledger.all(), space, widest)
    plan = net.plan(best.config, goal=within(asked) if asked else within(limits), rule=str(strategy))
    if measured is not None:
        plan = _with_measurement(plan, measured)
    statistics = score.recalibration if isinstance(score, Scored) else None
    network = net.extract(best.config, recalibration=statistics)
    return SearchResult(
        best=Winner(best.config, best.merit, best.cost, plan, measured),
        trials=trials,
        limits=limits,
        strategy=str(strategy),
        whole=space.whole,
        over=tuple(over),
        network=attach_plan(network, plan),
        recalibrated=statistics is not None and bool(norms_of(network)),
    )


def _budgets(limit: Budget | Sequence[Budget] | None) -> tuple[Budget, ...] | None:
    """What was asked for; None where nothing was, which means the original's own time."""
    if limit is None:
        return None
    asked = tuple(limit) if isinstance(limit, Sequence) else (limit,)
    for each in asked:
        if not isinstance(each, Budget):
            raise SearchError(f"a limit is lamina.Speedup(…), Milliseconds(…), Macs(…) or Parameters(…), not {each!r}")
    return asked


def _limits(space: Space, asked: tuple[Budget, ...] | None) -> tuple[AnyLimit, ...]:
    if asked is not None:
        return space.absolute(asked)
    if space.whole.timing is None:
        raise SearchError("times of another machine do not tell what the original takes: name a limit, or limit=() for none")
    return (Milliseconds(1.0).at(space.whole),)


def _joined(net: Supernet, ledger: Ledger, asked: Sequence[Budget] | None, score: str, shown: Display) -> Space:
    """The space of a search with the times that its study goes by; the supernet goes by them too from then on."""
    weights = digest(dict(net.network.state_dict())) if ledger.shared else ""
    ledger.enter(net.space.fingerprint(), weights, score)
    if asked is not None and not in_time(asked):
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
    limits: tuple[AnyLimit, ...],
    explore: Callable[[tuple[AnyLimit, ...]], tuple[Trial, ...]],
    finalists: int,
    own_time: bool,
) -> tuple[Trial, Comparison | None, list[tuple[Trial, float]], tuple[AnyLimit, ...]]:
    """The best trial; where time is limited, the best whose network, measured whole, is within the limit.

    A whole network takes longer or shorter than the table says. So what the table may say is corrected by what the finalists
    took, both ways, and the search goes on there. With the winner come its measurement, the finalists over the limit with their
    milliseconds, and the widest limits that were searched within. Where the limit is the original's own time, what is not
    slower beyond doubt is within it: the original itself would else be over it every other time.
    """
    scored = _scored(explore(limits), limits)
    time_limit = min(
        (limit for limit in limits if isinstance(limit, Milliseconds)), key=lambda limit: limit.value, default=None
    )
    original, example, mode = net.dense_like(), net.example, net.blueprint.timing_mode
    whole = net.space.whole
    if time_limit is None or whole.timing is None:
        timed = whole.timing is not None
        measured = compare(original, net.extract(scored[0].config), example, mode=mode, seconds=_SECONDS) if timed else None
        return scored[0], measured, [], limits
    aim, widest, over = time_limit, limits, list[tuple[Trial, float]]()
    best: tuple[Trial, Comparison] | None = None
    seen: set[str] = set()
    for number in itertools.count():
        if best is not None and number >= _ROUNDS:
            break
        shares = []
        fresh = [t for t in scored if key(t.config) not in seen and (best is None or t.merit > best[0].merit)]
        for trial in fresh[:finalists]:
            found = compare(original, net.extract(trial.config), example, mode=mode, seconds=_SECONDS)
            taken_ms = whole.timing.median_ms / found.speedup  # by paired ratios: the machine may have drifted since
            seen.add(key(trial.config))
            shares.append(aim.of(trial.cost) / taken_ms)
            if taken_ms <= time_limit.value or (own_time and found.interval[1] >= 1):
                best = (trial, found)
                break  # those that follow score less
            over.append((trial, taken_ms))
        if not shares:
            break
        value = time_limit.value * median(shares)
        if best is None:
            value = min(value, _STEP * aim.value)
        elif value <= _LOOSER * aim.value:
            break
        aim = Milliseconds(value)
        aims = tuple(aim if isinstance(limit, Milliseconds) else limit for limit in limits)
        try:
            net.space.check(aims)
            scored = _scored(explore(aims), aims)
        except SearchError as error:
            if best is not None:
                break
            raise _none_within(time_limit, over) from error
        if aim.value > time_limit.value:
            widest = aims
    if best is None:
        raise _none_within(time_limit, over)
    return *best, over, widest


def _none_within(limit: Milliseconds, over: Sequence[tuple[Trial, float]]) -> SearchError:
    return SearchError(
        f"none of the {len(over)} configurations that were measured as a whole is within {limit}; the fastest takes "
        f"{min(ms for _, ms in over):.4g} ms: raise the limit, or offer cheaper forms"
    )


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
