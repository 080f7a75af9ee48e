"""The folder of a saved network is what a model hub takes: a card that says what the plan says, safetensors and JSON."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina import ArtifactError, folder
from lamina.card import model_card
from lamina.decomposition import plan_of
from lamina.plan import WholeModel

IDS = torch.arange(10).view(2, 5)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 6))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small(planned: Any) -> nn.Module:
    model = network()
    return lamina.decompose(model, planned(model, X, {"0": lamina.BlockTerm(2, 4), "3": lamina.LowRank(2)}))


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
    return transformers.AutoModel.from_config(transformers.BertConfig(**sizes)).eval()


def test_the_card_says_what_the_plan_says_and_how_to_load(small: nn.Module, tmp_path: Path) -> None:
    lamina.save(small, tmp_path)
    card, plan = (tmp_path / "README.md").read_text(), plan_of(small)
    assert card.startswith("---\nlibrary_name: lamina\ntags:\n- lamina\n") and "license" not in card
    for line in plan.summary():
        assert f"- {line}\n" in card
    for name, layer in plan.decomposed.items():
        assert f"| `{name}` | {layer.geometry} | {layer.form} |" in card
    (weights,) = (path.name for path in tmp_path.glob("model-*.safetensors"))
    assert f"`{weights}`" in card and "```python\nimport lamina\n" in card


def test_of_what_was_measured_the_card_has_the_times_their_conditions_and_the_score(small: nn.Module, tmp_path: Path) -> None:
    setting = lamina.Setting("cpu", "a chip", "float32", "contiguous", 2, "inference")
    plan = plan_of(small)
    before, after = (lamina.Cost(9, 9, lamina.Timing(seconds, 1e-5, 9, setting)) for seconds in (0.004, 0.002))
    whole = WholeModel(before=before, after=after, speedup=2.0, interval=(1.9, 2.1))
    measured = plan.model_copy(update={"whole": whole, "setting": setting, "scores": lamina.Scores(before=0.9, after=0.875)})
    card = model_card(small, measured, ["model-0.safetensors"])
    assert "- whole network: 4 → 2 ms, ×2.00 (95 % between 1.90 and 2.10)\n" in card
    assert "- measured on cpu (a chip), 2 threads, float32" in card and "- score: 0.9 → 0.875, a drop of 0.025\n" in card


def test_the_hubs_own_library_reads_the_card(planned: Any, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    model = bert()
    model.config._name_or_path = "somebody/tiny-bert"
    lamina.save(lamina.decompose(model, planned(model, {"input_ids": IDS})), tmp_path)
    card = hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": "somebody/tiny-bert",
        "library_name": "lamina",
        "tags": ["lamina", "pytorch", "low-rank", "tensor-decomposition"],
    }
    assert 'transformers.BertModel(transformers.AutoConfig.from_pretrained("somebody/tiny-bert"))' in card.text


@pytest.mark.parametrize("name", ["", "/home/me/bert", "./bert", "here/bert", "a/b/c", None])
def test_a_base_that_is_no_name_on_a_hub_is_not_told(name: Any, planned: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "here" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    small = network()
    small.config = type("Config", (), {"_name_or_path": name})
    card = model_card(small, planned(small, X), ["model-0.safetensors"])
    assert "base_model" not in card and "bert" not in card


# ---- on the networks of timm and transformers ----


def test_the_three_lines_of_the_card_load_a_network_of_timm(planned: Any, tmp_path: Path, monkeypatch: Any) -> None:
    timm = pytest.importorskip("timm")
    model, x = timm.create_model("test_vit", num_classes=7).eval(), torch.randn(1, 3, 160, 160)
    small = lamina.decompose(model, planned(model, x, {"blocks.0.attn.qkv": lamina.LowRank(8)}))
    lamina.save(small, tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = (tmp_path / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(lines, names)
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(x), small(x))


def test_a_network_of_transformers_is_restored_onto_what_its_library_makes_without_pickle_or_code(
    planned: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    model = bert()
    model.save_pretrained(tmp_path / "base")
    small = lamina.decompose(model, planned(model, {"input_ids": IDS}, {"pooler.dense": lamina.LowRank(3)}))
    lamina.save(small, tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".md", ".json", ".safetensors"}

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("something is unpickled")

    for module, name in ((torch, "load"), (torch.serialization, "load"), (__import__("pickle"), "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    for base in (
        transformers.AutoModel.from_pretrained(tmp_path / "base"),
        transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "base")),
    ):
        again = lamina.load(base, tmp_path / "out").eval()
        with torch.no_grad():
            assert torch.equal(again(IDS).pooler_output, small(IDS).pooler_output)


# ---- folders as hubs make and take them ----


def test_a_folder_of_links_into_a_hubs_cache_is_loaded(small: nn.Module, tmp_path: Path) -> None:
    lamina.save(small, tmp_path / "out")
    blobs, snapshot = tmp_path / "models--me--net" / "blobs", tmp_path / "models--me--net" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "out").iterdir())):
        shutil.move(path, blobs / f"{number:064x}")
        os.symlink(Path("..", "..", "blobs", f"{number:064x}"), snapshot / path.name)
    (snapshot / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert torch.equal(lamina.load(network(), snapshot).eval()(X), small.eval()(X))


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a network of transformers": lambda folder: (
        (folder / "config.json").write_text('{"model_type": "bert"}'),
        (folder / "model.safetensors").touch(),
        (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n"),
    ),
    "adapters": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "nothing": lambda folder: None,
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_hubs_folder_that_is_no_saved_network_is_refused_and_left_alone(
    make: Callable[[Path], object], small: nn.Module, tmp_path: Path
) -> None:
    make(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ArtifactError, match=rf"^{tmp_path} is not a saved network: it has no plan\.json; name the folder that it was saved to$"
    ):
        lamina.load(network(), tmp_path)
    if before:
        with pytest.raises(ArtifactError, match="holds other files than a saved network"):
            lamina.save(small, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- whose card it is ----


def test_an_untouched_card_is_replaced_with_its_network(small: nn.Module, tmp_path: Path, planned: Any) -> None:
    lamina.save(small, tmp_path)
    before = (tmp_path / "README.md").read_bytes()
    model = network()
    lamina.save(lamina.decompose(model, planned(model, X, {"3": lamina.LowRank(3)})), tmp_path)
    after = (tmp_path / "README.md").read_bytes()
    assert b"rank 3" in after and b"rank 3" not in before and len(list(tmp_path.iterdir())) == 3


EDITS: dict[str, Callable[[bytes], bytes]] = {
    "a licence": lambda text: text.replace(b"library_name", b"license: mit\nlibrary_name"),
    "a line at the end": lambda text: text + b"Mine.\n",
    "a line at the beginning": lambda text: b"Mine.\n" + text,
    "a text of his own": lambda text: b"mine",
    "nothing": lambda text: b"",
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_card_that_somebody_has_changed_is_not_replaced(
    edit: Callable[[bytes], bytes], small: nn.Module, tmp_path: Path
) -> None:
    lamina.save(small, tmp_path)
    path = tmp_path / "README.md"
    path.write_bytes(edit(path.read_bytes()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ArtifactError, match=r"holds other files than a saved network \(README\.md\)"):
        lamina.save(small, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(lamina.load(network(), tmp_path).eval()(X), small.eval()(X))  # it is read all the same


def test_where_the_card_cannot_be_written_nothing_has_changed(small: nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    lamina.save(small, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        small[3].second.weight.zero_()

    def full(path: Path, content: bytes) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return write(path, content)

    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArtifactError, match="No space left"):
        lamina.save(small, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_without_a_card_leaves_no_card_of_other_weights(small: nn.Module, tmp_path: Path) -> None:
    lamina.save(small, tmp_path)
    folder.write_folder(tmp_path, "plan.json", plan_of(small), dict(small.state_dict()))
    assert not (tmp_path / "README.md").exists()
