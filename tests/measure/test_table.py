"""The table of times: nothing is lost, nothing is reused under other conditions, and a bad file never stops the work."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from lamina import BlockTerm, Dense, Geometry, LaminaError, LowRank, Setting, Timing
from lamina.forms import Form
from lamina.measure.table import TimingTable, default_path, signature
from lamina.values import Use

SETTING = Setting("cpu", "a CPU", "float32", "contiguous", 1, "inference", versions="torch 2")


def timed(seconds: float) -> Timing:
    return Timing(seconds, seconds / 10, 7, SETTING)


def test_a_time_put_in_is_found_again_also_by_the_next_process(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        table.put({"a": timed(1.0), "b": timed(2.0)})
        assert table.get(["a", "c"], SETTING) == {"a": timed(1.0)}
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert table.get(["a", "b"], SETTING) == {"a": timed(1.0), "b": timed(2.0)}
        assert len(table) == 2


def test_a_later_time_of_the_same_signature_replaces_the_earlier() -> None:
    with TimingTable(None) as table:
        table.put({"a": timed(1.0)})
        table.put({"a": timed(2.0)})
        assert table.get(["a"], SETTING) == {"a": timed(2.0)}
        assert len(table) == 1


def test_a_cleared_table_is_empty_and_says_how_much_it_forgot(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        table.put({str(n): timed(1.0) for n in range(5)})
        assert table.clear() == 5
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert len(table) == 0


def test_the_table_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "mine"))
    assert default_path() == tmp_path / "mine" / "timings.sqlite"
    monkeypatch.delenv("LAMINA_CACHE")
    assert default_path().name == "timings.sqlite"
    assert "lamina" in str(default_path())


CONV = Geometry("Conv2d", 8, 6, True, (3, 3), (1, 1), (1, 1), (1, 1))
USE = Use((2, 6, 9, 9), (2, 8, 9, 9))


def other_values(value: object) -> dict[str, object]:
    """For each field of a dataclass the value with that field changed."""
    changed: dict[str, object] = {}
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        old = getattr(value, field.name)
        if isinstance(old, bool):
            new: object = not old
        elif isinstance(old, int):
            new = old + 1
        elif isinstance(old, tuple):
            new = (*old[:-1], old[-1] + 1)
        else:
            new = f"{old}'"
        changed[field.name] = dataclasses.replace(value, **{field.name: new})  # type: ignore[type-var]
    return changed


@pytest.mark.parametrize("other", other_values(SETTING).values(), ids=other_values(SETTING))
def test_a_time_taken_in_another_setting_is_never_reused(other: Setting) -> None:
    here = signature(CONV, Dense(), USE, False, SETTING)
    with TimingTable(None) as table:
        table.put({here: timed(1.0)})
        assert table.get([signature(CONV, Dense(), USE, False, other)], other) == {}


@pytest.mark.parametrize("other", other_values(CONV).values(), ids=other_values(CONV))
def test_a_time_of_another_geometry_is_never_reused(other: Geometry) -> None:
    assert signature(other, Dense(), USE, False, SETTING) != signature(CONV, Dense(), USE, False, SETTING)


def test_a_signature_tells_forms_shapes_and_layouts_apart() -> None:
    forms: list[Form] = [
        Dense(),
        LowRank(4),
        LowRank(5),
        BlockTerm(4, 4),
        BlockTerm(4, None),
        BlockTerm(None, 4),
        BlockTerm(4, 4, 2),
    ]
    uses = [USE, Use((1, 6, 9, 9), (1, 8, 9, 9)), Use((2, 6, 9, 8), (2, 8, 9, 8))]
    keys = {signature(CONV, f, use, last, SETTING) for f, use, last in itertools.product(forms, uses, (False, True))}
    assert len(keys) == len(forms) * len(uses) * 2


def test_how_often_a_layer_is_called_does_not_decide_the_time_of_one_call() -> None:
    often = dataclasses.replace(USE, calls=7, weight=0.5)
    assert signature(CONV, Dense(), often, False, SETTING) == signature(CONV, Dense(), USE, False, SETTING)


WRITER = """
import itertools, sys
from pathlib import Path
from lamina import Setting, Timing
from lamina.measure.table import TimingTable
path, name, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
setting = Setting("cpu", "a CPU", "float32", "contiguous", 1, "inference", versions="torch 2")
with TimingTable(path) as table:
    for n in range(number):
        table.put({f"{name}{n}": Timing(1.0 + n, 0.1, 7, setting), f"{name}{n}'": Timing(1.0, 0.1, 7, setting)})
"""


def start_writer(path: Path, name: str, number: int) -> subprocess.Popen[bytes]:
    """A process of its own that puts times into a file, two at a time."""
    return subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, str(path), name, str(number)])


def test_two_processes_that_write_one_file_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    writers = [start_writer(path, name, 60) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    with TimingTable(path) as table:
        assert len(table) == 240
        assert [t.median_s for t in table.get(["a59", "b59"], SETTING).values()] == [60.0, 60.0]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_writer_killed_at_any_moment_leaves_a_whole_table(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    writer = start_writer(path, "a", 10**9)
    for _ in range(2000):
        if path.exists() and path.stat().st_size > 40_000:
            break
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with TimingTable(path) as table:
            number = len(table)
            assert number > 0
            assert number % 2 == 0  # both times of a put, or neither
            table.put({"more": timed(1.0)})
            assert len(table) == number + 1


DAMAGES = {
    "no database": lambda content: b"this is no database, only text that is long enough to be looked at" * 20,
    "cut in the middle": lambda content: content[: len(content) // 2 + 100],
    "pages overwritten": lambda content: content[:4096] + b"\xff" * (len(content) - 4096),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_set_aside_with_a_warning_and_a_new_one_begun(damage: object, tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with TimingTable(path) as table:
        table.put({f"a signature that fills its page soon {n}": timed(1.0) for n in range(400)})
    bad = damage(path.read_bytes())  # type: ignore[operator]
    path.write_bytes(bad)
    with pytest.warns(UserWarning, match="damaged.*set aside.*a new one begun"), TimingTable(path) as table:
        table.put({"a": timed(1.0)})
    asides = list(tmp_path.glob("*.corrupt-*"))
    assert [aside.read_bytes() for aside in asides] == [bad]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with TimingTable(path) as table:
            assert table.get(["a"], SETTING) == {"a": timed(1.0)}


def test_an_empty_file_is_a_table_without_times(tmp_path: Path) -> None:
    (tmp_path / "t.sqlite").touch()
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert len(table) == 0


def test_a_folder_that_cannot_be_made_is_said_and_times_are_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be used.*not kept"), TimingTable(tmp_path / "file" / "t.sqlite") as table:
        table.put({"a": timed(1.0)})
        assert table.get(["a"], SETTING) == {"a": timed(1.0)}


def test_a_folder_in_the_tables_place_is_said_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "t.sqlite").mkdir()
    with pytest.warns(UserWarning, match="cannot be used"), TimingTable(tmp_path / "t.sqlite") as table:
        table.put({"a": timed(1.0)})
        assert len(table) == 1
    assert (tmp_path / "t.sqlite").is_dir()


def read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True)


def test_a_file_that_cannot_be_written_still_gives_its_times_and_new_ones_are_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with TimingTable(path) as table:
        table.put({"a": timed(1.0)})
        table._connection.close()
        table._connection = read_only(path)  # the tests may run as root, to whom no file is read-only
        with pytest.warns(UserWarning, match="readonly.*not kept"):
            table.put({"b": timed(2.0)})
        assert table.get(["a", "b"], SETTING) == {"a": timed(1.0), "b": timed(2.0)}
    with TimingTable(path) as table:
        assert len(table) == 1


class FullDisk(sqlite3.Connection):
    """A connection whose every write fails as on a full disk."""

    def executemany(self, *_: object) -> sqlite3.Cursor:  # type: ignore[override]
        raise sqlite3.OperationalError("database or disk is full")


def test_a_full_disk_is_said_once_and_times_are_kept_in_memory(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        table._connection.close()
        table._connection = sqlite3.connect(tmp_path / "t.sqlite", factory=FullDisk)
        with pytest.warns(UserWarning, match="disk is full.*not kept") as caught:
            table.put({"a": timed(1.0)})
            table.put({"b": timed(2.0)})
        assert len(caught) == 1
        assert set(table.get(["a", "b"], SETTING)) == {"a", "b"}


class BadDisk(sqlite3.Connection):
    """A connection that can no longer read."""

    def execute(self, *_: object) -> sqlite3.Cursor:  # type: ignore[override]
        raise sqlite3.DatabaseError("database disk image is malformed")


def test_a_file_that_fails_while_in_use_is_said_and_the_work_goes_on(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        table._connection.close()
        table._connection = sqlite3.connect(tmp_path / "t.sqlite", factory=BadDisk)
        with pytest.warns(UserWarning, match="malformed"):
            assert table.get(["a"], SETTING) == {}
        table.put({"a": timed(1.0)})
        assert table.get(["a"], SETTING) == {"a": timed(1.0)}


def test_a_table_of_other_columns_is_said_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE timings (something TEXT)")
        other.execute("INSERT INTO timings VALUES ('else')")
    other.close()
    with pytest.warns(UserWarning, match="cannot be used"), TimingTable(path) as table:
        table.put({"a": timed(1.0)})
        assert len(table) == 1
    check = sqlite3.connect(path)
    assert check.execute("SELECT * FROM timings").fetchall() == [("else",)]
    check.close()


def test_a_time_of_nothing_is_no_time() -> None:
    with TimingTable(None) as table:
        table.put({"a": Timing(0.0, 0.0, 7, SETTING)})
        assert table.get(["a"], SETTING) == {}


def test_a_table_that_cannot_be_cleared_is_an_error_and_keeps_its_times(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with TimingTable(path) as table:
        table.put({"a": timed(1.0)})
        table._connection.close()
        table._connection = read_only(path)
        with pytest.raises(LaminaError, match=r"cannot be cleared: .*readonly"):
            table.clear()
        assert len(table) == 1


FORM = LowRank(4)


def at(setting: Setting, form: Form = FORM) -> str:
    return signature(CONV, form, USE, False, setting)


THERE = dataclasses.replace(SETTING, device_name="another CPU", threads=64, versions="torch 3", flush_denormals=True)


def exported(path: Path, *settings: Setting) -> Path:
    """A file of one time under each setting, exported for the first of them."""
    with TimingTable(None) as table:
        table.put({at(setting): timed(1.0 + n) for n, setting in enumerate(settings)})
        table.export(path, settings[0])
    return path


def test_exported_times_are_found_again_as_they_were(tmp_path: Path) -> None:
    with TimingTable.imported(exported(tmp_path / "t.json", SETTING)) as table:
        assert table.get([at(SETTING), at(SETTING, Dense())], SETTING) == {at(SETTING): timed(1.0)}
        table.put({at(SETTING, Dense()): timed(3.0)})  # on the same machine it is a table like any other
        assert table.get([at(SETTING, Dense())], SETTING) == {at(SETTING, Dense()): timed(3.0)}


def test_times_of_another_machine_answer_in_its_name(tmp_path: Path) -> None:
    with TimingTable.imported(exported(tmp_path / "t.json", THERE)) as table:
        assert table.conditions(SETTING) == THERE
        assert table.get([at(SETTING)], SETTING) == {at(SETTING): Timing(1.0, 0.1, 7, THERE)}


def test_times_of_several_phases_are_found_in_one_question(tmp_path: Path) -> None:
    resting = dataclasses.replace(SETTING, mode="training", freezing="first")
    awake = dataclasses.replace(resting, freezing="off")
    path = exported(tmp_path / "t.json", *(dataclasses.replace(s, device_name="another CPU") for s in (resting, awake)))
    with TimingTable.imported(path) as table:
        assert [t.median_s for t in table.get([at(resting), at(awake)], resting).values()] == [1.0, 2.0]


@pytest.mark.parametrize("field", ["dtype", "memory_format", "mode", "freezing", "autocast"])
def test_times_of_another_machine_do_not_answer_for_a_network_run_otherwise(field: str, tmp_path: Path) -> None:
    otherwise = dataclasses.replace(SETTING, **{field: "other"})  # type: ignore[arg-type]
    with TimingTable.imported(exported(tmp_path / "t.json", THERE)) as table, pytest.raises(LaminaError, match="other"):
        table.get([at(otherwise)], otherwise)


def test_a_time_that_another_machine_lacks_is_an_error_that_names_it(tmp_path: Path) -> None:
    message = r"t.json has no time of Conv2d 6→8 3×3 as low_rank rank 5 on 2×6×9×9 \(.*another CPU"
    with TimingTable.imported(exported(tmp_path / "t.json", THERE)) as table, pytest.raises(LaminaError, match=message):
        table.get([at(SETTING, LowRank(5))], SETTING)


def test_only_times_of_that_machine_are_exported_in_every_dtype_and_mode(tmp_path: Path) -> None:
    others = other_values(SETTING)
    kept = {"dtype", "memory_format", "mode", "freezing", "autocast"}
    exported(tmp_path / "t.json", SETTING, *others.values())  # type: ignore[arg-type]
    keys = set(json.loads((tmp_path / "t.json").read_text())["timings"])
    assert keys == {at(SETTING), *(at(setting) for name, setting in others.items() if name in kept)}  # type: ignore[arg-type]


def test_times_are_counted_by_their_setting() -> None:
    with TimingTable(None) as table:
        table.put({at(SETTING): timed(1.0), at(SETTING, Dense()): timed(1.0), at(THERE): timed(1.0), "older": timed(1.0)})
        assert table.settings() == {SETTING: 2, THERE: 1}


BAD_FILES = {
    "cut short": (lambda text: text[:-9], "no readable file of timings"),
    "no file of timings": (lambda text: "[]", "no file of timings"),
    "a plan": (lambda text: '{"format": 1, "layers": {}}', "no file of timings"),
    "newer": (lambda text: text.replace('"format": 1', '"format": 2'), "made by a newer lamina"),
    "older": (lambda text: text.replace('"format": 1', '"format": 0'), "format: "),
    "no number": (lambda text: text.replace('"median_s": 1.0', '"median_s": "fast"'), "timings.*median_s"),
    "not a number": (lambda text: text.replace('"median_s": 1.0', '"median_s": NaN'), "timings.*median_s"),
    "a time of nothing": (lambda text: text.replace('"median_s": 1.0', '"median_s": 0'), "timings.*median_s"),
    "no repeats": (lambda text: text.replace('"repeats": 7', '"repeats": 0'), "timings.*repeats"),
    "a field lost": (lambda text: text.replace('"mad_s": 0.1,', ""), "timings.*mad_s"),
    "no setting": (lambda text: text.replace('"setting": {', '"sitting": {'), "setting"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_of_timings_is_refused_in_a_line_and_left_as_it_was(damage: object, message: str, tmp_path: Path) -> None:
    path = exported(tmp_path / "t.json", SETTING)
    bad = damage(path.read_text())  # type: ignore[operator]
    assert bad != path.read_text()
    path.write_text(bad)
    with pytest.raises(LaminaError, match=message) as error:
        TimingTable.imported(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert path.read_text() == bad


def test_a_missing_file_of_timings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match="no readable file of timings"):
        TimingTable.imported(tmp_path / "gone.json")


def test_an_export_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match="cannot be written"):
        exported(tmp_path / "gone" / "t.json", SETTING)
    (tmp_path / "folder").mkdir()
    with pytest.raises(LaminaError, match="cannot be written"):
        exported(tmp_path / "folder", SETTING)
    assert list((tmp_path / "folder").iterdir()) == []
