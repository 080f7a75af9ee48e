"""A network learns from the answers and features of its original, which is left as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lamina
from lamina.train.distill import answer_loss, scores, taught
from lamina.values import Workload


def answer_loss_naively(s: Tensor, t: Tensor, T: float) -> float:
    """Straight from Hinton's definition, a sample and a class at a time."""
    total = 0.0
    for mine, wanted in zip(s.double().tolist(), t.double().tolist(), strict=True):
        p = [math.exp(score / T) for score in wanted]
        q = [math.exp(score / T) for score in mine]
        p, q = [a / sum(p) for a in p], [a / sum(q) for a in q]
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return T**2 * total / len(s)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(2, 5), st.floats(0.5, 8), st.integers(0, 100))
def test_the_loss_of_answers_is_its_definition(samples: int, classes: int, temperature: float, seed: int) -> None:
    s, t = torch.randn(2, samples, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = float(answer_loss(s, t, temperature=temperature))
    assert found == pytest.approx(answer_loss_naively(s, t, temperature), rel=1e-9, abs=1e-12)


def test_it_is_zero_where_both_agree_and_positive_elsewhere() -> None:
    s = torch.randn(5, 4)
    assert float(answer_loss(s, s + 3.0, temperature=2.0)) == pytest.approx(0.0, abs=1e-6)  # a shift changes no probability
    assert float(answer_loss(s, s.flip(1))) > 0


def test_its_gradient_is_that_of_the_cross_entropy_with_the_teachers_probabilities() -> None:
    s, t = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    (ours,) = torch.autograd.grad(answer_loss(s, t), s)
    (theirs,) = torch.autograd.grad(F.cross_entropy(s, t.softmax(1)), s)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dim", [1, -1, 2])
def test_the_classes_may_stand_in_any_dimension(dim: int) -> None:
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    flat = [x.movedim(dim, -1).flatten(0, -2) for x in (s, t)]
    torch.testing.assert_close(answer_loss(s, t, class_dim=dim), answer_loss(*flat))


def net(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def step(student: nn.Module, teacher: nn.Module, options: lamina.Distillation, task: float = 2.0) -> float:
    x = torch.ones(2, 4)
    with taught(student, teacher, options) as together:
        assert together is not None
        inputs = Workload(x)
        output, wanted = inputs.run(student), together.answers(inputs)
        return float(together.loss(output, wanted, torch.tensor(task)).detach())


def test_the_parts_of_the_loss_are_weighted_as_said() -> None:
    student, teacher, x = net().requires_grad_(False), net().requires_grad_(False), torch.ones(2, 4)
    answers = float(answer_loss(student(x), teacher(x), temperature=3.0))
    features = sum(float(F.mse_loss(student[:i](x), teacher[:i](x))) for i in (1, 2))  # type: ignore[index]
    options = lamina.Distillation(weight=0.3, temperature=3.0, features=("0", "1"), feature_weight=0.7)
    assert step(student, teacher, options) == pytest.approx(0.7 * 2.0 + 0.3 * answers + 0.7 * features, rel=1e-5)
    assert step(student, teacher, lamina.Distillation(weight=0.0)) == 2.0


def test_relative_features_count_alike_whatever_their_size() -> None:
    student, teacher, x = net().requires_grad_(False), net().requires_grad_(False), torch.ones(2, 4)
    with torch.no_grad():
        teacher[0].weight *= 1000  # type: ignore[index, operator]
    pairs = [(student[:i](x), teacher[:i](x)) for i in (1, 2)]  # type: ignore[index]
    wanted = sum(float(F.mse_loss(here, there) / there.square().mean()) for here, there in pairs)
    options = lamina.Distillation(weight=0.0, features=("0", "1"), feature_weight=0.5, relative=True)
    assert step(student, teacher, options, task=0.0) == pytest.approx(0.5 * wanted, rel=1e-5)
    with torch.no_grad():
        teacher[0].weight.zero_(), teacher[0].bias.zero_()  # type: ignore[index, union-attr, operator]
    assert step(teacher, copy.deepcopy(teacher), options, task=0.0) == 0.0


def test_features_of_a_decomposed_layer_are_compared_with_those_of_the_layer_it_replaced() -> None:
    model = net(16).eval()
    plan = lamina.make_plan(model, torch.zeros(2, 4), lamina.Ratio(1.5), rule=lamina.AtRatio())
    exact = lamina.decompose(model, plan.with_form("0", lamina.LowRank(4)).with_form("2", lamina.Dense()))
    options = lamina.Distillation(weight=0.0, features=("0",))
    assert step(exact, model, options) == pytest.approx(2.0, abs=1e-6)
    coarse = lamina.decompose(model, plan.with_form("0", lamina.LowRank(1)).with_form("2", lamina.Dense()))
    assert step(coarse, model, options) > 2.0 + 1e-4


def test_only_the_student_gets_a_gradient() -> None:
    student, teacher = net(), net()
    with taught(student, teacher, lamina.Distillation(features=("0",))) as together:
        assert together is not None
        inputs = Workload(torch.ones(2, 4))
        output = inputs.run(student)
        together.loss(output, together.answers(inputs), torch.tensor(0.0)).backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "weight": (lambda: lamina.Distillation(weight=1.5), "between 0 and 1"),
    "temperature": (lambda: lamina.Distillation(temperature=0.0), "positive"),
    "feature weight": (lambda: lamina.Distillation(feature_weight=-1.0), "must not be negative"),
    "one name": (lambda: lamina.Distillation(features="layer4"), "tuple of module names"),  # type: ignore[arg-type]
    "unknown module": (
        lambda: step(net(), net(), lamina.Distillation(features=("9",))),
        "'9', which the network does not have",
    ),
    "feature shapes": (
        lambda: step(net(6), net(7), lamina.Distillation(features=("0",))),
        r"0: output \(2, 6\) cannot be compared with the teacher's \(2, 7\)",
    ),
    "score shapes": (lambda: step(net(), nn.Linear(4, 2), lamina.Distillation()), r"\(2, 3\) and the teacher's \(2, 2\)"),
    "which are classes": (
        lambda: step(nn.Unflatten(1, (2, 2)), nn.Unflatten(1, (2, 2)), lamina.Distillation()),
        "which dimension counts the classes",
    ),
    "no scores": (lambda: scores(SimpleNamespace(a=1)), "without scores to learn from"),
}


@pytest.mark.parametrize("case", WRONG, ids=WRONG)
def test_what_cannot_be_is_said_in_one_line(case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(lamina.TrainingError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_leaves_no_hook_behind() -> None:
    student, teacher = net(), net()
    with pytest.raises(lamina.TrainingError, match="teacher does not have"):
        teacher.append(nn.Identity()), student.append(nn.Identity()).append(nn.Identity())  # type: ignore[operator]
        step(student, teacher, lamina.Distillation(features=("0", "4")))
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_scores_are_found_in_what_networks_return() -> None:
    t = torch.ones(1)
    for output in (t, {"loss": 1, "logits": t}, SimpleNamespace(logits=t), (t, 1), [t]):
        assert scores(output) is t
