"""The table of times: nothing is lost, nothing is reused under other conditions, and a bad file never stops the work."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamina import BlockTerm, Dense, Geometry, LaminaError, LowRank, Separable, Setting, Timing
from lamina.forms import Form
from lamina.measure import store as room
from lamina.measure.clock import alike
from lamina.measure.signature import signature
from lamina.measure.table import TimingTable, default_path, forget, kept, kept_besides, opened
from lamina.values import Use

SETTING = Setting("cpu", "a CPU", "float32", "contiguous", 1, "inference", versions="torch 2")


def timed(seconds: float, setting: Setting = SETTING) -> Timing:
    return Timing(seconds, seconds / 10, 7, setting)


def steady(then_s: float) -> bool:
    """A machine that is always the same."""
    return True


def keep(table: TimingTable, dense: float = 1.0, anchor: str = "dense", **forms: float) -> dict[str, float]:
    """Put a batch; what it then takes."""
    batch = {anchor: timed(dense), **{key: timed(seconds) for key, seconds in forms.items()}}
    return seconds(table.put(anchor, batch))


def ask(table: TimingTable, *keys: str, holds: Callable[[float], bool] = steady, anchor: str = "dense") -> dict[str, float]:
    return seconds(table.get(anchor, keys, SETTING, holds))


def seconds(found: dict[str, Timing]) -> dict[str, float]:
    return {key: one.median_s for key, one in found.items()}


def test_a_time_put_in_is_found_again_also_by_the_next_process(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        keep(table, 4.0, a=1.0, b=2.0)
        assert ask(table, "a", "c") == {"a": 1.0}
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert table.get("dense", ["a", "dense"], SETTING, steady) == {"a": timed(1.0), "dense": timed(4.0)}
        assert len(table) == 3


def test_of_several_batches_the_first_dense_time_stays_and_forms_follow_it_by_their_ratios() -> None:
    with TimingTable(None) as table:
        keep(table, 1.0, a=0.5)
        assert keep(table, 3.0, b=3.6) == pytest.approx({"dense": 1.0, "b": 1.2})
        assert ask(table, "dense", "a", "b") == pytest.approx({"dense": 1.0, "a": 0.5, "b": 1.2})


def test_of_two_processes_that_measure_one_layer_at_once_no_times_mix(tmp_path: Path) -> None:
    # Both found nothing; the second one measured in a moment three times slower. No form is faster than the dense layer.
    with TimingTable(tmp_path / "t.sqlite") as one, TimingTable(tmp_path / "t.sqlite") as two:
        assert ask(one, "a", "b") == ask(two, "a", "b") == {}
        keep(one, 1.0, a=1.2)
        assert keep(two, 3.0, b=3.6) == pytest.approx({"dense": 3.0, "b": 3.6})
        for table, unit in ((one, 1.0), (two, 3.0)):
            assert ask(table, "dense", "a", "b") == pytest.approx({"dense": unit, "a": 1.2 * unit, "b": 1.2 * unit})


def test_a_form_without_a_dense_time_is_not_known(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        keep(table, a=0.5)
        assert ask(table, "a", anchor="another") == {}


def takes(now_s: float) -> Callable[[float], bool]:
    """A machine on which the dense layer takes so long now."""
    return lambda then_s: alike(then_s, now_s)


@pytest.mark.parametrize("now", [1.5, 0.6])
def test_what_was_taken_while_the_dense_layer_was_clearly_faster_or_slower_does_not_answer_and_is_replaced(
    now: float, tmp_path: Path
) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        keep(table, 1.0, a=0.5, b=0.5)
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert ask(table, "dense", "a", "b", holds=takes(now)) == {}
        keep(table, now, a=0.6 * now)
        assert ask(table, "dense", "a", "b", holds=takes(now)) == pytest.approx({"dense": now, "a": 0.6 * now})


def test_a_batch_of_a_busy_moment_does_not_answer_the_next_process_though_the_dense_time_stays(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        keep(table, 1.0, a=0.5)
        assert keep(table, 3.0, b=0.6) == pytest.approx({"dense": 1.0, "b": 0.2}), "a run goes by what it took"
        assert ask(table, "b", holds=takes(1.0)) == pytest.approx({"b": 0.2})
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert ask(table, "dense", "a", "b", holds=takes(1.0)) == {"dense": 1.0, "a": 0.5}


def test_a_machine_nearly_as_fast_as_then_is_the_same_machine(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        keep(table, 1.0, a=0.5)
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert ask(table, "a", holds=takes(1.35)) == {"a": 0.5}


def test_a_table_works_from_several_threads_at_once(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        threads = [threading.Thread(target=lambda n=n: keep(table, **{f"{n}-{m}": 0.5 for m in range(20)})) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(table) == 81
        assert len(ask(table, *(f"{n}-{m}" for n in range(4) for m in range(20)))) == 80


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
            new = (*old[:-1], old[-1] + 1) if old else (1,)
        else:
            new = f"{old}'"
        changed[field.name] = dataclasses.replace(value, **{field.name: new})  # type: ignore[type-var]
    return changed


@pytest.mark.parametrize("other", other_values(SETTING).values(), ids=other_values(SETTING))
def test_a_time_taken_in_another_setting_is_never_reused(other: Setting) -> None:
    here = signature(CONV, Dense(), USE, False, SETTING)
    with TimingTable(None) as table:
        keep(table, anchor=here)
        key = signature(CONV, Dense(), USE, False, other)
        assert table.get(key, [key], other, steady) == {}


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
        Separable(4),
    ]
    uses = [USE, Use((1, 6, 9, 9), (1, 8, 9, 9)), Use((2, 6, 9, 8), (2, 8, 9, 8))]
    keys = {signature(CONV, f, use, last, SETTING) for f, use, last in itertools.product(forms, uses, (False, True))}
    assert len(keys) == len(forms) * len(uses) * 2


def test_a_signature_tells_the_inputs_dtype_apart() -> None:
    uses = [dataclasses.replace(USE, input_dtype=dtype) for dtype in (None, "bfloat16", "float16")]
    assert len({signature(CONV, Dense(), use, False, SETTING) for use in uses}) == len(uses)


def test_how_often_a_layer_is_called_does_not_decide_the_time_of_one_call() -> None:
    often = dataclasses.replace(USE, calls=7, weight=0.5)
    assert signature(CONV, Dense(), often, False, SETTING) == signature(CONV, Dense(), USE, False, SETTING)


WRITER = """
import sys, time
from pathlib import Path
from lamina import Setting, Timing
from lamina.measure.table import TimingTable
path, name, number, start = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
setting = Setting("cpu", "a CPU", "float32", "contiguous", 1, "inference", versions="torch 2")
number_of_name = 1 + ord(name) - ord("a")
dense, one = Timing(number_of_name, 0.1, 7, setting), Timing(number_of_name / (1 + number_of_name), 0.1, 7, setting)
time.sleep(max(0.0, start - time.time()))
with TimingTable(path) as table:
    for n in range(number):
        table.put("dense", {"dense": dense, f"{name}{n}": one, f"{name}{n}'": one})
"""


def start_writer(path: Path, name: str, number: int, start: float = 0.0) -> subprocess.Popen[bytes]:
    """A process of its own that puts times into a file, two forms at a time, from a moment on.

    Of the dense layer a takes one second, b two, and so on; its forms take a half of that, a third, and so on.
    """
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(number), str(start)], stderr=subprocess.PIPE)


def test_eight_processes_that_write_one_file_at_once_lose_nothing_and_mix_nothing(tmp_path: Path) -> None:
    path, start = tmp_path / "t.sqlite", time.time() + 4
    writers = [start_writer(path, name, 30, start) for name in "abcdefgh"]
    assert [writer.communicate()[1] for writer in writers] == [b""] * 8
    with quiet(), TimingTable(path) as table:
        assert len(table) == 1 + 8 * 30 * 2
        forms = {f"{name}{n}{end}": 1 / (2 + at) for at, name in enumerate("abcdefgh") for n in range(30) for end in ("", "'")}
        found = ask(table, "dense", *forms)
        dense_s = found.pop("dense")
        assert dense_s in range(1, 9)
        assert {form: seconds / dense_s for form, seconds in found.items()} == pytest.approx(forms)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_writer_killed_at_any_moment_leaves_a_whole_table(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    writer = start_writer(path, "a", 10**9)
    for _ in range(2000):
        if sum(file.stat().st_size for file in tmp_path.glob("t.sqlite*")) > 400_000:
            break
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    with quiet(), TimingTable(path) as table:
        number = len(table)
        assert number > 1
        assert number % 2 == 1  # the dense time, and both forms of a put or neither
        keep(table, more=1.0)
        assert len(table) == number + 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2 + 100]


DAMAGES = {
    "no database": lambda content: b"this is no database, only text that is long enough to be looked at" * 20,
    "cut in the middle": cut,
    "pages overwritten": lambda content: content[:4096] + b"\xff" * (len(content) - 4096),
}


def filled(path: Path) -> Path:
    with TimingTable(path) as table:
        keep(table, **{f"a signature that fills its page soon {n}": 1.0 for n in range(400)})
    return path


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_laminas_own_damaged_file_is_set_aside_with_a_warning_and_a_new_one_begun(damage: object) -> None:
    path = filled(default_path())
    bad = damage(path.read_bytes())  # type: ignore[operator]
    path.write_bytes(bad)
    with pytest.warns(UserWarning, match="damaged.*set aside.*a new one begun"), TimingTable(path) as table:
        keep(table, a=0.5)
    assert [aside.read_bytes() for aside in path.parent.glob("*.corrupt-*")] == [bad]
    with quiet(), TimingTable(path) as table:
        assert ask(table, "a") == {"a": 0.5}


@pytest.mark.parametrize("named", ["the default table", "a table by name"])
def test_of_eight_processes_that_open_one_damaged_table_none_loses_times_or_sets_the_new_one_aside(
    named: str, tmp_path: Path
) -> None:
    path = filled(default_path() if named == "the default table" else tmp_path / "t.sqlite")
    bad = DAMAGES["no database"](b"") if named == "the default table" else cut(path.read_bytes())
    path.write_bytes(bad)
    start = time.time() + 4
    writers = [start_writer(path, name, 10, start) for name in "abcdefgh"]
    said = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 8
    assert sum(b"set aside" in each for each in said) == 1
    assert [aside.read_bytes() for aside in path.parent.glob("*.corrupt-*")] == [bad]
    with quiet(), TimingTable(path) as table:
        assert len(table) == 161


def foreign_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE timings (something TEXT)")
        other.execute("INSERT INTO timings VALUES ('else')")
        other.commit()


def empty_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("VACUUM")


def damaged_database(path: Path) -> None:
    foreign_database(path)
    path.write_bytes(path.read_bytes()[:4196])


FOREIGN = {
    "weights": lambda path: path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      " * 99),
    "a checkpoint": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(999)),
    "a text": lambda path: path.write_text("import torch\n" * 99),
    "another JSON": lambda path: path.write_text('{"format": 1, "layers": {}}'),
    "a list": lambda path: path.write_text("[]"),
    "a short file": lambda path: path.write_bytes(b"SQL"),
    "another database": foreign_database,
    "an empty database": empty_database,
    "another database, damaged": damaged_database,
}


@pytest.mark.parametrize("name", ["model.safetensors", "times", "times.json", "times.sqlite"])
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_lamina_did_not_make_is_refused_in_a_line_and_stays_as_it_was(
    make: object, name: str, tmp_path: Path
) -> None:
    make(tmp_path / name)  # type: ignore[operator]
    before = (tmp_path / name).read_bytes()
    for door in (opened, TimingTable):
        with pytest.raises(LaminaError, match=name) as error, door(tmp_path / name):  # type: ignore[operator]
            pass
        assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: before}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LaminaError, match="pipe is no table of times"), opened(tmp_path / "pipe"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_no_new_table_is_begun_under_the_name_of_an_export(tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match=r"gone.json: no such file"), opened(tmp_path / "gone.json"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["times.txt", "times", "times.sqlite"])
def test_an_export_is_known_by_its_content_whatever_its_name(name: str, tmp_path: Path) -> None:
    path = exported(tmp_path / name, SETTING)
    before = path.read_bytes()
    with opened(path) as table:
        assert table.target == SETTING and len(table) == 2
    assert path.read_bytes() == before


def test_a_table_is_known_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    path = filled(tmp_path / "times.json")
    with opened(path) as table:
        assert len(table) == 401


def old_table(path: Path) -> Path:
    """One of the version before, with other columns and a table that is no more."""
    filled(path)
    with contextlib.closing(sqlite3.connect(path)) as old:
        (version,) = old.execute("PRAGMA user_version").fetchone()
        old.execute("ALTER TABLE ratios RENAME COLUMN dense_s TO product_s")
        old.execute("CREATE TABLE older (signature TEXT)")
        old.execute(f"PRAGMA user_version = {version - 1}")
        old.commit()
    return path


def test_a_table_of_an_older_version_goes_on_as_a_new_one_and_its_times_do_not_answer(tmp_path: Path) -> None:
    path = old_table(tmp_path / "t.sqlite")
    assert kept(path) == (0, {})
    with quiet(), TimingTable(path) as table:
        assert ask(table, "dense", "a") == {}
        keep(table, 2.0, a=1.0)
        assert ask(table, "dense", "a") == {"dense": 2.0, "a": 1.0}
        assert len(table) == 2


def newer_table(path: Path) -> bytes:
    filled(path)
    with contextlib.closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 99")
    return path.read_bytes()


def test_a_table_of_a_newer_lamina_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    before = newer_table(path)
    for door in (opened, kept, forget):
        with pytest.raises(LaminaError, match=r"t.sqlite was made by a newer lamina \(version 99"), door(path):
            pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", [newer_table, foreign_database])
def test_a_file_in_laminas_place_that_it_cannot_use_is_said_left_alone_and_the_work_goes_on(make: object) -> None:
    make(default_path())  # type: ignore[operator]
    before = default_path().read_bytes()
    with pytest.warns(UserWarning, match="cannot be used.*not kept"), TimingTable(default_path()) as table:
        keep(table, a=0.5)
        assert ask(table, "a") == {"a": 0.5}
    assert default_path().read_bytes() == before


def test_an_empty_file_is_a_table_without_times(tmp_path: Path) -> None:
    (tmp_path / "t.sqlite").touch()
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert len(table) == 0


def test_a_folder_that_cannot_be_made_is_said_and_times_are_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be used.*not kept"), TimingTable(tmp_path / "file" / "t.sqlite") as table:
        keep(table, a=0.5)
        assert ask(table, "a") == {"a": 0.5}


def test_a_folder_in_the_tables_place_is_said_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "t.sqlite").mkdir()
    with pytest.warns(UserWarning, match="cannot be used"), TimingTable(tmp_path / "t.sqlite") as table:
        keep(table, a=0.5)
        assert len(table) == 2
    assert (tmp_path / "t.sqlite").is_dir()


def read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)


def test_a_file_that_cannot_be_written_still_gives_its_times_and_new_ones_are_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    with TimingTable(path) as table:
        keep(table, a=0.5)
        table._store._connection.close()  # type: ignore[union-attr]
        table._store._connection = read_only(path)  # the tests may run as root, to whom no file is read-only
        with pytest.warns(UserWarning, match="readonly.*not kept"):
            keep(table, b=0.6)
        assert ask(table, "a", "b") == {"a": 0.5, "b": 0.6}
    with TimingTable(path) as table:
        assert len(table) == 2


DENIED = """
import os, sys, warnings
from pathlib import Path
from lamina import LaminaError
from lamina.measure.table import default_path, kept, opened
if os.getuid() == 0:
    os.setuid(65534)
for door in (opened, kept):
    try:
        with door(default_path()):
            print("opened")
    except LaminaError as error:
        print("cannot be read" in str(error))
with warnings.catch_warnings(record=True) as said, opened(None) as table:
    print(len(table), len(said))
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="no users here")
def test_a_table_that_may_not_be_read_is_an_error_where_it_is_named_and_else_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(tempfile.mkdtemp())
    monkeypatch.setenv("LAMINA_CACHE", str(folder))
    filled(default_path()).chmod(0)
    folder.chmod(0o755)
    ran = subprocess.run([sys.executable, "-c", DENIED], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "True\nTrue\n0 1\n"), ran.stderr


READER = """
import os, sys, warnings
from pathlib import Path
from lamina import Setting
from lamina.measure.table import TimingTable, kept
if os.getuid() == 0:
    os.setuid(65534)
setting = Setting("cpu", "a CPU", "float32", "contiguous", 1, "inference", versions="torch 2")
path = Path(sys.argv[1])
print(kept(path)[0])
with TimingTable(path) as table:
    print(len(table.get("dense", ["dense"], setting, bool)))
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="no users here")
def test_a_table_in_a_folder_that_cannot_be_written_gives_its_times(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own may be closed to others
    path = filled(folder / "t.sqlite")
    path.chmod(0o444)
    folder.chmod(0o555)
    try:
        ran = subprocess.run([sys.executable, "-c", READER, path], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, "401\n1\n"), ran.stderr
        assert [file.name for file in folder.iterdir()] == ["t.sqlite"]
    finally:
        folder.chmod(0o755)


class FullDisk(sqlite3.Connection):
    """A connection whose every write fails as on a full disk."""

    def executemany(self, *_: object) -> sqlite3.Cursor:  # type: ignore[override]
        raise sqlite3.OperationalError("database or disk is full")


def test_a_full_disk_is_said_once_and_times_are_kept_in_memory(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        table._store._connection.close()  # type: ignore[union-attr]
        table._store._connection = sqlite3.connect(tmp_path / "t.sqlite", factory=FullDisk, isolation_level=None)
        with pytest.warns(UserWarning, match="disk is full.*not kept") as caught:
            keep(table, a=0.5)
            keep(table, b=0.6)
        assert len(caught) == 1
        assert set(ask(table, "a", "b")) == {"a", "b"}


class BadDisk(sqlite3.Connection):
    """A connection that can no longer read."""

    def execute(self, *_: object) -> sqlite3.Cursor:  # type: ignore[override]
        raise sqlite3.DatabaseError("database disk image is malformed")


def test_a_file_that_fails_while_in_use_is_said_and_the_work_goes_on(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        table._store._connection.close()  # type: ignore[union-attr]
        table._store._connection = sqlite3.connect(tmp_path / "t.sqlite", factory=BadDisk)
        with pytest.warns(UserWarning, match="malformed"):
            assert ask(table, "a") == {}
        keep(table, a=0.5)
        assert ask(table, "a") == {"a": 0.5}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """Somebody holds a file so that nobody else can read or write it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("UPDATE anchors SET repeats = repeats")
        yield other


def test_a_table_that_stays_locked_is_said_once_and_gives_and_takes_its_times_when_it_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_PATIENCE_S", 0.1)
    path = tmp_path / "t.sqlite"
    with TimingTable(path) as table:
        keep(table, 2.0, a=1.0)
    with locked(path), pytest.warns(UserWarning, match="locked.*asked again") as caught:
        table = TimingTable(path)
        assert ask(table, "a") == {}
        assert keep(table, 2.4, b=1.2) == {"dense": 2.4, "b": 1.2}
        assert ask(table, "b") == {"b": 1.2}
    assert len(caught) == 1
    with quiet(), table:
        assert ask(table, "a") == {"a": 1.2}, "half of the dense time that this run took"
    with quiet(), TimingTable(path) as table:  # what was taken meanwhile was written at the end, beside the first dense time
        assert ask(table, "dense", "a", "b") == {"dense": 2.0, "a": 1.0, "b": 1.0}


def test_a_table_that_is_locked_to_the_end_says_how_many_times_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_PATIENCE_S", 0.1)
    path = filled(tmp_path / "t.sqlite")
    lost = pytest.warns(UserWarning, match="stayed locked; 2 times of this run are not kept")
    with locked(path), lost, TimingTable(path) as table:
        keep(table, a=0.5)


def test_a_time_of_nothing_is_no_time() -> None:
    with TimingTable(None) as table:
        assert keep(table, 0.0, a=0.0) == {"dense": 0.0, "a": 0.0}
        keep(table, 1.0, b=0.0)
        assert ask(table, "dense", "a", "b") == {"dense": 1.0}


def test_a_cleared_table_is_empty_smaller_and_says_how_much_it_forgot(tmp_path: Path) -> None:
    path = filled(tmp_path / "t.sqlite")
    before = path.stat().st_size
    assert forget(path) == 401
    assert path.stat().st_size < before / 2
    with TimingTable(path) as table:
        assert len(table) == 0


def test_a_table_that_cannot_be_cleared_is_an_error_and_keeps_its_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_PATIENCE_S", 0.1)
    path = filled(tmp_path / "t.sqlite")
    with locked(path), pytest.raises(LaminaError, match=r"cannot be cleared: .*locked"):
        forget(path)
    assert kept(path)[0] == 401


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_looking_at_a_damaged_table_or_clearing_it_is_an_error_and_changes_nothing(damage: object, tmp_path: Path) -> None:
    path = filled(tmp_path / "t.sqlite")
    bad = damage(path.read_bytes())  # type: ignore[operator]
    path.write_bytes(bad)
    for door in (kept, forget):
        with pytest.raises(LaminaError, match=r"t\.sqlite"):
            door(path)
    assert path.read_bytes() == bad and not list(tmp_path.glob("*.corrupt-*"))


FORM = LowRank(4)


def at(setting: Setting, form: Form = FORM) -> str:
    return signature(CONV, form, USE, False, setting)


THERE = dataclasses.replace(SETTING, device_name="another CPU", threads=64, versions="torch 3", flush_denormals=True)


def put(table: TimingTable, setting: Setting, dense: float = 2.0, form: float = 1.0) -> None:
    """Times of a dense layer and of a form, as they are taken in a setting."""
    anchor = at(dataclasses.replace(setting, freezing="off"), Dense())
    table.put(anchor, {anchor: timed(dense, setting), at(setting): timed(form, setting)})


def get(table: TimingTable, setting: Setting, *forms: Form, holds: Callable[[float], bool] = steady) -> dict[str, Timing]:
    anchor = at(dataclasses.replace(setting, freezing="off"), Dense())
    return table.get(anchor, [anchor if form == Dense() else at(setting, form) for form in forms], setting, holds)


def exported(path: Path, *settings: Setting) -> Path:
    """A file of two times under each setting, exported for the first of them."""
    with TimingTable(None) as table:
        for number, setting in enumerate(settings):
            put(table, setting, form=1.0 + number)
        table.export(path, settings[0])
    return path


def test_exported_times_are_found_again_as_they_were(tmp_path: Path) -> None:
    with TimingTable.imported(exported(tmp_path / "t.json", SETTING)) as table:
        assert get(table, SETTING, FORM, LowRank(5)) == {at(SETTING): timed(1.0)}
        put(table, SETTING, form=1.5)  # on the same machine it is a table like any other
        assert get(table, SETTING, FORM) == {at(SETTING): timed(1.5)}


def test_times_of_this_machine_do_not_answer_from_a_file_while_it_is_slower(tmp_path: Path) -> None:
    with TimingTable.imported(exported(tmp_path / "t.json", SETTING)) as table:
        assert get(table, SETTING, FORM, holds=lambda then_s: False) == {}


def test_times_of_another_machine_answer_in_its_name_however_fast_this_one_is(tmp_path: Path) -> None:
    with TimingTable.imported(exported(tmp_path / "t.json", THERE)) as table:
        assert table.conditions(SETTING) == THERE
        assert get(table, SETTING, FORM, holds=lambda then_s: False) == {at(SETTING): Timing(1.0, 0.1, 7, THERE)}


def test_times_of_several_phases_are_of_one_dense_time(tmp_path: Path) -> None:
    resting = dataclasses.replace(SETTING, mode="training", freezing="first")
    awake = dataclasses.replace(resting, freezing="off")
    path = exported(tmp_path / "t.json", *(dataclasses.replace(s, device_name="another CPU") for s in (resting, awake)))
    with TimingTable.imported(path) as table:
        assert seconds(get(table, resting, FORM) | get(table, awake, FORM)) == {at(resting): 1.0, at(awake): 2.0}


@pytest.mark.parametrize("field", ["dtype", "memory_format", "mode", "freezing", "autocast"])
def test_times_of_another_machine_do_not_answer_for_a_network_run_otherwise(field: str, tmp_path: Path) -> None:
    otherwise = dataclasses.replace(SETTING, **{field: "other"})  # type: ignore[arg-type]
    with TimingTable.imported(exported(tmp_path / "t.json", THERE)) as table, pytest.raises(LaminaError, match="other"):
        get(table, otherwise, FORM)


def test_a_time_that_another_machine_lacks_is_an_error_that_names_it(tmp_path: Path) -> None:
    message = r"t.json has no time of Conv2d 6→8 3×3 as low_rank rank 5 on 2×6×9×9 \(.*another CPU"
    with TimingTable.imported(exported(tmp_path / "t.json", THERE)) as table, pytest.raises(LaminaError, match=message):
        get(table, SETTING, LowRank(5))


def test_a_time_of_another_machine_answers_for_the_inputs_dtype_it_was_taken_with(tmp_path: Path) -> None:
    use = dataclasses.replace(USE, input_dtype="bfloat16")
    keys = {at_dtype: signature(CONV, Dense(), at_dtype, False, THERE) for at_dtype in (USE, use)}
    with TimingTable(None) as table:
        table.put(keys[use], {keys[use]: timed(1.0, THERE)})
        table.export(tmp_path / "t.json", THERE)
    here = {each: signature(CONV, Dense(), each, False, SETTING) for each in keys}
    with TimingTable.imported(tmp_path / "t.json") as table:
        assert table.get(here[use], [here[use]], SETTING, steady) == {here[use]: timed(1.0, THERE)}
        with pytest.raises(LaminaError, match=r"no time of Conv2d 6→8 3×3 as dense on 2×6×9×9 \("):
            table.get(here[USE], [here[USE]], SETTING, steady)
    other = exported(tmp_path / "t.json", THERE)
    with TimingTable.imported(other) as table, pytest.raises(LaminaError, match="on 2×6×9×9 in bfloat16"):
        table.get(here[use], [here[use]], SETTING, steady)


def test_only_times_of_that_machine_are_exported_in_every_dtype_and_mode(tmp_path: Path) -> None:
    others = other_values(SETTING)
    kept = {"dtype", "memory_format", "mode", "freezing", "autocast", "runtime"}
    exported(tmp_path / "t.json", SETTING, *others.values())  # type: ignore[arg-type]
    keys = set(json.loads((tmp_path / "t.json").read_text())["timings"])
    assert keys == {at(SETTING), *(at(setting) for name, setting in others.items() if name in kept)}  # type: ignore[arg-type]


def test_only_times_that_were_asked_for_in_this_run_are_exported(tmp_path: Path) -> None:
    other = dataclasses.replace(SETTING, dtype="float64")
    with TimingTable(tmp_path / "t.sqlite") as table:
        put(table, SETTING)
        put(table, other)
    with TimingTable(tmp_path / "t.sqlite") as table:
        get(table, other, FORM, LowRank(5))
        assert table.export(tmp_path / "t.json", SETTING) == 2
    content = json.loads((tmp_path / "t.json").read_text())
    assert (set(content["dense"]), set(content["timings"])) == ({at(other, Dense())}, {at(other)})


def test_times_are_counted_by_their_setting(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        put(table, SETTING)
        put(table, THERE)
        keep(table, a=1.0)
    number, held = kept(tmp_path / "t.sqlite")
    assert number == 6 and {setting: each.times for setting, each in held.items()} == {SETTING: 2, THERE: 2}


BAD_FILES = {
    "cut short": (lambda text: text[:-9], "no readable file of timings"),
    "no file of timings": (lambda text: "[]", "no file of timings"),
    "a plan": (lambda text: '{"format": 1, "layers": {}}', "no file of timings"),
    "newer": (lambda text: text.replace('"format": 3', '"format": 4'), "made by a newer lamina"),
    "older": (lambda text: text.replace('"format": 3', '"format": 2'), "of an older lamina.*anew with lamina measure"),
    "no number": (lambda text: text.replace('"value": 0.5', '"value": "fast"'), "timings.*value"),
    "not a number": (lambda text: text.replace('"value": 0.5', '"value": NaN'), "timings.*value"),
    "a time of nothing": (lambda text: text.replace('"value": 0.5', '"value": 0'), "timings.*value"),
    "no repeats": (lambda text: text.replace('"repeats": 7', '"repeats": 0'), "timings.*repeats"),
    "a field lost": (lambda text: text.replace('"mad": 0.05,', ""), "timings.*mad"),
    "a table": (lambda text: "SQLite format 3\0" + text, "is a table, no file of timings: lamina measure writes one"),
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


def test_what_was_remembered_is_recalled_by_kind_and_key_also_by_the_next_process(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        table.remember("losses", "a", "old")
        table.remember("losses", "a", "1")
        table.remember("dense times", "a", "2")
    with TimingTable(tmp_path / "t.sqlite") as table:
        assert [table.recall(*each) for each in (("losses", "a"), ("dense times", "a"), ("losses", "b"))] == ["1", "2", None]
        assert len(table) == 0  # no times
    assert kept(tmp_path / "t.sqlite") == (0, {})
    assert kept_besides(tmp_path / "t.sqlite") == {"losses": 1, "dense times": 1}


def test_of_two_kinds_and_keys_that_read_alike_none_answers_for_the_other() -> None:
    with TimingTable(None) as table:
        table.remember("a", "b:c", "1")
        assert table.recall("a", "b") is None
        with pytest.raises(ValueError, match="'a:b' does not say in plain words"):
            table.recall("a:b", "c")


REMEMBERER = """
import sys
from pathlib import Path
from lamina.measure.table import TimingTable
with TimingTable(Path(sys.argv[1])) as table:
    for n in range(60):
        table.remember("losses", f"{sys.argv[2]}{n}", str(n))
        table.remember("losses", "of both", sys.argv[2])
"""


def test_two_processes_that_remember_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    command = [sys.executable, "-c", REMEMBERER, str(path)]
    writers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE) for name in "ab"]
    assert [writer.communicate()[1] for writer in writers] == [b"", b""]
    with TimingTable(path) as table:
        assert [table.recall("losses", f"{name}{n}") for name in "ab" for n in range(60)] == [*map(str, range(60))] * 2
        assert table.recall("losses", "of both") in ("a", "b")
    assert kept_besides(path) == {"losses": 121}


def test_a_table_made_before_anything_was_remembered_goes_on_with_all_its_times(tmp_path: Path) -> None:
    path = filled(tmp_path / "t.sqlite")
    with contextlib.closing(sqlite3.connect(path)) as before:
        before.execute("DROP TABLE kept")
        before.commit()
    content = path.read_bytes()
    assert (kept(path)[0], kept_besides(path)) == (401, {})
    assert path.read_bytes() == content  # to look changes nothing
    with quiet(), TimingTable(path) as table:
        table.remember("losses", "a", "1")
        assert (len(table), table.recall("losses", "a")) == (401, "1")
    assert (kept(path)[0], kept_besides(path)) == (401, {"losses": 1})


@pytest.mark.parametrize("target", [SETTING, THERE], ids=["here", "there"])
def test_in_a_table_of_exported_times_what_is_remembered_stays_in_memory(target: Setting, tmp_path: Path) -> None:
    path = exported(tmp_path / "t.json", target)
    before = path.read_bytes()
    with TimingTable.imported(path) as table:
        table.remember("losses", "a", "1")
        assert table.recall("losses", "a") == "1"
        get(table, SETTING, Dense(), FORM)
        assert table.export(tmp_path / "again.json", target) == (2 if target == SETTING else 0)
    assert path.read_bytes() == before
    with TimingTable.imported(path) as table:
        assert table.recall("losses", "a") is None


def test_what_is_remembered_is_not_exported(tmp_path: Path) -> None:
    with TimingTable(tmp_path / "t.sqlite") as table:
        put(table, SETTING)
        table.remember("losses", at(SETTING), "a loss")
        assert table.export(tmp_path / "t.json", SETTING) == 2
    assert "a loss" not in (tmp_path / "t.json").read_text()


def test_a_cleared_table_remembers_nothing(tmp_path: Path) -> None:
    path = filled(tmp_path / "t.sqlite")
    with TimingTable(path) as table:
        table.remember("losses", "a", "1")
    assert forget(path) == 401
    assert kept_besides(path) == {}


def test_a_table_damaged_only_where_it_remembers_is_set_aside_when_it_is_opened_and_begun_anew() -> None:
    path = filled(default_path())
    with TimingTable(path) as table:
        for number in range(9):
            table.remember("losses", str(number), f"this stands on page {number} " * 999)
    content = path.read_bytes()
    at_page = content.index(b"this stands on page 7") // 4096 + 2  # one that no other row shares
    path.write_bytes(content[: at_page * 4096] + b"\xff" * 4096 + content[(at_page + 1) * 4096 :])
    with pytest.warns(UserWarning, match="damaged.*set aside"), TimingTable(path) as table:
        assert (table.recall("losses", "7"), len(table)) == (None, 0)
        table.remember("losses", "7", "1")
    with quiet(), TimingTable(path) as table:
        assert table.recall("losses", "7") == "1"


def test_what_a_locked_table_cannot_take_is_remembered_in_memory_and_written_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_PATIENCE_S", 0.1)
    path = filled(tmp_path / "t.sqlite")
    with locked(path), pytest.warns(UserWarning, match="locked.*asked again"):
        table = TimingTable(path)
        table.remember("losses", "a", "1")
        assert table.recall("losses", "a") == "1"
    table.close()
    assert kept_besides(path) == {"losses": 1}
    lost = pytest.warns(UserWarning, match="stayed locked; 2 times, 1 other results of this run are not kept")
    with locked(path), lost, TimingTable(path) as table:
        keep(table, a=0.5)
        table.remember("losses", "b", "1")
