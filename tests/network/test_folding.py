"""Batch norms go into the convolutions that feed them, where a graph says so, and the answers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.errors import LaminaError
from lamina.forms import BlockTerm, Form, Separable
from lamina.network.folding import feeding, folded
from lamina.values import Workload


def lived(model: nn.Module) -> nn.Module:
    """With statistics as a training leaves them."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
                if norm.affine:
                    norm.weight.normal_()
                    norm.bias.normal_()
    return model.eval()


class Shuffled(nn.Module):
    """Held in another order than it is called in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_b, self.norm_a = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv_a, self.conv_b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_b(self.conv_b(self.norm_a(self.conv_a(x)).relu()))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x)


class OneNormForTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)) + self.norm(self.b(x))


def decomposed(form: Form) -> nn.Module:
    """A layer in factors, of which the last one feeds the norm."""
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(), torch.randn(2, 8, 9, 9)
    plan = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio())
    return lamina.decompose(model, plan.with_form("0", form))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    return model


X = torch.randn(2, 3, 9, 9)
CASES: dict[str, tuple[Any, Tensor, set[tuple[str, str]]]] = {
    "in order": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), X, {("0", "1")}),
    "shuffled": (Shuffled, X, {("conv_a", "norm_a"), ("conv_b", "norm_b")}),
    "without weights of its own": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), X, {("0", "1")}),
    "1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), torch.randn(2, 3, 9), {("0", "1")}),
    "decomposed": (lambda: decomposed(BlockTerm(4, 4)), torch.randn(2, 8, 9, 9), {("0.expand", "1")}),
    "separable": (lambda: decomposed(Separable(6)), torch.randn(2, 8, 9, 9), {("0.horizontal", "1")}),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), X, set()),
    "something between": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), X, set()),
    "read by two": (TwoReaders, X, set()),
    "called twice": (CalledTwice, X, set()),
    "one norm for two": (OneNormForTwo, X, set()),
    "hooked": (hooked, X, set()),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), X, set()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_norm_is_folded_where_it_alone_reads_a_convolution_that_is_called_once(name: str) -> None:
    make, x, pairs = CASES[name]
    model = make()
    model = lived(model) if name != "no statistics" else model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        assert set(feeding(model, Workload(x))) == pairs
        twin = folded(model, Workload(x))
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(isinstance(twin.get_submodule(norm), nn.Identity) for _, norm in pairs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_keep_their_layout() -> None:
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        twin = folded(model, Workload(X))
    assert twin[0].weight.stride() == model[0].weight.stride() != (27, 9, 3, 1)


def test_what_cannot_be_exported_is_refused_in_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(
        LaminaError, match="what feeds its batch norms cannot be read, as the network cannot be exported: "
    ) as caught:
        folded(Branching(), Workload(X))
    assert "\n" not in str(caught.value)
