"""Layers that share a weight get their own: equal answers, the original as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.errors import PlanError
from lamina.network.walk import walk


class Tied(nn.Module):
    """An embedding and a head that share their weight, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.body, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        answer: Tensor = self.head(self.body(self.tokens(ids)).relu())
        return answer


IDS = torch.arange(10).view(2, 5)


def test_a_head_is_untied_on_a_copy_and_decomposed(planned: Any) -> None:
    model = Tied().eval()
    apart = lamina.untied(model, "head")
    assert model.head.weight is model.tokens.weight and "head" in walk(model).refused
    assert torch.equal(apart(IDS), model(IDS)) and "head" in walk(apart).layers
    assert apart.head.weight.untyped_storage().data_ptr() != apart.tokens.weight.untyped_storage().data_ptr()
    small = lamina.decompose(apart, planned(apart, IDS))
    torch.testing.assert_close(small(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    assert torch.equal(small.tokens.weight, model.tokens.weight)


def test_what_was_untied_is_saved_and_loaded_onto_what_is_untied_alike(planned: Any, tmp_path: Any) -> None:
    apart = lamina.untied(Tied().eval(), "head")
    small = lamina.decompose(apart, planned(apart, IDS)).eval()
    lamina.save(small, tmp_path / "saved")
    assert torch.equal(lamina.load(lamina.untied(Tied().eval(), "head"), tmp_path / "saved")(IDS), small(IDS))
    with pytest.raises(lamina.LaminaError):
        lamina.load(Tied(), tmp_path / "saved")


@pytest.mark.parametrize(("name", "message"), [
    ("heads", r"^'heads': no module of this network has this name; did you mean head\?$"),
    ("body", "^body: shares no parameter with another module: nothing to untie$"),
])  # fmt: skip
def test_what_is_not_tied_cannot_be_untied(name: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        lamina.untied(Tied(), name)
