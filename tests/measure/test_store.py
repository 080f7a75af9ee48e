"""The store knows rows and keys alone: all of a put or none of it, and which of two rows of one key stands.

What becomes of files that are damaged, locked, older or somebody else's is tested where it has a meaning, in `test_table`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina import LaminaError
from lamina.measure import store as room
from lamina.measure.store import File, Layout, Store, Table

LAYOUT = Layout(
    tables={
        "words": Table("word", ("meaning", "length"), "words"),
        "records": Table("event", ("seconds",), "records", stays=lambda first, new: first[0] <= new[0]),
    },
    mark=0x74657374,
    version=3,
    called="book",
    foreign="no book",
)


def book(path: Path) -> File:
    return File(path, LAYOUT, own=False)


@pytest.fixture(params=["in a file", "in memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened = Store(book(tmp_path / "book") if request.param == "in a file" else None, LAYOUT)
    yield opened
    opened.close()


def test_rows_are_found_by_table_and_key(store: Store) -> None:
    store.put({"words": {"a": ("first", 1), "b": ("second", 1)}, "records": {"a": (3.0,)}})
    assert store.rows("words", ["b", "a", "c"]) == {"b": ("second", 1), "a": ("first", 1)}
    assert store.rows("records", ["a", "b"]) == {"a": (3.0,)}
    assert (store.keys("words"), store.keys("records")) == ({"a", "b"}, {"a"})


def test_a_row_replaces_the_one_that_was_there_unless_the_table_says_that_it_stays(store: Store) -> None:
    store.put({"words": {"a": ("first", 1)}, "records": {"run": (3.0,)}})
    assert store.put({"words": {"a": ("last", 2)}, "records": {"run": (4.0,), "jump": (1.0,)}}) == {
        "words": {"a": ("last", 2)},
        "records": {"run": (3.0,), "jump": (1.0,)},
    }
    assert store.put({"records": {"run": (2.0,)}}) == {"records": {"run": (2.0,)}}
    assert store.rows("words", ["a"]) | store.rows("records", ["run"]) == {"a": ("last", 2), "run": (2.0,)}


@pytest.mark.parametrize(("seconds", "stands"), [(2.0, 2.0), (4.0, 3.0)])
def test_what_waited_for_a_locked_file_is_settled_with_what_others_wrote_there_meanwhile(
    seconds: float, stands: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_PATIENCE_S", 0.05)
    store, other = (Store(book(tmp_path / "book"), LAYOUT) for _ in range(2))
    with room._transaction(other._connection), pytest.warns(UserWarning, match="the book .* is locked"):  # type: ignore[arg-type]
        store.put({"records": {"run": (seconds,)}})
        assert store.rows("records", ["run"]) == {"run": (seconds,)}
    other.put({"records": {"run": (3.0,)}})
    assert store.rows("records", ["run"]) == {"run": (stands,)}
    store.close()
    assert other.rows("records", ["run"]) == {"run": (stands,)}
    other.close()


def test_who_reads_the_file_keeps_nobody_from_writing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PATIENCE_S", 0.05)
    store = Store(book(tmp_path / "book"), LAYOUT)
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)  # type: ignore[union-attr]
    reader = sqlite3.connect(tmp_path / "book", isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT * FROM words").fetchall() == []
    store.put({"words": {"a": ("first", 1)}})
    assert book(tmp_path / "book").keys()["words"] == ["a"]
    assert reader.execute("SELECT * FROM words").fetchall() == []  # what there was when it began to read
    reader.close()
    store.close()


class Failing(sqlite3.Connection):
    """A connection that cannot write records."""

    def executemany(self, sql: str, *rest: object) -> sqlite3.Cursor:  # type: ignore[override]
        if "records" in sql:
            raise sqlite3.OperationalError("disk I/O error")
        return super().executemany(sql, *rest)  # type: ignore[arg-type]


def test_a_put_that_fails_halfway_leaves_nothing_in_the_file_and_everything_in_memory(tmp_path: Path) -> None:
    store = Store(book(tmp_path / "book"), LAYOUT)
    store.put({"words": {"a": ("first", 1)}})
    store._connection.close()  # type: ignore[union-attr]
    store._connection = sqlite3.connect(tmp_path / "book", factory=Failing, isolation_level=None)
    with pytest.warns(UserWarning, match="disk I/O error.*not kept"):
        store.put({"words": {"b": ("second", 1)}, "records": {"run": (3.0,)}})
    assert (store.keys("words"), store.keys("records")) == ({"a", "b"}, {"run"})
    store.close()
    assert book(tmp_path / "book").keys() == {"words": ["a"], "records": []}


def test_clearing_returns_the_keys_that_there_were(tmp_path: Path) -> None:
    assert book(tmp_path / "book").clear() == {"words": [], "records": []}
    assert not (tmp_path / "book").exists()
    store = Store(book(tmp_path / "book"), LAYOUT)
    store.put({"words": {"a": ("first", 1)}, "records": {"run": (3.0,)}})
    store.close()
    assert book(tmp_path / "book").clear() == {"words": ["a"], "records": ["run"]}
    assert book(tmp_path / "book").keys() == {"words": [], "records": []}


def test_a_file_of_another_layout_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    Store(book(tmp_path / "book"), LAYOUT).close()
    before = (tmp_path / "book").read_bytes()
    other = Layout(LAYOUT.tables, LAYOUT.mark + 1, LAYOUT.version, "list", "no list")
    file = File(tmp_path / "book", other, own=False)
    for door in (file.keys, file.clear, lambda: Store(file, other)):
        with pytest.raises(LaminaError, match="book is a database, and none that lamina made"):
            door()
    assert (tmp_path / "book").read_bytes() == before
