"""`lamina cache`: what is kept, and forgetting it."""

from __future__ import annotations

import contextlib
import sqlite3
from datetime import datetime
from pathlib import Path

import pytest

from lamina import Setting, Timing
from lamina.forms import Dense, LowRank
from lamina.measure import store
from lamina.measure.signature import signature
from lamina.measure.table import TimingTable, default_path
from lamina.values import Geometry, Use

LAYER, USE = Geometry("Linear", 4, 4, True), Use((1, 4), (1, 4))


def fill(*threads: int) -> list[Setting]:
    settings = [Setting("cpu", "a CPU", "float32", "contiguous", n, "inference") for n in threads]
    with TimingTable(default_path()) as times:
        for setting in settings:
            key = signature(LAYER, Dense(), USE, False, setting)
            times.put(key, {key: Timing(1.0, 0.1, 7, setting)})
    return settings


def test_an_empty_cache_is_shown_and_not_made(run) -> None:
    assert run("cache", "show").out == f"{default_path()}: 0 times\n"
    assert run("cache", "clear").out == f"{default_path()}: 0 times forgotten\n"
    assert not default_path().exists()


def test_times_are_shown_by_their_conditions(run) -> None:
    one, two = fill(1, 2)
    told = [f"1 on {setting}: the oldest of {today()}, ± 10.0% at the median\n" for setting in (one, two)]
    assert run("cache", "show").out == f"{default_path()}: 2 times\n{''.join(told)}"
    assert [each["setting"]["threads"] for each in run("cache", "show", "--json").json["taken"]] == [1, 2]


def today() -> str:
    return datetime.now().astimezone().date().isoformat()


def test_of_each_setting_the_age_of_its_oldest_time_is_shown_and_how_wide_its_times_spread(run) -> None:
    one, _ = fill(1, 2)
    with TimingTable(default_path()) as times:
        dense = signature(LAYER, Dense(), USE, False, one)
        forms = {signature(LAYER, LowRank(rank), USE, False, one): Timing(2.0, 0.1 * rank, 7, one) for rank in (1, 2)}
        times.put(dense, {dense: Timing(1.0, 0.1, 7, one), **forms})
    day = datetime(2026, 1, 31, 12).timestamp()
    with contextlib.closing(sqlite3.connect(default_path(), isolation_level=None)) as table:
        table.execute("UPDATE ratios SET taken = ? WHERE mad < 0.15 * value", (day,))
    shown = run("cache", "show", "--json").json["taken"]
    assert [(each["times"], each["oldest"][:10]) for each in shown] == [(3, "2026-01-31"), (1, today())]
    assert [each["spread"] for each in shown] == pytest.approx([0.1, 0.1])  # of 5 %, 10 % and 10 %
    assert f"3 on {one}: the oldest of 2026-01-31, ± 10.0% at the median" in run("cache", "show").out


def test_a_cleared_cache_is_empty(run) -> None:
    fill(1, 2, 3)
    assert run("cache", "clear", "--json").json == {"path": str(default_path()), "forgotten": 3, "others": {}}
    assert run("cache", "show", "--json").json["times"] == 0


def test_what_is_kept_beside_the_times_is_counted_by_its_kind_and_cleared_with_them(run) -> None:
    (one,) = fill(1)
    with TimingTable(default_path()) as times:
        for kind, key in (("losses", "a"), ("losses", "b:c"), ("dense times", "a")):
            times.remember(kind, key, "{}")
    told = f"the oldest of {today()}, ± 10.0% at the median"
    assert run("cache", "show").out == f"{default_path()}: 1 times, 1 dense times, 2 losses\n1 on {one}: {told}\n"
    assert run("cache", "show", "--json").json["others"] == {"losses": 2, "dense times": 1}
    assert run("cache", "clear").out == f"{default_path()}: 1 times, 1 dense times, 2 losses forgotten\n"
    assert run("cache", "show").out == f"{default_path()}: 0 times\n"


@pytest.mark.parametrize("command", ["show", "clear"])
def test_a_damaged_table_is_an_error_of_one_line_and_left_as_it_was(run, command: str) -> None:
    default_path().write_bytes(b"no database" * 999)
    assert f"the timing table {default_path()} is damaged" in run("cache", command).complaint(1)
    assert default_path().read_bytes() == b"no database" * 999
    assert [path.name for path in default_path().parent.iterdir()] == [default_path().name]


def test_a_table_that_cannot_be_cleared_is_an_error(run, monkeypatch) -> None:
    monkeypatch.setattr(store, "_PATIENCE_S", 0.1)
    fill(1)
    with contextlib.closing(sqlite3.connect(default_path(), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "cannot be cleared: database is locked" in run("cache", "clear").complaint(1)
    assert run("cache", "show", "--json").json["times"] == 1


def test_an_unusable_cache_folder_is_a_warning_and_the_work_goes_on(run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "file" / "below"))
    ran = run("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--include", "5", "--json")
    assert ran.json["setting"] and "cannot be used" in ran.err
