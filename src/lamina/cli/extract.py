"""``lamina extract``: take the plain network of a configuration out of a supernet, and save it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..artifact import save
from ..decomposition import attach_plan, plan_of
from ..errors import ArtifactError
from ..folder import size
from ..progress import display
from ..supernet.files import BEST, read_configuration, read_plan
from .apply import Applied
from .command import command
from .finetune import called
from .options import Budgets, Conditions, destination
from .supernet import BaseName, NetFolder, loaded


@command("lamina extract net/ --config best -o extracted/")
def extract(
    *,
    net: NetFolder,
    output: Annotated[Path, destination("Where the network is saved.", "FOLDER")],
    config: Annotated[str, typer.Option(metavar="best|FILE", help="best: what lamina search found; or a file.")] = "best",
    budgets: Budgets,
    recalibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FUNCTION",
            help="package.module:function that returns batches, on which batch norms are estimated anew, as a score may do.",
        ),
    ] = None,
    model: BaseName = None,
    conditions: Conditions,
) -> Applied:
    """Take a network out of a supernet, within a budget or as a search found it: plain layers, saved as lamina apply does."""
    file, limits = net / BEST if config == "best" else Path(config), budgets.limits
    if limits and config != "best":
        raise typer.BadParameter("a budget chooses the configuration, so it does not go with --config")
    if not limits and config == "best" and not file.is_file():
        raise ArtifactError(f"{net} has no {BEST}: name a budget, run lamina search, or name a file with --config")
    chosen = None if limits else read_configuration(file)
    with conditions.applied():
        supernet, _ = loaded(net, model, conditions)
        recalibration = called(recalibrate) if recalibrate else None
        if chosen is not None:
            small = supernet.extract(chosen, recalibration=recalibration)
        else:
            with display(True) as shown:
                supernet.time_for(limits, shown=shown)
            small = supernet.at(limits, recalibration=recalibration)
    plan = None if limits else read_plan(file)
    own = plan_of(small)
    if plan is not None and plan.fingerprint == own.fingerprint and not plan.differences(own):
        attach_plan(small, plan)  # it knows what was asked for, and what was measured
        own = plan
    save(small, output)
    before, after = (own.whole.before, own.whole.after) if own.whole else (None, None)
    return Applied(str(output), size(output), len(own.decomposed), len(own.layers), before, after)
