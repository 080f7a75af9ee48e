"""A calibration as a value: saved and loaded to the bit, refused where it is damaged or of something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()


def data() -> Tensor:
    return torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def made() -> lamina.Calibration:
    return lamina.calibrate(network(), data(), outputs=lamina.Categorical())


@pytest.fixture
def folder(made: lamina.Calibration, tmp_path: Path) -> Path:
    made.save(tmp_path / "deep" / "calibration")
    return tmp_path / "deep" / "calibration"


def assert_same(one: lamina.Calibration, other: lamina.Calibration) -> None:
    assert (one.identity, one.record, str(one), one.outputs) == (other.identity, other.record, str(other), other.outputs)
    for name, moments in one.layers.items():
        assert torch.equal(moments.inputs(), other.layers[name].inputs())
        assert torch.equal(moments.gradients(), other.layers[name].gradients())
        assert torch.equal(moments.mean(), other.layers[name].mean())


def test_what_is_loaded_is_what_was_saved(made: lamina.Calibration, folder: Path) -> None:
    assert_same(made, lamina.Calibration.load(folder))
    lamina.Calibration.load(folder).save(folder)  # over itself, whose file it reads
    assert_same(made, lamina.Calibration.load(folder))


def test_the_same_network_data_and_seed_give_the_same_calibration_and_another_seed_another(made: lamina.Calibration) -> None:
    again = lamina.calibrate(network(), data(), outputs=lamina.Categorical())
    assert_same(made, again)
    other = lamina.calibrate(network(), data(), outputs=lamina.Categorical(), seed=1)
    assert other.identity != made.identity
    assert not torch.equal(other.layers["4"].gradients(), made.layers["4"].gradients())
    assert torch.equal(other.layers["4"].inputs(), made.layers["4"].inputs())


def test_outputs_come_back_and_of_a_function_its_name(tmp_path: Path) -> None:
    def mine(y: Tensor) -> Tensor:
        return y.sum()

    for outputs in (lamina.Categorical(dim=-1), lamina.Gaussian(), None):
        lamina.calibrate(network(), data(), outputs=outputs).save(tmp_path / "c")
        assert lamina.Calibration.load(tmp_path / "c").outputs == outputs
    lamina.calibrate(network(), data(), outputs=mine).save(tmp_path / "c")
    loaded = lamina.Calibration.load(tmp_path / "c")
    assert "mine" in str(loaded)
    with pytest.raises(lamina.CalibrationError, match="tells no divergence"):
        loaded.outputs.divergence(data(), data())


def test_moments_made_anew_may_be_changed_and_the_calibration_stays(made: lamina.Calibration) -> None:
    before = made.layers["4"].mean().clone()
    made.layers["4"].mean().zero_()
    made.layers["4"].inputs().zero_()
    assert torch.equal(made.layers["4"].mean(), before) and made.layers["4"].inputs().any()


def test_its_own_network_passes_in_any_mode_and_wrapped(made: lamina.Calibration) -> None:
    made.check(network())
    made.check(network().train())
    made.check(nn.DataParallel(network()))


def shifted(model: nn.Module) -> nn.Module:
    model[4].weight.data[0, 0] += 1e-6
    return model


def moved(model: nn.Module) -> nn.Module:
    model[1].running_mean += 1
    return model


OTHERS = {
    "another network": (lambda m: nn.Sequential(*m[:4], nn.Linear(64, 6)), "another network"),
    "another weight": (shifted, "of other weights: 4.weight is not what it was"),
    "other statistics": (moved, "of other weights: 1.running_mean is not what it was"),
    "another dtype": (lambda m: m.double(), "of other weights: 0.weight is not what it was"),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_any_other_network_or_weights_are_refused_by_name(made: lamina.Calibration, change: Callable, message: str) -> None:
    with pytest.raises(lamina.CalibrationError, match=message) as error:
        made.check(change(network()))
    assert "\n" not in str(error.value)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder: Path) -> Path:
    return next(folder.glob("model-*.safetensors"))


def flipped(folder: Path) -> None:
    content = bytearray(weights(folder).read_bytes())
    content[-5] ^= 1
    weights(folder).write_bytes(content)


DAMAGED = {
    "no folder": (lambda f: f.rename(f.parent / "elsewhere"), "is not a saved calibration: it has no calibration.json"),
    "no weights": (lambda f: weights(f).unlink(), "is not whole"),
    "a flipped bit": (flipped, "is damaged"),
    "cut short": (lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-9]), "is damaged"),
    "an edited number": (lambda f: edited(f, samples=17), "is damaged: its content is not what was saved"),
    "newer": (lambda f: edited(f, format=4), "made by a newer lamina"),
    "older": (lambda f: edited(f, format=2), "of an older lamina, which measured less of what layers lose: calibrate anew"),
    "no JSON": (lambda f: (f / "calibration.json").write_text("{"), "is damaged"),
    "something else": (lambda f: (f / "calibration.json").write_text('{"format": 2, "layers": {}}'), "is no calibration"),
    "an unknown field": (lambda f: edited(f, colour="red"), "colour"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_foreign_and_newer_files_are_refused_in_one_line(folder: Path, damage: Callable, message: str) -> None:
    damage(folder)
    with pytest.raises(lamina.ArtifactError, match=message) as error:
        lamina.Calibration.load(folder)
    assert "\n" not in str(error.value)


def test_a_record_that_does_not_fit_its_tensors_is_refused(made: lamina.Calibration, tmp_path: Path) -> None:
    from lamina.folder import write_folder

    tensors = {f"{what} of {name}": t for name, moments in made.layers.items() for what, t in moments.tensors.items()}
    for change, message in (({"mean of 4": None}, "holds no mean of 4"), ({"mean of 9": torch.ones(2)}, "nothing is said of")):
        found = {name: t for name, t in (tensors | change).items() if t is not None}
        write_folder(tmp_path, "calibration.json", made.record, found)
        with pytest.raises(lamina.ArtifactError, match=message):
            lamina.Calibration.load(tmp_path)


def test_a_folder_of_other_files_is_left_alone(made: lamina.Calibration, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(lamina.ArtifactError, match=r"mine\.txt"):
        made.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_it_says_what_it_is(made: lamina.Calibration) -> None:
    text = str(made)
    assert "16 samples, 4 of them held out" in text and "patches of 1 layers, channels of 1" in text
    assert "by Categorical()" in text and made.largest_error is not None and "not converged" in text
