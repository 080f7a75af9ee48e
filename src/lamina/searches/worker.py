"""Where one worker of a search scores: it takes what nobody has begun, and waits for what others have."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from ..goals import AnyLimit
from ..progress import Display
from ..supernet.space import Configuration, Row, Space, as_json, from_json
from ..supernet.supernet import Supernet
from .score import Score, scores_of
from .study import Entry, Ledger
from .trials import Sampler, seed_of

_WINDOW = 64
"""Configurations that a worker asks the ledger about at a time."""

_PAUSE = 0.02
"""Seconds between two questions while others work; doubled up to one second."""


@final
@dataclass(slots=True)
class Worker:
    """One worker of a search."""

    net: Supernet
    scorer: Score
    space: Space
    limits: tuple[AnyLimit, ...]
    ledger: Ledger
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

    def _work(self, keys: list[str], configs: Mapping[str, Configuration]) -> None:
        """Score some claims and write down what came out; what is not finished goes back."""
        left = list(keys)
        try:
            with self.ledger.renewing(keys):
                began = time.perf_counter()
                outcomes = scores_of(self.net, self.scorer, [configs[key] for key in keys])
                seconds = (time.perf_counter() - began) / len(keys)
            for key, outcome in zip(keys, outcomes, strict=True):
                self.ledger.finish(key, outcome.score, outcome.error, seconds)
                left.remove(key)
        finally:
            if left:
                self.ledger.release(left)

    def ask(self, kind: Literal["tpe", "nsga2"], trials: int) -> None:
        """Let Optuna draw until so many different configurations within the limits are scored, by all workers together.

        A draw over a limit costs nothing: Optuna is told by how much. A draw that was scored before is answered from the book.
        """
        sampler = Sampler(self.space, self.limits, kind, seed_of(self.ledger, self.seed))
        idle = 0
        while self._all_within() < min(trials, self.space.size) and idle < 20 * trials:
            before = len(self.known)
            sampler.take_up(self.known)
            worst = min((e.score for e in self.known.values() if e.score is not None), default=0.0)
            sampler.draw(self._drawn, worst)
            idle = 0 if len(self.known) > before else idle + 1

    def _all_within(self) -> int:
        """Take up what all workers have scored, as far as the limits allow it; how many that is."""
        if self.ledger.shared or not self.known:
            fresh = (entry for entry in self.ledger.all() if entry.key not in self.known)
            # Of what failed in another run the ledger tells nothing as long as it may be tried again.
            self.known |= self.ledger.known([e.key for e in fresh if self._within(from_json(json.loads(e.forms)))])
        return len(self.known)

    def _within(self, config: Configuration) -> bool:
        return config in self.space and self.space.allows(self.space.row(config), self.limits)

    def _drawn(self, row: Row) -> tuple[str, float | None] | None:
        """The key and score of a row that was drawn; None where another works on it."""
        config = self.space.configuration(row)
        key = self.space.key(config)
        self._learn([key])
        if key not in self.known:
            if not self.ledger.claim({key: json.dumps(as_json(config))}, 1):
                return None
            self._work([key], {key: config})
            self._learn([key])
        entry = self.known.get(key)
        return key, None if entry is None else entry.score


def _merit(entry: Entry) -> float:
    return float("-inf") if entry.score is None else entry.score
