"""``lamina cache``: the table of layer times on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import typer

from ..measure.table import default_path, forget, kept, kept_besides
from ..values import Setting
from .command import app, command

cache = typer.Typer(help="The table in which the times of layers are kept.")
app.add_typer(cache, name="cache")


@final
@dataclass(frozen=True, slots=True)
class Taken:
    """How many times were taken under one setting."""

    times: int
    setting: Setting


@final
@dataclass(frozen=True, slots=True)
class Cache:
    """The table's file, the number of times in it, how much of other kinds, and the conditions under which times were taken."""

    path: str
    times: int
    others: Mapping[str, int]
    taken: tuple[Taken, ...]

    def __str__(self) -> str:
        """The file, then a line a setting."""
        first = f"{self.path}: {_numbers(self.times, self.others)}"
        return "\n".join([first, *(f"{each.times} on {each.setting}" for each in self.taken)])


@final
@dataclass(frozen=True, slots=True)
class Cleared:
    """The table's file, and how many times it forgot, and how much of other kinds."""

    path: str
    forgotten: int
    others: Mapping[str, int]

    def __str__(self) -> str:
        """One line."""
        return f"{self.path}: {_numbers(self.forgotten, self.others)} forgotten"


def _numbers(times: int, others: Mapping[str, int]) -> str:
    """``17 times, 5 losses``."""
    return ", ".join([f"{times} times", *(f"{number} {kind}" for kind, number in sorted(others.items()))])


def _show() -> Cache:
    """Print where the times are kept, how many there are, and under which conditions they were taken."""
    path = default_path()
    number, settings = kept(path)
    return Cache(str(path), number, kept_besides(path), tuple(Taken(n, setting) for setting, n in settings.items()))


def _clear() -> Cleared:
    """Forget every time, and whatever is kept beside the times."""
    path = default_path()
    others = kept_besides(path)
    return Cleared(str(path), forget(path), others)


command(_show, cache)
command(_clear, cache)
