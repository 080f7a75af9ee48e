"""Decomposing a checkpoint layer by layer: the bits of `decompose` and `save`; killed it goes on; bad files are named."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lamina
from lamina import ArtifactError, BlockTerm, LaminaError, LayerError, LowRank, Plan, PlanError, Separable, parts, streaming
from lamina import folder as folders
from lamina.folder import read_folder


class Everything(nn.Module):
    """A fused encoder, an embedding tied to a head, a convolution with running statistics, a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.conv = nn.Conv1d(32, 24, 3)
        self.norm = nn.BatchNorm1d(24)
        self.fc = nn.Linear(24, 32)
        self.again = self.fc
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("cache", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.encoder(self.embedding(x)).mT)).mT
        return self.head(self.again(y))


class Crossed(nn.Module):
    """An attention with widths of its own for keys and values, so that each projection is a parameter, and their biases."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, kdim=12, vdim=20, add_bias_kv=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :12], torch.cat([x, x[..., :4]], -1))[0]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Conv2d(8, 12, 3, padding=1)
        self.groups = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.apart = nn.Conv2d(16, 8, 3, padding=1)
        self.back = nn.ConvTranspose2d(8, 12, 3)
        self.root = nn.Parameter(torch.randn(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.apart(self.groups(self.whole(x)))) * self.root[0]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=16, use_cache=False))


def halved(model: nn.Module, x: Any) -> Plan:
    return lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio())


FORMS = {"whole": BlockTerm(4, 6), "groups": BlockTerm(8, 8, 4), "apart": Separable(7), "back": BlockTerm(None, 5)}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any] | None]] = {
    "everything": (Everything, lambda: torch.randint(50, (2, 9)), None),
    "crossed": (Crossed, lambda: torch.randn(2, 5, 16), {"attention.k_proj": LowRank(3), "attention.out_proj": LowRank(4)}),
    "convolutions": (Convolutions, lambda: torch.randn(2, 8, 6, 6), FORMS),
    "gpt2": (gpt2, lambda: {"input_ids": torch.randint(40, (2, 5))}, None),
    "the root itself": (lambda: nn.Linear(12, 20), lambda: torch.randn(2, 12), None),
}


def checkpoint(model: nn.Module, folder: Path, files: int = 3, dtype: torch.dtype | None = None) -> Path:
    """A network's weights in so many files with an index, each tensor once, as others write them."""
    state = model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(state.items())}
    names = sorted(once.values())
    folder.mkdir(exist_ok=True)
    named = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        own = names[number::files]
        held = {name: state[name].detach().contiguous() for name in own}
        save_file({name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in held.items()}, folder / file)
        named |= dict.fromkeys(own, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": named}))
    return index


def bare(make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    with torch.device("meta"):
        return make().to(dtype=dtype)


def saved(folder: Path) -> tuple[Plan, dict[str, Tensor]]:
    plan, tensors = read_folder(folder, "plan.json", Plan.read)
    return plan.alone(), tensors


def assert_alike(here: Path, there: Path) -> None:
    """Two folders hold the same network: the plan, and every tensor with its name, type and bits."""
    (plan, tensors), (other_plan, others) = saved(here), saved(there)
    assert plan == other_plan
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and tensor.shape == others[name].shape, name
        assert torch.equal(tensor.flatten().view(torch.uint8), others[name].flatten().view(torch.uint8)), name


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- the same network ----


def card_of(folder: Path) -> str:
    """The text of a saved network's card, without the names of its files of weights."""
    text = (folder / "README.md").read_text().partition("<!-- lamina")[0]
    return re.sub(r"(, )?`model-[0-9a-f]{16}\.safetensors`", "", text)


@pytest.mark.parametrize("largest_file", [2**32, 2000], ids=["one file", "many files"])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_saves_what_decompose_in_memory_saves_tensor_for_tensor(
    name: str, largest_file: int, tmp_path: Path, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_LARGEST_FILE", largest_file)
    make, example, forms = NETWORKS[name]
    model, x = make().eval(), example()
    plan = halved(model, x) if forms is None else planned(model, x, forms)
    assert plan.decomposed
    index = checkpoint(model, tmp_path / "big")
    lamina.save(lamina.decompose(model, plan), tmp_path / "whole")
    assert lamina.decompose_checkpoint(bare(make), plan, index, output=tmp_path / "streamed") == 0
    assert_alike(tmp_path / "streamed", tmp_path / "whole")
    assert card_of(tmp_path / "streamed") == card_of(tmp_path / "whole")
    assert (len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1) == (
        largest_file == 2000 and name != "the root itself"
    )
    assert not (tmp_path / "streamed" / folders.WRITING).exists()


HALVES = {
    "bfloat16 as it is": (torch.bfloat16, None, torch.bfloat16),
    "float16 as it is": (torch.float16, None, torch.float16),
    "float32 to bfloat16": (None, torch.bfloat16, None),
    "bfloat16 to float16": (torch.bfloat16, torch.float16, None),
    "float64 to bfloat16 by way of float32": (torch.float64, torch.bfloat16, None),
}


@pytest.mark.parametrize(("stored", "dtype", "made"), HALVES.values(), ids=HALVES)
def test_in_half_precision_it_saves_what_the_command_in_memory_saves(
    stored: torch.dtype | None, dtype: torch.dtype | None, made: torch.dtype | None, tmp_path: Path
) -> None:
    model = Everything().eval()
    plan = halved(model, torch.randint(50, (2, 9)))
    index = checkpoint(model, tmp_path / "big", dtype=stored)
    # As `lamina apply` does: made, its weights loaded, then converted.
    other = Everything().to(made).eval()
    held = {name: tensor for path in index.parent.glob("*.safetensors") for name, tensor in load_file(path).items()}
    own = other.state_dict(keep_vars=True)
    other.load_state_dict(held | {name: held[n] for n in held for name in own if own[name] is own[n]})
    lamina.save(lamina.decompose(other.to(dtype=dtype), plan, check=False), tmp_path / "whole")
    lamina.decompose_checkpoint(bare(Everything, made), plan, index, output=tmp_path / "streamed", dtype=dtype)
    assert_alike(tmp_path / "streamed", tmp_path / "whole")


def test_it_is_loaded_and_saved_again_as_any_saved_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_LARGEST_FILE", 4000)
    model, x = Everything().eval(), torch.randint(50, (2, 9))
    plan = halved(model, x)
    lamina.decompose_checkpoint(bare(Everything), plan, checkpoint(model, tmp_path / "big"), output=tmp_path / "out")
    again = lamina.load(Everything(), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(x), lamina.decompose(model, plan)(x))
    assert Plan.load(tmp_path / "out" / "plan.json") == plan, "the plan of many files is the plan"
    lamina.save(again, tmp_path / "once more")
    assert_alike(tmp_path / "once more", tmp_path / "out")
    assert len(list((tmp_path / "once more").glob("*.safetensors"))) == 1


def test_a_folder_and_a_single_file_are_weights_too(tmp_path: Path) -> None:
    model = Crossed().eval()
    plan = halved(model, torch.randn(2, 5, 16))
    checkpoint(model, tmp_path / "big")
    single = checkpoint(model, tmp_path / "single", 1).with_name("model-00001-of-00001.safetensors")
    for number, weights in enumerate([tmp_path / "big", single, str(single)]):
        lamina.decompose_checkpoint(bare(Crossed), plan, weights, output=tmp_path / str(number))
        assert_alike(tmp_path / str(number), tmp_path / "0")


def test_a_layer_goes_through_the_function_of_decompose_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Everything().eval()
    plan = halved(model, torch.randint(50, (2, 9)))
    seen = counted(monkeypatch)
    lamina.decompose_checkpoint(bare(Everything), plan, checkpoint(model, tmp_path / "big"), output=tmp_path / "out")
    assert sorted(seen) == sorted(plan.decomposed)


def test_large_tensors_are_copied_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina import weights

    monkeypatch.setattr(weights, "_SLICE_BYTES", 100)
    monkeypatch.setattr(streaming, "_TOGETHER_BYTES", 1000)
    model = Everything().eval()
    plan = halved(model, torch.randint(50, (2, 9)))
    lamina.save(lamina.decompose(model, plan), tmp_path / "whole")
    lamina.decompose_checkpoint(bare(Everything), plan, checkpoint(model, tmp_path / "big"), output=tmp_path / "out")
    assert_alike(tmp_path / "out", tmp_path / "whole")


def test_the_network_given_is_only_read(tmp_path: Path) -> None:
    model = Everything().eval()
    plan, given = halved(model, torch.randint(50, (2, 9))), bare(Everything)
    before = {name: (type(module), id(module)) for name, module in given.named_modules()}
    state = {name: (id(tensor), tensor.dtype) for name, tensor in given.state_dict(keep_vars=True).items()}
    index = checkpoint(model, tmp_path / "big")
    lamina.decompose_checkpoint(given, plan, index, output=tmp_path / "out", dtype=torch.bfloat16)
    assert {name: (type(module), id(module)) for name, module in given.named_modules()} == before
    assert {name: (id(tensor), tensor.dtype) for name, tensor in given.state_dict(keep_vars=True).items()} == state


# ---- killed, it goes on ----


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the layers that are factorised from now on."""
    factored, seen = streaming.factored_layer, []

    def counting(layer: Any, *args: Any, **options: Any) -> Any:
        seen.append(layer.name)
        return factored(layer, *args, **options)

    monkeypatch.setattr(streaming, "factored_layer", counting)
    return seen


STEPS = ("pwrite", "write", "fsync", "replace", "truncate")


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do something in a process that kills itself before its so-many-th step towards the disk; whether it came so far."""
    process = os.fork()
    if not process:
        try:
            left = [step]

            def killing(name: str) -> Callable[..., Any]:
                real = getattr(os, name)

                def call(*args: Any, **options: Any) -> Any:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **options)

                return call

            for name in STEPS:
                setattr(os, name, killing(name))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize(
    ("earlier", "stride"),
    [
        pytest.param(True, 13, id="some steps"),
        pytest.param(False, 1, id="every step in a new folder", marks=pytest.mark.slow),
        pytest.param(True, 1, id="every step over an earlier network", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_step_nothing_is_half_there_and_the_same_call_goes_on_to_the_same_bytes(
    earlier: bool, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_LARGEST_FILE", 1000)
    monkeypatch.setattr(streaming, "_TOGETHER_BYTES", 1000)
    model = Crossed().eval()
    plan = halved(model, torch.randn(2, 5, 16))
    other = plan.with_form("attention.q_proj", LowRank(1))
    index, given = checkpoint(model, tmp_path / "big"), bare(Crossed)

    def stream(folder: Path) -> int:
        return lamina.decompose_checkpoint(given, plan, index, output=folder)

    stream(tmp_path / "whole")
    whole = bytes_of(tmp_path / "whole")
    assert len(whole) > 2, "several files"
    lamina.save(lamina.decompose(model, other), tmp_path / "other")
    layers, all_seen, resumed, step = len(plan.decomposed), [], [], 0
    while True:
        folder = tmp_path / f"killed {step}"
        if earlier:
            shutil.copytree(tmp_path / "other", folder)
        if not killed_at(step, lambda folder=folder: stream(folder)):
            break
        if (folder / "plan.json").exists():
            found = saved(folder)[0]
            assert found == plan or (earlier and found == other), "one network or the other, whole"
        else:
            assert not earlier
            with pytest.raises(ArtifactError, match="is not a saved network"):
                lamina.load(Crossed(), folder)
        with monkeypatch.context() as watching:
            seen = counted(watching)
            resumed.append(stream(folder))
        assert bytes_of(folder) == whole, step
        all_seen.append(len(seen))
        shutil.rmtree(folder)
        step += stride
    assert bytes_of(folder) == whole
    assert step > 30 and max(resumed) > layers and {0, layers} < set(all_seen), "killed before, between and after the layers"
    assert all_seen == sorted(all_seen, reverse=True)
    assert stride > 1 or set(all_seen) == set(range(layers + 1))
    done = [made + seen for made, seen in zip(resumed, all_seen, strict=True) if seen < layers]
    assert set(done) == {max(resumed)}, "no layer that was done is done again"


def test_what_waits_there_is_looked_at_and_made_again_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Everything().eval()
    plan = halved(model, torch.randint(50, (2, 9)))
    index, given, folder = checkpoint(model, tmp_path / "big"), bare(Everything), tmp_path / "out"
    lamina.decompose_checkpoint(given, plan, index, output=tmp_path / "whole")
    with monkeypatch.context() as failing:
        failing.setattr(parts._File, "settled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lamina.decompose_checkpoint(given, plan, index, output=folder)
    (waiting,) = (folder / folders.WRITING).glob("weights-*")
    content = bytearray(waiting.read_bytes())
    content[-5] ^= 1
    waiting.write_bytes(content)
    with monkeypatch.context() as watching:
        seen = counted(watching)
        lamina.decompose_checkpoint(given, plan, index, output=folder)
    assert len(seen) <= 1
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


OTHERS: dict[str, Callable[[nn.Module, Plan, Path], tuple[Plan, dict[str, Any]]]] = {
    "another plan": lambda model, plan, big: (plan.with_form("attention.q_proj", LowRank(2)), {}),
    "other weights": lambda model, plan, big: (changed(model, big, plan), {}),
    "another type": lambda model, plan, big: (plan, {"dtype": torch.bfloat16}),
}


def changed(model: nn.Module, big: Path, plan: Plan) -> Plan:
    with torch.no_grad():
        model.attention.out_proj.weight += 1  # type: ignore[union-attr, operator]
    checkpoint(model, big)
    return plan


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_work_that_was_cut_off_serves_the_very_same_call_alone(
    change: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Crossed().eval()
    plan = halved(model, torch.randn(2, 5, 16))
    index, folder = checkpoint(model, tmp_path / "big"), tmp_path / "out"
    with monkeypatch.context() as failing:
        failing.setattr(parts._File, "settled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lamina.decompose_checkpoint(bare(Crossed), plan, index, output=folder)
    plan, options = change(model, plan, tmp_path / "big")
    assert lamina.decompose_checkpoint(bare(Crossed), plan, index, output=folder, **options) == 0
    lamina.decompose_checkpoint(bare(Crossed), plan, index, output=tmp_path / "fresh", **options)
    assert bytes_of(folder) == bytes_of(tmp_path / "fresh")


def test_a_save_into_the_folder_removes_what_waited_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Crossed().eval()
    plan = halved(model, torch.randn(2, 5, 16))
    with monkeypatch.context() as failing:
        failing.setattr(parts._File, "settled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lamina.decompose_checkpoint(bare(Crossed), plan, checkpoint(model, tmp_path / "big"), output=tmp_path / "out")
    lamina.save(lamina.decompose(model, plan), tmp_path / "out")
    assert sorted(each.suffix for each in (tmp_path / "out").iterdir()) == [".json", ".md", ".safetensors"]


def test_a_full_disk_is_one_line_and_what_was_done_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Everything().eval()
    plan = halved(model, torch.randint(50, (2, 9)))
    index, given, folder = checkpoint(model, tmp_path / "big"), bare(Everything), tmp_path / "out"
    write, room = os.pwrite, [40_000]

    def filling(descriptor: int, content: Any, at: int) -> int:
        room[0] -= len(content)
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        return write(descriptor, content, at)

    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", filling)
        with pytest.raises(
            ArtifactError, match=r"No space left on device; what is done waits in .*the same call goes on"
        ) as caught:
            lamina.decompose_checkpoint(given, plan, index, output=folder)
    assert "\n" not in str(caught.value)
    assert lamina.decompose_checkpoint(given, plan, index, output=folder) > 1
    lamina.decompose_checkpoint(given, plan, index, output=tmp_path / "whole")
    assert bytes_of(folder) == bytes_of(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Crossed().eval()
    plan = halved(model, torch.randn(2, 5, 16))
    index = checkpoint(model, tmp_path / "big")
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    refused(tmp_path, plan, index, ArtifactError, r"out cannot be written: the weights take .* GB more")


# ---- what is refused ----


def refused(tmp_path: Path, plan: Plan, weights: Path, kind: type[LaminaError], message: str, **more: Any) -> None:
    """A call ends in one line, and leaves nothing."""
    make, folder = more.pop("make", Crossed), more.pop("folder", tmp_path / "out")
    with pytest.raises(kind, match=message) as caught:
        lamina.decompose_checkpoint(make() if more.pop("full", False) else bare(make), plan, weights, output=folder, **more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def edited(index: Path, change: Callable[[dict[str, Tensor]], Any], file: str = "") -> None:
    """Change the tensors of one file, by default the first, and let the index name what is in it then."""
    path = index.with_name(file or "model-00001-of-00003.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    content = json.loads(index.read_text())
    others = {name: file for name, file in content["weight_map"].items() if file != path.name}
    index.write_text(json.dumps({"weight_map": others | dict.fromkeys(tensors, path.name)}))


BIAS = "attention.bias_k"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a shape": (lambda t: t.__setitem__(BIAS, torch.zeros(1, 1, 17)), rf"{BIAS} has shape \(1, 1, 17\), .* wants \(1, 1, 16\)"),
    "a type": (
        lambda t: t.__setitem__(BIAS, t[BIAS].half()),
        rf"{BIAS} is torch.float16, .* is torch.float32: convert with dtype=",
    ),
    "integers": (lambda t: t.__setitem__(BIAS, t[BIAS].int()), rf"{BIAS} is torch.int32, .*: these are not its weights"),
    "one too few": (lambda t: t.pop(BIAS), f"{BIAS} is missing"),
    "a name": (lambda t: t.__setitem__("attention.bias_j", t.pop(BIAS)), f"{BIAS} is missing; did you mean attention.bias_j"),
    "one too many": (lambda t: t.__setitem__("head", torch.zeros(1)), "head has no place in this network"),
}


@pytest.fixture
def crossed(tmp_path: Path) -> tuple[Plan, Path]:
    model = Crossed().eval()
    return halved(model, torch.randn(2, 5, 16)), checkpoint(model, tmp_path / "big")


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_tensor_that_does_not_fit_is_named(
    change: Callable[[dict[str, Tensor]], Any], message: str, crossed: tuple[Plan, Path], tmp_path: Path
) -> None:
    plan, index = crossed
    edited(index, change)
    refused(tmp_path, plan, index, ArtifactError, message)


def test_shards_that_are_missing_cut_short_or_damaged_are_named(crossed: tuple[Plan, Path], tmp_path: Path) -> None:
    plan, index = crossed
    shard = index.with_name("model-00002-of-00003.safetensors")
    whole = shard.read_bytes()
    for content in (whole[:-1], whole[:100], whole[:5], b"", b"no safetensors at all"):
        shard.write_bytes(content)
        refused(tmp_path, plan, index, ArtifactError, f"{re.escape(str(shard))}: cut short, or no safetensors .*fetch it again")
    shard.unlink()
    refused(tmp_path, plan, index, ArtifactError, f"{re.escape(str(shard))} is missing, and {index.name} names it")


def test_weights_that_are_not_finite_are_named_before_anything_is_factorised(
    crossed: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, index = crossed
    file = json.loads(index.read_text())["weight_map"]["attention.v_proj_weight"]
    edited(index, lambda t: t["attention.v_proj_weight"].__setitem__((0, 0), torch.nan), file)
    seen = counted(monkeypatch)
    refused(tmp_path, plan, index, LayerError, r"attention\.v_proj: 1 of its 320 weights are NaN")
    assert not seen


def test_a_layer_that_cannot_be_factorised_is_named_and_what_was_done_is_kept(
    crossed: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factored = streaming.factored_layer

    def failing(layer: Any, *args: Any, **options: Any) -> Any:
        if layer.part == "v_proj":
            raise LayerError(f"{layer.title}: cannot be factorised: no memory")
        return factored(layer, *args, **options)

    with monkeypatch.context() as broken:
        broken.setattr(streaming, "factored_layer", failing)
        with pytest.raises(LayerError, match=r"attention\.v_proj: cannot be factorised: no memory; what is done waits in"):
            lamina.decompose_checkpoint(bare(Crossed), *crossed, output=tmp_path / "out")
    with monkeypatch.context() as watching:
        seen = counted(watching)
        assert lamina.decompose_checkpoint(bare(Crossed), *crossed, output=tmp_path / "out") > 0
    assert 0 < len(seen) < 4 and "attention.v_proj" in seen


def test_plans_that_cannot_be_applied_so_are_refused(crossed: tuple[Plan, Path], tmp_path: Path) -> None:
    plan, index = crossed
    refused(tmp_path, plan, index, PlanError, "another network", make=Convolutions)
    fitted = plan.model_copy(update={"factors": plan.factors.model_copy(update={"calibration": "a" * 64})})
    refused(tmp_path, fitted, index, PlanError, "fitted to a calibration.*apply it in memory with its data")
    trained = plan.model_copy(update={"factors": plan.factors.model_copy(update={"series": "nested"})})
    refused(tmp_path, trained, index, PlanError, "trained in a supernet")


def test_a_network_in_memory_is_refused(crossed: tuple[Plan, Path], tmp_path: Path) -> None:
    refused(tmp_path, *crossed, ArtifactError, r"in memory: make the network under torch\.device\('meta'\)", full=True)


def test_tied_tensors_that_differ_in_the_checkpoint_are_named(tmp_path: Path) -> None:
    model = Everything().eval()
    plan, index = halved(model, torch.randint(50, (2, 9))), checkpoint(model, tmp_path / "big")
    edited(index, lambda t: t.__setitem__("head.weight", model.head.weight.detach().clone()))
    lamina.decompose_checkpoint(bare(Everything), plan, index, output=tmp_path / "both")
    edited(index, lambda t: t["head.weight"].__setitem__((3, 3), 7.0))
    message = r"embedding\.weight and head\.weight are one tensor in this network, and two here"
    refused(tmp_path, plan, index, ArtifactError, message, make=Everything)


def test_a_state_that_the_networks_own_code_makes_is_refused(tmp_path: Path) -> None:
    class Renamed(Crossed):
        def __init__(self) -> None:
            super().__init__()
            self.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(doubled(state)))

    def doubled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor * 2 for name, tensor in state.items()}

    model = Renamed().eval()
    plan = halved(model, torch.randn(2, 5, 16))
    save_file({name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    refused(tmp_path, plan, tmp_path / "w.safetensors", ArtifactError, "own code makes its state.*in memory", make=Renamed)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(
    crossed: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    seen = counted(monkeypatch)
    refused(tmp_path, *crossed, ArtifactError, "file is a file", folder=tmp_path / "file")
    refused(tmp_path, *crossed, ArtifactError, "cannot be written", folder=tmp_path / "file" / "below")
    refused(tmp_path, *crossed, ArtifactError, r"holds other files .*thesis\.txt", folder=tmp_path / "mine")
    assert not seen


def test_files_of_a_saved_network_that_are_missing_or_damaged_are_named(
    crossed: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_LARGEST_FILE", 1000)
    lamina.decompose_checkpoint(bare(Crossed), *crossed, output=tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "plan.json").read_text())["format"] == 2
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=f"{file.name} is damaged"):
            lamina.load(Crossed(), tmp_path / "saved")
        file.unlink()
        with pytest.raises(ArtifactError, match=f"is not whole: it has no {file.name}"):
            lamina.load(Crossed(), tmp_path / "saved")
        file.write_bytes(whole)
    lamina.load(Crossed(), tmp_path / "saved")


# ---- real processes ----

NETWORK = """
import torch
from torch import nn

def net():
    torch.manual_seed(7)
    return nn.Sequential(*(nn.Linear(384, 384) for _ in range(12)))
"""


@pytest.mark.slow
def test_the_command_killed_at_random_moments_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large_nets.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(*(nn.Linear(384, 384) for _ in range(12))).eval()
    halved(model, torch.randn(1, 384)).save("plan.json")
    checkpoint(model, tmp_path / "big")

    def start(folder: str) -> subprocess.Popen[str]:
        words = ("apply", "large_nets:net", "plan.json", "-o", folder, "--weights", "big", "--threads", "1")
        command = [sys.executable, "-m", "lamina", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def parts_done(folder: str) -> int:
        journal = tmp_path / folder / folders.WRITING / "journal"
        return len(journal.read_bytes().splitlines()) - 1 if journal.exists() else 0

    whole = start("whole")
    assert whole.communicate()[0] and whole.returncode == 0
    for wanted in (1, 4, 8):
        running = start("out")
        while running.poll() is None and parts_done("out") < wanted:
            time.sleep(0.001)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not (tmp_path / "out" / "plan.json").exists()
        assert parts_done("out") >= wanted
    ended = start("out")
    said = ended.communicate()
    assert ended.returncode == 0, said
    assert "parts of it had been made before" in said[0]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_stays_below_six_times_the_largest_layer(dtype: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("streamed_within.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path), dtype], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, largest, total = map(int, done.stdout.split())
    assert total > 3 * largest
    assert grown < 6 * largest, f"{grown / largest:.2f} times the largest layer"
