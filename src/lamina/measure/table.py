"""Keeps layer times in SQLite, one row a signature, so that nothing is measured twice under the same conditions.

The key holds everything that decides a time: geometry, form, input shape, layout and `Setting`. A time taken under other
conditions is another row. Of a form the ratio to the dense layer beside which it was timed is kept, and the dense layer's
seconds stand apart, written once: so times that several processes took, in quick moments and in slow ones, never mix. Each row
bears the `Probe` of its batch, and answers only while the machine is about as fast as then.

Several processes and threads may use one file at once. A file in lamina's own place that cannot be read or written never stops
the work: this is said, and times are kept in memory. A file that somebody names is looked at first: what lamina did not make is
refused and stays as it is, and only what lamina made is set aside where it is damaged.

Times travel: `TimingTable.export` writes those of one run as JSON, `TimingTable.imported` reads them on another machine, where
they answer in that machine's name or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, final
from urllib.parse import quote

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ..errors import LaminaError
from ..files import read_model, write_whole
from ..forms import Form
from ..values import Geometry, Probe, Setting, Timing, Use

_VERSION = 2
_APPLICATION = 0x6C616D69  # "lami", the mark of a file that lamina made for itself
_COLUMNS = "signature, value, mad, repeats, product_s, convolution_s, taken"
Table: TypeAlias = Literal["anchors", "ratios"]
_TABLES: tuple[Table, ...] = ("anchors", "ratios")
_OLD_COLUMNS = ["signature", "median_s", "mad_s", "repeats", "taken"]  # of version 1, which bore no mark
_PATIENCE_S = 60.0  # writes are short, so a lock is seldom held so long
_MAGIC = b"SQLite format 3\0"

EXPORT_FORMAT = 2

Result = TypeVar("Result")


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
    # Where it is not named, it is the weight's.
    content |= {"input_dtype": use.input_dtype} if use.input_dtype else {}
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


class _Row(NamedTuple):
    """A dense layer's seconds, or a form's ratio to them, with the spread and the probe of the batch."""

    value: float
    mad: float
    repeats: int
    product_s: float
    convolution_s: float

    @property
    def probe(self) -> Probe:
        return Probe(self.product_s, self.convolution_s)

    @classmethod
    def of(cls, timing: Timing, unit: float, probe: Probe) -> _Row:
        return cls(timing.median_s / unit, timing.mad_s / unit, timing.repeats, probe.product_s, probe.convolution_s)

    def timing(self, unit: float, setting: Setting) -> Timing:
        return Timing(self.value * unit, self.mad * unit, self.repeats, setting)


def _current(number: int) -> int:
    if number < EXPORT_FORMAT:
        raise PydanticCustomError("older", "of an older lamina, whose times cannot be used: take them anew with lamina measure")
    return number


class _Exported(BaseModel):
    model_config = ConfigDict(extra="forbid")

    value: float = Field(gt=0, allow_inf_nan=False)
    mad: float = Field(ge=0, allow_inf_nan=False)
    repeats: int = Field(ge=1)
    product_s: float = Field(gt=0, allow_inf_nan=False)
    convolution_s: float = Field(gt=0, allow_inf_nan=False)


class _Export(BaseModel):
    """What an exported file holds: the machine, seconds of dense layers and ratios of forms, by signature."""

    model_config = ConfigDict(extra="forbid")

    format: Annotated[int, AfterValidator(_current)] = EXPORT_FORMAT
    setting: Setting
    dense: dict[str, _Exported]
    timings: dict[str, _Exported]


@final
class TimingTable:
    """Times by signature. Use as a context manager, or call `close`.

    Args:
        path: The SQLite file; made with its folder where missing. None keeps everything in memory.

    Attributes:
        target: The setting of the machine whose times these are; None for this one.
        probes: How fast the machine last was, by the conditions; kept here for whoever measures.
        pool: What is timed lies in it; likewise.

    Raises:
        LaminaError: The file is none that lamina made, or a newer lamina did. In lamina's own place this is a warning.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.target: Setting | None = None
        self.probes: dict[tuple[Any, ...], Probe] = {}
        self.pool: object = None
        self._asked: dict[str, None] = {}
        self._lock = threading.RLock()
        self._memory: dict[str, dict[str, _Row]] = {table: {} for table in _TABLES}  # what the file does not hold (yet)
        self._patience = _PATIENCE_S
        self._in_file = path is not None
        self._connection: sqlite3.Connection | None = None
        self._on_file(lambda connection: None, None)

    @classmethod
    def imported(cls, path: str | os.PathLike[str]) -> TimingTable:
        """A table in memory of the times that `export` wrote.

        On the machine that took them, under the same conditions, it is a table like any other. Elsewhere it gives the times
        that it has in that machine's name, and a time that it lacks is an error, as it cannot be taken here.

        Raises:
            LaminaError: No such file, cut short, of another format, or with a value that makes no sense; the message names it.
        """
        content = _read_export(Path(path))
        table = cls(None)
        table.path, table.target = Path(path), content.setting
        for name, rows in zip(_TABLES, (content.dense, content.timings), strict=True):
            table._memory[name] = {key: _Row(**row.model_dump()) for key, row in rows.items()}
        return table

    def export(self, path: str | os.PathLike[str], setting: Setting) -> int:
        """Write the times that were asked for since the table was opened as JSON; the file is there whole or not at all.

        Args:
            path: The file.
            setting: One that times were taken under. Times of other dtypes, memory formats and modes are written too, those of
                another device, number of threads or version are not.

        Returns:
            The number of times written.

        Raises:
            LaminaError: The table cannot be read, or the file cannot be written.
        """
        asked = [key for key in self._asked if (taken := setting_in(key)) and on_machine_of(setting, taken) == taken]
        anchors, ratios = (self._rows(table, asked) for table in _TABLES)
        dense, timings = (
            {key: _Exported.model_construct(**rows[key]._asdict()) for key in sorted(rows)} for rows in (anchors, ratios)
        )
        content = _Export(setting=setting, dense=dense, timings=timings)
        try:
            write_whole(Path(path), (content.model_dump_json(indent=1) + "\n").encode())
        except OSError as error:
            raise LaminaError(f"{path} cannot be written: {error.strerror}") from error
        return len(dense) + len(timings)

    def conditions(self, setting: Setting) -> Setting:
        """The conditions under which this table's times were taken, for a network that would run here in a setting."""
        return setting if self.target is None else on_machine_of(self.target, setting)

    def __enter__(self) -> TimingTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what could not be written to it so far is written now, or its loss is said."""
        with self._lock:
            waiting = sum(map(len, self._memory.values()))
            if self._in_file and waiting and not self._on_file(lambda connection: True, False):
                warnings.warn(
                    f"the timing table {self.path} stayed locked; {waiting} times of this run are not kept", stacklevel=2
                )
            if self._connection:
                self._connection.close()
            self._connection, self._in_file, self.pool = None, False, None

    def __len__(self) -> int:
        """The number of times kept."""

        def count(connection: sqlite3.Connection) -> int:
            total = 0
            for table, rows in self._memory.items():
                total += len(rows.keys() | {key for (key,) in connection.execute(f"SELECT signature FROM {table}")})
            return total

        return self._on_file(count, sum(map(len, self._memory.values())))

    def get(self, anchor: str, signatures: Iterable[str], setting: Setting, probe: Probe) -> dict[str, Timing]:
        """The times that are known among some signatures of one layer.

        Args:
            anchor: The signature of the dense layer, which the others' ratios are of.
            signatures: As `signature` makes them here; the anchor may be among them.
            setting: The conditions here, which the times are to bear.
            probe: How fast the machine is now. What was taken while it was clearly faster or slower does not answer.

        Raises:
            LaminaError: The times were taken on another machine, and one of those asked for was not.
        """
        there = self.conditions(setting)
        foreign = there != setting
        kept = {
            key: _retaken(key, self.target) if foreign and self.target else key for key in dict.fromkeys([anchor, *signatures])
        }
        self._asked |= dict.fromkeys(kept)
        anchors = self._rows("anchors", [kept[anchor]])
        dense = anchors.get(kept[anchor])
        rows = self._rows("ratios", [name for key, name in kept.items() if key != anchor]) if dense else {}
        known: dict[str, Timing] = {}
        for key in signatures:
            row = dense if key == anchor else rows.get(kept[key])
            if dense and row and row.value > 0 and (foreign or (row.probe.agrees(probe) and dense.probe.agrees(probe))):
                known[key] = row.timing(1.0 if key == anchor else dense.value, there)
            elif foreign:
                raise LaminaError(f"{self.path} has no time of {_described(kept[key])}: take it there with lamina measure")
        return known

    def put(self, anchor: str, batch: Mapping[str, Timing], probe: Probe) -> dict[str, Timing]:
        """Keep the times of one batch, all of them or none.

        Args:
            anchor: The signature of the dense layer, whose time is part of the batch.
            batch: Times by signature.
            probe: How fast the machine was beside them.

        Returns:
            The batch as the table now tells it: by the dense time that was there first, whoever took it.
        """
        unit = batch[anchor].median_s
        if not unit > 0:
            return dict(batch)  # a clock that stood still tells no ratio
        dense = _Row.of(batch[anchor], 1.0, probe)
        ratios = {key: _Row.of(each, unit, probe) for key, each in batch.items() if key != anchor}
        self._asked |= dict.fromkeys(batch)

        def write(connection: sqlite3.Connection) -> _Row:
            with _transaction(connection):
                return _put(connection, anchor, dense, ratios)

        with self._lock:
            first = self._on_file(write, None)
            if first is None:
                before = self._memory["anchors"].get(anchor)
                first = before if before and before.probe.agrees(probe) else dense
                self._memory["anchors"][anchor] = first
                self._memory["ratios"] |= ratios
        setting = batch[anchor].setting
        return {
            key: first.timing(1.0, setting) if key == anchor else ratios[key].timing(first.value, each.setting)
            for key, each in batch.items()
        }

    def _rows(self, table: Table, keys: Iterable[str]) -> dict[str, _Row]:
        keys = list(keys)

        def read(connection: sqlite3.Connection) -> dict[str, _Row]:
            return {key: row for key in keys if (row := _row(connection, table, key))}

        with self._lock:
            found: dict[str, _Row] = self._on_file(read, {})
            return found | {key: row for key in keys if (row := self._memory[table].get(key))}

    def _on_file(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        """What comes of some work on the file; where it cannot be done now, or there is no file, something else.

        A locked file is asked again next time. Any other failure ends its use: the times that it still gives go into memory.
        """
        with self._lock:
            if not self._in_file or self.path is None:
                return otherwise
            try:
                if self._connection is None:
                    self._connection = _made(self.path, self._patience)
                    if self._connection is None:
                        self._in_file = False
                        return otherwise
                self._connection.execute(f"PRAGMA busy_timeout = {round(self._patience * 1000)}")
                self._flush(self._connection)
                result = work(self._connection)
                self._patience = _PATIENCE_S
                return result
            except (sqlite3.Error, OSError) as error:
                if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    if self._patience == _PATIENCE_S:
                        _warn(f"the timing table {self.path} is locked by another process; it is asked again later")
                    self._patience = min(1.0, _PATIENCE_S / 2)  # whoever holds it so long may never let go
                else:
                    self._give_up(self.path, error)
                return otherwise

    def _give_up(self, path: Path, error: Exception) -> None:
        """Go on in memory after the file failed, with the times that it still gives."""
        _warn(f"the timing table {path} cannot be used ({error}); times of this run are not kept")
        if self._connection:
            self._connection.close()
        self._connection, self._in_file = None, False
        with suppress(sqlite3.Error, LaminaError, OSError), closing(_reader(path)) as reader:
            for table in _TABLES:
                rows = reader.execute(f"SELECT {_COLUMNS} FROM {table}").fetchall()
                self._memory[table] = {key: _Row(*row) for key, *row, _ in rows} | self._memory[table]

    def _flush(self, connection: sqlite3.Connection) -> None:
        """Write what a locked file did not take."""
        if any(self._memory.values()):
            with _transaction(connection):
                for key, row in self._memory["anchors"].items():
                    _put(connection, key, row, {})
                _insert(connection, "ratios", self._memory["ratios"])
            for rows in self._memory.values():
                rows.clear()


def kept(path: Path) -> tuple[int, Counter[Setting]]:
    """How many times a file holds, and how many of them were taken under each setting; the file is only read.

    Raises:
        LaminaError: It cannot be read, or is none of lamina's.
    """
    if _is_new(path):
        return 0, Counter()
    try:
        with closing(_reader(path)) as connection:
            keys = [key for table in _TABLES for (key,) in connection.execute(f"SELECT signature FROM {table}")]
    except (sqlite3.Error, OSError) as error:
        raise LaminaError(f"the timing table {path} cannot be read ({error})") from error
    return len(keys), Counter(setting for key in keys if (setting := setting_in(key)))


def forget(path: Path) -> int:
    """Forget every time in a file, which shrinks; returns how many there were.

    Raises:
        LaminaError: The file cannot be written, or is none of lamina's; nothing is forgotten then.
    """
    if _is_new(path):
        return 0
    try:
        _look(path)
        with closing(_connect(path, _PATIENCE_S)) as connection:
            with _transaction(connection):
                number = sum(connection.execute(f"DELETE FROM {table}").rowcount for table in _TABLES)
            with suppress(sqlite3.OperationalError):  # while another process reads the file, it keeps its size
                connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except (sqlite3.Error, OSError) as error:
        raise LaminaError(f"the timing table {path} cannot be cleared: {error}") from error
    return number


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
    dtype = f" in {content['input_dtype']}" if "input_dtype" in content else ""
    return f"{Geometry(**fields)} as {form} on {shape}{dtype} ({Setting(**content['setting'])})"


def _read_export(path: Path) -> _Export:
    with suppress(OSError):
        if _first_bytes(path) == _MAGIC:
            raise LaminaError(f"{path} is a table, no file of timings: lamina measure writes one, for --timings")
    return read_model(
        path,
        _Export,
        EXPORT_FORMAT,
        LaminaError,
        unreadable=f"{path}: no readable file of timings",
        foreign=f"{path}: no file of timings: lamina measure writes one",
        needs="timings",
    )


def _row(connection: sqlite3.Connection, table: Table, key: str) -> _Row | None:
    found = connection.execute(f"SELECT {_COLUMNS} FROM {table} WHERE signature = ?", (key,)).fetchone()
    return _Row(*found[1:-1]) if found else None


def _put(connection: sqlite3.Connection, anchor: str, dense: _Row, ratios: Mapping[str, _Row]) -> _Row:
    """Write a batch; a dense time that is there stays, unless the machine was then clearly faster or slower."""
    first = _row(connection, "anchors", anchor)
    if first is None or not first.probe.agrees(dense.probe):
        connection.execute(
            f"INSERT OR REPLACE INTO anchors ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", (anchor, *dense, time.time())
        )
        first = dense
    _insert(connection, "ratios", ratios)
    return first


def _insert(connection: sqlite3.Connection, table: Table, rows: Mapping[str, _Row]) -> None:
    values = [(key, *row, time.time()) for key, row in rows.items()]
    connection.executemany(f"INSERT OR REPLACE INTO {table} ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)


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


def _made(path: Path, patience: float) -> sqlite3.Connection | None:
    """A connection to a table, made where missing, and begun anew where lamina's own is damaged; None where it is left alone.

    Raises:
        LaminaError: Somebody named the file, and lamina did not make it, or a newer one did.
    """
    own = path == default_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            if not own:
                _look(path)
            return _connect(path, patience)
        except sqlite3.DatabaseError as error:
            if not _damaged(error):
                raise
            if not (own or _marked(path)):
                raise LaminaError(f"{path} is a damaged database, and none that lamina made: name another file") from error
            return _begun_anew(path, patience, error)
    except LaminaError as error:
        if not own:
            raise
        _warn(f"the timing table cannot be used ({error}); times of this run are not kept")
        return None


def _begun_anew(path: Path, patience: float, error: Exception) -> sqlite3.Connection:
    """Set a damaged table aside and begin a new one.

    One process at a time, which looks again: another may have begun the new one meanwhile, and that must stay.
    """
    try:
        with FileLock(f"{path}.lock", timeout=_PATIENCE_S):
            try:
                return _connect(path, patience)
            except sqlite3.DatabaseError as again:
                if not _damaged(again):
                    raise
            aside = path.with_name(f"{path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
            for end in ("-wal", "-shm", ""):  # its log first: a new table must not find it
                with suppress(FileNotFoundError):
                    os.rename(f"{path}{end}", f"{aside}{end}")
            _warn(f"the timing table {path} is damaged ({error}); set aside as {aside.name}, a new one begun")
            return _connect(path, patience)
    except Timeout as late:
        raise OSError(f"{error}; {path}.lock is held by another process") from late


def _connect(path: Path, patience: float) -> sqlite3.Connection:
    # Autocommit: transactions are begun by hand. Threads take turns by the table's own lock.
    connection = sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)
    try:
        if not _ours(connection, path):
            with _transaction(connection):
                if not _ours(connection, path):  # another process may have made it while we waited
                    _upgrade(connection, path)
        with suppress(sqlite3.OperationalError):  # while others have it open; the next one to open it will
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        for table in _TABLES:  # a damaged page shows only when it is read
            connection.execute(f"SELECT sum(repeats) FROM {table}").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether lamina made the database, in this version."""
    (mark,), (version,) = (connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
    if mark == _APPLICATION and version > _VERSION:
        raise LaminaError(f"{path} was made by a newer lamina (version {version}, this one reads {_VERSION}): upgrade lamina")
    return bool(mark == _APPLICATION and version == _VERSION)


def _upgrade(connection: sqlite3.Connection, path: Path) -> None:
    """Make an empty file, or one of an older version, whose times cannot answer, a table of this version."""
    (mark,) = connection.execute("PRAGMA application_id").fetchone()
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = [row[1] for row in connection.execute("PRAGMA table_info(timings)")]
    older = mark == 0 and tables == ["timings"] and columns == _OLD_COLUMNS
    if not (older or _is_new(path)):
        raise LaminaError(f"{path} is a database, and none that lamina made: name another file")
    connection.execute("DROP TABLE IF EXISTS timings")
    _create(connection)


def _create(connection: sqlite3.Connection) -> None:
    columns = _COLUMNS.replace("signature", "signature TEXT PRIMARY KEY")
    for table in _TABLES:
        connection.execute(f"CREATE TABLE {table} ({columns}) WITHOUT ROWID")
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
    connection.execute(f"PRAGMA user_version = {_VERSION}")


def _reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads.

    Raises:
        LaminaError: The file is none that lamina made.
    """
    _look(path)
    name = f"file:{quote(os.fspath(path.absolute()))}?mode=ro"
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
        if not _ours(connection, path):
            older = sqlite3.connect(":memory:")  # its times cannot answer, but only where it is lamina's it is as good as empty
            connection.backup(older)
            connection.close()
            connection = older
            _upgrade(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _look(path: Path) -> None:
    """Refuse a file that is no database, before SQLite writes to it.

    Raises:
        LaminaError: It is something else.
    """
    if _is_new(path) or path.is_dir():
        return  # of a folder SQLite says that it cannot be opened
    if not path.is_file() or _first_bytes(path) != _MAGIC:
        if path == default_path():
            raise LaminaError(f"the timing table {path} is damaged: the next plan sets it aside and begins a new one")
        raise LaminaError(f"{path} is no table of times: name one that lamina made, a new file, or one of lamina measure")


def _is_new(path: Path) -> bool:
    """Whether there is nothing yet; an empty file is what a process leaves that was killed as it began one."""
    return not path.exists() or (path.is_file() and path.stat().st_size == 0)


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_MAGIC))


def _marked(path: Path) -> bool:
    """Whether a file that SQLite cannot read bears lamina's mark."""
    with path.open("rb") as file:
        head = file.read(72)
    return head.startswith(_MAGIC) and head[68:] == _APPLICATION.to_bytes(4, "big")


def _code(error: Exception) -> int | None:
    """SQLite's number of an error, without what it says of the case in particular."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _damaged(error: Exception) -> bool:
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)


@contextmanager
def opened(timings: TimingTable | str | os.PathLike[str] | None) -> Iterator[TimingTable]:
    """A table as users name it: itself, a file of `TimingTable.export`, a table's file, or None for the default one.

    What a file is, is told by what stands in it. A file that is not there becomes a table.

    Raises:
        LaminaError: The file is something else; it is left as it was.
    """
    if isinstance(timings, TimingTable):
        yield timings
        return
    with TimingTable(default_path()) if timings is None else _named(Path(timings)) as table:
        yield table


def _named(path: Path) -> TimingTable:
    try:
        export = path.is_file() and _first_bytes(path).lstrip().startswith(b"{")
    except OSError as error:
        raise LaminaError(f"{path} cannot be read: {error.strerror}") from error
    if export:
        return TimingTable.imported(path)
    if path.suffix == ".json" and not path.exists():
        raise LaminaError(f"{path}: no such file; lamina measure writes one, and a new table has a name without .json")
    return TimingTable(path)
