"""``lamina search``: find the best configuration of a supernet within a limit, alone or with workers on other machines."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, final

import typer

from ..errors import SearchError
from ..folder import digest
from ..models import attribute
from ..progress import display
from ..searches.screen import Screen, weight_errors
from ..searches.search import search as look
from ..searches.strategies import BreadthFirst, Exhaustive, Sampled, Solved, Strategy
from ..searches.study import Study
from ..supernet.files import save_best
from ..supernet.space import as_json, described
from ..supernet.supernet import Supernet
from ..values import Cost
from .command import command
from .options import Budgets, Conditions, destination
from .supernet import BaseName, NetFolder, loaded


class StrategyName(StrEnum):
    """In which order configurations are looked at."""

    solved = "solved"
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
class Ways:
    """How it is looked for."""

    strategy: Annotated[
        StrategyName, typer.Option(help="solved: least predicted loss, corrected by the scores; nsga2: the whole front.")
    ] = StrategyName.solved
    beam: Annotated[int, typer.Option(help="breadth-first: configurations that a round goes on from.")] = 4
    restarts: Annotated[int, typer.Option(help="breadth-first: how often to begin anew.")] = 0
    candidates: Annotated[int | None, typer.Option(metavar="N", help="breadth-first: most that are scored in a round.")] = None
    trials: Annotated[
        int | None, typer.Option(help="solved, random, tpe, nsga2: configurations to score; 64, or 100 where they are drawn.")
    ] = None
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
        given = {} if self.trials is None else {"trials": self.trials}
        return Solved(**given) if self.strategy is StrategyName.solved else Sampled(self.strategy.value, **given)  # type: ignore[arg-type]

    def screened(self, net: Supernet) -> Screen | None:
        """The screen, if any."""
        if self.screen is None:
            return None
        return Screen("scores" if self.screen_by is ScreenName.scores else weight_errors(net), self.screen)


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


@command("lamina search net/ --score nets:score --milliseconds 50 --study sqlite:///study.db")
def search(
    *,
    net: NetFolder,
    score: Annotated[
        str,
        typer.Option(
            metavar="FUNCTION", show_default=False, help="From a network to a number, higher is better; or a lamina.Scored(…)."
        ),
    ],
    budgets: Budgets,
    no_limit: Annotated[
        bool, typer.Option("--no-limit", help="Whatever it costs; by default nothing slower than the original.")
    ] = False,
    ways: Ways,
    study: Annotated[
        str | None,
        typer.Option(metavar="URL", show_default=False, help="Database of the study; by default sqlite:///NET.db beside NET."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the study, where a database holds several; by default a hash of NET's weights.")
    ] = None,
    lease: Annotated[
        float, typer.Option(metavar="SECONDS", help="After which the configuration of a silent worker is taken up by another.")
    ] = 60.0,
    finalists: Annotated[int, typer.Option(min=1, help="With a limit on time: so many are measured whole at a time.")] = 3,
    timings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The table of layer times, or one of lamina measure.")
    ] = None,
    plot: Annotated[Path | None, destination("Write score against cost as a picture.", "FILE", "--plot")] = None,
    model: BaseName = None,
    conditions: Conditions,
) -> Searched:
    """Find the best configuration within a limit; the same command on another machine joins, and after a crash goes on."""
    wanted = budgets.limits
    if wanted and no_limit:
        raise typer.BadParameter("--no-limit goes with no limit")
    function = attribute(score)
    if not (callable(function) or hasattr(function, "score_many")):
        raise SearchError(f"{score} is a {type(function).__name__}; it must be a function from a network to a number")
    with conditions.applied():
        supernet, _ = loaded(net, model, conditions)
        if timings is not None:
            with display(True) as shown:
                supernet.time(timings, shown=shown)
        weights = digest(dict(supernet.network.state_dict()))  # once trained on, it has a study of its own
        result = look(
            supernet,
            function,
            limit=wanted if wanted or no_limit else None,
            strategy=ways.chosen,
            screen=ways.screened(supernet),
            study=Study(study or f"sqlite:///{net.resolve()}.db", name or f"lamina-{weights[:12]}", lease),
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
