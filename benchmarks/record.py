"""What the benchmarks share: the conditions printed beside every number, and the place where results stand.

Each benchmark prints its tables and, with ``--publish``, puts them into its own section of a page in ``docs/results``.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch

import lamina

DOCS = Path(__file__).resolve().parent.parent / "docs"
IMAGES = DOCS / "images"
"""Pictures; from a page of results that is ``../images``."""
PAGES = {
    "accuracy": ("answers", "front", "piling", "calibrate-damping", "fused"),
    "planning": ("budget-planning", "budget-solver", "calibrate", "memory", "streaming", "surgery", "block"),
    "training": ("training", "ddp", "freezing", "trainings", "frozen"),
    "supernet": ("supernet", "gross"),
    "runtimes": ("runtimes", "gauge", "pivoted"),
    "gpu": ("gpu",),
    "published": ("pitch", "published"),
    "trust": ("faults",),
}
"""By page what the names of sections begin with that are new there; all others are about speed."""


def options(description: str, extend: Callable[[argparse.ArgumentParser], object] = lambda parser: None) -> argparse.Namespace:
    """The command line of every benchmark; ``extend`` adds what only one of them has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="write the tables into docs/results")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each comparison measures")
    parser.add_argument("--threads", type=int, default=2)
    extend(parser)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    return chosen


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(setting: lamina.Setting) -> str:
    """One line: when, on what, with which versions."""
    today = datetime.date.today().isoformat()
    return f"{today}; {setting}; Python {platform.python_version()}, lamina {lamina.__version__}."


def publish(name: str, title: str, command: str, body: str) -> None:
    """Replace one benchmark's section, on whichever page of results it stands; a new one goes to the end of its page."""
    section = f"<!-- {name} -->\n## {title}\n\n```console\n$ {command}\n```\n\n{body.strip()}\n<!-- /{name} -->"
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    for path in sorted((DOCS / "results").glob("*.md")):
        page = path.read_text()
        if pattern.search(page):
            path.write_text(pattern.sub(lambda _: section, page))
            return
    path = DOCS / "results" / f"{page_of(name)}.md"
    path.write_text(f"{path.read_text().rstrip()}\n\n{section}\n")


def page_of(name: str) -> str:
    """The page of a section that stands nowhere yet: by the longest beginning of its name that is known."""
    known = {start: page for page, starts in PAGES.items() for start in starts}
    return (
        known[max((start for start in known if name.startswith(start)), key=len)] if name.startswith(tuple(known)) else "speed"
    )


def foretold(plan: lamina.Plan) -> str:
    """The time of the whole network as its layers' times add up to, over the measured one; empty where it was not timed."""
    whole = plan.whole
    if whole is None or whole.predicted_s is None or whole.after.timing is None:
        return ""
    return f"{whole.predicted_s / whole.after.timing.median_s:.2f}"


def beside_the_goal(plan: lamina.Plan) -> list[str]:
    """What a plan's notes say of a goal that it does not meet closely, in their first words."""
    return [note.partition(":")[0] for note in plan.notes if "the best that" in note or "asked for" in note]
