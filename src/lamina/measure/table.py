"""Keeps layer times in SQLite, one row a signature, so that nothing is measured twice under the same conditions.

The key holds everything that decides a time: geometry, form, input shape, layout and `Setting`. A time taken under other
conditions is another row. Several processes may use one file at once. A table that cannot be read or written never stops the
work: it is set aside, said so, and times are kept in memory.

Times travel: `TimingTable.export` writes those of one machine as JSON, `TimingTable.imported` reads them on another one, where
they answer in that machine's name or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, final

from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field

from ..errors import LaminaError
from ..files import read_model, write_whole
from ..forms import Form
from ..values import Geometry, Setting, Timing, Use

_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS timings (signature TEXT PRIMARY KEY, median_s REAL, mad_s REAL, repeats INTEGER, taken REAL)"
)
_INSERT = "INSERT OR REPLACE INTO timings VALUES (?, ?, ?, ?, ?)"

EXPORT_FORMAT = 1


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


def on_machine_of(target: Setting, setting: Setting) -> Setting:
    """The conditions of ``setting`` on the machine of ``target``.

    What the network and its use decide is kept: dtype, memory format, mode, freezing, autocast. The rest is the machine's.
    """
    return dataclasses.replace(
        target,
        dtype=setting.dtype,
        memory_format=setting.memory_format,
        mode=setting.mode,
        freezing=setting.freezing,
        autocast=setting.autocast,
    )


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")

    median_s: float = Field(gt=0, allow_inf_nan=False)
    mad_s: float = Field(ge=0, allow_inf_nan=False)
    repeats: int = Field(ge=1)


class _Export(BaseModel):
    """What an exported file holds: the machine, and times by signature."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    setting: Setting
    timings: dict[str, _Row]


@final
class TimingTable:
    """Times by signature. Use as a context manager, or call `close`.

    Args:
        path: The SQLite file; made with its folder where missing. None keeps everything in memory.

    Attributes:
        target: The setting of the machine whose times these are; None for this one.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.target: Setting | None = None
        self._connection = self._open(path)

    @classmethod
    def imported(cls, path: str | os.PathLike[str]) -> TimingTable:
        """A table in memory of the times that `export` wrote.

        On the machine that took them, under the same conditions, it is a table like any other. Elsewhere it gives the times
        that it has in that machine's name, and a time that it lacks is an error, as it cannot be taken here.

        Raises:
            LaminaError: No such file, cut short, of a newer format, or with a value that makes no sense; the message names it.
        """
        content = _read_export(Path(path))
        table = cls(None)
        table.path, table.target = Path(path), content.setting
        table.put({key: Timing(r.median_s, r.mad_s, r.repeats, content.setting) for key, r in content.timings.items()})
        return table

    def export(self, path: str | os.PathLike[str], setting: Setting) -> int:
        """Write the times taken on the machine of a setting as JSON; the file is there whole or not at all.

        Args:
            path: The file.
            setting: One that times were taken under. Times of other dtypes, memory formats and modes are written too, those of
                another device, number of threads or version are not.

        Returns:
            The number of times written.

        Raises:
            LaminaError: The table cannot be read, or the file cannot be written.
        """
        try:
            found = self._connection.execute("SELECT signature, median_s, mad_s, repeats FROM timings ORDER BY signature")
            rows = {key: _Row.model_construct(median_s=m, mad_s=d, repeats=n) for key, m, d, n in found if m > 0}
        except sqlite3.Error as error:
            raise LaminaError(f"the timing table {self.path} cannot be read: {error}") from error
        taken = {key: setting_in(key) for key in rows}
        here = {key: row for key, row in rows.items() if (s := taken[key]) and on_machine_of(setting, s) == s}
        content = _Export(setting=setting, timings=here)
        try:
            write_whole(Path(path), (content.model_dump_json(indent=1) + "\n").encode())
        except OSError as error:
            raise LaminaError(f"{path} cannot be written: {error.strerror}") from error
        return len(here)

    def conditions(self, setting: Setting) -> Setting:
        """The conditions under which this table's times were taken, for a network that would run here in a setting."""
        return setting if self.target is None else on_machine_of(self.target, setting)

    def settings(self) -> Counter[Setting]:
        """How many times were taken under each setting; times that an older lamina kept are left out."""
        keys = (row[0] for row in self._connection.execute("SELECT signature FROM timings"))
        return Counter(setting for key in keys if (setting := setting_in(key)))

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
        """The times that are known among some signatures.

        Args:
            signatures: As `signature` makes them here.
            setting: The conditions here, which the times are to bear.

        Raises:
            LaminaError: The times were taken on another machine, and one of those asked for was not.
        """
        known: dict[str, Timing] = {}
        there = self.conditions(setting)
        for key in signatures:
            kept = key if self.target is None or there == setting else _retaken(key, self.target)
            try:
                row = self._connection.execute(
                    "SELECT median_s, mad_s, repeats FROM timings WHERE signature = ?", (kept,)
                ).fetchone()
            except sqlite3.Error as error:
                self._give_up(error)
                return known
            if row and row[0] > 0:
                known[key] = Timing(row[0], row[1], row[2], there)
            elif there != setting:
                raise LaminaError(f"{self.path} has no time of {_described(kept)}: take it there with lamina measure")
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
        """Forget every time; returns how many there were.

        Raises:
            LaminaError: The file cannot be written.
        """
        try:
            number = len(self)
            with self._connection:
                self._connection.execute("DELETE FROM timings")
        except sqlite3.Error as error:
            raise LaminaError(f"the timing table {self.path} cannot be cleared: {error}") from error
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


def setting_in(key: str) -> Setting | None:
    """The setting in a signature; None where another version of lamina wrote it."""
    try:
        content = json.loads(key)
        return Setting(**content["setting"]) if content["version"] == _VERSION else None
    except (ValueError, TypeError, KeyError):
        return None


def _retaken(key: str, target: Setting) -> str:
    """A signature on the machine of another setting."""
    content: dict[str, Any] = json.loads(key)
    there = dataclasses.asdict(on_machine_of(target, Setting(**content["setting"])))
    return json.dumps(content | {"setting": there}, sort_keys=True, separators=(",", ":"))


def _described(key: str) -> str:
    """What a signature is of, for a message."""
    content: dict[str, Any] = json.loads(key)
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content["geometry"].items()}
    form = " ".join(f"{name} {value}".replace("form ", "") for name, value in content["form"].items())
    shape = "×".join(map(str, content["input"]))
    return f"{Geometry(**fields)} as {form} on {shape} ({Setting(**content['setting'])})"


def _read_export(path: Path) -> _Export:
    return read_model(
        path,
        _Export,
        EXPORT_FORMAT,
        LaminaError,
        unreadable=f"{path}: no readable file of timings",
        foreign=f"{path}: no file of timings: lamina measure writes one",
        needs="timings",
    )


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


@contextmanager
def opened(timings: TimingTable | str | os.PathLike[str] | None) -> Iterator[TimingTable]:
    """A table as users name it: itself, a file, a ``.json`` file of `TimingTable.export`, or None for the default one."""
    if isinstance(timings, TimingTable):
        yield timings
        return
    path = default_path() if timings is None else Path(timings)
    with TimingTable.imported(path) if path.suffix == ".json" else TimingTable(path) as table:
        yield table
