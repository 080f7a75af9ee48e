"""Study: the book in which workers on many machines write which configuration they score, and what came out.

Scores live in a database: Optuna's trials, one for each configuration that was scored, and beside them two small tables of our
own, because what is asked of them cannot be done with trials alone:

* *Claims.* A configuration has one key, and the key's row is made by whoever comes first: ``INSERT … ON CONFLICT`` is atomic,
  on one machine as on many. The row is *leased*: its worker renews it while it scores. The lease of a worker that died runs
  out, and another takes the row over. (Optuna's own heartbeat acts only inside ``Study.optimize``.)
* *Space and times.* Whoever comes first writes what the space is and what its forms take, and all others use that: each worker
  finds the next configurations from the same numbers, so nobody has to lead.

The clock of leases is the database's, so that machines need not agree on the time.
"""

from __future__ import annotations

import contextlib
import importlib
import json
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

_ATTEMPTS = 3
"""Workers that may die over one configuration before it counts as failed."""

_TRIES = 6
_CHUNK = 500
"""Keys in one question to the database."""


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

    Raises:
        SearchError: The lease, or the time of a score, is no positive number.
    """

    url: str
    name: str = "lamina"
    lease_s: float = 60.0
    worker: str | None = None
    score: str | None = None
    score_s: float | None = None

    def __post_init__(self) -> None:
        for what, noun, seconds in (("lease_s", "a lease", self.lease_s), ("score_s", "a score", self.score_s)):
            if seconds is not None and not (isinstance(seconds, int | float) and math.isfinite(seconds) and seconds > 0):
                raise SearchError(f"{what} is {seconds!r}; {noun} takes a positive number of seconds")


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
        dialect = engine.dialect.name
        clock = {
            "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
            "postgresql": "extract(epoch from clock_timestamp())",
        }[dialect]
        self._now = sql.literal_column(clock, sql.Float)
        self._insert = importlib.import_module(f"sqlalchemy.dialects.{dialect}").insert
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
            "lamina_configurations",
            tables,
            sql.Column("study", sql.String(200), primary_key=True),
            sql.Column("key", sql.String(64), primary_key=True),
            sql.Column("forms", sql.Text, nullable=False),
            sql.Column("state", sql.String(10), nullable=False),  # running, done, failed
            sql.Column("worker", sql.String(200), nullable=False),
            sql.Column("attempts", sql.Integer, nullable=False),
            sql.Column("lease_until", sql.Float(53), nullable=False),
            sql.Column("score", sql.Float(53)),
            sql.Column("error", sql.Text),
            sql.Column("seconds", sql.Float(53)),
            sql.Column("recorded", sql.Integer, nullable=False),  # whether Optuna has its trial
        )
        for table in tables.sorted_tables:
            self._execute(sql.schema.CreateTable(table, if_not_exists=True), racing=True)
        self._failed_here: set[str] = set()
        """Keys whose score failed in this run: another run, whose score may be mended, tries them again."""
        if "score" not in {column["name"] for column in sql.inspect(engine).get_columns("lamina_studies")}:
            self._execute(sql.text("ALTER TABLE lamina_studies ADD COLUMN score TEXT"), racing=True)

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
        final = self._sql.or_(self._rows.c.state == "done", self._rows.c.attempts >= _ATTEMPTS)
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

        Those that failed in another run are among them, as long as they have not failed too often.
        """
        c = self._rows.c
        keys = [key for key in wanted if key not in self._failed_here]
        again = self._sql.and_(c.state == "failed", c.attempts < _ATTEMPTS)
        taken: set[str] = set()
        for start in range(0, len(keys), _CHUNK):
            query = self._sql.select(c.key).where(
                c.study == self.study.name,
                c.key.in_(keys[start : start + _CHUNK]),
                self._sql.or_(c.state == "done", c.lease_until >= self._now, c.state == "failed"),
                self._sql.not_(again),
            )
            taken |= {key for (key,) in self._read(query)}
        mine: list[str] = []
        for key in keys:
            if len(mine) == most:
                break
            if key not in taken and self._claim_one(key, wanted[key]):
                mine.append(key)
        return mine

    def _claim_one(self, key: str, forms: str) -> bool:
        c = self._rows.c
        until = self._now + self.study.lease_s
        fresh = self._insert(self._rows).values(
            study=self.study.name,
            key=key,
            forms=forms,
            state="running",
            worker=self.worker,
            attempts=1,
            lease_until=until,
            recorded=0,
        )
        lost = self._sql.and_(c.state == "running", c.lease_until < self._now)
        again = self._sql.and_(c.state == "failed", c.attempts < _ATTEMPTS)
        change = fresh.on_conflict_do_update(
            index_elements=["study", "key"],
            set_={"state": "running", "worker": self.worker, "attempts": c.attempts + 1, "lease_until": until, "recorded": 0},
            where=self._sql.or_(lost, again),
        )
        taken = self._read(change.returning(c.attempts))
        if not taken:
            return False
        if taken[0].attempts > _ATTEMPTS:
            self.finish(key, None, f"{_ATTEMPTS} workers died while they scored it, or took too long", 0.0)
            return False
        return True

    def attempts(self) -> dict[str, int]:
        """How many workers took up each configuration, by key: 1 unless one of them died."""
        c = self._rows.c
        query = self._sql.select(c.key, c.attempts).where(c.study == self.study.name)
        return {key: n for key, n in self._read(query)}

    @contextlib.contextmanager
    def renewing(self, keys: Sequence[str]) -> Iterator[None]:
        """Renew the lease of some claims as long as the work lasts."""
        if not self.shared:
            yield
            return
        stop = threading.Event()
        most = math.inf if self.study.score_s is None else time.monotonic() + len(keys) * self.study.score_s

        def renew() -> None:
            while not stop.wait(self.study.lease_s / 4) and time.monotonic() < most:
                with contextlib.suppress(SearchError):  # the work goes on; if the row is lost, `finish` sees it
                    self._change(self._mine(keys).values(lease_until=self._now + self.study.lease_s))

        thread = threading.Thread(target=renew, name="lamina-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def release(self, keys: Sequence[str]) -> None:
        """Give claims back that were not finished: whoever comes next takes them."""
        with contextlib.suppress(SearchError):
            self._change(self._mine(keys).values(lease_until=0.0, attempts=self._rows.c.attempts - 1))

    def finish(self, key: str, score: float | None, error: str | None, seconds: float) -> bool:
        """Write what became of a claim; False where another worker had taken it over meanwhile, whose score then counts."""
        if score is None:
            self._failed_here.add(key)
        values = {
            "state": "failed" if score is None else "done",
            "score": score,
            "error": error,
            "seconds": seconds,
            "lease_until": self._now + self.study.lease_s,
        }
        return self._change(self._mine([key]).values(values)) == 1

    def record(self, key: str) -> None:
        """Note that Optuna has the trial of a configuration."""
        c = self._rows.c
        change = self._sql.update(self._rows).where(c.study == self.study.name, c.key == key).values(recorded=1)
        self._change(change)

    def unrecorded(self) -> list[Entry]:
        """Finished configurations whose worker died before it told Optuna; each is given to one caller only."""
        c = self._rows.c
        late = self._sql.and_(c.recorded == 0, c.lease_until < self._now)
        mine = []
        for entry in self._entries(late):
            change = self._sql.update(self._rows).where(c.study == self.study.name, c.key == entry.key, c.recorded == 0)
            if self._change(change.values(recorded=1)) == 1:
                mine.append(entry)
        return mine

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

    def _change(self, statement: Any) -> int:
        """How many rows a statement changed."""
        return self._execute(statement)[1]

    def _execute(self, statement: Any, *, racing: bool = False) -> tuple[list[Any], int]:
        """One statement in one transaction; tried again where the database was busy or away for a moment.

        ``racing``: any complaint of the database may be due to another worker that did the same at the same moment.
        """
        for attempt in range(_TRIES):
            try:
                with self._engine.begin() as connection:
                    result = connection.execute(statement)
                    return list(result) if result.returns_rows else [], result.rowcount
            except self._sql.exc.DBAPIError as error:
                passing = isinstance(error, self._sql.exc.OperationalError) or racing
                if not passing or attempt == _TRIES - 1 or not self.shared:
                    raise SearchError(f"the study in {self.place} cannot be used: {first_line(error.orig or error)}") from error
                time.sleep(0.1 * 2**attempt)
        raise AssertionError("the last try either returns or raises")

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()


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


@contextlib.contextmanager
def optuna_study(ledger: Ledger, *, sampler: Any = None, front: bool = False) -> Iterator[Any]:
    """The Optuna study beside a ledger, in the same database.

    Args:
        ledger: The ledger.
        sampler: Who draws trials, where trials are asked for.
        front: Two objectives, score and cost, instead of the score alone; it is then a study of its own.

    Raises:
        SearchError: The database refuses.
    """
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield _optuna_study(optuna, ledger, sampler, front)
    except (optuna.exceptions.StorageInternalError, ledger._sql.exc.DBAPIError) as error:
        raise SearchError(f"the study in {ledger.place} cannot be used: {first_line(error)}") from error
    finally:
        optuna.logging.set_verbosity(before)


def _optuna_study(optuna: Any, ledger: Ledger, sampler: Any, front: bool) -> Any:
    name = f"{ledger.study.name} (front)" if front else ledger.study.name
    directions = ["maximize", "minimize"] if front else ["maximize"]
    options: dict[str, Any] = {"study_name": name, "directions": directions, "sampler": sampler, "load_if_exists": True}
    if not ledger.shared:
        return optuna.create_study(storage=optuna.storages.InMemoryStorage(), **options)
    url = ledger._engine.url
    connect = {"timeout": 60} if url.get_backend_name() == "sqlite" else {}
    for attempt in range(_TRIES):
        try:
            storage = optuna.storages.RDBStorage(
                url.render_as_string(hide_password=False), engine_kwargs={"connect_args": connect, "pool_pre_ping": True}
            )
            return optuna.create_study(storage=storage, **options)
        except Exception:  # workers that begin together may all try to make Optuna's tables
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("the last try either returns or raises")
