"""Keeps layer times in SQLite, one row a signature, so that nothing is measured twice under the same conditions.

The key holds everything that decides a time: geometry, form, input shape, layout and `Setting`. A time taken under other
conditions is another row. Several processes may use one file at once. A table that cannot be read or written never stops the
work: it is set aside, said so, and times are kept in memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import final

from platformdirs import user_cache_path

from ..forms import Form
from ..values import Geometry, Setting, Timing, Use

_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS timings (signature TEXT PRIMARY KEY, median_s REAL, mad_s REAL, repeats INTEGER, taken REAL)"
)
_INSERT = "INSERT OR REPLACE INTO timings VALUES (?, ?, ?, ?, ?)"


def default_path() -> Path:
    """Where the table lies: ``$LAMINA_CACHE`` or the user's cache folder."""
    folder = os.environ.get("LAMINA_CACHE")
    return (Path(folder) if folder else user_cache_path("lamina")) / "timings.sqlite"


def signature(geometry: Geometry, form: Form, use: Use, channels_last: bool, setting: Setting) -> str:
    """The key of a time: canonical JSON of all that decides it."""
    content = {
        "version": _VERSION,
        "geometry": dataclasses.asdict(geometry),
        "form": dataclasses.asdict(form),  # type: ignore[call-overload]
        "input": use.input_shape,
        "channels_last": channels_last,
        "setting": dataclasses.asdict(setting),
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


@final
class TimingTable:
    """Times by signature. Use as a context manager, or call `close`.

    Args:
        path: The SQLite file; made with its folder where missing. None keeps everything in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._connection = self._open(path)

    def __enter__(self) -> TimingTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __len__(self) -> int:
        """The number of times kept."""
        return int(self._connection.execute("SELECT count(*) FROM timings").fetchone()[0])

    def get(self, signatures: Iterable[str], setting: Setting) -> dict[str, Timing]:
        """The times that are known among some signatures."""
        known: dict[str, Timing] = {}
        for key in signatures:
            try:
                row = self._connection.execute(
                    "SELECT median_s, mad_s, repeats FROM timings WHERE signature = ?", (key,)
                ).fetchone()
            except sqlite3.Error as error:
                self._give_up(error)
                return known
            if row and row[0] > 0:
                known[key] = Timing(row[0], row[1], row[2], setting)
        return known

    def put(self, timings: Mapping[str, Timing]) -> None:
        """Keep some times, all of them or none."""
        rows = [(key, t.median_s, t.mad_s, t.repeats, time.time()) for key, t in timings.items()]
        for _ in range(2):
            try:
                with self._connection:
                    self._connection.executemany(_INSERT, rows)
                return
            except sqlite3.Error as error:
                self._give_up(error)

    def clear(self) -> int:
        """Forget every time; returns how many there were."""
        number = len(self)
        with self._connection:
            self._connection.execute("DELETE FROM timings")
        return number

    def _open(self, path: Path | None) -> sqlite3.Connection:
        if path is None:
            return _connect(":memory:")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return _connect(path)
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.OperationalError):
                return self._replace_corrupt(path, error)
            self._warn(error)
        except OSError as error:
            self._warn(error)
        return _connect(":memory:")

    def _replace_corrupt(self, path: Path, error: Exception) -> sqlite3.Connection:
        aside = path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
        try:
            path.rename(aside)
            connection = _connect(path)
        except (OSError, sqlite3.Error) as second:
            self._warn(second)
            return _connect(":memory:")
        warnings.warn(f"the timing table {path} is damaged ({error}); set aside as {aside.name}, a new one begun", stacklevel=4)
        return connection

    def _give_up(self, error: Exception) -> None:
        """Go on in memory after the file failed, with the times that it still gives."""
        self._warn(error)
        try:
            rows = self._connection.execute("SELECT * FROM timings").fetchall()
        except sqlite3.Error:
            rows = []
        self._connection.close()
        self._connection = _connect(":memory:")
        with self._connection:
            self._connection.executemany(_INSERT, rows)

    def _warn(self, error: Exception) -> None:
        warnings.warn(f"the timing table {self.path} cannot be used ({error}); times of this run are not kept", stacklevel=4)


def _connect(path: Path | str) -> sqlite3.Connection:
    # Autocommit off, and a long wait for other processes' locks: their writes are short.
    connection = sqlite3.connect(path, timeout=60)
    try:
        with connection:
            connection.execute(_SCHEMA)
        # A damaged page shows only when it is read.
        connection.execute("SELECT sum(repeats) FROM timings").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection
