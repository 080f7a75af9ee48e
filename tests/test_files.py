"""Files that are whole: written in one stroke, with the modes and links that were there; read without believing anything."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
import torch
from safetensors.torch import load_file, save_file

from lamina import LaminaError
from lamina.files import (
    FileValue,
    fsync_directory,
    one_line,
    parse_model,
    read_model,
    replaced,
    replaced_folder,
    write_whole,
)

from .disk import noted
from .processes import forked


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o000], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def plainly(path: Path) -> None:
    write_whole(path, b"new")


def by_another_library(path: Path) -> None:
    """safetensors puts a file of its own in the place of the one that it is told to write."""
    with replaced(path) as temporary:
        save_file({"a": torch.ones(3)}, temporary)


WRITERS = {"plainly": plainly, "by another library": by_another_library}
each_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


# ---- written ----


def test_what_was_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    for content in (b"first", b"", b"\x00third\n"):
        write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
        assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_library_can_write_the_file(tmp_path: Path) -> None:
    by_another_library(tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [tmp_path / "w.safetensors"]


@each_writer
def test_a_new_file_has_the_mode_that_the_umask_leaves(write: Callable[[Path], None], tmp_path: Path, umask: int) -> None:
    write(tmp_path / "file")
    assert mode(tmp_path / "file") == 0o666 & ~umask


@each_writer
@pytest.mark.parametrize("kept", [0o600, 0o644, 0o664, 0o666, 0o400, 0o755], ids=oct)
def test_a_file_that_is_there_keeps_its_mode(write: Callable[[Path], None], kept: int, tmp_path: Path, umask: int) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(kept)
    write(tmp_path / "file")
    assert mode(tmp_path / "file") == kept
    assert (tmp_path / "file").read_bytes() != b"old"


def test_nobody_reads_the_temporary_file_who_may_not_read_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o600)
    before = os.umask(0)
    try:
        with replaced(tmp_path / "file") as temporary:
            assert mode(temporary) == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_stays_a_link_and_what_it_points_to_is_replaced(exists: bool, relative: bool, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "file", tmp_path / "link"
    if exists:
        file.write_bytes(b"old")
    (tmp_path / "second").symlink_to(Path("there") / "file" if relative else file)
    link.symlink_to("second" if relative else tmp_path / "second")
    write_whole(link, b"new")
    assert link.is_symlink() and (tmp_path / "second").is_symlink() and not file.is_symlink()
    assert file.read_bytes() == link.read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "link", "second", "there"]


def test_a_relative_path_is_one_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_whole(Path("file"), b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"new")]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "." * 200 + "x"], ids=["letters", "two bytes each", "dots"])
def test_a_name_as_long_as_names_may_be_is_written(name: str, tmp_path: Path) -> None:
    write_whole(tmp_path / name, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(name, b"new")]


def test_writers_beside_each_other_have_temporary_files_of_their_own(tmp_path: Path) -> None:
    with replaced(tmp_path / "file") as one, replaced(tmp_path / "file") as two:
        assert one != two and one.parent == two.parent == tmp_path
        one.write_bytes(b"one")
        two.write_bytes(b"two")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"one")]  # the outer one ends last


def test_a_temporary_file_is_always_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands under its name, a link to somewhere else above all, is not written through."""
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / f".file.{'0' * 16}").symlink_to("precious")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "precious").read_bytes() == b"precious" and not (tmp_path / "file").exists()


def test_the_old_content_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    with replaced(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half of the ")
        assert (tmp_path / "file").read_bytes() == b"old"
        temporary.write_bytes(b"half of the new")
        assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "file").read_bytes() == b"half of the new"


def failing(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    call: str, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    if exists:
        write_whole(path, b"old")
    monkeypatch.setattr(Path if call == "chmod" else os, call, failing)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == ({path: b"old"} if exists else {})


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_writer_leaves_the_old_file_and_nothing_else(error: type[BaseException], tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    with pytest.raises(error), replaced(tmp_path / "file") as temporary:
        temporary.write_bytes(b"new")
        raise error
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_the_file_is_on_the_disk_before_its_name_and_its_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def watched(descriptor: int) -> None:
        what = os.fstat(descriptor)
        names = {p.stat().st_ino: p.name for p in (tmp_path, *tmp_path.iterdir())}
        happened.append(
            ("fsync", "folder" if stat.S_ISDIR(what.st_mode) else names[what.st_ino].partition(".")[0] or "temporary")
        )
        assert stat.S_ISDIR(what.st_mode) or what.st_size == 3  # all that was written
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        happened.append(("rename", Path(new).name))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "file", b"new")
    assert happened == [("fsync", "temporary"), ("rename", "file"), ("fsync", "folder")]


def test_a_platform_that_syncs_no_folders_writes_files_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    fsync_directory(tmp_path / "nowhere")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else pytest.skip("needs /proc")
    for _ in range(5):
        write_whole(tmp_path / "file", b"new")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "other"
    if kind != "device":
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(OSError, match="not a file"):
        write_whole(path, b"new")
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert [p for p in tmp_path.iterdir() if p != path] == []


@pytest.mark.parametrize("path", ["none/file", "file/inside", "loop"])
def test_a_path_that_leads_nowhere_is_an_error_of_the_system(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError):
        write_whole(tmp_path / path, b"new")
    assert sorted(tmp_path.iterdir()) == before


KILLED = """
import sys
from pathlib import Path
from lamina.files import write_whole
path, n = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    n += 1
    write_whole(path, bytes([n % 256]) * 100_000)
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, bytes(100_000))
    for delay in range(5):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout and writer.stdout.readline() == b"ready\n"
            for _ in range(20 * delay + 1):
                found = path.read_bytes()  # a reader meanwhile, too
                assert len(found) == 100_000 and len(set(found)) == 1
            writer.send_signal(signal.SIGKILL)
        found = path.read_bytes()
        assert len(found) == 100_000 and len(set(found)) == 1


# ---- folders ----


def write_both(path: Path, content: bytes) -> None:
    with replaced_folder(path) as fresh:
        for name in ("graph", "weights"):
            (fresh / name).write_bytes(content)


def both(path: Path) -> bytes:
    """What stands in a folder's two files; they are of one writing."""
    graph, weights = (path / "graph").read_bytes(), (path / "weights").read_bytes()
    assert graph == weights and {each.name for each in path.iterdir()} == {"graph", "weights"}
    return graph


def test_a_folder_takes_the_place_of_the_earlier_one_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for content in (b"first", b"second", b""):
        write_both(path, content)
        assert both(path) == content and list(tmp_path.iterdir()) == [path]


def test_a_folder_keeps_its_mode_and_a_link_to_it_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("real")
    write_both(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and both(tmp_path / "real") == b"new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o750


STOPS = [OSError(28, "No space left on device"), KeyboardInterrupt()]


@pytest.mark.parametrize("stop", STOPS, ids=["error", "interrupt"])
@pytest.mark.parametrize(("earlier", "at"), [(True, 1), (True, 2), (False, 1)], ids=["aside", "in place", "nothing before"])
def test_where_a_rename_fails_or_is_interrupted_the_earlier_folder_stands(
    at: int, stop: BaseException, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename, calls = tmp_path / "out", os.rename, list[str]()
    if earlier:
        write_both(path, b"earlier")

    def failing(source: Any, target: Any) -> None:
        calls.append(str(target))
        if len(calls) == at:
            raise stop
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(type(stop)):
        write_both(path, b"new")
    assert list(tmp_path.iterdir()) == ([path] if earlier else [])
    assert not earlier or both(path) == b"earlier"


@pytest.mark.parametrize("stop", STOPS, ids=["error", "interrupt"])
def test_where_the_writing_fails_the_earlier_folder_was_never_touched(stop: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_both(path, b"earlier")
    with pytest.raises(type(stop)), replaced_folder(path) as fresh:
        (fresh / "graph").write_bytes(b"half")
        raise stop
    assert both(path) == b"earlier" and list(tmp_path.iterdir()) == [path]


def killed_at(rename_number: int, path: Path, *, after: bool = False) -> None:
    """A process that writes a folder and is killed in one of its renames: before it is made, or right after."""

    def work() -> None:
        rename, calls = os.rename, list[str]()

        def dying(source: Any, target: Any) -> None:
            calls.append(str(target))
            if after:
                rename(source, target)
            if len(calls) == rename_number:
                os.kill(os.getpid(), signal.SIGKILL)
            if not after:
                rename(source, target)

        os.rename = dying  # type: ignore[assignment]
        write_both(path, b"new")

    process = forked(work)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes")
@pytest.mark.parametrize(("number", "after", "left"), [(1, False, b"earlier"), (2, False, None), (2, True, b"new")])
def test_a_writer_that_is_killed_leaves_one_whole_folder_and_the_next_one_begins_with_it(
    number: int, after: bool, left: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    write_both(path, b"earlier")
    killed_at(number, path, after=after)
    if left is None:  # between the two renames: it was moved aside, and nothing stands in its place
        assert not path.exists() and both(tmp_path / ".out.before") == b"earlier"
    else:
        assert both(path) == left
    with pytest.raises(KeyboardInterrupt), replaced_folder(path):
        raise KeyboardInterrupt
    assert both(path) == (left or b"earlier") and list(tmp_path.iterdir()) == [path]
    killed_at(number, path, after=after)
    write_both(path, b"third")
    assert both(path) == b"third" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes")
def test_two_writers_of_one_folder_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "out"
    writers = [forked(lambda number=number: [write_both(path, bytes([number])) for _ in range(20)]) for number in range(2)]
    assert [os.waitpid(each, 0)[1] for each in writers] == [0, 0]
    assert both(path) in (b"\0", b"\1") and list(tmp_path.iterdir()) == [path]


def test_files_and_both_names_of_a_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = noted(monkeypatch, "rename")
    write_both(tmp_path / "out", b"first")
    assert steps == ["sync"] * 3 + ["out", "sync"]
    steps.clear()
    write_both(tmp_path / "out", b"second")
    assert steps == ["sync"] * 3 + [".out.before", "out", "sync"]


# ---- read ----


class Inner(FileValue):
    rank: int = 1
    share: float = 0.5
    sides: tuple[int, ...] = ()


class Content(FileValue):
    format: Literal[1] = 1
    name: str = ""
    inner: Inner = Inner()
    more: dict[str, Inner] = {}  # noqa: RUF012


def read(text: str | bytes, folder: Path, **options: Any) -> Content:
    path = folder / "content.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_model(path, Content, 1, LaminaError, unreadable=f"{path} is damaged", foreign=f"{path} is foreign", **options)


def test_what_was_written_is_read_equal(tmp_path: Path) -> None:
    content = Content(name="×\n\u3000", inner=Inner(rank=3, sides=(1, 2)), more={"a.b": Inner(share=1e-300)})
    assert read(content.model_dump_json(indent=1), tmp_path) == content


def test_whole_numbers_stand_for_floats(tmp_path: Path) -> None:
    assert read('{"format": 1, "inner": {"share": 2}}', tmp_path).inner.share == 2.0


DAMAGED = {
    "empty": "",
    "cut short": '{"format": 1, "na',
    "two values": '{"format": 1} {"format": 1}',
    "deep lists": "[" * 100_000,
    "deep dicts": '{"format": 1, "a": ' * 50_000,
    "deep and closed": '{"format": 1, "name": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "5,000 digits": '{"format": 1, "inner": {"rank": ' + "9" * 5000 + "}}",
    "format of 5,000 digits": '{"format": ' + "9" * 5000 + "}",
    "a name twice": '{"format": 1, "inner": {"rank": 1, "rank": 2}}',
    "format twice": '{"format": 2, "format": 1}',
    "equal twice": '{"format": 1, "name": "a", "name": "a"}',
    "a name twice, of a layer with a line break": '{"format": 1, "more": {"a\\nb": {}, "a\\nb": {}}}',
    "byte order mark": b'\xef\xbb\xbf{"format": 1}',
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "no text": b"\xff\xfe\x00",
    "zeros": bytes(40),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_is_no_json_is_damaged_and_says_so_in_a_line(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match=r"content\.json is damaged \(.+\)$") as caught:
        read(text, tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400 + len(str(tmp_path))


INFINITE = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400 + ".0"]


@pytest.mark.parametrize("number", INFINITE, ids=lambda number: number[:10])
def test_a_number_that_is_not_finite_is_refused_and_its_field_named(number: str, tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match=r"content\.json: inner\.share: Input should be a finite number$"):
        read(f'{{"format": 1, "inner": {{"share": {number}}}}}', tmp_path)


class Careless(pydantic.BaseModel):
    format: int
    share: float = 0.0


@pytest.mark.parametrize("number", INFINITE, ids=lambda number: number[:10])
def test_a_number_that_is_not_finite_is_refused_where_the_kind_would_take_it(number: str) -> None:
    with pytest.raises(Special, match=rf"^u \({number[:20]} is not a finite number\)$"):
        parse_model(f'{{"format": 1, "share": {number}}}', "here", Careless, 1, Special, unreadable="u", foreign="f")


FOREIGN = [
    "null",
    "3",
    '"format"',
    "[]",
    '["format"]',
    "{}",
    *(f'{{"format": {n}}}' for n in ('"1"', "null", "true", "1.0", "[1]")),
]


@pytest.mark.parametrize("text", FOREIGN)
def test_a_file_without_a_format_number_is_foreign(text: str, tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match=r"content\.json is foreign$"):
        read(text, tmp_path)


def test_a_file_without_the_field_by_which_its_kind_is_known_is_foreign(tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match="is foreign"):
        read('{"format": 1}', tmp_path, needs="name")
    assert read('{"format": 1, "name": "a"}', tmp_path, needs="name").name == "a"


def test_a_file_of_a_newer_format_asks_for_a_newer_lamina_whatever_it_holds(tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match=r"content\.json: made by a newer lamina \(format 2, this one reads 1\)"):
        read('{"format": 2, "colour": []}', tmp_path)


WRONG = {
    "format 0": ('{"format": 0}', "format: Input should be 1"),
    "negative format": ('{"format": -1}', "format: Input should be 1"),
    "text for a number": ('{"format": 1, "inner": {"rank": "4"}}', "inner.rank: Input should be a valid integer"),
    "a float for a whole number": ('{"format": 1, "inner": {"rank": 4.0}}', "inner.rank: Input should be a valid integer"),
    "truth for a number": ('{"format": 1, "inner": {"rank": true}}', "inner.rank: Input should be a valid integer"),
    "truth for a float": ('{"format": 1, "inner": {"share": true}}', "inner.share: Input should be a valid number"),
    "a number for text": ('{"format": 1, "name": 3}', "name: Input should be a valid string"),
    "text for a list": ('{"format": 1, "inner": {"sides": "12"}}', "inner.sides: Input should be a valid array"),
    "unknown field": ('{"format": 1, "colour": 1}', "colour: Extra inputs are not permitted"),
    "unknown field inside": ('{"format": 1, "inner": {"colour": 1}}', "inner.colour: Extra inputs are not permitted"),
    "an odd name": ('{"format": 1, "more": {"a\\nb": 3}}', r"more.a\nb: Input should be"),
    "half a surrogate pair": ('{"format": 1, "name": "\\ud800"}', "the file: Invalid JSON"),
    "deeper than needed": ('{"format": 1, "name": ' + "[" * 400 + "]" * 400 + "}", "the file: Invalid JSON: recursion limit"),
}


@pytest.mark.parametrize(("text", "says"), WRONG.values(), ids=WRONG)
def test_a_field_that_makes_no_sense_is_named_in_a_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(LaminaError) as caught:
        read(text, tmp_path)
    assert f"{tmp_path / 'content.json'}: {says}" in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["none.json", ".", "a\0b", "x" * 300], ids=["missing", "folder", "NUL", "too long"])
def test_a_path_that_cannot_be_read_is_named_in_a_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match="is damaged") as caught:
        read_model(tmp_path / name, Content, 1, LaminaError, unreadable=f"{name} is damaged", foreign="")
    assert str(caught.value).isprintable()


class Special(LaminaError):
    pass


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "colour": 1}'])
def test_an_error_is_of_the_kind_that_was_asked_for(text: str) -> None:
    with pytest.raises(Special):
        parse_model(text, "here", Content, 1, Special, unreadable="u", foreign="f")


def test_text_is_parsed_as_a_file_is_read() -> None:
    assert parse_model('{"format": 1, "name": "a"}', "here", Content, 1, Special, unreadable="u", foreign="f").name == "a"
    with pytest.raises(Special, match=r"^here: inner\.rank: "):
        parse_model(json.dumps({"format": 1, "inner": {"rank": "4"}}), "here", Content, 1, Special, unreadable="u", foreign="f")


@pytest.mark.parametrize(
    ("text", "line"),
    [("×1.66 → 2", "×1.66 → 2"), ("a\nb\r\tc", r"a\nb\r\tc"), ("a\0b", r"a\x00b"), ("\ud800", r"\ud800"), ("", "")],
)
def test_a_line_holds_only_what_can_be_printed(text: str, line: str) -> None:
    assert one_line(text) == line
