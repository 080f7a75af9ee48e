"""Where one worker of a search scores: it takes what nobody has begun, and tells Optuna what came out."""

from __future__ import annotations

import json
import random
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

from ..goals import AnyLimit
from ..progress import Display
from .score import Outcome, Score, scores_of
from .space import Configuration, Row, Space, as_json, described, from_json
from .study import Entry, Ledger, optuna_study
from .supernet import Supernet

_WINDOW = 64
"""Configurations that a worker asks the ledger about at a time."""

_PAUSE = 0.02
"""Seconds between two questions while others work; doubled up to one second."""


@final
@dataclass(slots=True)
class Desk:
    """Where one worker scores: it takes what nobody has begun, and waits for what others have."""

    net: Supernet
    scorer: Score
    space: Space
    limits: tuple[AnyLimit, ...]
    ledger: Ledger
    optuna: Any
    at_once: int
    seed: int
    shown: Display
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
        self.shown.say("scoring configurations", len(self.known), None, "" if best is None else f"best {best:.6g}")

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
        if not self._within(config):
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


def _merit(entry: Entry) -> float:
    return float("-inf") if entry.score is None else entry.score
