"""Weights in safetensors files: found by file, index or folder, read by the slice, and every broken one named in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lamina import ArtifactError, load_model, weights
from lamina.weights import Checkpoint

TENSORS = {"a": torch.arange(24.0).view(6, 4), "b": torch.tensor(3), "c": torch.randn(5).bfloat16(), "d": torch.empty(0, 4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({name: TENSORS[name] for name in "ab"}, tmp_path / "one.safetensors")
    save_file({name: TENSORS[name] for name in "cd"}, tmp_path / "two.safetensors")
    index({"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", "d": "two.safetensors"}, tmp_path)
    return tmp_path


def index(named: object, folder: Path) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": named}))
    return path


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_every_tensor_is_found_with_its_type_shape_and_bits(folder: Path, name: str) -> None:
    found = Checkpoint.open(folder / name)
    assert found.tensors.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        stored = found.tensors[key]
        assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(found.read(key), tensor)
    assert torch.equal(found.read("a", 2, 5), TENSORS["a"][2:5])


@pytest.mark.parametrize("size", [1, 16, 40, 1000])
@pytest.mark.parametrize("rows", [(0, None), (0, 6), (1, 4), (2, 2)])
def test_slices_are_the_rows_in_their_order(
    folder: Path, rows: tuple[int, int | None], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SLICE_BYTES", size)
    found = Checkpoint.open(folder)
    slices = list(found.slices("a", *rows))
    assert all(part.numel() * 4 <= max(size, 16) for part in slices)
    assert torch.equal(torch.cat([*slices, torch.empty(0, 4)]), TENSORS["a"][slice(*rows)])
    assert torch.equal(next(found.slices("b")), TENSORS["b"])


def test_the_hash_tells_every_byte_apart(folder: Path) -> None:
    before = Checkpoint.open(folder).digest()
    assert Checkpoint.open(folder).digest() == before
    path = folder / "two.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Checkpoint.open(folder).digest() != before


def rewritten(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such file": (lambda f: (f / "one.safetensors").unlink(), r"one\.safetensors is missing, and model\..* names it"),
    "cut short": (
        lambda f: (f / "one.safetensors").write_bytes(b"0123456789"),
        r"one\.safetensors: cut short, or no safetensors",
    ),
    "a folder for a file": (
        lambda f: ((f / "one.safetensors").unlink(), (f / "one.safetensors").mkdir()),
        r"one\.safetensors is missing",
    ),
    "a tensor that is not there": (lambda f: index({"x": "one.safetensors"}, f), r"x is not in one\.safetensors"),
    "a file elsewhere": (
        lambda f: index({"a": "../one.safetensors"}, f),
        r"'\.\./one\.safetensors', which is no file beside it",
    ),
    "an index of numbers": (lambda f: index({"a": 3}, f), "not an index: it has no weight_map"),
    "an empty index": (lambda f: index({}, f), "not an index"),
    "a list for an index": (rewritten("[]"), "not an index"),
    "an index cut short": (rewritten('{"weight_map": {"a"'), "not a readable index"),
    "two indices": (lambda f: (f / "x.safetensors.index.json").touch(), "2 indices are in it"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "2 files .* and no index"),
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], "there are no weights in it"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_named_in_a_line(change: Callable[[Path], object], message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_meanwhile_is_named(folder: Path) -> None:
    found = Checkpoint.open(folder)
    (folder / "one.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"one\.safetensors: a cannot be read any more"):
        found.read("a")
    with pytest.raises(ArtifactError, match=r"one\.safetensors cannot be read"):
        found.digest()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_a_network_in_memory_takes_a_folder_and_a_tied_tensor_under_one_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina.models.attribute", lambda _: Tied)
    weight: Tensor = torch.randn(4, 4)
    save_file({name: weight}, tmp_path / "model.safetensors")
    model = load_model("any:Tied", tmp_path)
    assert torch.equal(model.first.weight, weight) and model.first.weight is model.second.weight
