"""Saving and loading: equal bits without a factorisation, strict, atomic, and nothing half-loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lamina
from lamina import ArtifactError, BlockTerm, LaminaError, LayerError, LowRank, Plan, PlanError, artifact
from lamina import folder as folders
from lamina.decomposition import merge, plan_of
from lamina.folder import Saved, size

EXAMPLE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
FORMS = {"conv": BlockTerm(2, 4), "fc": LowRank(3)}


class Network(nn.Module):
    """A shared layer, tied weights, running statistics and a buffer that is not saved."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 8)
        self.again = self.fc
        self.head = nn.Linear(8, classes, bias=False)
        self.tied = nn.Linear(8, classes)
        self.tied.weight = self.head.weight
        self.register_buffer("cache", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)).mean((2, 3))
        y = self.again(self.fc(y))
        z: Tensor = self.head(y) + self.tied(y)
        return z * self.cache


@pytest.fixture
def small(planned: Any) -> nn.Module:
    model = Network()
    model(EXAMPLE)  # the running statistics are those of nobody else
    small = lamina.decompose(model, planned(model, EXAMPLE, FORMS))
    with torch.no_grad():
        for parameter in small.parameters():  # as after fine-tuning: no factorisation of the base gives these
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return small.eval()


@pytest.fixture
def folder(small: nn.Module, tmp_path: Path) -> Path:
    lamina.save(small, tmp_path / "saved")
    return tmp_path / "saved"


def refused(folder: Path, error: type[LaminaError], message: str, model: nn.Module | None = None) -> None:
    """Loading raises, in one line, and the base model is as it was."""
    model = model or Network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message) as caught:
        lamina.load(model, folder)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("model-*.safetensors")
    return path


def rewritten(folder: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Change the weights and write them as `save` would, hashes included."""
    path = weights_of(folder)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    signed(folder)


def signed(folder: Path) -> None:
    """Let the plan say what stands in the folder now, as `save` would."""
    plan, weights = Plan.load(folder / "plan.json"), weights_of(folder)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    own = hashlib.sha256(plan.model_dump_json().encode()).hexdigest()
    plan.model_copy(update={"saved": Saved(weights=weights.name, sha256=sha256, document=own)}).save(folder / "plan.json")


# ---- there and back ----


def test_loaded_onto_a_fresh_network_it_gives_the_same_bits(small: nn.Module, folder: Path) -> None:
    again = lamina.load(Network(), folder).eval()
    assert torch.equal(again(EXAMPLE), small(EXAMPLE))
    assert again.state_dict().keys() == small.state_dict().keys()


def test_loading_changes_the_network_in_place_and_it_carries_its_plan(small: nn.Module, folder: Path, tmp_path: Path) -> None:
    base = Network()
    again = lamina.load(base, folder)
    assert again is base
    lamina.save(again, tmp_path / "second")
    assert torch.equal(lamina.load(Network(), tmp_path / "second").eval()(EXAMPLE), small(EXAMPLE))


def test_what_was_shared_is_shared_and_stored_once(small: nn.Module, folder: Path) -> None:
    # traps: one module under two names; tied parameters: silent overwrite on reload
    again = lamina.load(Network(), folder)
    assert again.fc is again.again and again.tied.weight is again.head.weight
    stored = load_file(weights_of(folder))
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in small.parameters()) + sum(
        b.numel() for name, b in small.named_buffers() if name != "cache"
    )


def test_what_is_loaded_lies_in_memory_as_what_was_made(small: nn.Module, folder: Path) -> None:
    """Pieces of one file, at addresses that are no multiple of 64 bytes, give other last bits in a matrix product."""
    again = lamina.load(Network(), folder)
    for (name, made), loaded in zip(small.named_parameters(), again.parameters(), strict=True):
        assert loaded.untyped_storage().nbytes() == loaded.numel() * loaded.element_size(), name
        assert loaded.stride() == made.stride() and loaded.data_ptr() % 64 == 0, name


def test_loading_runs_no_factorisation(small: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # traps: restored onto a fresh base model without running any SVD
    for name in ("eigh", "svd", "qr", "eigvalsh", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, forbidden)
    assert torch.equal(lamina.load(Network(), folder).eval()(EXAMPLE), small(EXAMPLE))


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("a factorisation was run")


APART = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
import network, lamina
def forbidden(*_, **__):
    raise AssertionError("a factorisation was run")
torch.linalg.eigh = torch.linalg.svd = torch.linalg.qr = forbidden
torch.manual_seed(99)
model = lamina.load(network.Network(), sys.argv[2]).eval()
save_file({"y": model(load_file(sys.argv[3])["x"]).detach()}, sys.argv[4])
"""


@pytest.mark.slow
def test_another_process_loads_the_same_bits_without_a_factorisation(small: nn.Module, folder: Path, tmp_path: Path) -> None:
    shutil.copy(__file__, tmp_path / "network.py")
    save_file({"x": EXAMPLE}, tmp_path / "x.safetensors")
    arguments = [str(tmp_path), str(folder), str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    source = str(Path(lamina.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", APART, *arguments], env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], small(EXAMPLE))


def test_nothing_of_it_is_pickled(folder: Path) -> None:
    # traps: no pickled modules
    weights = weights_of(folder)
    assert {entry.name for entry in folder.iterdir()} == {weights.name, "plan.json", "README.md"}
    json.loads((folder / "plan.json").read_text())
    load_file(weights)


def test_modes_hooks_and_what_trains_are_those_of_the_base(folder: Path) -> None:
    base, calls = Network().train(), []
    base.fc.eval()
    base.conv.weight.requires_grad_(False)
    handle = base.conv.register_forward_hook(lambda *_: calls.append("hook"))
    again = lamina.load(base, folder)
    assert again.training and not again.fc.training and not again.fc.first.training and again.conv.core.training
    assert {name: p.requires_grad for name, p in again.conv.named_parameters()} == {
        "reduce.weight": False,
        "core.weight": False,
        "expand.weight": False,
        "expand.bias": True,
    }
    again(EXAMPLE)
    handle.remove()
    again(EXAMPLE)
    assert calls == ["hook"]


def test_a_channels_last_base_stays_channels_last(folder: Path) -> None:
    again = lamina.load(Network().to(memory_format=torch.channels_last), folder)
    assert again.conv.core.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_comes_back(dtype: torch.dtype, planned: Any, tmp_path: Path) -> None:
    model = Network().to(dtype)
    small = lamina.decompose(model, planned(model, EXAMPLE.to(dtype), FORMS)).eval()
    lamina.save(small, tmp_path / "saved")
    again = lamina.load(Network().to(dtype), tmp_path / "saved").eval()
    assert torch.equal(again(EXAMPLE.to(dtype)), small(EXAMPLE.to(dtype)))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(8, 6), lambda: nn.Sequential(nn.Linear(8, 6))], ids=["root", "child of the root"]
)
def test_the_root_itself_can_be_the_layer(make: Callable[[], nn.Module], planned: Any, tmp_path: Path) -> None:
    model, x = make(), torch.randn(2, 8)
    small = lamina.decompose(model, planned(model, x))
    lamina.save(small, tmp_path / "saved")
    assert torch.equal(lamina.load(make(), tmp_path / "saved")(x), small(x))


def test_a_layout_of_the_weights_in_memory_is_no_obstacle(planned: Any, tmp_path: Path) -> None:
    model = Network().to(memory_format=torch.channels_last)
    small = lamina.decompose(model, planned(model, EXAMPLE, FORMS)).eval()
    lamina.save(small, tmp_path / "saved")
    again = lamina.load(Network().to(memory_format=torch.channels_last), tmp_path / "saved").eval()
    assert torch.equal(again(EXAMPLE), small(EXAMPLE))


def test_buffers_that_are_views_of_one_another_can_be_saved(planned: Any, tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            flat = torch.arange(6.0)
            self.register_buffer("flat", flat)
            self.register_buffer("part", flat[1:3])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y

    model, x = Views(), torch.randn(2, 4)
    small = lamina.decompose(model, planned(model, x))
    lamina.save(small, tmp_path / "saved")
    again = lamina.load(Views(), tmp_path / "saved")
    assert again.part.tolist() == [1.0, 2.0] and again.flat.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_size_is_that_of_all_its_files(folder: Path) -> None:
    assert size(folder) == sum(entry.stat().st_size for entry in folder.iterdir())


def test_what_is_loaded_carries_the_very_plan_by_which_it_was_decomposed(small: nn.Module, folder: Path) -> None:
    assert plan_of(lamina.load(Network(), folder)) == plan_of(small)


def test_loading_needs_no_room_on_disk(small: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    assert torch.equal(lamina.load(Network(), folder).eval()(EXAMPLE), small(EXAMPLE))


def test_where_nothing_is_decomposed_no_example_is_made(planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network().eval()
    lamina.save(lamina.decompose(model, planned(model, EXAMPLE, {})), tmp_path / "saved")

    def forbidden(*_: Any) -> None:
        raise AssertionError("an example was made")

    monkeypatch.setattr(artifact, "example_from", forbidden)
    assert torch.equal(lamina.load(Network(), tmp_path / "saved").eval()(EXAMPLE), model(EXAMPLE))


# ---- saving is whole or not at all ----


def test_saving_again_replaces_what_was_there(small: nn.Module, folder: Path) -> None:
    with torch.no_grad():
        small.fc.second.bias.fill_(7.0)
    lamina.save(small, folder)
    assert torch.equal(lamina.load(Network(), folder).eval()(EXAMPLE), small(EXAMPLE))
    assert [entry.name for entry in folder.parent.iterdir()] == ["saved"], "nothing is left beside it"


@pytest.mark.parametrize("step", ["plan", "weights", "first rename", "last rename"])
@pytest.mark.parametrize("existing", [True, False])
def test_when_writing_fails_what_was_there_stays(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bool
) -> None:
    # promise 3: an error leaves the files as they were
    target = tmp_path / "saved"
    if existing:
        lamina.save(small, target)
    before = {entry.name: entry.read_bytes() for entry in target.iterdir()} if existing else None
    with torch.no_grad():
        small.fc.second.bias.fill_(7.0)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    rename, renames = os.replace, 0

    def failing(source: Any, to: Any) -> None:
        nonlocal renames
        renames += 1
        if renames == 1 if step == "first rename" else Path(to).name == "plan.json":
            full()
        rename(source, to)

    with monkeypatch.context() as patch:
        if step == "plan":
            patch.setattr(folders, "write_whole", full)
        elif step == "weights":
            patch.setattr(folders, "save_file", full)
        else:
            patch.setattr(os, "replace", failing)
        with pytest.raises(ArtifactError, match=r"saved cannot be written: .*No space left on device"):
            lamina.save(small, target)
    found = {entry.name: entry.read_bytes() for entry in target.iterdir()} if target.exists() else None
    assert found == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["saved"] if existing else [])


def test_a_folder_with_other_files_is_not_replaced(small: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds other files"):
        lamina.save(small, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_is_not_replaced_by_a_folder(small: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ArtifactError, match="out"):
        lamina.save(small, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_parents_are_made_and_an_empty_folder_will_do(small: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    lamina.save(small, tmp_path / "a" / "b")
    lamina.save(small, tmp_path / "c" / "d")
    assert (tmp_path / "a" / "b" / "plan.json").is_file() and (tmp_path / "c" / "d" / "plan.json").is_file()


def test_a_relative_path_and_a_trailing_dot_name_the_same_folder(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lamina.save(small, "out")
    lamina.save(small, "./out/")
    assert torch.equal(lamina.load(Network(), "out").eval()(EXAMPLE), small(EXAMPLE))


def test_others_can_read_what_was_saved(folder: Path) -> None:
    """A temporary file is private; what it becomes is not."""
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in folder.iterdir()} == {0o644}


def test_a_network_that_was_never_decomposed_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="carries no plan"):
        lamina.save(Network(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_state_that_is_no_tensor_is_refused_by_name(planned: Any, tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y

        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    model, x = Holder(), torch.randn(2, 4)
    with pytest.raises(ArtifactError, match="_extra_state"):
        lamina.save(lamina.decompose(model, planned(model, x)), tmp_path / "saved")


# ---- what does not fit is refused, and nothing is half-loaded ----


@pytest.mark.parametrize("weights", [False, True])
def test_a_missing_file_is_named(folder: Path, weights: bool) -> None:
    gone = weights_of(folder) if weights else folder / "plan.json"
    gone.unlink()
    refused(folder, ArtifactError, f"has no {gone.name}")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", ArtifactError, "nowhere is not a saved network")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_weights_cut_short_are_damaged(folder: Path, share: float) -> None:
    path = weights_of(folder)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(folder, ArtifactError, f"{path.name} is damaged")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_plan_cut_short_is_not_readable(folder: Path, share: float) -> None:
    path = folder / "plan.json"
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(len(content) * share)])
    refused(folder, PlanError, "plan.json: not a readable plan")


@pytest.mark.parametrize("place", [9, -1, -1000])
def test_one_changed_byte_of_the_weights_is_noticed(folder: Path, place: int) -> None:
    # traps: a truncated or tampered file
    path = weights_of(folder)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    refused(folder, ArtifactError, f"{path.name} is damaged")


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[LaminaError], str]] = {
    "a rank": (lambda p: p["layers"]["fc"]["form"].__setitem__("rank", 4), ArtifactError, "fc.first.weight has shape"),
    "an impossible rank": (lambda p: p["layers"]["fc"]["form"].__setitem__("rank", 99), PlanError, "fc: rank 99"),
    "a negative rank": (lambda p: p["layers"]["fc"]["form"].__setitem__("rank", -1), PlanError, "rank"),
    "another form": (lambda p: p["layers"]["fc"].__setitem__("form", {"form": "dense"}), ArtifactError, "fc.weight is missing"),
    "an unknown form": (lambda p: p["layers"]["fc"]["form"].__setitem__("form", "magic"), PlanError, "layers.fc.form"),
    "a geometry": (
        lambda p: p["layers"]["fc"]["geometry"].__setitem__("in_channels", 9),
        PlanError,
        "^fc: a Linear 8→8 .*here, a Linear 9→8 in the plan",
    ),
    "a layer's name": (lambda p: p["layers"].__setitem__("fd", p["layers"].pop("fc")), PlanError, "^fd: not in this network"),
    "the fingerprint": (lambda p: p.__setitem__("fingerprint", "0" * 64), PlanError, "another network"),
    "a field too many": (lambda p: p.__setitem__("extra", 1), PlanError, "extra"),
    "a field gone": (lambda p: p.pop("fingerprint"), PlanError, "fingerprint"),
    "a newer format": (lambda p: p.__setitem__("format", 3), PlanError, "made by a newer lamina"),
    "no format": (lambda p: p.pop("format"), PlanError, "no format number"),
}


@pytest.mark.parametrize(("change", "error", "message"), TAMPERED.values(), ids=TAMPERED)
def test_a_changed_plan_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], error: type[LaminaError], message: str
) -> None:
    # traps: a newer format version, a tampered file
    path = folder / "plan.json"
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))
    refused(folder, LaminaError, "plan.json")
    try:
        Plan.load(path)
    except PlanError as unreadable:
        assert error is PlanError and re.search(message, str(unreadable))
        return
    signed(folder)  # by somebody who knows how
    refused(folder, error, message)


CHANGED: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "a tensor gone": (lambda t, _: t.pop("norm.bias"), "norm.bias is missing"),
    "a tensor too many": (lambda t, _: t.__setitem__("spare", torch.ones(1)), "spare has no place"),
    "another shape": (
        lambda t, _: t.__setitem__("norm.bias", torch.ones(9)),
        r"norm.bias has shape \(9,\), this network wants \(8,\)",
    ),
    "another dtype": (lambda t, _: t.__setitem__("norm.bias", t["norm.bias"].half()), "norm.bias is torch.float16"),
    "an alias that leads nowhere": (lambda _, m: m.__setitem__("alias:tied.weight", "gone"), "tied.weight is missing"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_weights_of_something_else_are_refused_and_the_first_misfit_named(
    folder: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any], message: str
) -> None:
    rewritten(folder, change)
    refused(folder, ArtifactError, f"^{re.escape(str(folder))}: {message}")


def test_a_base_of_another_dtype_is_told_what_to_do(folder: Path) -> None:
    refused(
        folder, ArtifactError, "is torch.float32, this network's is torch.float64: convert the base model", Network().double()
    )


def test_a_base_of_another_structure_is_refused(folder: Path) -> None:
    refused(folder, PlanError, "modules, shapes or ties beside them differ", Network(classes=7))


def test_a_base_that_is_decomposed_already_is_refused(small: nn.Module, folder: Path) -> None:
    refused(folder, PlanError, "^conv is decomposed already", small)


def test_a_base_on_the_meta_device_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="meta device"):
        lamina.load(Network().to("meta"), folder)


def test_a_base_of_which_one_buffer_alone_is_on_the_meta_device_is_refused(folder: Path) -> None:
    base = Network()
    name, buffer = next(iter(base.named_buffers()))
    owner, _, leaf = name.rpartition(".")
    setattr(base.get_submodule(owner), leaf, buffer.to("meta"))
    with pytest.raises(ArtifactError, match=rf"^{name} of this network is on the meta device"):
        lamina.load(base, folder)


class Reading(nn.Module):
    """Reads the weight of its layer from a list, or does not."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.aside, self.reads = [self.fc.weight], reads

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y + self.aside[0].sum() if self.reads else y


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "in a wrapper"])
def test_a_base_that_reads_a_dense_weight_from_elsewhere_is_refused_by_name(
    planned: Any, tmp_path: Path, wrapped: bool
) -> None:
    model, x = Reading(reads=False), torch.randn(2, 8)
    small = lamina.decompose(model, planned(model, x, {"fc": LowRank(3)}))
    lamina.save(small, tmp_path / "saved")
    reading: nn.Module = Reading(reads=True)
    given = nn.DataParallel(reading) if wrapped else reading
    refused(tmp_path / "saved", LayerError, "^fc: the network reads this layer's dense weight", given)
    assert torch.equal(lamina.load(Reading(reads=False), tmp_path / "saved")(x), small(x)), "to hold it is no harm"


# ---- a checkpoint of the dense network ----


def newer() -> Network:
    torch.manual_seed(3)
    model = Network()
    model(EXAMPLE)
    return model


def test_a_dense_checkpoint_is_factorised_into_a_decomposed_network(small: nn.Module) -> None:
    model = newer()
    wanted = lamina.decompose(model, plan_of(small)).eval()
    held = small.fc
    assert lamina.load_dense(small, model.state_dict()) is small and small.fc is held
    assert torch.equal(small(EXAMPLE), wanted(EXAMPLE))
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), wanted.state_dict().values(), strict=True))


def test_a_newer_checkpoint_is_factorised_by_a_calibration_of_its_own_weights(small: nn.Module) -> None:
    plan, data = plan_of(small), [torch.randn(8, *EXAMPLE.shape[1:]) for _ in range(8)]
    old, model = merge(small).eval(), newer().eval()
    fitted = lamina.decompose(old, plan, lamina.calibrate(old, data), sequential=data)
    before = {name: tensor.clone() for name, tensor in fitted.state_dict().items()}
    calibration = lamina.calibrate(model, data)
    with pytest.raises(PlanError, match=r"^this plan's factors are fitted to a calibration: pass it as data="):
        lamina.load_dense(fitted, model.state_dict())
    with pytest.raises(PlanError, match=r"^this plan's layers were fitted in sequence: pass what they were fitted on"):
        lamina.load_dense(fitted, model.state_dict(), calibration)
    with pytest.raises(LaminaError, match="this calibration is of other weights"):
        lamina.load_dense(fitted, model.state_dict(), lamina.calibrate(old, data), sequential=data)
    torch.testing.assert_close(dict(fitted.state_dict()), before, atol=0, rtol=0)
    wanted = lamina.decompose(model, plan, calibration, sequential=data)
    lamina.load_dense(fitted, model.state_dict(), calibration, sequential=data)
    torch.testing.assert_close(fitted.state_dict(), wanted.state_dict(), atol=0, rtol=0)
    assert plan_of(fitted).factors == plan_of(wanted).factors


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state.pop("fc.weight"), "the checkpoint: fc.weight is missing"),
    (lambda state: state.update(more=torch.ones(1)), "the checkpoint: more has no place in this network"),
    (lambda state: state.update({"norm.bias": torch.ones(9)}), r"the checkpoint: norm.bias has shape \(9,\)"),
    (lambda state: state.update({"conv.weight": torch.full((8, 3, 3, 3), torch.nan)}), "conv: 216 of its 216 weights are NaN"),
], ids=["missing", "left over", "another shape", "NaN"])  # fmt: skip
def test_a_dense_checkpoint_that_does_not_fit_leaves_the_network_as_it_was(
    small: nn.Module, change: Callable[[Any], object], message: str
) -> None:
    before, state = small(EXAMPLE), newer().state_dict()
    change(state)
    with pytest.raises(LaminaError, match=message):
        lamina.load_dense(small, state)
    assert torch.equal(small(EXAMPLE), before)
