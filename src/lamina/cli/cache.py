"""``lamina cache``: the table of layer times on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import typer

from ..measure.table import default_path, forget, kept
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
    """The table's file, the number of times in it, and the conditions under which they were taken."""

    path: str
    times: int
    taken: tuple[Taken, ...]

    def __str__(self) -> str:
        """The file, then a line a setting."""
        return "\n".join([f"{self.path}: {self.times} times", *(f"{each.times} on {each.setting}" for each in self.taken)])


@final
@dataclass(frozen=True, slots=True)
class Cleared:
    """The table's file, and how many times it forgot."""

    path: str
    forgotten: int

    def __str__(self) -> str:
        """One line."""
        return f"{self.path}: {self.forgotten} times forgotten"


def _show() -> Cache:
    """Print where the times are kept, how many there are, and under which conditions they were taken."""
    path = default_path()
    number, settings = kept(path)
    return Cache(str(path), number, tuple(Taken(n, setting) for setting, n in settings.items()))


def _clear() -> Cleared:
    """Forget every time."""
    path = default_path()
    return Cleared(str(path), forget(path))


command(_show, cache)
command(_clear, cache)
