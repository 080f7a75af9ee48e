"""Folders of a JSON document and its weights, in one file or several, committed by one rename of one file.

The weights stand under names that hold their hashes, and the document, which names them, is written last. So a reader finds the
old pair or the new one, whenever a writer is killed, and a hash over everything tells a damaged file. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, final

import pydantic
import torch
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from .errors import ArtifactError
from .files import PATIENCE_S, FileValue, locked, one_line, replaced, write_whole

_LOCK = ".lamina.lock"
_WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors")
CARD = "README.md"
_SEAL = re.compile(rb"\n<!-- lamina ([0-9a-f]{64}) -->\n")  # ends a card that nobody has touched: the hash of what stands above
WRITING = ".lamina.writing"  # a folder for weights whose hash, and so whose name, is not known yet
_SCRATCH = re.compile(r"\.[a-z.]+\.[0-9a-f]{16}")  # what a killed writer leaves behind beside it


class WeightsFile(FileValue):
    """A file of weights, and its hash."""

    weights: str = pydantic.Field(pattern=rf"^{_WEIGHTS.pattern}$")
    sha256: str


@final
class Saved(WeightsFile):
    """What belongs to a document in a folder: the file of its weights, further ones where there are several, and all hashes.

    Where there are none, nothing is written of further ones: that is the format of before.
    """

    document: str
    further: tuple[WeightsFile, ...] = pydantic.Field(default=())

    @pydantic.model_serializer(mode="wrap")
    def _without_none(self, write: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value or name != "further"}


Document = TypeVar("Document", bound=pydantic.BaseModel)
Card = Callable[[Sequence[str]], str]


def write_folder(
    folder: Path,
    name: str,
    document: pydantic.BaseModel,
    tensors: Mapping[str, Tensor],
    *,
    extra: frozenset[str] = frozenset(),
    card: Card | None = None,
) -> None:
    """Write a document and its weights; an earlier pair is replaced, whatever else stands there is not.

    Args:
        folder: Where to; it and its parents are made. A link to a folder is followed.
        name: The document's file.
        document: What it holds; its field ``saved`` is filled in.
        tensors: The weights; tensors that are one are stored once.
        extra: Files that may stand there too, and are gone afterwards: they belong to the weights.
        card: From the names of the files of weights to the text of a ``README.md``, which is written for whoever reads, and by
            no one read. An earlier one is replaced; one that somebody has changed is another file.

    Raises:
        ArtifactError: The folder holds other files, cannot be written, or a tensor cannot be stored; nothing has changed.
    """
    with writer(folder, name, extra) as target:
        with _nothing_new_on_error(target, name):
            fresh = emptied(target / WRITING) / "weights"
            weights = named(write_tensors(fresh, tensors))
            os.replace(fresh, target / weights.weights)
            _announce(target, name, document, [weights], card)
        _forget_others(target, name, [weights], card)


@contextmanager
def writer(folder: Path, name: str, extra: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Be the one writer of a folder, which is made where it is missing; gives its path with links followed.

    Args:
        folder: See `write_folder`.
        name: The document's file.
        extra: See `write_folder`.

    Raises:
        ArtifactError: The folder holds other files, somebody else writes there, or it cannot be written.
    """
    try:
        target = folder.resolve()
        _forbid_others(target, name, extra)
        with _made(target), locked(target / _LOCK):
            yield target
    except Timeout as error:
        raise ArtifactError(f"{folder} cannot be written: somebody else is saving there for {PATIENCE_S:.0f} s") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder} cannot be written: {error}") from error


def commit(
    target: Path, name: str, document: pydantic.BaseModel, weights: Sequence[WeightsFile], card: Card | None = None
) -> None:
    """Let a document name its weights, which stand in the folder already; what it does not name is removed afterwards.

    Raises:
        OSError: The document cannot be written; the earlier one stands.
    """
    _announce(target, name, document, weights, card)
    _forget_others(target, name, weights, card)


def named(sha256: str) -> WeightsFile:
    """A file of weights of a hash, under the name that it gets."""
    return WeightsFile(weights=f"model-{sha256[:16]}.safetensors", sha256=sha256)


def _announce(target: Path, name: str, document: pydantic.BaseModel, weights: Sequence[WeightsFile], card: Card | None) -> None:
    if card is not None:  # now, while a full disk still changes nothing
        (target / WRITING / CARD).write_bytes(_sealed(card([each.weights for each in weights])))
    document = document.model_copy(update={"saved": None})
    first, *further = weights
    saved = Saved(weights=first.weights, sha256=first.sha256, document=_hash(document), further=tuple(further))
    whole = document.model_copy(update={"saved": saved})
    write_whole(target / name, (whole.model_dump_json(indent=1) + "\n").encode())


def _forget_others(target: Path, name: str, weights: Sequence[WeightsFile], card: Card | None) -> None:
    with suppress(OSError):  # the pair stands; what cannot be removed now may be by the next writer
        kept = {name, _LOCK, *(each.weights for each in weights)}
        if card is not None:
            os.replace(target / WRITING / CARD, target / CARD)
            kept.add(CARD)
        _keep_only(target, kept)


def forbid_unwritable(folder: Path, name: str, extra: frozenset[str] = frozenset()) -> None:
    """Refuse, before the work rather than after it, a folder where `write_folder` could not write that document.

    Args:
        folder: The folder.
        name: The document.
        extra: See `write_folder`.

    Raises:
        ArtifactError: It holds other files, or it or its nearest parent cannot be written.
    """
    try:
        target = folder.resolve()
        _forbid_others(target, name, extra)
        with tempfile.TemporaryFile(dir=next(there for there in (target, *target.parents) if there.exists())):
            pass
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error}") from error


def read_folder(
    folder: Path, name: str, read: Callable[[Path], Document], *, what: str = "saved network"
) -> tuple[Document, dict[str, Tensor]]:
    """Read a document and its weights, and hold both against their hashes.

    A writer may replace both meanwhile: then the new ones are read.

    Args:
        folder: What `write_folder` wrote.
        name: The document's file.
        read: Reads it.
        what: What the folder should be, for messages.

    Returns:
        The document, and tensors that lie in the file: copy them before the file may change.

    Raises:
        ArtifactError: A file is missing or damaged. What ``read`` raises goes through.
    """
    path = folder / name
    failed: Saved | None = None
    while True:
        _forbid_missing(path, what)
        document = read(path)
        saved: Saved | None = getattr(document, "saved", None)
        if saved is None:
            raise ArtifactError(f"{folder} is not a {what}: its {name} names no weights")
        if saved.document != _hash(document.model_copy(update={"saved": None})):
            raise ArtifactError(f"{path} is damaged: its content is not what was saved")
        found: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        for each in (saved, *saved.further):
            try:
                stored, told = _read(folder / each.weights, each.sha256)
            except (OSError, SafetensorError, ValueError) as error:
                if saved == failed:  # no writer has come between
                    if isinstance(error, FileNotFoundError):
                        raise ArtifactError(f"{folder} is not whole: it has no {each.weights}") from error
                    raise ArtifactError(f"{folder / each.weights} is damaged: {error}") from error
                failed = saved
                break
            found |= stored
            aliases |= told
        else:
            return document, _under_all_names(found, aliases)


def size(folder: str | os.PathLike[str]) -> int:
    """Bytes of a document, its weights and its card."""
    return sum(entry.stat().st_size for entry in Path(folder).iterdir())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and every byte of some tensors: safetensors itself does not notice a flipped bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _forbid_missing(path: Path, what: str) -> None:
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path.parent} cannot be read: {error}") from error
    if not there:
        raise ArtifactError(f"{path.parent} is not a {what}: it has no {path.name}; name the folder that it was saved to")


def _hash(document: pydantic.BaseModel) -> str:
    return hashlib.sha256(document.model_dump_json().encode()).hexdigest()


def _forbid_others(target: Path, name: str, extra: frozenset[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file: choose an empty or a new folder")
    for entry in target.iterdir():
        if entry.name == WRITING:
            ours = not entry.is_file()  # it may be gone by now: another writer's
        elif entry.is_dir():
            ours = False
        elif entry.name == name:
            ours = _is_saved(entry)
        elif entry.name == CARD:
            ours = _is_sealed(entry)
        else:
            known = entry.name in {_LOCK, *extra}
            ours = known or bool(_WEIGHTS.fullmatch(entry.name) or _SCRATCH.fullmatch(entry.name))
        if not ours:
            raise ArtifactError(
                f"{target} holds other files than a saved network ({entry.name}): choose an empty or a new folder"
            )


def _is_saved(path: Path) -> bool:
    """Whether a file is a document that `write_folder` wrote, damaged perhaps."""
    return b'"saved"' in path.read_bytes()


def _sealed(card: str) -> bytes:
    """A card, and below it by what `_is_sealed` knows it as long as nobody has changed it."""
    text = card.encode()
    return text + f"\n<!-- lamina {hashlib.sha256(text).hexdigest()} -->\n".encode()


def _is_sealed(path: Path) -> bool:
    content = path.read_bytes()
    seal = _SEAL.search(content, max(0, len(content) - 100))
    return bool(seal and seal.end() == len(content) and hashlib.sha256(content[: seal.start()]).hexdigest().encode() == seal[1])


@contextmanager
def _nothing_new_on_error(target: Path, name: str) -> Iterator[None]:
    before, document = {entry.name for entry in target.iterdir()}, _inode(target / name)
    try:
        yield
    except BaseException:
        if _inode(target / name) == document:  # else the error came after the rename: the new weights are named already
            _keep_only(target, before)
        raise


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _keep_only(target: Path, names: Collection[str]) -> None:
    for entry in target.iterdir():
        if entry.name == WRITING:
            shutil.rmtree(entry)
        elif entry.name not in names:
            entry.unlink(missing_ok=True)


def emptied(folder: Path) -> Path:
    """A folder in which nothing is."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


@contextmanager
def _made(target: Path) -> Iterator[None]:
    """A folder and its parents, made where they are missing; after an error those are gone again."""
    missing = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            try:
                folder.rmdir()
            except OSError:
                break  # somebody else has put something there
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file of tensors in one stroke, those that are one once; what it answers tells `read_tensors` a damaged file.

    Raises:
        ArtifactError: A tensor cannot be stored; the message names it.
        OSError: The file cannot be written.
    """
    stored, aliases = _once_each(tensors)
    with replaced(path) as scratch:
        save_file(stored, scratch, metadata=metadata(aliases))
    return _hash_of(path)


def metadata(aliases: Mapping[str, str]) -> dict[str, str]:
    """What a file of weights says of itself: for every other name of a shared tensor the name it is stored under."""
    return {"lamina": "2"} | {f"alias:{alias}": kept for alias, kept in aliases.items()}


def _hash_of(path: Path) -> str:
    # Mapped, not read: that takes half as long.
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return hashlib.sha256().hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def _once_each(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, each once, and for every other name of a shared tensor the name it is stored under."""
    kept: dict[tuple[Any, ...], str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ArtifactError(f"{name}: it is on the meta device and has no values to save")
        what = tensor.layout if tensor.layout != torch.strided else tensor.dtype
        if tensor.layout != torch.strided or tensor.is_nested or code_of(tensor.dtype) is None:
            raise ArtifactError(f"{name}: a tensor of {what} cannot be stored: make its buffer persistent=False, or convert it")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        key = place if tensor.numel() else (name,)
        if key in kept:
            aliases[name] = kept[key]
        else:
            kept[key] = name
            stored[name] = tensor.contiguous()
    # Two names may still be views into one storage, which safetensors refuses.
    seen: set[int] = set()
    for name, tensor in stored.items():
        pointer = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return stored, aliases


@cache
def code_of(dtype: torch.dtype) -> str | None:
    """What a safetensors file calls a data type, such as BF16; None where it holds none of that type."""
    try:
        empty = save({"": torch.empty(0, dtype=dtype, device="cpu")})
    except (KeyError, ValueError, RuntimeError, SafetensorError):
        return None
    code: str = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])[""]["dtype"]
    return code


def read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote; the tensors lie in the file: copy them before it may change.

    Raises:
        ArtifactError: The file is not what was written.
        OSError: It cannot be read.
    """
    return _under_all_names(*_read(path, sha256))


def _read(path: Path, sha256: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what it says of names that it stores none for."""
    with ThreadPoolExecutor(1) as beside:  # hashing takes a third of a load
        reading = beside.submit(_stored, path)
        if _hash_of(path) != sha256:
            raise ArtifactError(f"{path} is damaged: its content is not what was saved")
        return reading.result()


def _under_all_names(stored: dict[str, Tensor], told: Mapping[str, str]) -> dict[str, Tensor]:
    for key, kept in told.items():
        if key.startswith("alias:") and kept in stored:
            stored[key.removeprefix("alias:")] = stored[kept]
    return stored


def _stored(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - only has keys()
    except RuntimeError as error:  # PyTorch's word for a file that is gone meanwhile
        raise OSError(one_line(str(error))) from error
