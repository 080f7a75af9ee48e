"""`lamina cache`: what is kept, and forgetting it."""

from __future__ import annotations

from pathlib import Path

from lamina import Setting, Timing
from lamina.forms import Dense
from lamina.measure.table import TimingTable, default_path, signature
from lamina.values import Geometry, Use

LAYER, USE = Geometry("Linear", 4, 4, True), Use((1, 4), (1, 4))


def fill(*threads: int) -> list[Setting]:
    settings = [Setting("cpu", "a CPU", "float32", "contiguous", n, "inference") for n in threads]
    with TimingTable(default_path()) as table:
        for setting in settings:
            table.put({signature(LAYER, Dense(), USE, False, setting): Timing(1.0, 0.1, 7, setting)})
    return settings


def test_an_empty_cache_is_shown_and_not_made(run) -> None:
    assert run("cache", "show").out == f"{default_path()}: 0 times\n"
    assert run("cache", "clear").out == f"{default_path()}: 0 times forgotten\n"
    assert not default_path().exists()


def test_times_are_shown_by_their_conditions(run) -> None:
    one, two = fill(1, 2)
    shown = run("cache", "show")
    assert shown.out == f"{default_path()}: 2 times\n1 on {one}\n1 on {two}\n"
    assert [each["setting"]["threads"] for each in run("cache", "show", "--json").json["taken"]] == [1, 2]


def test_a_cleared_cache_is_empty(run) -> None:
    fill(1, 2, 3)
    assert run("cache", "clear", "--json").json == {"path": str(default_path()), "forgotten": 3}
    assert run("cache", "show", "--json").json["times"] == 0


def test_a_damaged_table_is_a_warning_of_one_line(run) -> None:
    default_path().write_bytes(b"no database" * 999)
    ran = run("cache", "show")
    assert ran.code == 0 and ran.out.startswith(str(default_path()))
    assert ran.err.startswith("warning: the timing table") and ran.err.count("\n") == 1


def test_an_unusable_cache_folder_is_a_warning_and_the_work_goes_on(run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "file" / "below"))
    ran = run("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--include", "5", "--json")
    assert ran.json["setting"] and "cannot be used" in ran.err
