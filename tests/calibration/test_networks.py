"""Networks of others: every layer of theirs has moments that price a change of it as what it does to the answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina.network.walk import walk


def priced(moments: lamina.Moments, change: torch.Tensor) -> float:
    """½ tr(G ΔW H ΔWᵀ)."""
    H, G, rows = moments.inputs(), moments.gradients(), change.double().flatten(1)
    assert G is not None
    return float((G @ rows @ H @ rows.T).trace()) / 2


def measured(model: nn.Module, name: str, change: torch.Tensor, data: list[Any], outputs: Any) -> float:
    """The mean divergence of an item, with the layer changed."""
    weight = model.get_submodule(name).weight
    run = lambda x: model(**x) if isinstance(x, dict) else model(x)  # noqa: E731
    with torch.no_grad():
        before = [run(x) for x in data]
        weight += change
        divergence = torch.cat([outputs.divergence(b, run(x)) for b, x in zip(before, data, strict=True)])
        weight -= change
    return float(divergence.mean())


@pytest.mark.slow
def test_every_layer_of_a_resnet_has_finite_moments_that_price_its_changes() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(weights=None).eval().double()
    outputs, data = lamina.Categorical(), list(torch.randn(48, 3, 32, 32, dtype=torch.float64).split(8))
    found = lamina.calibrate(model, data, outputs=outputs, tolerance=None)
    assert found.layers.keys() == walk(model).layers.keys()
    assert all(torch.isfinite(m.inputs()).all() and torch.isfinite(m.gradients()).all() for m in found.layers.values())
    # In the last layers positions are few; earlier the independence of positions, which Kronecker factors rest on, is far off.
    for name in ("fc", "layer4.1.conv2", "layer4.0.conv2"):
        weight = model.get_submodule(name).weight.detach()
        change = 1e-3 * weight.norm() / weight.numel() ** 0.5 * torch.randn_like(weight)
        price, cost = priced(found.layers[name], change), measured(model, name, change, data, outputs)
        assert 0.4 < price / cost < 2.5, (name, price, cost)


def test_a_tiny_bert_has_moments_of_every_layer_and_its_padding_can_be_left_out() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(50, (16, 7))
    mask = (torch.arange(7) < torch.arange(16)[:, None] % 5 + 2).long()
    data = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]
    found = lamina.calibrate(model, data, outputs=lamina.Categorical())
    assert found.layers.keys() == walk(model).layers.keys() and not found.notes
    assert all(moments.gradients().any() for moments in found.layers.values())
    name = "bert.encoder.layer.0.attention.self.query"
    assert found.layers[name].rows == 16 * 7
    kept = lamina.calibrate(model, data, outputs=lamina.Categorical(), mask="attention_mask")
    assert kept.layers[name].rows == int(mask.sum())
    assert kept.layers["bert.pooler.dense"].rows == 16
    # Nobody listens to a padded position, so its gradients are nothing but a part of the mean.
    last = "bert.encoder.layer.1.output.dense"
    for moments, other in ((kept.layers[last], found.layers[last]),):
        torch.testing.assert_close(moments.gradients() * moments.rows, other.gradients() * other.rows, rtol=1e-4, atol=1e-7)


def test_the_transposed_weights_of_gpt2_are_read_and_every_output_of_a_model_counts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2Model(config).eval()
    found = lamina.calibrate(model, [{"input_ids": torch.randint(50, (8, 6))}])
    layer = found.layers["h.0.attn.c_attn"]
    assert layer.inputs().shape == (16, 16) and layer.gradients().shape == (48, 48)


def test_answers_in_a_tuple_of_unlike_tensors_move_every_branch() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Conv1d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> Any:
            h = self.body(x).tanh()
            return {"boxes": [self.left(h)], "map": self.right(h[..., None].expand(-1, -1, 5)), "count": torch.arange(3)}

    model, data = Two().double(), list(torch.randn(4096, 4, dtype=torch.float64).split(256))
    found = lamina.calibrate(model, data, tolerance=None)
    for name in ("left", "right", "body"):
        weight = model.get_submodule(name).weight.detach()
        change = 1e-4 * torch.randn_like(weight)
        price, cost = priced(found.layers[name], change), measured(model, name, change, data, lamina.Gaussian())
        assert 0.5 < price / cost < 2, (name, price, cost)
