"""``lamina report``: a page about a plan, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.page import Report
from ..report.page import report as written
from .command import command
from .options import destination


@command("lamina report out/ -o report.html --front front/ --bench eager.json")
def report(
    *,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The folder of a saved network, or a plan's file.")],
    output: Annotated[Path, destination("The page, such as report.html.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The network's name, for the title and the commands.")] = "",
    front: Annotated[Path | None, typer.Option(metavar="FOLDER", help="What lamina pareto -o wrote of this network.")] = None,
    bench: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What lamina bench -o wrote; may be repeated, one for each runtime."),
    ] = None,
    timings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The layers' times, for the staircases; by default this machine's.")
    ] = None,
) -> Report:
    """Write one page that shows what was asked, what came of it, and why. It needs no network."""
    return written(source, output, model=model, front=front, comparisons=bench or (), timings=timings)
