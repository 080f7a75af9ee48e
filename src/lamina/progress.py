"""One progress display, on stderr: what a program prints on stdout is its result."""

from __future__ import annotations

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

    def through(self, items: Sequence[T], what: str) -> Iterable[T]:
        """The items one after the other, and how many of them are done."""
        for done, item in enumerate(items):
            self.say(what, done, len(items))
            yield item

    def say(self, what: str, done: int, total: int) -> None:
        """Show what is being done, and how much of it is."""
        if self.bar is not None:
            self.bar.update(self.task, description=what, completed=done, total=total)


@contextmanager
def display(shown: bool) -> Iterator[Display]:
    """A display while some work is done, or one that shows nothing."""
    if not shown:
        yield Display()
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        yield Display(bar, bar.add_task("", total=None))
