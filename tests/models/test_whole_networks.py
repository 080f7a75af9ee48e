"""Whole networks of other people: exact at full rank in every mode, what is refused named, every promise kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.layers.decomposed import DecomposedLayer
from lamina.network.running import MODES, set_mode

Case = tuple[nn.Module, Any]


def resnet18() -> Case:
    models = pytest.importorskip("torchvision.models")
    return models.resnet18(num_classes=10), torch.randn(1, 3, 64, 64)


def mobilenet() -> Case:
    models = pytest.importorskip("torchvision.models")
    return models.mobilenet_v2(num_classes=10), torch.randn(1, 3, 64, 64)


def vit() -> Case:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10), torch.randn(2, 3, 64, 64)


def gpt2() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    return transformers.GPT2LMHeadModel(config), {
        "input_ids": torch.randint(100, (2, 9)),
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
    }


def t5() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, use_cache=False)
    return transformers.T5Model(config), {
        "input_ids": torch.randint(100, (2, 9)),
        "decoder_input_ids": torch.randint(100, (2, 5)),
    }


def encoder() -> Case:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2), torch.randn(2, 7, 32)


def decoder() -> Case:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64), 2), (torch.randn(5, 2, 32), torch.randn(7, 2, 32))


def video() -> Case:
    layers = [
        nn.Conv3d(3, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 16, (1, 3, 3), stride=(1, 2, 2)),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 4)), torch.randn(2, 3, 4, 9, 9)


NETWORKS = {
    "resnet18": resnet18,
    "mobilenet": mobilenet,
    "vit": vit,
    "gpt2": gpt2,
    "t5": t5,
    "encoder": encoder,
    "decoder": decoder,
    "video": video,
}

# What is left dense in each, and a word of the reason. "the rest" may be refused for no other.
REFUSED: dict[str, dict[str, str]] = {
    "resnet18": {},
    "mobilenet": {"features.2.conv.1.0": "depthwise"},
    "vit": {},
    "gpt2": {"lm_head": "tied"},
    "t5": {},
    "encoder": {},
    "decoder": {},
    "video": {},
}
COUNTS = {"resnet18": 21, "mobilenet": 36, "vit": 14, "gpt2": 8, "t5": 32, "encoder": 12, "decoder": 20, "video": 3}


@pytest.fixture(params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def case(name: str) -> Case:
    return NETWORKS[name]()


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def outputs(model: nn.Module, example: Any, mode: str) -> list[Tensor]:
    training, context = MODES[mode]
    set_mode(model, training)
    torch.manual_seed(0)  # dropout falls on the same entries
    with warnings.catch_warnings(), context():
        warnings.simplefilter("ignore")
        return tensors(lamina.Workload(example).run(model))


def test_a_network_at_full_rank_is_the_same_in_every_mode(case: Case, name: str, planned: Callable[..., lamina.Plan]) -> None:
    model, example = case
    model, example = model.double(), in_double(example)
    plan = planned(model, example)
    assert len(plan.decomposed) == COUNTS[name]
    for layer, word in REFUSED[name].items():
        assert word in plan.refused[layer]
    assert not any("Embedding" in reason for reason in plan.refused.values())  # which is no layer
    small = lamina.decompose(model, plan)
    assert sum(isinstance(m, DecomposedLayer) for m in small.modules()) == COUNTS[name]
    for mode in MODES:
        # Each layer is exact to 1e-10; many in a row, and divisions by small variances, may cost three digits.
        for wanted, found in zip(outputs(model, example, mode), outputs(small, example, mode), strict=True):
            assert float((found - wanted).detach().norm() / wanted.detach().norm()) <= 1e-7, mode


def in_double(example: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, example)


@pytest.mark.slow
def test_a_network_at_half_its_size_keeps_every_promise(case: Case, tmp_path: Path) -> None:
    model, example = case
    model.eval()
    plan = lamina.make_plan(model, example, lamina.Ratio(2.0), rule=lamina.AtRatio())
    assert plan.decomposed
    small = lamina.decompose(model, plan)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    verification = lamina.verify(model, small, example)
    assert verification.passed, str(verification)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "resnet18"])  # it takes 8 s twice, and says no more
def test_a_network_in_place_gives_the_same_bits_as_a_copy(name: str) -> None:
    model, example = NETWORKS[name]()
    plan = lamina.make_plan(model, example, lamina.Ratio(2.0), rule=lamina.AtRatio())
    small = lamina.decompose(model, plan, check=False)
    again = lamina.decompose(model, plan, inplace=True, check=False)
    for a, b in zip(outputs(small, example, "eval"), outputs(again, example, "eval"), strict=True):
        assert torch.equal(a, b)


def test_weights_tied_in_gpt2_are_tied_afterwards(planned: Callable[..., lamina.Plan], tmp_path: Path) -> None:
    # traps: tied parameters (embedding/head)
    model, example = gpt2()
    small = lamina.decompose(model, planned(model, example))
    assert small.lm_head.weight is small.transformer.wte.weight
    lamina.save(small, tmp_path / "saved")
    again = lamina.load(gpt2()[0], tmp_path / "saved")
    assert again.lm_head.weight is again.transformer.wte.weight
    for a, b in zip(outputs(small, example, "eval"), outputs(again, example, "eval"), strict=True):
        assert torch.equal(a, b)


def test_gpt2_generates_with_decomposed_layers(planned: Callable[..., lamina.Plan]) -> None:
    model, example = gpt2()
    small = lamina.decompose(model.eval(), planned(model, example))
    prompt = {name: value[:1, :4] for name, value in example.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, found = (m.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, small))
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_a_timed_plan_of_a_network_is_decomposed_saved_and_loaded(tmp_path: Path) -> None:
    model, example = video()
    model.eval()
    plan = lamina.make_plan(model, example, lamina.Ratio(2.0))
    small = lamina.decompose(model, plan)
    lamina.save(small, tmp_path / "saved")
    again = lamina.load(video()[0].eval(), tmp_path / "saved")
    assert torch.equal(again(example), small(example))
