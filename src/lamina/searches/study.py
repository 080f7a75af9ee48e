"""Study: the book in which workers on many machines write which configuration they score, and what came out.

Scores live in a database, in two small tables of our own:

* *Claims.* A configuration has one key, and the key's row is made by whoever comes first: ``INSERT … ON CONFLICT`` is atomic,
  on one machine as on many. While a worker scores, it counts the row's *beat* up. Whoever waits for the row watches that count
  by a clock of its own: where it stands still for the row's lease, the worker is dead, and the row is taken over. So no two
  machines need agree on the time.
* *Studies.* Whoever comes first writes what the space is, what its forms take and what the score is called, and all others use
  that: each worker finds the next configurations from the same numbers, so nobody has to lead.

Optuna gets a trial for each configuration when a search ends (`trials`).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ..errors import MissingExtra, SearchError
from ..network.running import first_line

_LOG = logging.getLogger("lamina")
_PATIENCE_S = 300.0
"""How long a database may be away before a worker gives up. A finished score waits for as long as it takes."""
_CHUNK = 500
"""Keys in one question to the database."""
_RELEASED = ""
"""The worker of a row that nobody works on: it may be taken at once."""


@final
@dataclass(frozen=True, slots=True)
class Study:
    """Where a search is kept, so that it can be stopped, gone on with, and joined from other machines.

    Args:
        url: ``sqlite:///search.db``, or ``postgresql://user@host/database`` for many machines.
        name: Of the study, where one database holds several.
        lease_s: Seconds after which the configuration of a worker that no longer gives a sign is taken up by another.
        worker: This worker's name; by default host, process and a random number.
        score: What the score is called; by default ``module:function``. A study holds one score and refuses another.
        score_s: Seconds that a score may take at most. One that takes longer counts as a worker that died: another takes it up.
        attempts: How often a configuration is taken up over which workers died, or whose score failed in runs of before.

    Raises:
        SearchError: The lease, the time of a score or the number of attempts is not positive.
    """

    url: str
    name: str = "lamina"
    lease_s: float = 60.0
    worker: str | None = None
    score: str | None = None
    score_s: float | None = None
    attempts: int = 3

    def __post_init__(self) -> None:
        for what, noun, seconds in (("lease_s", "a lease", self.lease_s), ("score_s", "a score", self.score_s)):
            if seconds is not None and not (isinstance(seconds, int | float) and math.isfinite(seconds) and seconds > 0):
                raise SearchError(f"{what} is {seconds!r}; {noun} takes a positive number of seconds")
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise SearchError(f"attempts is {self.attempts!r}; it must be a whole number of 1 or more")


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """What became of one configuration: its score, or why it has none."""

    key: str
    forms: str
    """The configuration, as JSON."""
    score: float | None
    error: str | None
    seconds: float
    worker: str


@final
class Ledger:
    """The claims of one study in one database. Made by `opened`."""

    def __init__(self, engine: Any, study: Study, shared: bool) -> None:
        import sqlalchemy as sql

        self._sql = sql
        self._engine = engine
        self.study = study
        self.shared = shared
        self.worker = study.worker or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._insert = importlib.import_module(f"sqlalchemy.dialects.{engine.dialect.name}").insert
        tables = sql.MetaData()
        self._studies = sql.Table(
            "lamina_studies",
            tables,
            sql.Column("study", sql.String(200), primary_key=True),
            sql.Column("space", sql.String(64), nullable=False),
            sql.Column("weights", sql.String(64), nullable=False),
            sql.Column("times", sql.Text),
            sql.Column("score", sql.Text),  # what it is called
        )
        self._rows = sql.Table(
            "lamina_claims",
            tables,
            sql.Column("study", sql.String(200), primary_key=True),
            sql.Column("key", sql.String(64), primary_key=True),
            sql.Column("forms", sql.Text, nullable=False),
            sql.Column("state", sql.String(10), nullable=False),  # running, done, failed
            sql.Column("worker", sql.String(200), nullable=False),
            sql.Column("attempts", sql.Integer, nullable=False),
            sql.Column("beat", sql.Integer, nullable=False),
            sql.Column("lease_s", sql.Float(53), nullable=False),
            sql.Column("score", sql.Float(53)),
            sql.Column("error", sql.Text),
            sql.Column("seconds", sql.Float(53)),
        )
        for table in tables.sorted_tables:
            self._execute(sql.schema.CreateTable(table, if_not_exists=True), racing=True)
        self._failed_here: set[str] = set()
        """Keys whose score failed in this run: another run, whose score may be mended, tries them again."""
        self._watched: dict[str, tuple[tuple[Any, ...], float]] = {}
        """Rows of others that were seen running: what stood there, and since when by this worker's own clock."""
        self._heart = _Heart(self._beat, study.lease_s / 4)
        inspector = sql.inspect(engine)
        if "score" not in {column["name"] for column in inspector.get_columns("lamina_studies")}:
            self._execute(sql.text("ALTER TABLE lamina_studies ADD COLUMN score TEXT"), racing=True)
        if inspector.has_table("lamina_configurations"):
            self._take_over_old()

    def _take_over_old(self) -> None:
        """Scores that a lamina before beats were counted has written."""
        sql, columns = self._sql, ("study", "key", "forms", "state", "worker", "attempts", "score", "error", "seconds")
        old = sql.table("lamina_configurations", *map(sql.column, columns))
        own = (old.c.study == self.study.name, old.c.state != "running")
        query = sql.select(*(old.c[name] for name in columns), sql.literal(0), sql.literal(self.study.lease_s)).where(*own)
        self._change(self._insert(self._rows).from_select([*columns, "beat", "lease_s"], query).on_conflict_do_nothing())

    def enter(self, space: str, weights: str, score: str = "") -> None:
        """Join the study, or begin it.

        Args:
            space: What tells its space from others.
            weights: What tells the supernet's weights from others.
            score: What its score is called; a study that holds none yet takes this one.

        Raises:
            SearchError: It is the study of another space, of other weights, or holds another score.
        """
        values = {"study": self.study.name, "space": space, "weights": weights, "score": score}
        self._change(self._insert(self._studies).values(values).on_conflict_do_nothing())
        (found,) = self._read(self._sql.select(self._studies).where(self._studies.c.study == self.study.name))
        if found.score is None:  # begun by a lamina that did not write it
            mine = self._studies.c.study == self.study.name
            self._change(self._sql.update(self._studies).where(mine, self._studies.c.score.is_(None)).values(score=score))
            (found,) = self._read(self._sql.select(self._studies).where(mine))
        checks = (
            (found.space, space, "its space is another, layers or forms differ"),
            (found.weights, weights, "its scores are of other weights of this supernet"),
            (found.score, score, f"it holds scores by {found.score}, and this is {score}"),
        )
        for there, here, why in checks:
            if there != here:
                raise SearchError(
                    f"the study {self.study.name!r} in {self.place} cannot be gone on with: {why}; "
                    "choose another name or database"
                )

    def times(self, here: dict[str, Any] | None) -> dict[str, Any] | None:
        """The times that the study goes by: those that were written first; ``here`` if it has none."""
        mine = self._studies.c.study == self.study.name
        if here is not None:
            change = self._sql.update(self._studies).where(mine, self._studies.c.times.is_(None)).values(times=json.dumps(here))
            self._change(change)
        ((found,),) = self._read(self._sql.select(self._studies.c.times).where(mine))
        return None if found is None else json.loads(found)

    def known(self, keys: Sequence[str]) -> dict[str, Entry]:
        """What became of some configurations; those that nobody has finished are left out, and failures to be tried again."""
        found: dict[str, Entry] = {}
        final = self._sql.or_(self._rows.c.state == "done", self._rows.c.attempts >= self.study.attempts)
        for start in range(0, len(keys), _CHUNK):
            asked = list(keys[start : start + _CHUNK])
            condition = self._sql.and_(
                self._rows.c.key.in_(asked), self._sql.or_(final, self._rows.c.key.in_([*self._failed_here & {*asked}]))
            )
            found |= {entry.key: entry for entry in self._entries(condition)}
        return found

    def forgive(self) -> None:
        """Let every failed configuration be tried again, however often it was."""
        c = self._rows.c
        failed = self._sql.update(self._rows).where(c.study == self.study.name, c.state == "failed")
        self._change(failed.values(attempts=0))

    def all(self) -> list[Entry]:
        """Every configuration of the study that was finished, by key."""
        return self._entries(self._sql.true())

    def _entries(self, condition: Any) -> list[Entry]:
        c = self._rows.c
        query = (
            self._sql.select(c.key, c.forms, c.score, c.error, c.seconds, c.worker)
            .where(c.study == self.study.name, c.state != "running", condition)
            .order_by(c.key)
        )
        return [Entry(*row) for row in self._read(query)]

    def claim(self, wanted: Mapping[str, str], most: int) -> list[str]:
        """Take up to ``most`` of some configurations, key → forms as JSON, that nobody has finished or is at work on.

        Those that failed in another run are among them, as long as they have not failed too often. One over which a worker died
        is taken alone: if it kills this worker too, it shall not take innocents with it.
        """
        keys = [key for key in wanted if key not in self._failed_here]
        there: dict[str, Any] = {}
        for start in range(0, len(keys), _CHUNK):
            there |= {row.key: row for row in self._look_at(keys[start : start + _CHUNK])}
        mine: list[str] = []
        for key in keys:
            if len(mine) == most:
                break
            row = there.get(key)
            if row is None:
                if self._begin(key, wanted[key]):
                    mine.append(key)
            elif self._is_free(row) and not (mine and row.attempts) and self._take_over(row):
                if row.attempts >= self.study.attempts:
                    self.finish(key, None, f"{row.attempts} workers died while they scored it, or took too long", 0.0)
                    continue
                mine.append(key)
                if row.attempts:
                    break
        return mine

    def _look_at(self, keys: Sequence[str]) -> list[Any]:
        """The rows of some keys, as `_is_free` and `_take_over` take them."""
        c = self._rows.c
        query = self._sql.select(c.key, c.state, c.worker, c.attempts, c.beat, c.lease_s)
        return self._read(query.where(c.study == self.study.name, c.key.in_(list(keys))))

    def _is_free(self, row: Any) -> bool:
        """Whether nobody works on a row that is there, and it may be tried again."""
        if row.state != "running":
            return bool(row.state == "failed" and row.attempts < self.study.attempts)
        if row.worker == _RELEASED:
            return True
        seen, now = (row.worker, row.attempts, row.beat), time.monotonic()
        before, since = self._watched.get(row.key, (None, now))
        if seen != before:
            self._watched[row.key] = (seen, now)
            return False
        return bool(now - since >= row.lease_s)

    def _begin(self, key: str, forms: str) -> bool:
        own = self._taken | {"study": self.study.name, "key": key, "forms": forms, "attempts": 1, "beat": 0}
        # What is returned says it: of an insert some drivers count no rows.
        return bool(self._read(self._insert(self._rows).values(own).on_conflict_do_nothing().returning(self._rows.c.key)))

    def _take_over(self, row: Any) -> bool:
        """Take a row over, unless another does at this moment: it is then no longer what was seen."""
        c = self._rows.c
        names = ("key", "state", "worker", "attempts", "beat")
        same = [c.study == self.study.name, *(c[name] == getattr(row, name) for name in names)]
        values = self._taken | {"attempts": c.attempts + 1, "beat": c.beat + 1}
        return self._change(self._sql.update(self._rows).where(*same).values(values)) == 1

    @property
    def _taken(self) -> dict[str, Any]:
        return {"state": "running", "worker": self.worker, "lease_s": self.study.lease_s}

    def attempts(self) -> dict[str, int]:
        """How many workers took up each configuration, by key: 1 unless one of them died."""
        c = self._rows.c
        query = self._sql.select(c.key, c.attempts).where(c.study == self.study.name, c.key.not_like("(%"))
        return {key: n for key, n in self._read(query)}

    @contextlib.contextmanager
    def renewing(self, keys: Sequence[str]) -> Iterator[None]:
        """Count the beat of some claims up as long as the work lasts, and no longer than a score may take."""
        if not self.shared:
            yield
            return
        most = math.inf if self.study.score_s is None else time.monotonic() + len(keys) * self.study.score_s
        with self._heart.beating(keys, most):
            yield

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Do something that only one worker may do at a time; whoever comes second waits. The row of it is never finished."""
        key = f"({what})"
        while not self._begin(key, "{}") and not any(
            self._is_free(row) and self._take_over(row) for row in self._look_at([key])
        ):
            time.sleep(0.05)
        try:
            with self.renewing([key]):
                yield
        finally:
            self.release([key])

    def _beat(self, keys: Sequence[str]) -> None:
        with contextlib.suppress(SearchError):  # the work goes on; if the row is lost, `finish` sees it
            self._change(self._mine(keys).values(beat=self._rows.c.beat + 1))

    def release(self, keys: Sequence[str]) -> None:
        """Give claims back that were not finished: whoever comes next takes them."""
        with contextlib.suppress(SearchError):
            self._change(self._mine(keys).values(worker=_RELEASED, attempts=self._rows.c.attempts - 1))

    def finish(self, key: str, score: float | None, error: str | None, seconds: float) -> bool:
        """Write what became of a claim; False where another worker had taken it over meanwhile, whose score then counts.

        A score may have taken hours: it waits for a database that is away for as long as that takes.
        """
        if score is None:
            self._failed_here.add(key)
        values = {"state": "failed" if score is None else "done", "score": score, "error": error, "seconds": seconds}
        return self._change(self._mine([key]).values(values), patience_s=math.inf) == 1

    def _mine(self, keys: Sequence[str]) -> Any:
        c = self._rows.c
        return self._sql.update(self._rows).where(
            c.study == self.study.name, c.key.in_(list(keys)), c.worker == self.worker, c.state == "running"
        )

    @property
    def place(self) -> str:
        """The database, without a password."""
        return self._engine.url.render_as_string(hide_password=True) if self.shared else "memory"

    def _read(self, query: Any) -> list[Any]:
        """The rows that a statement returns."""
        return self._execute(query)[0]

    def _change(self, statement: Any, patience_s: float | None = None) -> int:
        """How many rows a statement changed."""
        return self._execute(statement, patience_s=patience_s)[1]

    def _execute(self, statement: Any, *, racing: bool = False, patience_s: float | None = None) -> tuple[list[Any], int]:
        """One statement in one transaction; tried again where the database is busy or away.

        ``racing``: a complaint of the database may be due to another worker that did the same at the same moment.
        """
        began, pause = time.monotonic(), 0.1
        patience_s = _PATIENCE_S if patience_s is None else patience_s
        for attempt in range(1 << 30):
            try:
                with self._engine.begin() as connection:
                    result = connection.execute(statement)
                    return list(result) if result.returns_rows else [], result.rowcount
            except self._sql.exc.DBAPIError as error:
                why = first_line(error.orig or error)
                passing = self._is_passing(error) or (racing and attempt < 6)
                if not (self.shared and passing) or time.monotonic() - began > patience_s:
                    raise SearchError(f"the study in {self.place} cannot be used: {why}") from error
                if attempt == 5:
                    _LOG.warning("the study in %s is away, it is tried again: %s", self.place, why)
                time.sleep(pause)
                pause = min(2 * pause, 5.0)
        raise AssertionError("it returns or raises")

    def _is_passing(self, error: Any) -> bool:
        """Whether a database is only busy, or its server away; SQLite says so of much else that will not pass."""
        if self._engine.dialect.name == "sqlite":
            return any(word in str(error.orig) for word in ("locked", "busy"))
        return isinstance(error, self._sql.exc.OperationalError) or bool(error.connection_invalidated)

    def close(self) -> None:
        """End the heart beat, and close the connections."""
        self._heart.close()
        self._engine.dispose()


@final
class _Heart:
    """The one thread of a ledger that counts up the beats of what is worked on."""

    def __init__(self, beat: Any, every_s: float) -> None:
        self._beat, self._every_s = beat, every_s
        self._until: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def beating(self, keys: Sequence[str], until: float) -> Iterator[None]:
        """Beat for some keys, until a time of the monotonic clock at most."""
        self._until |= dict.fromkeys(keys, until)
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="lamina-heart", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError as error:  # the machine has no thread to give: others may score the same once more
                _LOG.warning("the study gets no sign of life from this worker: %s", error)
        try:
            yield
        finally:
            for key in keys:
                self._until.pop(key, None)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            now = time.monotonic()
            if keys := [key for key, until in list(self._until.items()) if now < until]:
                self._beat(keys)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


@contextlib.contextmanager
def opened(study: Study | None) -> Iterator[Ledger]:
    """The ledger of a study; without one, in memory.

    Raises:
        SearchError: The database cannot be reached, or is of an unknown kind; its password is not part of the message.
        MissingExtra: Optuna, which brings SQLAlchemy, or the database's driver is not installed.
    """
    try:
        import sqlalchemy as sql
    except ImportError as error:
        raise MissingExtra("optuna", "search", "a search") from error
    if study is None:
        # One connection for all: a database in memory is gone with its connection.
        engine = sql.create_engine("sqlite://", poolclass=sql.pool.StaticPool, connect_args={"check_same_thread": False})
        yield from _closing(Ledger(engine, Study("sqlite://"), shared=False))
        return
    try:
        url = sql.engine.make_url(study.url)
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise SearchError(f"a study lives in SQLite or PostgreSQL, not in {url.get_backend_name()}")
        if url.get_backend_name() == "sqlite" and not url.database:
            raise SearchError(f"{study.url!r} names no file: write sqlite:///search.db")
        options = {"timeout": 60} if url.get_backend_name() == "sqlite" else {"connect_timeout": 10}
        engine = sql.create_engine(url, pool_pre_ping=True, connect_args=options)
    except sql.exc.ArgumentError as error:
        raise SearchError(
            f"{study.url!r} is no database: write sqlite:///search.db or postgresql://user@host/database"
        ) from error
    except ImportError as error:
        raise MissingExtra("psycopg", "search", "a study in PostgreSQL") from error
    place = url.render_as_string(hide_password=True)
    try:
        with engine.connect():
            pass
    except sql.exc.DBAPIError as error:
        engine.dispose()
        raise SearchError(f"the study in {place} cannot be reached: {first_line(error.orig or error)}") from error
    yield from _closing(Ledger(engine, study, shared=True))


def _closing(ledger: Ledger) -> Iterator[Ledger]:
    try:
        yield ledger
    finally:
        ledger.close()
