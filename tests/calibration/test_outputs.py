"""How outputs are read: divergences in nats, drawn answers whose gradients have the Fisher information, and containers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical as Choice
from torch.distributions import Independent, Normal, kl_divergence

import lamina
from lamina import Categorical, Gaussian
from lamina.calibration.outputs import outputs_of


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_divergence_of_classes_is_that_of_torch_distributions() -> None:
    p, q = torch.randn(2, 5, 7, dtype=torch.float64)
    wanted = kl_divergence(Choice(logits=p), Choice(logits=q))
    torch.testing.assert_close(Categorical().divergence(p, q), wanted)


def test_the_divergence_of_a_map_of_classes_is_summed_over_its_positions() -> None:
    p, q = torch.randn(2, 5, 7, 2, 3, dtype=torch.float64)
    wanted = kl_divergence(Choice(logits=p.movedim(1, -1)), Choice(logits=q.movedim(1, -1))).sum((1, 2))
    torch.testing.assert_close(Categorical(dim=1).divergence(p, q), wanted)


def test_the_divergence_of_numbers_is_that_of_normal_distributions_of_their_own_size() -> None:
    y, z = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    deviation = (y.square().sum() / 5).sqrt()
    wanted = kl_divergence(Independent(Normal(y, deviation), 2), Independent(Normal(z, deviation), 2))
    torch.testing.assert_close(Gaussian().divergence(y, z), wanted)
    torch.testing.assert_close(Gaussian().divergence(y, 1.1 * y).mean(), torch.tensor(0.005, dtype=torch.float64))


@pytest.mark.parametrize("outputs", [Categorical(), Gaussian()])
def test_the_same_answer_is_no_divergence_and_another_one_is_some(outputs: Any) -> None:
    y = torch.randn(6, 4)
    assert outputs.divergence(y, y).eq(0).all() and outputs.divergence(y, y).shape == (6,)
    assert outputs.divergence(y, y.flip(1)).gt(0).all()


def test_impossible_classes_are_none_and_a_zero_output_divides_by_nothing() -> None:
    p = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert Categorical().divergence(p, torch.tensor([[1.0, 1.0, -torch.inf]])).item() == pytest.approx(0)
    zero = torch.zeros(2, 3)
    assert Gaussian().divergence(zero, zero).eq(0).all()
    leaf = zero.clone().requires_grad_()
    assert torch.autograd.grad(Gaussian().log_likelihood(leaf, generator()), leaf)[0].isfinite().all()


def fisher(model: nn.Module, x: Tensor, outputs: Any) -> Tensor:
    """The exact Fisher information of the model's weight, averaged over items, by the Jacobian and the law of its output."""
    weight = model.weight.detach()

    def answer(w: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"weight": w.view_as(weight)}, (x,))

    J = torch.func.jacrev(answer)(weight.flatten()).flatten(1, -2)  # (B, outputs, weights)
    y = model(x).detach()
    if isinstance(outputs, Categorical):
        p = y.softmax(1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    else:
        inner = torch.eye(J.shape[1], dtype=J.dtype).expand(len(x), -1, -1) / (y.square().sum() / len(x))
    return torch.einsum("bci,bcd,bdj->ij", J, inner, J) / len(x)


@pytest.mark.parametrize("outputs", [Categorical(), Gaussian()])
def test_a_small_change_of_a_weight_diverges_by_half_its_fisher_norm(outputs: Any) -> None:
    model, x = nn.Linear(5, 4).double(), torch.randn(20, 5, dtype=torch.float64)
    v = 1e-4 * torch.randn(20, dtype=torch.float64)
    changed = torch.func.functional_call(model, {"weight": model.weight + v.view(4, 5)}, (x,))
    wanted = v @ fisher(model, x, outputs) @ v / 2
    torch.testing.assert_close(outputs.divergence(model(x), changed).mean(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("outputs", [Categorical(), Gaussian()])
def test_gradients_of_drawn_answers_have_the_fisher_information_as_their_second_moment(outputs: Any) -> None:
    model, draws = nn.Linear(3, 3).double(), 20_000
    x = torch.randn(1, 3, dtype=torch.float64).expand(draws, -1)
    y = model(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(outputs.log_likelihood(y, generator()), y)
    rows = torch.einsum("bo,bi->boi", g, x).flatten(1)
    wanted = fisher(model, x[:1], outputs)
    assert (rows.T @ rows / draws - wanted).norm() / wanted.norm() < 0.05  # 3 / √20,000 is 0.02


class Pair(NamedTuple):
    logits: Tensor
    count: Tensor


@dataclass
class Answer:
    boxes: Tensor
    extra: Any = None


def test_answers_are_found_in_every_container() -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 5)
    both = Categorical().divergence((a, b), (a + 1, b * 2))
    torch.testing.assert_close(both, Categorical().divergence(b, b * 2))
    one = Categorical().divergence(b, b * 2)
    for wrap in (lambda t: {"x": [t]}, lambda t: Answer(t), lambda t: Answer(t, extra=torch.arange(4)), lambda t: [(t,)]):
        torch.testing.assert_close(Categorical().divergence(wrap(b), wrap(b * 2)), one)
    # Of several the one named logits.
    torch.testing.assert_close(
        Categorical().divergence({"logits": b, "hidden": a[None]}, {"logits": b * 2, "hidden": a[None]}), one
    )
    torch.testing.assert_close(Categorical().divergence(Pair(b, a), Pair(b * 2, a * 9)), one)


WRONG = {
    "a map without its dimension": (Categorical(), torch.zeros(2, 3, 4, 4), r"2×3×4×4: say which dimension"),
    "the batch as classes": (Categorical(dim=0), torch.zeros(2, 3), "its dimension 0 holds no classes"),
    "no such dimension": (Categorical(dim=4), torch.zeros(2, 3), "its dimension 4 holds no classes"),
    "nothing": (Gaussian(), {"x": torch.arange(3)}, "holds no tensor of floating point numbers"),
    "no tensor": (lambda y: 3.0, torch.zeros(2, 3), "returned a float"),
}


@pytest.mark.parametrize(("outputs", "output", "message"), WRONG.values(), ids=WRONG)
def test_outputs_that_cannot_be_read_so_are_refused(outputs: Any, output: Any, message: str) -> None:
    with pytest.raises(lamina.CalibrationError, match=message) as error:
        outputs_of(outputs).log_likelihood(output, generator())
    assert "\n" not in str(error.value)


def test_outputs_of_unlike_shapes_have_no_divergence_and_a_function_has_none() -> None:
    with pytest.raises(lamina.CalibrationError, match="2×3 and 2×4"):
        Gaussian().divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(lamina.CalibrationError, match="tells no divergence"):
        outputs_of(torch.sum).divergence(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("given", [Categorical, "categorical", 3])
def test_what_is_no_kind_of_outputs_is_refused(given: Any) -> None:
    with pytest.raises(lamina.CalibrationError, match=r"give lamina.Categorical\(\)"):
        outputs_of(given)
