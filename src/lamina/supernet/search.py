"""Search: scores configurations of a supernet within a limit, on one machine or many, and names a winner.

What is scored, and in which order, is the strategy's business; who scores it, the ledger's (`study`); how, `score`'s.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, final

from ..artifact import digest
from ..comparison import Comparison, compare
from ..errors import MissingExtra, SearchError
from ..forms import Form
from ..goals import AnyLimit, Limit, Milliseconds
from ..plan import Plan
from ..values import Cost
from .convert import Supernet, within
from .score import ManyScores, Outcome, Score, scores_of
from .space import Configuration, Row, Space, as_json, described, from_json
from .strategies import BreadthFirst, Hunt, Screen, Strategy
from .study import Entry, Ledger, Study, opened, optuna_study

_WINDOW = 64
"""Configurations that a worker asks the ledger about at a time."""

_PAUSE = 0.02
"""Seconds between two questions while others work; doubled up to one second."""

_SECONDS = 1.0
"""About how long each finalist is timed against the original."""


@final
@dataclass(frozen=True, slots=True)
class Trial:
    """A configuration that was scored: what it costs, its score, or why it has none."""

    config: Configuration
    cost: Cost
    score: float | None
    error: str | None = None
    seconds: float = 0.0
    worker: str = ""

    def __str__(self) -> str:
        """``0.912 at 21.3 k parameters, 2.59 M MACs: …``."""
        what = f"{self.score:.6g}" if self.score is not None else f"failed ({self.error})"
        return f"{what} at {self.cost}: {described(self.config)}"


@final
@dataclass(frozen=True, slots=True)
class Winner:
    """The best configuration that was scored.

    Attributes:
        config: The configuration.
        score: Its score in the supernet.
        cost: What it costs, by the space's numbers.
        plan: A plan like any other.
        measured: The whole extracted network against the original, where time was limited and could be measured here.
    """

    config: Configuration
    score: float
    cost: Cost
    plan: Plan
    measured: Comparison | None = None


@final
@dataclass(frozen=True, slots=True)
class SearchResult:
    """How a search went.

    Attributes:
        best: The winner.
        trials: Every configuration within the limits that the study has scored, the best first; failed ones last.
        limits: What was asked for.
        strategy: How it was looked for, as it prints.
        over: Finalists whose whole network took longer than allowed when it was measured, with their times in milliseconds.
    """

    best: Winner
    trials: tuple[Trial, ...]
    limits: tuple[AnyLimit, ...]
    strategy: str
    over: tuple[tuple[Trial, float], ...] = ()

    @property
    def scored(self) -> tuple[Trial, ...]:
        """The trials that have a score."""
        return tuple(trial for trial in self.trials if trial.score is not None)

    @property
    def failed(self) -> tuple[Trial, ...]:
        """The trials whose score raised, or was no finite number."""
        return tuple(trial for trial in self.trials if trial.score is None)

    @property
    def front(self) -> tuple[Trial, ...]:
        """The trials that no other one beats in both score and cost, the cheapest first; cost is that of the first limit."""
        front: list[Trial] = []
        for trial in sorted(self.scored, key=lambda t: (self.price(t.cost), -_score(t))):
            if not front or _score(trial) > _score(front[-1]):
                front.append(trial)
        return tuple(front)

    def price(self, cost: Cost) -> float:
        """The part of a cost that the first limit looks at; without limits its MACs."""
        return self.limits[0].of(cost) if self.limits else float(cost.macs)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Score against cost: every trial, the front, the winner and the limit, as a Matplotlib figure.

        Args:
            path: Where it is written too, if anywhere.

        Raises:
            MissingExtra: Matplotlib is not installed.
        """
        try:
            figure = importlib.import_module("matplotlib.figure").Figure(figsize=(6.4, 4.4), layout="constrained")
        except ImportError as error:
            raise MissingExtra("matplotlib", "report", "the plot of a search") from error
        axes = figure.subplots()
        axes.scatter(
            [self.price(t.cost) for t in self.scored], [_score(t) for t in self.scored], s=12, color="0.6", label="scored"
        )
        front = self.front
        axes.plot([self.price(t.cost) for t in front], [_score(t) for t in front], "o-", markersize=4, label="front")
        axes.plot([self.price(self.best.cost)], [self.best.score], "*", markersize=14, label="winner")
        unit = "MACs"
        if self.limits:
            unit = {"milliseconds": "ms", "macs": "MACs", "parameters": "parameters"}[self.limits[0].goal]
            axes.axvline(self.limits[0].value, linestyle="--", color="0.4", label=f"limit {self.limits[0]}")
        axes.set_xlabel(unit)
        axes.set_ylabel("score in the supernet")
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure

    def __str__(self) -> str:
        """The winner, what was scored, and the front."""
        limit = " and ".join(map(str, self.limits)) or "no limit"
        lines = [
            f"{self.strategy} within {limit}: {len(self.scored)} configurations scored, {len(self.failed)} failed",
            f"best: {self.best.score:.6g} at {self.best.cost}: {described(self.best.config)}",
        ]
        if self.best.measured:
            lines.append(f"whole network: {self.best.measured}")
        lines += [f"over the limit when measured as a whole: {ms:.4g} ms, {trial}" for trial, ms in self.over]
        lines += [f"front: {trial}" for trial in self.front]
        return "\n".join(lines)


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
        >>> small = net.extract(result.best.config)

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
        finalists: With a limit on time, so many of the best are measured as whole networks at a time, until one is within it.
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
    with opened(where) as ledger:
        space = _joined(net, ledger, limits)
        space.check(limits)
        with optuna_study(ledger) as plain, _bar(progress) as advance:
            desk = _Desk(
                net, score, space, limits, ledger, plain, at_once if isinstance(score, ManyScores) else 1, seed, advance
            )
            hunt = Hunt(space, limits, seed, screen, desk.score, desk.ask)
            strategy.check(hunt)
            strategy.explore(hunt)
            desk.mend()
        trials = _trials(ledger.all(), space, limits)
    return _judged(net, space, trials, limits, str(strategy), finalists)


def weight_errors(net: Supernet) -> dict[str, dict[Form, float]]:
    """The squared weight errors ``‖W − Ŵ‖²`` of a supernet's fits before any training, layer by layer: a `Screen` without data.

    Their sum ranked configurations about as well as short-trained supernets did.
    """
    return {name: dict(zip(layer.forms, layer.errors, strict=True)) for name, layer in net.blueprint.layers.items()}


@final
@dataclass(slots=True)
class _Desk:
    """Where one worker scores: it takes what nobody has begun, and waits for what others have."""

    net: Supernet
    scorer: Score
    space: Space
    limits: tuple[AnyLimit, ...]
    ledger: Ledger
    optuna: Any
    at_once: int
    seed: int
    advance: Callable[[int, float | None], None]
    known: dict[str, Entry] = field(default_factory=dict)

    def score(self, rows: Sequence[Row]) -> dict[Row, float]:
        """The scores of some rows, all of them, whoever makes them."""
        configs = {row: self.space.configuration(row) for row in rows}
        keys = {row: self.space.key(config) for row, config in configs.items()}
        forms = {keys[row]: json.dumps(as_json(config)) for row, config in configs.items()}
        by_key = {keys[row]: configs[row] for row in rows}
        # Each worker begins somewhere else, so that they seldom want the same.
        missing = list(by_key)
        turn = zlib.crc32(self.ledger.worker.encode()) % max(len(missing), 1)
        missing = missing[turn:] + missing[:turn]
        pause, idle = _PAUSE, 0
        while missing:
            window = missing[:_WINDOW]
            mine = self.ledger.claim({key: forms[key] for key in window}, self.at_once)
            if mine:
                self._work(mine, {key: by_key[key] for key in mine})
            self._learn(window)
            left = [key for key in window if key not in self.known]
            # What others are at work on goes to the end; when nothing else is left, they are waited for.
            missing = missing[_WINDOW:] + left
            idle = idle + len(window) if len(left) == len(window) else 0
            if idle < len(missing) or not missing:
                pause = _PAUSE if not idle else pause
                continue
            time.sleep(pause)
            pause, idle = min(2 * pause, 1.0), 0
        return {row: _merit(self.known[keys[row]]) for row in rows}

    def _learn(self, keys: Sequence[str]) -> None:
        found = self.ledger.known([key for key in keys if key not in self.known])
        self.known |= found
        best = max((entry.score for entry in self.known.values() if entry.score is not None), default=None)
        self.advance(len(self.known), best)

    def _work(self, keys: list[str], configs: Mapping[str, Configuration], asked: Any = None) -> None:
        """Score some claims and write down what came out; what is not finished goes back."""
        left = list(keys)
        try:
            with self.ledger.renewing(keys):
                began = time.perf_counter()
                outcomes = scores_of(self.net, self.scorer, [configs[key] for key in keys])
                seconds = (time.perf_counter() - began) / len(keys)
            for key, outcome in zip(keys, outcomes, strict=True):
                if self.ledger.finish(key, outcome.score, outcome.error, seconds):
                    self._record(key, configs[key], outcome, seconds, self.ledger.worker, asked)
                left.remove(key)
        finally:
            if left:
                self.ledger.release(left)

    def _record(
        self, key: str, config: Configuration, outcome: Outcome, seconds: float, worker: str, asked: Any = None
    ) -> None:
        """Make the trial of a configuration, or finish the one that asked for it."""
        import optuna

        failed = outcome.score is None
        about = self._about(key, config, seconds, worker) | ({"error": outcome.error} if failed else {})
        if asked is not None:
            for name, value in about.items():
                asked.set_user_attr(name, value)
        else:
            # One objective: those trials that Optuna itself draws for a front are told there.
            trial = optuna.trial.create_trial(
                state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
                value=outcome.score,
                params=dict(zip(self._titles, self.space.row(config), strict=True)),
                distributions=self._distributions(optuna),
                user_attrs=about,
            )
            self.optuna.add_trial(trial)
        self.ledger.record(key)

    def _about(self, key: str, config: Configuration, seconds: float, worker: str) -> dict[str, Any]:
        cost = self.space.cost(config)
        about: dict[str, Any] = {
            "key": key,
            "forms": described(config),
            "parameters": cost.parameters,
            "macs": cost.macs,
            "seconds": seconds,
            "worker": worker,
        }
        return about | ({"milliseconds": cost.timing.median_ms} if cost.timing else {})

    @property
    def _titles(self) -> list[str]:
        return [name or "(the network)" for name in self.space.names]

    def _distributions(self, optuna: Any) -> dict[str, Any]:
        return {
            title: optuna.distributions.IntDistribution(0, len(choice.forms) - 1)
            for title, choice in zip(self._titles, self.space.choices.values(), strict=True)
        }

    def mend(self) -> None:
        """Make the trials of configurations whose worker died between writing the score and telling Optuna."""
        late = self.ledger.unrecorded() if self.ledger.shared else []
        if not late:
            return
        there = {trial.user_attrs.get("key") for trial in self.optuna.get_trials(deepcopy=False)}
        for entry in late:
            config = from_json(json.loads(entry.forms))
            if entry.key not in there and config in self.space:
                self._record(entry.key, config, Outcome(entry.score, entry.error), entry.seconds, entry.worker)

    def ask(self, kind: Literal["tpe", "nsga2"], trials: int) -> None:
        """Let Optuna draw until so many different configurations within the limits are scored.

        A draw over a limit costs nothing: Optuna is told by how much. A draw that was scored before is answered from the book.
        """
        import optuna

        seed = self.seed
        if self.ledger.shared:  # workers that draw alike would all want the same
            seed = random.Random(f"{self.seed} {self.ledger.worker}").randrange(2**31)
        front = kind == "nsga2"
        samplers = {"tpe": optuna.samplers.TPESampler, "nsga2": optuna.samplers.NSGAIISampler}
        with optuna_study(self.ledger, sampler=samplers[kind](seed=seed), front=front) as drawn:
            idle = 0
            while self._count(drawn) < min(trials, self.space.size) and idle < 20 * trials:
                before = len(self.known)
                self._draw(optuna, drawn, front)
                idle = 0 if len(self.known) > before else idle + 1

    def _count(self, drawn: Any) -> int:
        self._learn([key for trial in drawn.get_trials(deepcopy=False) if (key := trial.user_attrs.get("key")) is not None])
        return sum(1 for entry in self.known.values() if self._within(from_json(json.loads(entry.forms))))

    def _within(self, config: Configuration) -> bool:
        return config in self.space and self.space.allows(self.space.row(config), self.limits)

    def _draw(self, optuna: Any, drawn: Any, front: bool) -> None:
        """One trial of Optuna's."""
        asked = drawn.ask(self._distributions(optuna))
        row = tuple(asked.params[title] for title in self._titles)
        config = self.space.configuration(row)
        cost, key = self.space.cost(config), self.space.key(config)
        for limit in self.limits:
            asked.set_constraint(limit.goal, limit.of(cost) / limit.value - 1)
        price = (self.limits[0].of(cost) if self.limits else float(cost.macs),) if front else ()
        failed = optuna.trial.TrialState.FAIL
        if not all(limit.allows(cost) for limit in self.limits):
            worst = min((e.score for e in self.known.values() if e.score is not None), default=0.0)
            asked.set_user_attr("over the limit", True)
            drawn.tell(asked, (worst, *price))
            return
        asked.set_user_attr("key", key)
        self._learn([key])
        if key not in self.known:
            if self.ledger.claim({key: json.dumps(as_json(config))}, 1):
                self._work([key], {key: config}, asked)
                self._learn([key])
            else:
                asked.set_user_attr("scored elsewhere", True)
                drawn.tell(asked, state=failed)
                return
        entry = self.known.get(key)
        if entry is None or entry.score is None:
            drawn.tell(asked, state=failed)
        else:
            drawn.tell(asked, (entry.score, *price))


def _limits(limit: Limit | Sequence[Limit]) -> tuple[AnyLimit, ...]:
    limits = tuple(limit) if isinstance(limit, Sequence) else (limit,)
    for each in limits:
        if not isinstance(each, Limit):
            raise SearchError(f"a limit is lamina.Milliseconds(…), Macs(…) or Parameters(…), not {each!r}")
    return limits  # type: ignore[return-value]


def _joined(net: Supernet, ledger: Ledger, limits: Sequence[AnyLimit]) -> Space:
    """The space of a search with the times that its study goes by; the supernet goes by them too from then on."""
    weights = digest(dict(net.network.state_dict())) if ledger.shared else ""
    ledger.enter(net.space.fingerprint(), weights)
    if not any(isinstance(limit, Milliseconds) for limit in limits):
        return net.space
    there = ledger.times(None)
    if there is None:
        if not net.space.timed:
            net.time()
        there = ledger.times(net.space.times())
    assert there is not None
    if there != net.space.times():
        net.adopt(net.space.with_times(there))
    return net.space


def _trials(entries: Sequence[Entry], space: Space, limits: Sequence[Limit]) -> tuple[Trial, ...]:
    found = []
    for entry in entries:
        config = from_json(json.loads(entry.forms))
        if config in space and space.allows(space.row(config), limits):
            found.append(Trial(config, space.cost(config), entry.score, entry.error, entry.seconds, entry.worker))
    return tuple(sorted(found, key=lambda trial: (trial.score is None, -_score(trial), trial.cost.macs)))


def _judged(
    net: Supernet, space: Space, trials: tuple[Trial, ...], limits: tuple[AnyLimit, ...], strategy: str, finalists: int
) -> SearchResult:
    """The result; where time is limited, after the finalists were measured whole."""
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        if trials:
            raise SearchError(f"the score failed for all {len(trials)} configurations; of the first: {trials[0].error}")
        raise SearchError(f"no configuration within {' and '.join(map(str, limits))} was found")
    time_limit = min(
        (limit for limit in limits if isinstance(limit, Milliseconds)), key=lambda limit: limit.value, default=None
    )
    over: list[tuple[Trial, float]] = []
    best, measured = scored[0], None
    if time_limit is not None and space.whole.timing is not None:
        original, example, mode = net.dense_like(), net.example, net.blueprint.timing_mode
        for start in range(0, len(scored), finalists):
            timed = [
                (trial, compare(original, net.extract(trial.config), example, mode=mode, seconds=_SECONDS))
                for trial in scored[start : start + finalists]
            ]
            good = [(trial, found) for trial, found in timed if found.after.median_ms <= time_limit.value]
            over += [(trial, found.after.median_ms) for trial, found in timed if found.after.median_ms > time_limit.value]
            if good:
                best, measured = good[0]
                break
        else:
            fastest = min(ms for _, ms in over)
            raise SearchError(
                f"none of the {len(over)} configurations that were scored is within {time_limit} when measured as a whole; the "
                f"fastest takes {fastest:.4g} ms: raise the limit, or search with a tighter one"
            )
    plan = net.plan(best.config, goal=within(limits), rule=strategy)
    if measured is not None:
        plan = _with_measurement(plan, measured)
    return SearchResult(Winner(best.config, _score(best), best.cost, plan, measured), trials, limits, strategy, tuple(over))


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


def _merit(entry: Entry) -> float:
    return float("-inf") if entry.score is None else entry.score


def _score(trial: Trial) -> float:
    return float("-inf") if trial.score is None else trial.score


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[int, float | None], None]]:
    """A function that is told how many configurations are scored, and the best score."""
    if not shown:
        yield lambda scored, best: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task("searching")

        def advance(scored: int, best: float | None) -> None:
            bar.update(task, description=f"{scored} scored" + ("" if best is None else f", best {best:.6g}"))

        yield advance
