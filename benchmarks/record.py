"""What the benchmarks share: the conditions printed beside every number, and the place where results stand.

Each benchmark prints its tables and, with ``--publish``, puts them into its own section of ``docs/results.md``.
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

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results.md"


def options(description: str, extend: Callable[[argparse.ArgumentParser], object] = lambda parser: None) -> argparse.Namespace:
    """The command line of every benchmark; ``extend`` adds what only one of them has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="write the tables into docs/results.md")
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
    """Replace one benchmark's section of the results page."""
    section = f"<!-- {name} -->\n## {title}\n\n```console\n$ {command}\n```\n\n{body.strip()}\n<!-- /{name} -->"
    page = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    page = pattern.sub(lambda _: section, page) if pattern.search(page) else f"{page.rstrip()}\n\n{section}\n"
    RESULTS.write_text(page)
