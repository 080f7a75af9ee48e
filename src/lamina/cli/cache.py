"""``lamina cache``: the table of layer times on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import final

import typer

from ..measure.table import Held, default_path, forget, kept, kept_besides
from ..values import Setting
from .command import app, command

cache = typer.Typer(help="The table in which the times of layers are kept.")
app.add_typer(cache, name="cache")


@final
@dataclass(frozen=True, slots=True)
class Taken:
    """How many times were taken under one setting, when the oldest was, and how wide they spread, as a share, at the median."""

    times: int
    oldest: str
    spread: float
    setting: Setting

    @classmethod
    def of(cls, held: Held, setting: Setting) -> Taken:
        """What a table holds of a setting."""
        oldest = datetime.fromtimestamp(held.oldest).astimezone().isoformat(timespec="seconds")
        return cls(held.times, oldest, held.spread, setting)

    def __str__(self) -> str:
        """One line."""
        return f"{self.times} on {self.setting}: the oldest of {self.oldest[:10]}, ± {self.spread:.1%} at the median"


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
        return "\n".join([first, *map(str, self.taken)])


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
    """Print where the times are kept, how many there are, under which conditions, how old they are and how wide they spread."""
    path = default_path()
    number, settings = kept(path)
    return Cache(str(path), number, kept_besides(path), tuple(Taken.of(held, setting) for setting, held in settings.items()))


def _clear() -> Cleared:
    """Forget every time, and whatever is kept beside the times."""
    path = default_path()
    others = kept_besides(path)
    return Cleared(str(path), forget(path), others)


command("lamina cache show", cache)(_show)
command("lamina cache clear", cache)(_clear)
