"""One progress display, on stderr: what a program prints on stdout is its result.

On a terminal it is a bar with the time left. Elsewhere, as in a log, it is a line for each piece of work, and for long ones a
line now and then; what is done within seconds says nothing. Each piece of work goes to the log ``lamina`` too, at level INFO,
shown or not.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

T = TypeVar("T")
_LOG = logging.getLogger("lamina")
_QUICK_S = 5.0
"""Without a terminal nothing is said of work that takes no longer."""
_AGAIN_S = 20.0
"""There, how often a piece of work is told of again."""


@final
@dataclass(slots=True)
class Display:
    """Shows how far the work is; with neither a bar nor lines it shows nothing."""

    bar: Any = None
    lines: bool = False
    task: Any = None
    what: str = ""
    done: int = 0
    begun: float = field(default_factory=lambda: time.monotonic())
    since: float = field(default_factory=lambda: time.monotonic())
    """When this piece of work began."""
    told: tuple[str, float] = "", 0.0
    """What the last line was of, and when it was written."""

    def through(self, items: Sequence[T], what: str) -> Iterable[T]:
        """The items one after the other, and how many of them are done."""
        for done, item in enumerate(items):
            self.say(what, done, len(items))
            yield item

    def say(self, what: str, done: int, total: int | None, numbers: str = "") -> None:
        """Show what is being done, how much of it is, of how much where that is known, and numbers beside it."""
        if what != self.what:
            _LOG.info("%s", what)
        # A piece of work of its own, whose speed does not follow from the last one's.
        anew = what != self.what or done < self.done
        self.what, self.done = what, done
        if self.lines:
            self._tell(anew, total)
        if self.bar is None:
            return
        if self.task is not None and not anew:
            self.bar.update(self.task, completed=done, total=total, numbers=numbers)
        else:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(what, completed=done, total=total, numbers=numbers)

    def _tell(self, anew: bool, total: int | None) -> None:
        """A line of its own, where it is time for one."""
        now, what, done = time.monotonic(), self.what, self.done
        if anew:
            self.since = now
        last, when = self.told
        if now - self.begun < _QUICK_S or (what == last and now - when < _AGAIN_S):
            return
        far = f": {done} of {total}" if total else ""
        left = f", about {(now - self.since) / done * (total - done):.0f} s left" if total and done else ""
        print(f"{now - self.begun:5.0f} s  {what}{far}{left}", file=sys.stderr, flush=True)
        self.told = what, now


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
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield Display(lines=True)
        return
    # What the user's own code prints is put above the bar where both are on one screen; a pipe gets it as ever.
    above = sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, redirect_stdout=above) as bar:
        yield Display(bar)
