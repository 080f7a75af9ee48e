"""Rows by key in one SQLite file, which several processes and threads may use at once.

A `Layout` says which tables a file holds and by which mark it is known; what the rows mean is their owner's business.

A file in its own place that cannot be read or written never stops the work: this is said, and rows are kept in memory. A file
that somebody names is looked at first: what lamina did not make is refused and stays as it is, and only what lamina made is
set aside where it is damaged.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, final
from urllib.parse import quote

from filelock import FileLock, Timeout

from ..errors import LaminaError, TimingWarning

MAGIC = b"SQLite format 3\0"
_PATIENCE_S = 60.0  # writes are short, so a lock is seldom held so long

Row: TypeAlias = tuple[Any, ...]
Rows: TypeAlias = Mapping[str, Row]
Result = TypeVar("Result")


@final
@dataclass(frozen=True, slots=True)
class Table:
    """One table: its key, the columns of a row, what rows are called in messages, and which of two rows of one key stands.

    Beside them stands when a row was written, as seconds since 1970, in a column ``taken``.
    """

    key: str
    columns: tuple[str, ...]
    noun: str
    stays: Callable[[Row, Row], bool] = lambda first, new: False
    """Whether the row that was there first stays when a new one comes."""

    def settled(self, there: Rows, new: Rows) -> dict[str, Row]:
        """New rows, or those that were there and stay."""
        return {key: there[key] if key in there and self.stays(there[key], row) else row for key, row in new.items()}


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """What a file holds: its tables by name, the mark and the version by which it is known, and words for messages."""

    tables: Mapping[str, Table]
    mark: int
    version: int
    called: str
    """What the file is: ``timing table``."""
    foreign: str
    """What is said of a file that is something else, after its name."""


@final
@dataclass(frozen=True, slots=True)
class File:
    """A file of a layout. ``own`` says that it lies in lamina's own place, so that whatever stands there is lamina's.

    Every method raises `LaminaError` where it is something else, or of a newer lamina, and leaves it then as it was.
    """

    path: Path
    layout: Layout
    own: bool

    def __str__(self) -> str:
        """``the timing table /tmp/t.sqlite``."""
        return f"the {self.layout.called} {self.path}"

    def keys(self) -> dict[str, list[str]]:
        """The keys of each table; the file is only read, and errors of reading it are `LaminaError` too."""
        tables = self.layout.tables
        return self._read(lambda file: {name: _keys(file, name, table) for name, table in tables.items()}) or {
            name: [] for name in tables
        }

    def written(self, name: str) -> list[tuple[str, Row, float]]:
        """The rows of a table: key, columns, and when it was written; the file is only read, as by `keys`."""
        table = self.layout.tables[name]
        query = f"SELECT {', '.join((table.key, *table.columns, 'taken'))} FROM {name}"
        return self._read(lambda file: [(key, tuple(row), taken) for key, *row, taken in file.execute(query)]) or []

    def _read(self, work: Callable[[sqlite3.Connection], Result]) -> Result | None:
        """What comes of some work that only reads; None where there is no file yet."""
        if self._is_new():
            return None
        try:
            with closing(self.reader()) as connection:
                return work(connection)
        except (sqlite3.Error, OSError) as error:
            raise LaminaError(f"{self} cannot be read ({error})") from error

    def clear(self) -> dict[str, list[str]]:
        """Forget every row; the file shrinks. Returns the keys that there were; after a `LaminaError` all are still there."""
        if self._is_new():
            return {name: [] for name in self.layout.tables}
        try:
            self._look()
            with closing(self._connect(_PATIENCE_S)) as connection:
                with _transaction(connection):
                    keys = {name: _keys(connection, name, table) for name, table in self.layout.tables.items()}
                    for name in keys:
                        connection.execute(f"DELETE FROM {name}")
                with suppress(sqlite3.OperationalError):  # while another process reads the file, it keeps its size
                    connection.execute("VACUUM")
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except (sqlite3.Error, OSError) as error:
            raise LaminaError(f"{self} cannot be cleared: {error}") from error
        return keys

    def made(self, patience: float) -> sqlite3.Connection | None:
        """A connection to the file, made where missing, begun anew where lamina's own is damaged; None if it is left alone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                if not self.own:
                    self._look()
                return self._connect(patience)
            except sqlite3.DatabaseError as error:
                if not _damaged(error):
                    raise
                if not (self.own or self._is_marked()):
                    why = "is a damaged database, and none that lamina made: name another file"
                    raise LaminaError(f"{self.path} {why}") from error
                return self._begun_anew(patience, error)
        except LaminaError as error:
            if not self.own:
                raise
            _warn(f"the {self.layout.called} cannot be used ({error}); what this run finds is not kept")
            return None

    def reader(self) -> sqlite3.Connection:
        """A connection that only reads."""
        self._look()
        name = f"file:{quote(os.fspath(self.path.absolute()))}?mode=ro"
        connection = sqlite3.connect(name, uri=True, timeout=_PATIENCE_S)
        try:
            connection.execute("SELECT name FROM sqlite_master").fetchall()
        except sqlite3.OperationalError as error:
            connection.close()
            if _code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            # In a folder that cannot be written, the log that readers share cannot be made; nobody writes there either.
            connection = sqlite3.connect(f"{name}&immutable=1", uri=True)
        try:
            if not self._is_complete(connection):
                copy = sqlite3.connect(":memory:")
                connection.backup(copy)
                connection.close()
                connection = copy
                self._complete(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _begun_anew(self, patience: float, error: Exception) -> sqlite3.Connection:
        """Set a damaged file aside and begin a new one.

        One process at a time, which looks again: another may have begun the new one meanwhile, and that must stay.
        """
        try:
            with FileLock(f"{self.path}.lock", timeout=_PATIENCE_S):
                try:
                    return self._connect(patience)
                except sqlite3.DatabaseError as again:
                    if not _damaged(again):
                        raise
                aside = self.path.with_name(f"{self.path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
                for end in ("-wal", "-shm", ""):  # its log first: a new file must not find it
                    with suppress(FileNotFoundError):
                        os.rename(f"{self.path}{end}", f"{aside}{end}")
                _warn(f"{self} is damaged ({error}); set aside as {aside.name}, a new one begun")
                return self._connect(patience)
        except Timeout as late:
            raise OSError(f"{error}; {self.path}.lock is held by another process") from late

    def _connect(self, patience: float) -> sqlite3.Connection:
        # Autocommit: transactions are begun by hand. Threads take turns by the store's own lock.
        connection = sqlite3.connect(self.path, timeout=patience, isolation_level=None, check_same_thread=False)
        try:
            if not self._is_complete(connection):
                with _transaction(connection):
                    if not self._is_complete(connection):  # another process may have made it while we waited
                        self._complete(connection)
            with suppress(sqlite3.OperationalError):  # while others have it open; the next one to open it will
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            for name, table in self.layout.tables.items():  # a damaged page shows only when it is read
                whole = ", ".join(f"total(length({column}))" for column in table.columns)
                connection.execute(f"SELECT {whole} FROM {name}").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _is_complete(self, connection: sqlite3.Connection) -> bool:
        """Whether lamina made the database, in this version, with every table."""
        mark, version = _marks(connection)
        if mark == self.layout.mark and version > self.layout.version:
            made = f"(version {version}, this one reads {self.layout.version})"
            raise LaminaError(f"{self.path} was made by a newer lamina {made}: upgrade lamina")
        return (mark, version) == (self.layout.mark, self.layout.version) and self.layout.tables.keys() <= _names(connection)

    def _complete(self, connection: sqlite3.Connection) -> None:
        """Give an empty database, one of an older version, or one that lacks tables, every table of this version.

        What stands in an older one is given up.
        """
        mark, version = _marks(connection)
        if mark != self.layout.mark and not self._is_new():
            raise LaminaError(f"{self.path} is a database, and none that lamina made: name another file")
        if mark == self.layout.mark and version < self.layout.version:
            for name in _names(connection):
                connection.execute(f'DROP TABLE "{name}"')
        for name, table in self.layout.tables.items():
            fields = ", ".join((f"{table.key} TEXT PRIMARY KEY", *table.columns, "taken"))
            connection.execute(f"CREATE TABLE IF NOT EXISTS {name} ({fields}) WITHOUT ROWID")
        connection.execute(f"PRAGMA application_id = {self.layout.mark}")
        connection.execute(f"PRAGMA user_version = {self.layout.version}")

    def _look(self) -> None:
        """Refuse a file that is no database, before SQLite writes to it."""
        if self._is_new() or self.path.is_dir():
            return  # of a folder SQLite says that it cannot be opened
        if not self.path.is_file() or first_bytes(self.path, len(MAGIC)) != MAGIC:
            if self.own:
                raise LaminaError(f"{self} is damaged: the next plan sets it aside and begins a new one")
            raise LaminaError(f"{self.path} is {self.layout.foreign}")

    def _is_new(self) -> bool:
        """Whether there is nothing yet; an empty file is what a process leaves that was killed as it began one."""
        return not self.path.exists() or (self.path.is_file() and self.path.stat().st_size == 0)

    def _is_marked(self) -> bool:
        """Whether a file that SQLite cannot read bears lamina's mark."""
        head = first_bytes(self.path, 72)
        return head.startswith(MAGIC) and head[68:] == self.layout.mark.to_bytes(4, "big")


@final
class Store:
    """Rows by table and key. Close it in the end.

    Args:
        file: Where they are kept; made with its folder where missing. None keeps everything in memory.
        layout: The tables.

    Raises:
        LaminaError: The file is none that lamina made, or a newer lamina did. In lamina's own place this is a warning.
    """

    def __init__(self, file: File | None, layout: Layout) -> None:
        self._file = file
        self._layout = layout
        self._lock = threading.RLock()
        self._memory: dict[str, dict[str, Row]] = {name: {} for name in layout.tables}  # what the file does not hold (yet)
        self._patience = _PATIENCE_S
        self._connection: sqlite3.Connection | None = None
        self._on_file(lambda connection: None, None)

    def rows(self, name: str, keys: Iterable[str]) -> dict[str, Row]:
        """The rows of a table that are there among some keys."""
        keys, table = list(keys), self._layout.tables[name]
        with self._lock:
            found: dict[str, Row] = self._on_file(lambda connection: _read(connection, name, table, keys), {})
            return found | {key: row for key in keys if (row := self._memory[name].get(key))}

    def keys(self, name: str) -> set[str]:
        """Every key of a table."""
        with self._lock:
            nothing: list[str] = []
            table = self._layout.tables[name]
            return {*self._on_file(lambda connection: _keys(connection, name, table), nothing), *self._memory[name]}

    def put(self, new: Mapping[str, Rows]) -> dict[str, dict[str, Row]]:
        """Keep rows of several tables, all of them or none; returns them as they now stand."""

        def write(connection: sqlite3.Connection) -> dict[str, dict[str, Row]]:
            with _transaction(connection):
                return self._written(connection, new)

        with self._lock:
            stand = self._on_file(write, None)
            if stand is None:
                stand = {name: self._layout.tables[name].settled(self._memory[name], rows) for name, rows in new.items()}
                for name, rows in stand.items():
                    self._memory[name] |= rows
            return stand

    def close(self) -> None:
        """Close the file; what could not be written to it so far is written now, or its loss is said."""
        with self._lock:
            lost = Counter({table.noun: 0 for table in self._layout.tables.values()})
            for name, rows in self._memory.items():
                lost[self._layout.tables[name].noun] += len(rows)
            if self._file and lost.total() and not self._on_file(lambda connection: True, False) and self._file:
                what = ", ".join(f"{number} {noun}" for noun, number in lost.items() if number)
                warnings.warn(f"{self._file} stayed locked; {what} of this run are not kept", TimingWarning, stacklevel=3)
            if self._connection:
                self._connection.close()
            self._connection = self._file = None

    def _on_file(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """What comes of some work on the file; where it cannot be done now, or there is no file, something else.

        A locked file is asked again next time. Any other failure ends its use: the rows that it still gives go into memory.
        """
        with self._lock:
            if (file := self._file) is None:
                return otherwise
            try:
                if self._connection is None:
                    self._connection = file.made(self._patience)
                    if self._connection is None:
                        self._file = None
                        return otherwise
                self._connection.execute(f"PRAGMA busy_timeout = {round(self._patience * 1000)}")
                self._flush(self._connection)
                result = work(self._connection)
                self._patience = _PATIENCE_S
                return result
            except (sqlite3.Error, OSError) as error:
                if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    if self._patience == _PATIENCE_S:
                        _warn(f"{file} is locked by another process; it is asked again later")
                    self._patience = min(1.0, _PATIENCE_S / 2)  # whoever holds it so long may never let go
                else:
                    self._give_up(file, error)
                return otherwise

    def _give_up(self, file: File, error: Exception) -> None:
        """Go on in memory after the file failed, with the rows that it still gives."""
        _warn(f"{file} cannot be used ({error}); what this run finds is not kept")
        if self._connection:
            self._connection.close()
        self._connection = self._file = None
        with suppress(sqlite3.Error, LaminaError, OSError), closing(file.reader()) as reader:
            for name, table in self._layout.tables.items():
                there = _read(reader, name, table, _keys(reader, name, table))
                self._memory[name] = there | table.settled(there, self._memory[name])

    def _flush(self, connection: sqlite3.Connection) -> None:
        """Write what a locked file did not take."""
        if any(self._memory.values()):
            with _transaction(connection):
                self._written(connection, self._memory)
            for rows in self._memory.values():
                rows.clear()

    def _written(self, connection: sqlite3.Connection, new: Mapping[str, Rows]) -> dict[str, dict[str, Row]]:
        stand: dict[str, dict[str, Row]] = {}
        for name, rows in new.items():
            table = self._layout.tables[name]
            there = _read(connection, name, table, rows)
            stand[name] = table.settled(there, rows)
            fresh = [(key, *row, time.time()) for key, row in stand[name].items() if row is not there.get(key)]
            marks = ", ".join("?" * (len(table.columns) + 2))
            connection.executemany(f"INSERT OR REPLACE INTO {name} VALUES ({marks})", fresh)
        return stand


def first_bytes(path: Path, number: int) -> bytes:
    """How a file begins.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return file.read(number)


def _read(connection: sqlite3.Connection, name: str, table: Table, keys: Iterable[str]) -> dict[str, Row]:
    query = f"SELECT {', '.join(table.columns)} FROM {name} WHERE {table.key} = ?"
    return {key: row for key in keys if (row := connection.execute(query, (key,)).fetchone())}


def _keys(connection: sqlite3.Connection, name: str, table: Table) -> list[str]:
    return [key for (key,) in connection.execute(f"SELECT {table.key} FROM {name}")]


def _names(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _marks(connection: sqlite3.Connection) -> tuple[int, int]:
    mark, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    return mark, version


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """One that takes the writers' lock at once: who reads first and then writes could find it taken by one who did the same."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _code(error: Exception) -> int | None:
    """SQLite's number of an error, without what it says of the case in particular."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _damaged(error: Exception) -> bool:
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _warn(message: str) -> None:
    warnings.warn(message, TimingWarning, stacklevel=6)
