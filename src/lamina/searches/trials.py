"""Trials: a study as Optuna shows it, and Optuna's samplers that draw configurations.

The ledger is the truth (`study`). Optuna's trials are made of it in one pass when a search ends, each once, whoever makes them;
so Optuna's own tools and its dashboard read a study. A sampler draws from trials in memory that are made of the ledger as well:
a worker that is killed leaves no trial half done.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

from ..errors import SearchError
from ..goals import AnyLimit
from ..network.running import first_line
from ..supernet.space import Row, Space, described, from_json
from .study import Entry, Ledger

_TRIES = 6


def write_trials(ledger: Ledger, space: Space) -> None:
    """Give Optuna the trials that it lacks, by one worker at a time. One that is killed meanwhile leaves the rest to the next.

    Raises:
        SearchError: The database refuses.
    """
    if not ledger.shared:
        return
    with ledger.alone("trials"), optuna_study(ledger) as study:
        import optuna

        there = {trial.user_attrs.get("key") for trial in study.get_trials(deepcopy=False)}
        late = [entry for entry in ledger.all() if entry.key not in there]
        fresh = [_trial(optuna, space, entry) for entry in late if from_json(json.loads(entry.forms)) in space]
        study.add_trials(fresh)


def titles(space: Space) -> list[str]:
    """The layers, as Optuna's parameters are called."""
    return [name or "(the network)" for name in space.names]


def _distributions(optuna: Any, space: Space) -> dict[str, Any]:
    return {
        title: optuna.distributions.IntDistribution(0, len(choice.forms) - 1)
        for title, choice in zip(titles(space), space.choices.values(), strict=True)
    }


def _trial(optuna: Any, space: Space, entry: Entry, price: Callable[[Row], float] | None = None) -> Any:
    """The trial of a configuration that was finished."""
    config = from_json(json.loads(entry.forms))
    cost, row = space.cost(config), space.row(config)
    about: dict[str, Any] = {
        "key": entry.key,
        "forms": described(config),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "seconds": entry.seconds,
        "worker": entry.worker,
    }
    about |= {"milliseconds": cost.timing.median_ms} if cost.timing else {}
    state = optuna.trial.TrialState
    failed = entry.score is None
    values = None if failed else [entry.score] if price is None else [entry.score, price(row)]
    return optuna.trial.create_trial(
        state=state.FAIL if failed else state.COMPLETE,
        values=values,
        params=dict(zip(titles(space), row, strict=True)),
        distributions=_distributions(optuna, space),
        user_attrs=about | ({"error": entry.error} if failed else {}),
    )


@final
@dataclass(slots=True)
class Sampler:
    """One of Optuna's samplers, drawing rows of a space within limits."""

    space: Space
    limits: tuple[AnyLimit, ...]
    kind: Literal["tpe", "nsga2"]
    seed: int
    study: Any = None

    def __post_init__(self) -> None:
        import optuna

        samplers = {"tpe": optuna.samplers.TPESampler, "nsga2": optuna.samplers.NSGAIISampler}
        directions: list[Any] = ["maximize", "minimize"] if self._front else ["maximize"]
        with _quiet(optuna):
            self.study = optuna.create_study(sampler=samplers[self.kind](seed=self.seed), directions=directions)

    @property
    def _front(self) -> bool:
        return self.kind == "nsga2"

    def price(self, row: Row) -> float:
        """The part of a row's cost that the first limit looks at; without limits its MACs."""
        cost = self.space.cost_of_row(row)
        return self.limits[0].of(cost) if self.limits else float(cost.macs)

    def take_up(self, entries: Mapping[str, Entry]) -> None:
        """Learn what others found."""
        import optuna

        there = {trial.user_attrs.get("key") for trial in self.study.get_trials(deepcopy=False)}
        price = self.price if self._front else None
        fresh = [_trial(optuna, self.space, entry, price) for key, entry in entries.items() if key not in there]
        self.study.add_trials(fresh)

    def draw(self, score: Callable[[Row], tuple[str, float | None] | None], worst: float) -> None:
        """Draw a row, have it scored, and learn the score.

        Args:
            score: From a row to its key and its score; None for a key that another works on.
            worst: What is told of a row over a limit, which costs nothing, beside by how much it is over.
        """
        import optuna

        asked = self.study.ask(_distributions(optuna, self.space))
        row = tuple(asked.params[title] for title in titles(self.space))
        cost = self.space.cost_of_row(row)
        for limit in self.limits:
            asked.set_constraint(limit.goal, limit.of(cost) / limit.value - 1)
        price = (self.price(row),) if self._front else ()
        if not self.space.allows(row, self.limits):
            asked.set_user_attr("over the limit", True)
            self.study.tell(asked, (worst, *price))
            return
        found = score(row)
        if found is not None:
            asked.set_user_attr("key", found[0])
        if found is None or found[1] is None:
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(asked, (found[1], *price))


def seed_of(ledger: Ledger, seed: int) -> int:
    """A seed of a worker's own: workers that draw alike would all want the same."""
    return random.Random(f"{seed} {ledger.worker}").randrange(2**31) if ledger.shared else seed


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextlib.contextmanager
def optuna_study(ledger: Ledger) -> Iterator[Any]:
    """The Optuna study beside a ledger, in the same database.

    Raises:
        SearchError: The database refuses.
    """
    import optuna

    with _quiet(optuna):
        try:
            yield _stored(optuna, ledger)
        except (optuna.exceptions.StorageInternalError, ledger._sql.exc.DBAPIError) as error:
            raise SearchError(f"the study in {ledger.place} cannot be used: {first_line(error)}") from error


def _stored(optuna: Any, ledger: Ledger) -> Any:
    url = ledger._engine.url
    connect = {"timeout": 60} if url.get_backend_name() == "sqlite" else {}
    engine = {"connect_args": connect, "pool_pre_ping": True}
    for attempt in range(_TRIES):
        try:
            storage = optuna.storages.RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine)
            options = {"study_name": ledger.study.name, "direction": "maximize", "load_if_exists": True}
            return optuna.create_study(storage=storage, **options)
        except Exception:  # workers that begin together may all try to make Optuna's tables
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("the last try either returns or raises")
