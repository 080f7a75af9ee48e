"""What other libraries would save of a decomposed network is refused aloud; a dense one saves as before."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina.errors import LaminaError

transformers = pytest.importorskip("transformers")
IDS = torch.arange(10).view(2, 5)


def bert() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
    return transformers.BertModel(transformers.BertConfig(**sizes)).eval()


@pytest.mark.parametrize("name", ["save_pretrained", "push_to_hub"])
def test_saving_that_would_lose_the_factors_is_refused_aloud(name: str, planned: Any, tmp_path: Path) -> None:
    small = lamina.decompose(bert(), planned(bert(), {"input_ids": IDS}))
    with pytest.raises(LaminaError, match=rf"^{name} would write factors that from_pretrained does not read: .* lamina\.save"):
        getattr(small, name)(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    lamina.save(small, tmp_path / "out")
    with pytest.raises(LaminaError, match="would write factors"):
        getattr(lamina.load(bert(), tmp_path / "out"), name)(tmp_path / "saved")
    with pytest.raises(LaminaError, match="would write factors"):
        getattr(pickle.loads(pickle.dumps(small)), name)(tmp_path / "saved")


def test_a_merged_network_is_saved_and_loaded_by_its_own_library(planned: Any, tmp_path: Path) -> None:
    model = bert()
    merged = lamina.merge(lamina.decompose(model, planned(model, {"input_ids": IDS})))
    merged.save_pretrained(tmp_path / "saved")
    again = transformers.BertModel.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(again(IDS).last_hidden_state, merged(IDS).last_hidden_state)
    torch.testing.assert_close(merged(IDS).last_hidden_state, model(IDS).last_hidden_state, rtol=1e-4, atol=1e-5)
