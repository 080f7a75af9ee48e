"""A document and its weights in a folder: one rename commits, a hash tells damage, and what is not ours stays."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamina import files
from lamina import folder as folders
from lamina.errors import ArtifactError, LaminaError
from lamina.files import FileValue, read_model
from lamina.folder import Saved, digest, read_folder, read_tensors, size, write_folder, write_tensors

from .disk import noted
from .processes import forked

NAME = "plan.json"


class Document(FileValue):
    """A document that says which network its weights are."""

    format: int = 1
    number: int = 0
    saved: Saved | None = None


def read_document(path: Path) -> Document:
    return read_model(path, Document, 1, ArtifactError, unreadable=f"{path}: unreadable", foreign=f"{path}: something else")


def tensors(number: int = 0) -> dict[str, Tensor]:
    return {"weight": torch.full((4, 2), float(number)), "bias": torch.tensor([float(number)])}


def write(folder: Path, number: int = 0, given: Mapping[str, Tensor] | None = None, **more: Any) -> None:
    write_folder(folder, NAME, Document(number=number), tensors(number) if given is None else given, **more)


def read(folder: Path) -> tuple[Document, dict[str, Tensor]]:
    document, found = read_folder(folder, NAME, read_document)
    return document.model_copy(update={"saved": None}), found


def holds(folder: Path, number: int) -> bool:
    """Whether a folder holds the pair of a number, and not the document of one with the weights of another."""
    document, found = read(folder)
    wanted = tensors(number)
    return (
        document == Document(number=number)
        and found.keys() == wanted.keys()
        and all(torch.equal(found[name], wanted[name]) for name in wanted)
    )


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("model-*.safetensors")
    return path


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, every folder with None."""
    return {
        str(entry.relative_to(folder)): entry.read_bytes() if entry.is_file() else None for entry in sorted(folder.rglob("*"))
    }


def ended_well(process: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def refused(folder: Path, message: str, number: int = 1, given: Mapping[str, Tensor] | None = None) -> None:
    """Writing raises in one line, and the folder holds what it held."""
    before = content(folder) if folder.is_dir() else None
    with pytest.raises(ArtifactError, match=message) as caught:
        write(folder, number, given)
    assert "\n" not in str(caught.value)
    assert (content(folder) if folder.is_dir() else None) == before


# ---- one rename commits ----


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 3)
    assert holds(tmp_path, 3)


def test_a_reader_finds_the_old_pair_until_the_document_is_renamed_and_the_new_one_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    rename, seen = os.replace, []

    def watched(source: Any, target: Any) -> None:
        before = holds(tmp_path, 1)
        rename(source, target)
        seen.append((Path(target).name, before, holds(tmp_path, 2 if Path(target).name == NAME else 1)))

    monkeypatch.setattr(os, "replace", watched)
    write(tmp_path, 2)
    assert [name for name, _, _ in seen][-1] == NAME and len(seen) == 3, "the weights under two names, the document last"
    assert all(old and new for _, old, new in seen)


def test_the_document_is_written_when_its_weights_stand_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, found = folders.write_whole, []

    def looking(path: Path, text: bytes) -> None:
        found.append((tmp_path / json.loads(text)["saved"]["weights"]).is_file())
        whole(path, text)

    monkeypatch.setattr(folders, "write_whole", looking)
    write(tmp_path)
    assert found == [True]


def test_a_reader_overtaken_by_a_writer_reads_the_new_pair(tmp_path: Path) -> None:
    write(tmp_path, 1)
    late = [lambda: write(tmp_path, 2)]

    def slow(path: Path) -> Document:
        document = read_document(path)
        if late:
            late.pop()()
        return document

    document, found = read_folder(tmp_path, NAME, slow)
    assert document.number == 2 and torch.equal(found["weight"], tensors(2)["weight"])


def test_what_was_read_stays_what_it_is_while_the_folder_is_written_anew(tmp_path: Path) -> None:
    write(tmp_path, 1)
    _, found = read(tmp_path)
    write(tmp_path, 2)
    assert torch.equal(found["weight"], tensors(1)["weight"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(1, "Operation not permitted")], ids=["interrupt", "error"])
def test_an_error_after_the_commit_does_not_lose_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    write(tmp_path, 1)
    old, unlink = weights_of(tmp_path), Path.unlink

    def failing(path: Path, missing_ok: bool = False) -> None:
        if path == old:
            raise error
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        try:
            write(tmp_path, 2)
        except KeyboardInterrupt:
            assert error is KeyboardInterrupt
    assert holds(tmp_path, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes to kill")
def test_a_writer_killed_at_any_moment_leaves_a_folder_that_loads_and_the_next_one_clears_its_leftovers(tmp_path: Path) -> None:
    write(tmp_path, 0)
    draw = random.Random(0)
    left = 0

    def forever() -> None:
        number = 0
        while True:
            number += 1
            write(tmp_path, number)

    for _ in range(20):
        process = forked(forever)
        time.sleep(draw.uniform(0.001, 0.03))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        document, _ = read(tmp_path)
        assert holds(tmp_path, document.number)
        left += len(content(tmp_path)) > 2
    write(tmp_path, 7)
    assert holds(tmp_path, 7) and content(tmp_path).keys() == {NAME, weights_of(tmp_path).name}


def test_the_next_writer_clears_whatever_a_killed_one_can_leave(tmp_path: Path) -> None:
    write(tmp_path, 0)
    (tmp_path / ".lamina.writing").mkdir()
    # What safetensors itself calls a file that it is writing, it alone knows.
    for left in (".lamina.writing/weights", ".lamina.writing/.tmpMd19sK", ".plan.json.0123456789abcdef", ".lamina.lock"):
        (tmp_path / left).write_bytes(b"half of it")
    (tmp_path / "model-0123456789abcdef.safetensors").write_bytes(b"weights whose document never came")
    write(tmp_path, 1)
    assert holds(tmp_path, 1) and content(tmp_path).keys() == {NAME, weights_of(tmp_path).name}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes")
def test_two_writers_and_a_reader_never_meet_a_mixture_or_an_error(tmp_path: Path) -> None:
    target = tmp_path / "saved"
    write(target, 0)

    def writer(numbers: range) -> Callable[[], None]:
        return lambda: [write(target, number) for number in numbers] and None

    writers = [forked(writer(range(first, 40, 2))) for first in (1, 2)]
    waiting, seen = set(writers), set()
    while waiting:
        document, found = read(target)
        seen.add(document.number)
        assert torch.equal(found["weight"], tensors(document.number)["weight"])
        for process in list(waiting):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                waiting.remove(process)
                assert status == 0
    assert len(seen) > 1
    assert content(target).keys() == {NAME, weights_of(target).name} and [*tmp_path.iterdir()] == [target]


def test_who_waits_too_long_for_another_writer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(files, "PATIENCE_S", 0.05)
    with FileLock(tmp_path / ".lamina.lock"):
        refused(tmp_path, "somebody else is saving there", 2)
    write(tmp_path, 2)


def test_every_file_is_on_the_disk_before_the_document_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = noted(monkeypatch, "replace")
    write(tmp_path)
    renames = [number for number, step in enumerate(steps) if step != "sync"]
    assert steps[0] == "sync" and "sync" in steps[renames[-2] : renames[-1]] and steps[-1] == "sync"


# ---- damage is noticed ----


def flipped(path: Path, places: Iterable[int]) -> Iterator[None]:
    """Flip every bit at some places of a file, one at a time, and put it right again."""
    whole = path.read_bytes()
    for place in places:
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            yield
    path.write_bytes(whole)


def test_every_flipped_bit_of_the_weights_is_noticed(tmp_path: Path) -> None:
    # The header holds names, types, shapes and which tensors are one; the rest are values.
    shared, path = torch.randn(2, 2), tmp_path / "t.safetensors"
    sha256 = write_tensors(path, {"a": shared, "b": shared, "c": torch.randn(50)})
    length = len(path.read_bytes())
    head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for _ in flipped(path, [*range(head), *range(head, length, 7), length - 1]):
        with pytest.raises(ArtifactError, match="is damaged"):
            read_tensors(path, sha256)
    assert read_tensors(path, sha256).keys() == {"a", "b", "c"}


def test_every_flipped_bit_of_the_document_is_noticed_or_harmless(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path, noticed = tmp_path / NAME, 0
    for _ in flipped(path, range(0, len(path.read_bytes()))):
        try:
            assert holds(tmp_path, 1), path.read_bytes()
        except LaminaError as error:
            assert "\n" not in str(error)
            noticed += 1
    assert noticed > 1000 and holds(tmp_path, 1)


@pytest.mark.parametrize("length", [0, 5, -1])
@pytest.mark.parametrize("which", ["weights", "document"])
def test_a_file_cut_short_is_noticed(tmp_path: Path, which: str, length: int) -> None:
    write(tmp_path)
    path = weights_of(tmp_path) if which == "weights" else tmp_path / NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:length] if which == "weights" else whole[: length - 2 if length < 0 else length])
    with pytest.raises(ArtifactError, match=r"damaged|unreadable"):
        read(tmp_path)


def test_whole_weights_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "saved")
    sha256 = hashlib.sha256(b"not at all").hexdigest()
    weights_of(tmp_path / "saved").write_bytes(b"not at all")
    whole = json.loads((tmp_path / "saved" / NAME).read_text())
    whole["saved"]["sha256"] = sha256
    (tmp_path / "saved" / NAME).write_text(json.dumps(whole))
    with pytest.raises(ArtifactError, match=r"saved/model-.* is damaged"):
        read(tmp_path / "saved")


@pytest.mark.parametrize(
    "name",
    [
        "../model-0123456789abcdef.safetensors",
        "/etc/passwd",
        "sub/model-0123456789abcdef.safetensors",
        "model.safetensors",
        "",
        "model-0123456789abcdef.safetensors\n",
    ],
)
def test_a_document_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    target = tmp_path / "saved"
    write(target)
    whole = json.loads((target / NAME).read_text())
    elsewhere = Path(os.path.normpath(target / (name or "empty")))
    if elsewhere.is_relative_to(tmp_path):
        elsewhere.parent.mkdir(exist_ok=True)
        elsewhere.write_bytes(weights_of(target).read_bytes())
    whole["saved"]["weights"] = name
    (target / NAME).write_text(json.dumps(whole))
    with pytest.raises(ArtifactError, match=r"saved\.weights"):
        read(target)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not a saved network: it has no plan\.json"):
        read(tmp_path)
    with pytest.raises(ArtifactError, match=r"is not a song: it has no plan\.json"):
        read_folder(tmp_path, NAME, read_document, what="song")
    with pytest.raises(ArtifactError, match=r"cannot be read|has no plan"):
        read(tmp_path / "a\0b")
    write(tmp_path)
    gone = weights_of(tmp_path)
    gone.unlink()
    with pytest.raises(ArtifactError, match=f"is not whole: it has no {gone.name}"):
        read(tmp_path)
    (tmp_path / NAME).write_text(Document().model_dump_json())
    with pytest.raises(ArtifactError, match=r"its plan\.json names no weights"):
        read(tmp_path)


def test_a_hash_tells_names_types_shapes_and_values_apart() -> None:
    base = digest({"a": torch.zeros(4), "b": torch.ones(1)})
    assert digest({"b": torch.ones(1), "a": torch.zeros(4)}) == base, "the order is no matter"
    others = [
        {"c": torch.zeros(4), "b": torch.ones(1)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(1)},
        {"a": torch.zeros(2, 2), "b": torch.ones(1)},
        {"a": torch.zeros(4), "b": torch.full((1,), 2.0)},
    ]
    assert len({base, *map(digest, others)}) == 5


# ---- what is stored ----


def test_a_tensor_under_two_names_is_stored_once_and_read_under_both(tmp_path: Path) -> None:
    one = torch.randn(64)
    path = tmp_path / "t.safetensors"
    found = read_tensors(path, write_tensors(path, {"a": one, "b": one, "c": one.detach()}))
    assert load_file(path).keys() == {"a"} and found.keys() == {"a", "b", "c"}
    assert found["a"] is found["b"] is found["c"] and torch.equal(found["a"], one)


def test_tensors_at_one_address_are_one_only_if_they_are_read_alike(tmp_path: Path) -> None:
    square = torch.randn(3, 3)
    given = {
        "square": square,
        "transposed": square.T,
        "other shape": square.view(9),
        "other type": square.view(torch.int32),
        "a part": square[:1],
        "none": square[:0],
        "none either": torch.empty(0),
    }
    path = tmp_path / "t.safetensors"
    found = read_tensors(path, write_tensors(path, given))
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_views_are_stored_as_what_they_show(tmp_path: Path) -> None:
    numbers = torch.complex(torch.arange(4.0), torch.ones(4))
    given = {
        "expanded": torch.ones(1, 1).expand(2, 3),
        "conjugated": numbers.conj(),
        "negated": numbers.conj().imag,
        "strided": torch.arange(9.0).view(3, 3)[:, 1],
        "channels last": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    path = tmp_path / "t.safetensors"
    found = read_tensors(path, write_tensors(path, given))
    for name, tensor in given.items():
        assert torch.equal(found[name], tensor.resolve_conj().resolve_neg()), name


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_every_type_that_safetensors_knows_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    path, tensor = tmp_path / "t.safetensors", torch.ones(5).to(dtype)
    found = read_tensors(path, write_tensors(path, {"t": tensor}))["t"]
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


UNSTORABLE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    "CSR": (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
    "complex128": (lambda: torch.ones(3, dtype=torch.complex128), "complex128"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qint8"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "jagged"),
    "meta": (lambda: torch.ones(3, device="meta"), "on the meta device"),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own prototypes
@pytest.mark.parametrize(("make", "what"), UNSTORABLE.values(), ids=UNSTORABLE)
def test_a_tensor_that_cannot_be_stored_is_named_and_nothing_is_changed(
    tmp_path: Path, make: Callable[[], Tensor], what: str
) -> None:
    write(tmp_path / "old", 1)
    refused(tmp_path / "old", f"^buffers.adjacency: .*{what}", 2, {"a": torch.ones(1), "buffers.adjacency": make()})
    refused(tmp_path / "new", f"^buffers.adjacency: .*{what}", 2, {"buffers.adjacency": make()})
    assert not (tmp_path / "new").exists() and holds(tmp_path / "old", 1)


# ---- what is not ours stays ----


FOREIGN: dict[str, Callable[[Path], object]] = {
    "somebody else's weights": lambda folder: save_file({"precious": torch.ones(3)}, folder / "model.safetensors"),
    "a bare document": lambda folder: (folder / NAME).write_text(Document().model_dump_json(exclude_none=True)),
    "another plan.json": lambda folder: (folder / NAME).write_text('{"holidays": []}'),
    "an empty plan.json": lambda folder: (folder / NAME).touch(),
    "a folder called plan.json": lambda folder: (
        (folder / NAME).mkdir(),
        (folder / NAME / "thesis.tex").write_text("years of work"),
    ),
    "an empty folder called plan.json": lambda folder: (folder / NAME).mkdir(),
    "a folder with the name of weights": lambda folder: (folder / "model-0123456789abcdef.safetensors").mkdir(),
    "a hidden file": lambda folder: (folder / ".gitignore").touch(),
    "a hidden file with a long name": lambda folder: (folder / ".plan.json.swp").touch(),
    "a file with the name of our scratch folder": lambda folder: (folder / ".lamina.writing").touch(),
    "another document of ours": lambda folder: (folder / "supernet.json").write_text('{"saved": {}}'),
    "a saved network with a note beside it": lambda folder: (write(folder, 5), (folder / "README.md").write_text("mine")),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_with_anything_that_is_not_ours_stays_as_it_is(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path)
    refused(tmp_path, "holds other files than a saved network .*: choose an empty or a new folder")


@pytest.mark.parametrize("name", [".lamina.writing", ".lamina.lock", "model-0123456789abcdef.safetensors"])
def test_what_another_writer_of_ours_has_just_removed_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    list_all = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([*list_all(self), self / name]))
    write(tmp_path, 1)
    assert holds(tmp_path, 1)


def test_a_file_in_the_folders_place_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    refused(tmp_path / "out", "out is a file")
    refused(tmp_path / "out" / "below", "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_files_that_belong_to_the_weights_go_with_them(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "best.json").touch()
    with pytest.raises(ArtifactError, match=r"best\.json"):
        write(tmp_path, 1)
    write(tmp_path, 1, extra=frozenset({"best.json"}))
    assert not (tmp_path / "best.json").exists() and holds(tmp_path, 1)


def test_a_damaged_pair_of_ours_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1)
    weights_of(tmp_path).write_bytes(b"")
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:-5])
    write(tmp_path, 2)
    assert holds(tmp_path, 2)


# ---- links, modes, parents, permissions ----


def test_a_link_to_a_folder_is_followed_and_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    for number in (1, 2):
        write(link, number)
        assert link.is_symlink() and holds(real, number) and holds(link, number)


def test_links_that_lead_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refused(tmp_path / "a", "a cannot be written: ")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "b").is_symlink()
    with pytest.raises(ArtifactError):
        read(tmp_path / "a")


def test_the_current_folder_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        write(Path("."), number)
        assert holds(Path("."), number) and holds(tmp_path, number)


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_have_the_mode_that_the_umask_leaves(
    tmp_path: Path, umask: Callable[[int], object], mask: int, mode: int
) -> None:
    umask(mask)
    write(tmp_path / "saved")
    modes = {stat.S_IMODE(entry.stat().st_mode) for entry in (tmp_path / "saved").iterdir()}
    assert modes == {mode} and stat.S_IMODE((tmp_path / "saved").stat().st_mode) == 0o777 & ~mask


def test_a_private_document_stays_private(tmp_path: Path, umask: Callable[[int], object]) -> None:
    write(tmp_path, 1)
    (tmp_path / NAME).chmod(0o600)
    write(tmp_path, 2)
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600


def failing(*_: Any, **__: Any) -> NoReturn:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["save_file", "write_whole"])
def test_when_the_disk_is_full_nothing_has_changed_and_no_parent_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write(tmp_path / "old", 1)
    monkeypatch.setattr(folders, step, failing)
    refused(tmp_path / "old", "old cannot be written: .*No space left", 2)
    refused(tmp_path / "a" / "b" / "c", "c cannot be written: .*No space left")
    assert holds(tmp_path / "old", 1) and [entry.name for entry in tmp_path.iterdir()] == ["old"]


def test_after_an_error_no_parent_goes_that_somebody_else_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def others(*_: Any, **__: Any) -> NoReturn:
        (tmp_path / "a" / "theirs").touch()
        failing()

    monkeypatch.setattr(folders, "save_file", others)
    with pytest.raises(ArtifactError):
        write(tmp_path / "a" / "b")
    assert content(tmp_path).keys() == {"a", "a/theirs"}


def as_nobody(work: Callable[[], object]) -> None:
    """Run something as a user without rights, who may be nobody else than this one."""
    if os.geteuid():
        work()
        return

    def without_rights() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        work()

    assert ended_well(forked(without_rights))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs users")
def test_what_permissions_forbid_is_said_in_one_line() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        write(root / "closed", 1)
        write(root / "readable", 1)
        write(root / "unreadable", 1)
        weights_of(root / "unreadable").chmod(0)
        (root / "readable").chmod(0o555)
        (root / "closed").chmod(0)

        def tries() -> None:
            for action, folder in (
                (read, "closed"),
                (read, "closed/below"),
                (read, "unreadable"),
                (write, "closed"),
                (write, "closed/below"),
                (write, "readable"),
                (write, "readable/below"),
            ):
                with pytest.raises(ArtifactError, match=rf"{folder}.*Permission denied") as caught:
                    action(root / folder)
                assert "\n" not in str(caught.value)
            assert holds(root / "readable", 1)

        as_nobody(tries)
        (root / "closed").chmod(0o755)
        (root / "readable").chmod(0o755)
        assert holds(root / "closed", 1) and content(root / "readable").keys() == {
            NAME,
            weights_of(root / "readable").name,
        }


def test_the_size_is_that_of_all_files(tmp_path: Path) -> None:
    write(tmp_path)
    assert size(tmp_path) == sum(len(each) for each in content(tmp_path).values() if each) > 0
