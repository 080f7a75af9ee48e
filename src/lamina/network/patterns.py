"""Layers by patterns of their names, as the shell reads them."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence

from ..errors import PlanError
from ..values import closest, quoted


def selected(names: list[str], include: Sequence[str], skip: Sequence[str]) -> set[str]:
    """The names that are wanted: of those that match a pattern in ``include``, or of all, what matches none in ``skip``.

    Raises:
        PlanError: A pattern matches no name, or is none.
    """
    for name, patterns in (("include", include), ("skip", skip)):
        if isinstance(patterns, str):
            raise PlanError(f"{name} is {patterns!r}; give a list of patterns: [{patterns!r}]")
        # An iterator is empty once it was looked through.
        if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
            raise PlanError(f"{name} is {quoted(patterns)}; give a list of patterns of layer names, such as ['layer4.*']")
    for pattern in [*include, *skip]:
        if not any(matches(name, [pattern]) for name in names):
            raise PlanError(f"pattern {pattern!r} matches no layer{closest(pattern, names)}")
    return {name for name in names if (not include or matches(name, include)) and not matches(name, skip)}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of some patterns, as the shell reads them."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
