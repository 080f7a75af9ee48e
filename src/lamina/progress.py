"""One progress display, on stderr: what a program prints on stdout is its result."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, final

T = TypeVar("T")


@final
@dataclass(slots=True)
class Display:
    """Shows how far the work is; without a bar it shows nothing."""

    bar: Any = None
    task: Any = None
    what: str = ""
    done: int = 0

    def through(self, items: Sequence[T], what: str) -> Iterable[T]:
        """The items one after the other, and how many of them are done."""
        for done, item in enumerate(items):
            self.say(what, done, len(items))
            yield item

    def say(self, what: str, done: int, total: int | None, numbers: str = "") -> None:
        """Show what is being done, how much of it is, of how much where that is known, and numbers beside it."""
        if self.bar is None:
            return
        if self.task is not None and what == self.what and done >= self.done:
            self.bar.update(self.task, completed=done, total=total, numbers=numbers)
        else:  # a piece of work of its own, whose speed does not follow from the last one's
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(what, completed=done, total=total, numbers=numbers)
        self.what, self.done = what, done


@contextmanager
def display(shown: bool) -> Iterator[Display]:
    """A display while some work is done, or one that shows nothing."""
    if not shown:
        yield Display()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    # What the user's own code prints is put above the bar where both are on one screen; a pipe gets it as ever.
    above = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=above) as bar:
        yield Display(bar)
