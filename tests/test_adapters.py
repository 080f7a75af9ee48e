"""PEFT's adapters on decomposed networks: their factors are plain layers, found by the names of the layers that were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina import BlockTerm, LayerError, LowRank, PlanError
from lamina.layers.decomposed import DecomposedLayer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(20).view(2, 10)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)).eval()


def convolutional() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 4 * 4, 6)).eval()


def few(name: str) -> bool:
    return ".q_proj" in name or ".query" in name or "0.mlp" in name or name in ("2", "4")


NETWORKS: dict[str, Any] = {
    # maker, input, names of layers, some of them decomposed and others dense
    "llama": (llama, IDS, ["q_proj", "v_proj"]),
    "bert": (bert, IDS, ["query", "value", "classifier"]),
    "a plain network": (convolutional, torch.randn(2, 3, 8, 8), ["0", "2", "4"]),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def case(request: Any, planned: Any) -> tuple[Any, Any, torch.Tensor, list[str]]:
    """Maker of the original, decomposed network, input, names."""
    make, x, names = request.param
    model = make()
    plan = lamina.make_plan(model, x, lamina.Ratio(2), rule=lamina.AtRatio())
    forms = {name: layer.form for name, layer in plan.decomposed.items() if few(name)}
    return make, lamina.decompose(model, planned(model, x, forms)), x, names


def answers(model: Any, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    return found if isinstance(found, torch.Tensor) else found.logits


def adapted(base: Any, targets: list[str]) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0))


def trained(model: Any, x: torch.Tensor) -> list[float]:
    """The losses of some steps towards a drawn target."""
    with torch.no_grad():
        wanted = torch.randn(answers(model, x).shape, generator=torch.Generator().manual_seed(2))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(adapters, lr=1e-2), []
    for _ in range(8):
        loss = (answers(model, x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_adapters_train_beside_a_base_that_rests_as_on_a_network_without_lamina(case: Any) -> None:
    _, small, x, names = case
    plain, targets = lamina.plain(small), lamina.adapter_targets(small, names)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    model = adapted(small, targets)
    losses = trained(model, x)
    assert losses[-1] < losses[0] and losses == trained(adapted(plain, targets), x)
    base = {name.replace(".base_layer", ""): value for name, value in small.state_dict().items() if "lora" not in name}
    assert base.keys() == before.keys() and all(torch.equal(base[name], before[name]) for name in before)


def test_merged_the_network_answers_the_same_and_its_layers_are_whole(case: Any, tmp_path: Path) -> None:
    make, small, x, names = case
    stacks = [name for name, module in small.named_modules() if isinstance(module, DecomposedLayer)]
    first = answers(small, x).detach()
    model = adapted(small, lamina.adapter_targets(small, names))
    trained(model, x)
    with torch.no_grad():
        wanted = answers(model, x)
        merged = model.merge_and_unload()
        torch.testing.assert_close(answers(merged, x), wanted, rtol=1e-4, atol=1e-5)
        assert (wanted - first).norm() > 1e-3 * first.norm()
        assert [name for name, module in merged.named_modules() if isinstance(module, DecomposedLayer)] == stacks
        lamina.save(merged, tmp_path)
        assert torch.equal(answers(lamina.load(make(), tmp_path).eval(), x), answers(merged, x))
        torch.testing.assert_close(answers(lamina.merge(merged), x), wanted, rtol=1e-4, atol=1e-5)


def test_adapters_saved_by_peft_go_onto_the_saved_network(case: Any, tmp_path: Path) -> None:
    make, small, x, names = case
    lamina.save(small, tmp_path / "out")
    model = adapted(small, lamina.adapter_targets(small, names))
    trained(model, x)
    model.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(lamina.load(make(), tmp_path / "out").eval(), tmp_path / "adapters")
    with torch.no_grad():
        assert torch.equal(answers(again, x), answers(model, x))


def test_what_would_leave_the_adapters_out_is_refused(case: Any, tmp_path: Path) -> None:
    _, small, x, names = case
    model = adapted(small, lamina.adapter_targets(small, names))
    trained(model, x)
    with pytest.raises(
        PlanError, match=r"its factors were changed after it was decomposed, they have .*base_layer.*merge_and_unload"
    ):
        lamina.save(small, tmp_path / "out")
    with pytest.raises(LayerError, match=r"a .* of peft stands where a factor stood, and computes with more than its weight"):
        lamina.merge(small)
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        plain = lamina.plain(small)  # has them as it has any layer
        torch.testing.assert_close(answers(plain, x), answers(model, x))


def test_peft_itself_refuses_a_decomposed_layer_and_takes_its_factors(planned: Any) -> None:
    model = llama()
    small = lamina.decompose(model, planned(model, IDS, {"model.layers.0.self_attn.q_proj": LowRank(4)}))
    with pytest.raises(ValueError, match="LowRankLayer"):
        peft.get_peft_model(small, peft.LoraConfig(target_modules=["q_proj"]))
    small = lamina.decompose(model, planned(model, IDS, {"model.layers.0.self_attn.q_proj": LowRank(4)}))
    assert peft.get_peft_model(small, peft.LoraConfig(target_modules="all-linear")) is not None


def test_targets_are_the_factors_of_decomposed_layers_and_dense_ones_themselves(planned: Any) -> None:
    model = convolutional()
    small = lamina.decompose(model, planned(model, torch.randn(2, 3, 8, 8), {"2": BlockTerm(4, 4), "4": LowRank(2)}))
    assert lamina.adapter_targets(small, ["2", "0"]) == ["2.reduce", "2.core", "2.expand", "0"]
    inside = nn.ModuleDict({"body": small})
    assert lamina.adapter_targets(inside, ["4"]) == ["body.4.first", "body.4.second"]
    assert lamina.adapter_targets(inside, ["body.[04]", "4"]) == ["body.0", "body.4.first", "body.4.second"]
    assert lamina.adapter_targets(small[4], ["*"])[:2] == ["first", "second"]


def test_a_name_that_no_layer_has_is_refused() -> None:
    with pytest.raises(PlanError, match=r"pattern 'q_porj' matches no layer; did you mean .*q_proj"):
        lamina.adapter_targets(llama(), ["q_porj"])
    with pytest.raises(PlanError, match=r"give a list of patterns: \['q_proj'\]"):
        lamina.adapter_targets(llama(), "q_proj")
