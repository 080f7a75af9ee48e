"""A saved supernet comes back as it was, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina
from lamina.errors import ArtifactError, LaminaError, PlanError, SearchError
from lamina.forms import Dense, Form, LowRank
from lamina.supernet.convert import make_supernet
from lamina.supernet.files import load_supernet, load_terms, read_configuration, save_best, save_supernet
from lamina.supernet.supernet import Supernet

from ..supernets import network


def shaken(net: Supernet) -> Supernet:
    """As after a training: no term is what was fitted, no statistic what it was."""
    with torch.no_grad():
        for tensor in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
            tensor.add_(0.05 * torch.rand_like(tensor))
    return net


def ranks(*forms: Form) -> dict[str, list[Form]]:
    return {"9": list(forms)}


@pytest.fixture
def saved(net: Supernet, tmp_path: Path) -> Path:
    save_supernet(shaken(net), tmp_path / "NET")
    return tmp_path / "NET"


def test_a_loaded_supernet_computes_the_same_in_every_configuration(net: Supernet, saved: Path, example: torch.Tensor) -> None:
    back = load_supernet(network(), saved)
    assert back.blueprint == net.blueprint
    assert {path.name for path in saved.iterdir()} == {"supernet.json", weights_of(saved).name}
    for config in net.space:
        net.set_active(config)
        back.set_active(config)
        assert torch.equal(back(example), net(example))
    assert back.space.fingerprint() == net.space.fingerprint()
    assert [tuple(w.args[0].shape) for w in back.example] == [tuple(example.shape)]


def test_saving_again_replaces_and_drops_what_a_search_had_found(net: Supernet, saved: Path) -> None:
    config = net.space.uniform(1)
    path = save_best(saved, config, score=0.5)
    assert read_configuration(path) == config
    save_supernet(net, saved)
    assert not path.exists()


def test_a_loaded_supernet_keeps_dtype_and_layout_of_the_network(saved: Path) -> None:
    model = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    core = load_supernet(model, saved).extract(load_supernet(network(), saved).get_active()).get_submodule("3.core")
    assert core.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator, union-attr]
    with pytest.raises(ArtifactError, match=r"this network's is torch\.float64"):
        load_supernet(network().double(), saved)


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("model-*.safetensors")
    return path


def cut(folder: Path) -> None:
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:-100])


def flipped(folder: Path) -> None:
    path = weights_of(folder)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def edited(**change: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "supernet.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: weights_of(folder).unlink(), r"is not whole: it has no model-.*\.safetensors"),
    "no blueprint": (lambda folder: (folder / "supernet.json").unlink(), "has no supernet.json"),
    "weights cut short": (cut, "is damaged"),
    "a flipped bit": (flipped, "is damaged"),
    "no json": (lambda folder: (folder / "supernet.json").write_text("{"), "is damaged"),
    "another file": (lambda folder: (folder / "supernet.json").write_text("[]"), "is no supernet: it has no format number"),
    "newer": (edited(format=3), "made by a newer lamina"),
    "unknown field": (edited(colour="red"), "colour: Extra inputs"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_leaves_the_network_as_it_was(damage: Callable[[Path], object], says: str, saved: Path) -> None:
    damage(saved)
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=says) as caught:
        load_supernet(model, saved)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_another_network_is_refused_by_the_first_layer_that_differs(saved: Path) -> None:
    other = network()
    other[5] = nn.Conv2d(8, 16, 5)  # type: ignore[operator]
    with pytest.raises(PlanError, match="5: a Conv2d 8→16 5×5 here, a Conv2d 8→16 3×3 stride 2 in the supernet"):
        load_supernet(other, saved)
    with pytest.raises(PlanError, match="modules or shapes beside them differ"):
        load_supernet(nn.Sequential(*network(), nn.Linear(5, 5)), saved)
    with pytest.raises(PlanError, match="3 is a series already"):
        load_supernet(load_supernet(network(), saved).network, saved)


def test_a_folder_with_other_files_is_not_overwritten(net: Supernet, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ArtifactError, match="holds other files"):
        save_supernet(net, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_forms_in_common_are_taken_over_and_the_others_stay(example: torch.Tensor, tmp_path: Path) -> None:
    theirs = shaken(
        make_supernet(network(), example, group_sizes=(1, 2, 4, 8), forms=ranks(LowRank(1), LowRank(3), LowRank(4)))
    )
    save_supernet(theirs, tmp_path / "NET")
    mine = shaken(make_supernet(network(), example, group_sizes=(2, 8), forms=ranks(Dense(), LowRank(3), LowRank(2))))
    dense = mine.extract(mine.get_active() | {"9": Dense()}).get_submodule("9").weight.detach().clone()  # type: ignore[operator, union-attr]
    taken = load_terms(mine, tmp_path / "NET")
    assert {name: len(forms) for name, forms in taken.items()} == {"3": 2, "5": 2, "9": 1}
    common = [config for config in mine.space if config in theirs.space]
    assert len(common) == 4
    for config in common:
        mine.set_active(config)
        theirs.set_active(config)
        torch.testing.assert_close(mine(example), theirs(example))
    assert torch.equal(mine.extract(mine.get_active() | {"9": Dense()}).get_submodule("9").weight, dense)  # type: ignore[arg-type]


def test_a_form_between_two_that_are_taken_over_keeps_its_own_weights(example: torch.Tensor, tmp_path: Path) -> None:
    theirs = shaken(make_supernet(network(), example, group_sizes=(1, 8)))
    save_supernet(theirs, tmp_path / "NET")
    mine = shaken(make_supernet(network(), example, group_sizes=(1, 2, 8)))
    between = mine.space.forms["3"][1]
    config = mine.get_active() | {"3": between}
    before = mine.extract(config).get_submodule("3.core").weight.detach().clone()  # type: ignore[operator, union-attr]
    load_terms(mine, tmp_path / "NET")
    torch.testing.assert_close(mine.extract(config).get_submodule("3.core").weight, before)
    for both in theirs.space:
        mine.set_active(both)
        theirs.set_active(both)
        torch.testing.assert_close(mine(example), theirs(example))


def test_a_supernet_without_a_form_in_common_gives_nothing(net: Supernet, saved: Path, example: torch.Tensor) -> None:
    other = make_supernet(network(), example, forms=ranks(LowRank(2), Dense()))
    before = other.state_dict()
    with pytest.raises(ArtifactError, match="no layer has a form there"):
        load_terms(other, saved)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize("content", ["", "3", '{"config": 4}'])
def test_a_file_without_a_configuration_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(LaminaError):
        read_configuration(path)
    with pytest.raises((ArtifactError, SearchError)):
        read_configuration(tmp_path / "nowhere.json")
    for content in (b"\xff", b"[" * 100_000, b"9" * 5000):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"^[^\n]* is no readable configuration: [^\n]*$"):
            read_configuration(path)


def test_a_saved_supernet_is_no_saved_network(saved: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds a supernet: say what to take out, as in at=lamina\.Speedup\(2\)"):
        lamina.load(network(), saved)
