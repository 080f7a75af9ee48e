"""Colour, on a terminal alone: what is gained, what is uncertain, what to beware of. Piped text is plain."""

from __future__ import annotations

import sys
from typing import ClassVar

from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.theme import Theme

_THEME = Theme(
    {
        "lamina.gain": "bold green",
        "lamina.loss": "bold red",
        "lamina.beware": "bold yellow",
        "lamina.wrong": "bold red",
        "lamina.aside": "dim",
    }
)


class _Words(RegexHighlighter):
    """The words that bear colour."""

    base_style = "lamina."
    highlights: ClassVar[list[str]] = [
        r"(?P<gain>×(?:[2-9]|\d{2,}|1)\.\d+)",
        r"(?P<loss>×0\.\d+)",
        r"(?P<beware>WARNING:?|SLOWER|^warning:|^note:)",
        r"(?P<wrong>^(?:error|unexpected):|^interrupted)",
        r"(?P<aside>\((?:95 % between )?×?\d[\d.]* (?:and|to) ×?[\d.]*\))",
    ]


def say(text: object, *, beside: bool = False) -> None:
    """Print something: plain where nobody sees colours, as ``NO_COLOR`` and ``FORCE_COLOR`` wish.

    Args:
        text: What is printed; its lines are broken already.
        beside: On stderr, where complaints go.
    """
    stream = sys.stderr if beside else sys.stdout
    console = Console(file=stream, theme=_THEME, highlighter=_Words(), markup=False, emoji=False, soft_wrap=True)
    if console.is_terminal and not console.no_color:
        console.print(str(text))
    else:
        print(text, file=stream)
