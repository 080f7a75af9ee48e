"""What PyTorch's users do with any network works with a decomposed one: a transformer, an encoder of PyTorch's, a CNN."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina import BlockTerm, LowRank
from lamina.decomposition import plan_of
from lamina.network.attention import Attention

IDS = torch.arange(10).view(2, 5)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(8 * 3 * 3, 6)
    )


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
        self.inner = transformers.BertModel(transformers.BertConfig(**sizes))

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.inner(ids).last_hidden_state
        return found


NETWORKS: dict[str, Any] = {
    "encoder": (
        encoder,
        torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)),
        {"layers.0.self_attn.q_proj": LowRank(5), "layers.1.self_attn.out_proj": LowRank(4), "layers.0.linear1": LowRank(6)},
    ),
    "CNN": (
        convolutional,
        torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)),
        {"0": BlockTerm(2, 4), "3": BlockTerm(None, 4), "5": LowRank(3)},
    ),
    "BERT": (Bert, IDS, {"inner.encoder.layer.0.attention.self.query": LowRank(4), "inner.pooler.dense": LowRank(3)}),
}


@pytest.fixture(params=NETWORKS)
def case(request: Any, planned: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """The network, decomposed, and an input; both in eval mode."""
    make, x, forms = NETWORKS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    small = lamina.decompose(model, planned(model, x, forms))
    assert any(isinstance(module, Attention) for module in small.modules()) == (request.param == "encoder")
    return model, small, x


def of(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda model: model.half(), torch.float16),
        (lambda model: model.bfloat16(), torch.bfloat16),
        (lambda model: model.to(torch.float64), torch.float64),
        (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
    ],
    ids=["half", "bfloat16", "to float64", "to bfloat16"],
)
def test_it_is_converted_whole_and_answers_as_it_did_up_to_rounding(case: Any, convert: Any, dtype: torch.dtype) -> None:
    _, small, x = case
    converted = convert(copy.deepcopy(small))
    assert {p.dtype for p in converted.parameters()} == {dtype} and {p.dtype for p in small.parameters()} == {torch.float32}
    with torch.no_grad():
        wanted, found = small(x), converted(of(x, dtype))
    assert found.dtype == dtype
    assert (found.float() - wanted).norm() <= 20 * max(torch.finfo(dtype).eps, 1e-6) * wanted.norm()


def test_it_is_brought_to_the_meta_device_and_back_empty(case: Any) -> None:
    _, small, x = case
    state = {name: value.clone() for name, value in small.state_dict().items()}
    with torch.no_grad():
        wanted = small(x)
        empty = copy.deepcopy(small).to("meta").to_empty(device="cpu")
        for name, buffer in small.named_buffers():
            if name not in state:  # what no state dict holds
                empty.get_buffer(name).copy_(buffer)
        empty.load_state_dict(state)
        assert torch.equal(empty(x), wanted)


def test_a_deep_copy_shares_nothing_and_carries_the_plan(case: Any, tmp_path: Path) -> None:
    _, small, x = case
    twin = copy.deepcopy(small)
    with torch.no_grad():
        wanted = small(x)
        assert torch.equal(twin(x), wanted) and plan_of(twin) == plan_of(small)
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.zero_()
        assert torch.equal(small(x), wanted)
    lamina.save(copy.deepcopy(small), tmp_path / "out")


def test_its_state_dict_is_written_and_read_by_torch_without_pickled_code(case: Any, tmp_path: Path) -> None:
    model, small, x = case
    torch.save(small.state_dict(), tmp_path / "state.pt")
    fresh = lamina.decompose(model, plan_of(small))
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
        fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
        assert torch.equal(fresh(x), small(x))


def test_torch_saves_it_whole(case: Any, tmp_path: Path) -> None:
    _, small, x = case
    torch.save(small, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    lamina.save(again, tmp_path / "out")


@pytest.mark.parametrize("training", [False, True])
def test_it_is_compiled_whole_as_the_network_is(case: Any, training: bool) -> None:
    torch._dynamo.reset()
    model, small, x = case
    for each in (model, small):
        each.train(training)
        for module in each.modules():
            if isinstance(module, nn.Dropout | nn.MultiheadAttention):
                module.p = module.dropout = 0.0  # type: ignore[assignment]
        compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of autograd's, about the leaves of the example
            torch.testing.assert_close(compiled(x), each(x), rtol=1e-4, atol=1e-5)
            compiled(x).square().mean().backward()
    assert all(p.grad is not None for name, p in small.named_parameters() if "pooler" not in name)


SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset


class Answers(Dataset):
    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, at):
        assert torch.utils.data.get_worker_info() is not None
        with torch.no_grad():
            return self.model(self.inputs[at : at + 1])[0]


if __name__ == "__main__":
    path, how = sys.argv[1:]
    torch.set_num_threads(1)
    model, inputs = torch.load(path, weights_only=False)
    loader = DataLoader(Answers(model, inputs), batch_size=2, num_workers=1, multiprocessing_context=how)
    found = torch.cat(list(loader))
    with torch.no_grad():
        torch.testing.assert_close(found, model(inputs), rtol=1e-4, atol=1e-5)
    print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_loaders_worker_process_runs_it(planned: Any, tmp_path: Path, how: str) -> None:
    for name in ("encoder", "CNN"):
        make, x, forms = NETWORKS[name]
        model = make().eval()
        torch.save((lamina.decompose(model, planned(model, x, forms)), x), tmp_path / f"{name}.pt")
        (tmp_path / "loading.py").write_text(textwrap.dedent(SCRIPT))
        words = [sys.executable, str(tmp_path / "loading.py"), str(tmp_path / f"{name}.pt"), how]
        ran = subprocess.run(words, capture_output=True, text=True, timeout=240)
        assert (ran.returncode, ran.stdout) == (0, "same\n"), ran.stderr
