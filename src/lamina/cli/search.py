"""``lamina search``: find the best configuration of a supernet within a limit, alone or with workers on other machines."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, final

import typer

from ..errors import SearchError
from ..goals import Limit, Macs, Milliseconds, Parameters
from ..models import attribute
from ..progress import display
from ..supernet.files import save_best
from ..supernet.screen import Screen, score_drops, weight_errors
from ..supernet.search import search as look
from ..supernet.space import as_json, described
from ..supernet.strategies import BreadthFirst, Exhaustive, Sampled, Strategy
from ..supernet.study import Study
from ..supernet.supernet import Supernet
from ..values import Cost
from .command import command
from .options import Conditions, writable
from .supernet import BaseName, NetFolder, loaded


class StrategyName(StrEnum):
    """In which order configurations are looked at."""

    breadth_first = "breadth-first"
    exhaustive = "exhaustive"
    random = "random"
    tpe = "tpe"
    nsga2 = "nsga2"


class ScreenName(StrEnum):
    """What ranks configurations before they are scored."""

    errors = "errors"
    scores = "scores"


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """What a configuration may cost; several limits hold together."""

    limit_ms: Annotated[float | None, typer.Option(metavar="MS", help="At most so many milliseconds a call, here.")] = None
    limit_macs: Annotated[float | None, typer.Option(metavar="N", help="At most so many multiply-accumulates.")] = None
    limit_parameters: Annotated[float | None, typer.Option(metavar="N", help="At most so many parameters.")] = None

    @property
    def limits(self) -> list[Limit]:
        """As `lamina.search` takes them."""
        given = ((Milliseconds, self.limit_ms), (Macs, self.limit_macs), (Parameters, self.limit_parameters))
        return [kind(value) for kind, value in given if value is not None]


@final
@dataclass(frozen=True, slots=True)
class Ways:
    """How it is looked for."""

    strategy: Annotated[StrategyName, typer.Option(help="nsga2 looks for the whole front.")] = StrategyName.breadth_first
    beam: Annotated[int, typer.Option(help="breadth-first: configurations that a round goes on from.")] = 4
    restarts: Annotated[int, typer.Option(help="breadth-first: how often to begin anew.")] = 0
    candidates: Annotated[int | None, typer.Option(metavar="N", help="breadth-first: most that are scored in a round.")] = None
    trials: Annotated[int, typer.Option(help="random, tpe, nsga2: configurations to score.")] = 100
    screen: Annotated[int | None, typer.Option(metavar="N", help="Rank all by a prediction first, and score the best N.")] = (
        None
    )
    screen_by: Annotated[
        ScreenName, typer.Option(help="The squared weight errors, or the scores of configurations that change one layer.")
    ] = ScreenName.errors
    seed: Annotated[int, typer.Option(help="Of whatever is drawn.")] = 0

    @property
    def chosen(self) -> Strategy:
        """The strategy."""
        if self.strategy is StrategyName.breadth_first:
            return BreadthFirst(self.beam, self.restarts, candidates=self.candidates)
        if self.strategy is StrategyName.exhaustive:
            return Exhaustive()
        return Sampled(self.strategy.value, self.trials)  # type: ignore[arg-type]

    def screened(self, net: Supernet, score: Any) -> Screen | None:
        """The screen, if any."""
        if self.screen is None:
            return None
        drops = score_drops(net, score) if self.screen_by is ScreenName.scores else weight_errors(net)
        return Screen(drops, self.screen)


@final
@dataclass(frozen=True, slots=True)
class Searched:
    """The winner, and where it is written."""

    file: str
    score: float
    config: dict[str, Any]
    cost: Cost
    scored: int
    failed: int
    text: str

    def __str__(self) -> str:
        """The winner, the front, the file."""
        return f"{self.text}\n{self.file}"


@command("lamina search net/ --score nets:score --limit-ms 50 --study sqlite:///study.db")
def search(
    *,
    net: NetFolder,
    score: Annotated[
        str,
        typer.Option(
            metavar="FUNCTION", show_default=False, help="From a network to a number, higher is better; or a lamina.Scored(…)."
        ),
    ],
    limits: Limits,
    ways: Ways,
    study: Annotated[
        str | None,
        typer.Option(metavar="URL", show_default=False, help="Database of the study; by default sqlite:///NET.db beside NET."),
    ] = None,
    name: Annotated[str, typer.Option(help="Of the study, where a database holds several.")] = "lamina",
    lease: Annotated[
        float, typer.Option(metavar="SECONDS", help="After which the configuration of a silent worker is taken up by another.")
    ] = 60.0,
    finalists: Annotated[int, typer.Option(min=1, help="With --limit-ms: so many are measured whole at a time.")] = 3,
    timings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The table of layer times, or one of lamina measure.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write score against cost as a picture.")] = None,
    model: BaseName = None,
    conditions: Conditions,
) -> Searched:
    """Find the best configuration within a limit; the same command on another machine joins, and after a crash goes on."""
    wanted = limits.limits
    if plot:
        writable(plot)
    function = attribute(score)
    if not (callable(function) or hasattr(function, "score_many")):
        raise SearchError(f"{score} is a {type(function).__name__}; it must be a function from a network to a number")
    with conditions.applied():
        supernet, _ = loaded(net, model, conditions)
        if timings is not None:
            with display(True) as shown:
                supernet.time(timings, shown=shown)
        result = look(
            supernet,
            function,
            limit=wanted,
            strategy=ways.chosen,
            screen=ways.screened(supernet, function),
            study=Study(study or f"sqlite:///{net.resolve()}.db", name, lease),
            seed=ways.seed,
            finalists=finalists,
            progress=True,
        )
    best = result.best
    file = save_best(net, best.config, score=best.score, forms=described(best.config), plan=best.plan.model_dump(mode="json"))
    if plot:
        result.plot(plot)
    config, text = as_json(best.config), str(result)
    return Searched(str(file), best.score, config, best.cost, len(result.scored), len(result.failed), text)
