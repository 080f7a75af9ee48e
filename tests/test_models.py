"""Networks by name: made, loaded with weights, or refused in a line. Nothing is downloaded."""

from __future__ import annotations

import builtins
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lamina import MissingExtra, ModelError, load_model
from lamina.models import attribute

FACTORIES = """
import torch
from torch import nn
def make():
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout())
ready = make()
number = 3
def nothing():
    return None
def fails():
    raise ValueError("no such file: weights")
class holder:
    make = make
"""


@pytest.fixture(autouse=True)
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factories_here.py").write_text(FACTORIES)
    (tmp_path / "broken_here.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("factories_here", None)


@pytest.mark.parametrize("name", ["factories_here:make", "factories_here:ready", "factories_here:holder.make"])
def test_a_factory_in_the_current_folder_is_called(name: str) -> None:
    model = load_model(name)
    assert isinstance(model[0], nn.Linear) and not model.training and not model[1].training


REFUSED = {
    "resnet18": "names no network: write torchvision:resnet50",
    ":make": "names no network",
    "factories_here:": "names no network",
    "nowhere_at_all:make": "module nowhere_at_all cannot be imported",
    "..:make": "cannot be imported",
    "broken_here:make": "module broken_here cannot be imported: .*SyntaxError",
    "factories_here:mak": "has no mak; did you mean make?",
    "factories_here:number": "is a int; it must be a network or a function",
    "factories_here:nothing": "returned a NoneType",
    "factories_here:fails": "factories_here:fails: ValueError: no such file: weights",
    "torchvision:resnet19": "torchvision has no network 'resnet19'; did you mean resnet1",
    "torchvision:resnet18@NO_SUCH": "torchvision:resnet18@NO_SUCH",
    "timm:resnet19": "timm has no network 'resnet19'",
    "timm:resnet18@NO_SUCH": "write timm:resnet18 or timm:resnet18@pretrained",
    "hf:gone/nowhere": "^hf:gone/nowhere: .*(cache|connect|offline)",
    "hf:gone/nowhere@pretrained": "^hf:gone/nowhere@pretrained: .*(cache|connect|offline)",
    "hf:no such id!": "^hf:no such id!: .*no such id!",
    "hf:./empty": "^hf:./empty: .*config.json",
    "hf:./base@best": "^hf:./base@best: write hf:./base or hf:./base@pretrained$",
    "hf:./unheard": "^hf:./unheard: .*unheard_of",
    "hf:./own": "^hf:./own: ",
    "hf:./renamed": "^hf:./renamed: transformers has no network OwnModel; code beside a checkpoint is not run$",
    "hf:./tricky": "^hf:./tricky: transformers has no network pipeline; ",
    "hf:./base@pretrained": "^hf:./base@pretrained: .*model.safetensors",
}


@pytest.mark.parametrize(("name", "message"), REFUSED.items(), ids=REFUSED)
def test_a_name_that_leads_nowhere_is_refused_in_a_line(name: str, message: str) -> None:
    for source, package in {"torchvision": "torchvision", "timm": "timm", "hf": "transformers"}.items():
        if name.startswith(f"{source}:"):
            pytest.importorskip(package)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value) and not Path("ran").exists()


@pytest.fixture(autouse=True)
def on_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is reached and nothing is cached; and folders as hubs have them, none of them with weights."""
    if "transformers" in sys.modules or importlib.util.find_spec("transformers"):
        constants = importlib.import_module("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    own = {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}, "model_type": "own"}
    folders = {
        "base": BERT,
        "unheard": {"model_type": "unheard_of"},
        "own": own,
        "renamed": {**BERT, "architectures": ["OwnModel"]},
        "tricky": {**BERT, "architectures": ["pipeline"]},
    }
    for folder, config in folders.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        (tmp_path / folder / "own.py").write_text("open('ran', 'w')\n")
    (tmp_path / "empty").mkdir()


BERT: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30,
}  # fmt: skip


def test_networks_of_transformers_are_made_by_id_and_of_the_class_of_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    fresh = load_model("hf:./base")
    assert type(fresh).__name__ == "BertForMaskedLM" and not fresh.training
    fresh.save_pretrained(tmp_path / "base")
    trained = load_model("hf:./base@pretrained")
    assert type(trained) is type(fresh) and not trained.training
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in trained.state_dict().items())
    (tmp_path / "base" / "config.json").write_text(json.dumps({k: v for k, v in BERT.items() if k != "architectures"}))
    assert type(load_model("hf:./base")).__name__ == "BertModel"


def test_torchvision_networks_are_made_by_name() -> None:
    pytest.importorskip("torchvision")
    assert type(load_model("torchvision:squeezenet1_1")).__name__ == "SqueezeNet"


def test_timm_networks_are_made_by_name() -> None:
    pytest.importorskip("timm")
    assert "ResNet" in type(load_model("timm:test_resnet")).__name__


@pytest.mark.parametrize(("name", "pretrained"), [("timm:test_resnet", False), ("timm:test_resnet@pretrained", True)])
def test_pretrained_weights_come_only_where_they_are_asked_for(
    name: str, pretrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm, asked = pytest.importorskip("timm"), []
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)) or nn.Linear(1, 1))
    load_model(name)
    assert asked == [("test_resnet", {"pretrained": pretrained})]


@pytest.mark.parametrize(("source", "package"), [("torchvision", "torchvision"), ("timm", "timm"), ("hf", "transformers")])
def test_a_missing_extra_is_named(source: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # bad input: missing extra
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=rf"{source}:resnet18 needs {package}: pip install 'lamina\[zoo\]'"):
        load_model(f"{source}:resnet18")


HIDING = """
import sys
import lamina
before = list(sys.path)
print(lamina.load_model("my_network:make")[0].in_features)
assert sys.path == [*before, sys.argv[1]], sys.path
import colorsys
print(colorsys.rgb_to_hsv(0, 0, 0))
lamina.load_model("my_network:make")
assert sys.path == [*before, sys.argv[1]], sys.path
"""


def test_a_file_in_the_current_folder_hides_no_module_and_yet_its_neighbours_are_found_later(tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit('the standard library is hidden')")
    (tmp_path / "neighbour.py").write_text("import torch\nlayer = torch.nn.Linear(4, 3)")
    (tmp_path / "my_network.py").write_text(
        "import torch\ndef make():\n    import neighbour\n    return torch.nn.Sequential(neighbour.layer)"
    )
    # -P: the folder is not searched unless lamina says so.
    ran = subprocess.run([sys.executable, "-P", "-c", HIDING, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "4\n(0.0, 0.0, 0)\n"), ran.stderr


def test_a_name_that_another_module_took_first_is_answered_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text(FACTORIES)
    with pytest.raises(ModelError, match=r"colorsys:make: colorsys \(.*colorsys\.py\) has no make") as caught:
        load_model("colorsys:make")
    assert str(tmp_path) not in str(caught.value)


def test_a_missing_part_of_an_attribute_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(ModelError, match=r"factories_here \(.*factories_here\.py\) has no mak; did you mean make\?"):
        load_model("factories_here:holder.mak")


def test_an_attribute_of_a_module_is_found() -> None:
    assert attribute("factories_here:number") == 3


# ---- weights ----


def weights() -> dict[str, torch.Tensor]:
    return {"0.weight": torch.full((3, 4), 2.0), "0.bias": torch.full((3,), 3.0)}


@pytest.mark.parametrize("kind", ["safetensors", "state dict", "state_dict inside", "model inside"])
def test_weights_of_every_usual_kind_are_loaded(kind: str, tmp_path: Path) -> None:
    if kind == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(weights(), path)
    else:
        path = tmp_path / "w.pt"
        torch.save(
            {"state dict": weights(), "state_dict inside": {"state_dict": weights()}, "model inside": {"model": weights()}}[
                kind
            ],
            path,
        )
    model = load_model("factories_here:make", path)
    assert torch.equal(model[0].weight, weights()["0.weight"]) and not model.training


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_a_checkpoint_that_wants_to_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # promise 5: weights_only=True for foreign checkpoints
    torch.save({"state_dict": weights(), "evil": Evil()}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="refused, since it holds more than tensors") as caught:
        load_model("factories_here:make", tmp_path / "w.pt")
    assert "this ran" not in capsys.readouterr().out and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"nonsense"], ids=["missing", "empty", "nonsense"])
def test_weights_that_cannot_be_read_are_named(suffix: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"w\.{suffix}: ") as caught:
        load_model("factories_here:make", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "state", [{"1.weight": torch.ones(2)}, {"0.weight": torch.ones(2, 2)}, [1, 2], {"state_dict": {"x": 1}}], ids=str
)
def test_weights_of_another_network_are_refused(state: Any, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="these weights are not of this network") as caught:
        load_model("factories_here:make", tmp_path / "w.pt")
    assert "\n" not in str(caught.value)
