"""Remember what took long to find, as JSON beside the times, by all that decides it."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ..measure.table import TimingTable

Found = TypeVar("Found")


def digest(asked: Any, values: bytes | memoryview = b"") -> str:
    """A key of plain values, and of numbers beside them."""
    found = sha256(json.dumps(asked).encode())
    found.update(values)
    return found.hexdigest()


def remembered(
    table: TimingTable,
    kind: str,
    key: str,
    shape: TypeAdapter[Found],
    find: Callable[[], Found],
    holds: Callable[[Found], bool],
    keeps: Callable[[Found], bool] = lambda found: True,
) -> Found:
    """What was found before, where it can be read and still holds; else it is found now, and remembered.

    Args:
        table: Where it is kept.
        kind: See `TimingTable.remember`.
        key: Everything that decides it.
        shape: Reads and writes it.
        find: Finds it.
        holds: Whether what was found before is still true.
        keeps: Whether what is found now is worth remembering.
    """
    if (text := table.recall(kind, key)) is not None:
        try:
            if holds(known := shape.validate_json(text)):
                return known
        except ValidationError:
            pass  # found anew, and written over
    found = find()
    if keeps(found):
        table.remember(kind, key, shape.dump_json(found).decode())
    return found
