"""Training a supernet: what a batch meets trains, nothing else; draws follow from the seed; a killed one goes on."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import lamina
from lamina.errors import TrainingError
from lamina.forms import Form
from lamina.supernet.space import key
from lamina.supernet.supernet import Supernet
from lamina.supernet.train import Recipe, train_supernet
from lamina.train.distill import answer_loss

from ..processes import in_processes
from ..supernets import network
from . import training

SCRIPT = Path(__file__).with_name("training.py")


def batches(number: int = 6, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(number * size, 3, 10, 12, generator=generator)
    y = x[:, :, :5].mean((1, 2, 3)).gt(0).long()
    return list(zip(x.split(size), y.split(size), strict=True))


def met(net: Supernet, **options: Any) -> list[dict[str, Form]]:
    """The configurations that a training meets, in order."""
    found = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    handle = net.register_forward_pre_hook(lambda module, args: found.append(net.get_active()) if module.training else None)
    train_supernet(net, batches(), loss=loss, epochs=2, **options)
    handle.remove()
    return found


def test_every_batch_meets_a_configuration_drawn_from_the_seed_and_its_number(net: Supernet) -> None:
    wanted = [net.sample(random.Random(f"7 {number}")) for number in range(12)]
    assert met(net, seed=7, recipe=Recipe("uniform")) == wanted
    assert met(net, seed=8, recipe=Recipe("uniform")) != wanted


def test_each_layer_draws_its_sizes_uniformly(net: Supernet) -> None:
    drawn = [net.sample(random.Random(f"0 {number}")) for number in range(4000)]
    for name, forms in net.space.forms.items():
        counts = Counter(config[name] for config in drawn)
        assert all(abs(counts[form] - 1000) < 5 * 1000**0.5 for form in forms)
    pairs = Counter(tuple(config.values()) for config in drawn)
    assert len(pairs) == 16
    assert all(abs(count - 250) < 5 * 250**0.5 for count in pairs.values())


def test_a_sandwich_has_the_dearest_the_cheapest_and_a_drawn_configuration(net: Supernet) -> None:
    found = met(net, seed=7)
    ends = [net.space.uniform(99), net.space.uniform(0)]
    wanted = [[*ends, net.sample(random.Random(f"7 {number}"))] for number in range(12)]
    assert found == [config for three in wanted for config in three]


def one_step(net: Supernet, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    train_supernet(net, batches(1), loss=F.cross_entropy, epochs=1, recipe=recipe, seed=5)
    return before, {name: value.detach().clone() for name, value in net.named_parameters()}


def test_a_step_changes_the_terms_of_its_configuration_and_nothing_else(net: Supernet) -> None:
    config = net.sample(random.Random("5 0"))
    reached = {id(term) for name, layer in net.series.items() for term in layer.terms(config[name])}
    names = {name for name, parameter in net.named_parameters() if id(parameter) in reached}
    before, after = one_step(net, Recipe.faithful(rate=0.1))
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert 0 < len(names) < sum("branches" in name for name in before)


def test_momentum_and_weight_decay_leave_alone_what_a_batch_does_not_meet(net: Supernet) -> None:
    trail: list[tuple[set[str], dict[str, Tensor]]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            before = {n: p.detach().clone() for n, p in net.named_parameters()}
            graded = {n for n, p in net.named_parameters() if p.grad is not None}
            result = super().step(closure)
            trail.append((graded, {n: p.detach() - before[n] for n, p in net.named_parameters()}))
            return result

    options: dict[str, Any] = {"loss": F.cross_entropy, "epochs": 2, "recipe": Recipe("uniform")}
    train_supernet(net, batches(), optimizer=lambda p: Watched(p, lr=0.1, momentum=0.9, weight_decay=0.1), **options)
    assert len({frozenset(graded) for graded, _ in trail}) > 2
    for graded, change in trail:
        assert {name for name, value in change.items() if value.any()} <= graded


def test_norms_keep_their_statistics_in_eval_mode_and_move_otherwise(net: Supernet) -> None:
    before = {name: value.clone() for name, value in net.named_buffers()}
    one_step(net, Recipe())
    assert all(torch.equal(before[name], value) for name, value in net.named_buffers())
    one_step(net, Recipe(norms_in_eval=False))
    assert not torch.equal(before["network.1.running_mean"], net.get_buffer("network.1.running_mean"))


def test_all_parameters_train_where_the_recipe_says_so(net: Supernet) -> None:
    before, after = one_step(net, Recipe(only_factors=False, rate=0.1))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"network.0.weight", "network.1.weight", "network.9.bias", "network.3.bias"} <= changed


def test_afterwards_modes_what_trains_and_the_active_configuration_are_as_before(net: Supernet) -> None:
    config = net.sample(random.Random(4))
    net.set_active(config)
    net.network[0].weight.requires_grad_(False)
    trains = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    modes = [module.training for module in net.modules()]
    train_supernet(net, batches(2), loss=F.cross_entropy, epochs=1, recipe=Recipe(normalise=False))
    assert net.get_active() == config
    assert {name: parameter.requires_grad for name, parameter in net.named_parameters()} == trains
    assert [module.training for module in net.modules()] == modes
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(layer.normalise for layer in net.series.values())


def mean_loss(net: Supernet) -> float:
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with torch.no_grad():
        return sum(float(F.cross_entropy(net.extract(config).eval()(x), y)) for config in net.space) / net.space.size


@pytest.mark.parametrize(
    "recipe", [Recipe(rate=0.1), Recipe.faithful(0.1), Recipe("uniform", rate=0.1)], ids=["default", "faithful", "uniform"]
)
def test_the_whole_space_learns(net: Supernet, recipe: Recipe) -> None:
    before = mean_loss(net)
    record = train_supernet(net, batches(), loss=F.cross_entropy, epochs=12, recipe=recipe)
    assert mean_loss(net) < 0.9 * before
    assert record.steps == 72
    assert record.epochs[-1].loss < record.epochs[0].loss


def test_the_rates_fall_where_the_recipe_says(net: Supernet) -> None:
    faithful = train_supernet(copy.deepcopy(net), batches(1), loss=F.cross_entropy, epochs=8, recipe=Recipe.faithful(1e-2))
    assert [epoch.rate for epoch in faithful.epochs] == pytest.approx([1e-2] * 3 + [1e-3] * 2 + [1e-4] * 3)
    default = train_supernet(net, batches(1), loss=F.cross_entropy, epochs=4)
    assert default.epochs[-1].rate == pytest.approx(0.0, abs=1e-9)


def test_a_teacher_alone_is_learnt_from_without_targets(net: Supernet) -> None:
    teacher = network()
    x = torch.cat([x for x, _ in batches()])

    def apart() -> float:
        with torch.no_grad():
            wanted = F.softmax(teacher(x), 1)
            return sum(float((F.softmax(net.extract(c).eval()(x), 1) - wanted).square().mean()) for c in net.space)

    before, weights = apart(), copy.deepcopy(teacher.state_dict())
    options = lamina.Distillation(weight=1.0, temperature=1.0)

    def no_loss(output: Tensor, target: Tensor) -> Tensor:
        return output.sum() * 0

    train_supernet(net, batches(), loss=no_loss, epochs=6, recipe=Recipe(rate=0.3), teacher=teacher, distillation=options)
    assert apart() < 0.9 * before
    assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())
    assert not teacher.training


def test_the_score_of_an_epoch_is_the_mean_over_the_uniform_configurations(net: Supernet) -> None:
    asked = []

    def score(model: nn.Module) -> float:
        asked.append(net.get_active())
        return float(len(asked))

    record = train_supernet(net, batches(1), loss=F.cross_entropy, epochs=1, score=score)
    assert asked == net.space.uniforms()
    assert record.epochs[0].score == 2.5


def python(scenario: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), scenario, str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


def ended(*processes: subprocess.Popen[str], code: int = 0) -> None:
    for process in processes:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == code, complaint


@pytest.mark.slow
def test_a_training_killed_in_the_middle_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    killed, whole = tmp_path / "a", tmp_path / "b"
    for folder in (killed, whole):
        folder.mkdir()
    unharmed = python("whole", whole)
    ended(python("killed", killed), code=-signal.SIGKILL)
    assert not (killed / "killed.safetensors").exists()
    ended(python("killed", killed), unharmed)
    found, wanted = load_file(killed / "killed.safetensors"), load_file(whole / "whole.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_two_processes_train_as_one_where_they_draw_alike_and_hold_the_same_terms_in_any_case(tmp_path: Path) -> None:
    in_processes(2, SCRIPT, "together,apart", tmp_path)
    alone = training.trained(tmp_path, recipe=training.STILL)
    for scenario in ("together", "apart"):
        first, second = (load_file(tmp_path / f"{scenario}.{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in alone)
        alike = all(torch.allclose(first[name], alone[name], rtol=1e-4, atol=1e-6) for name in alone)
        assert alike == (scenario == "together")


def test_checkpoints_of_another_recipe_or_seed_are_refused(net: Supernet, tmp_path: Path) -> None:
    kept = lamina.Checkpoints(tmp_path)
    train_supernet(net, batches(1), loss=F.cross_entropy, epochs=1, checkpoints=kept)
    with pytest.raises(TrainingError, match="of another training: seed is 0 there and 1 here; choose another folder"):
        train_supernet(net, batches(1), loss=F.cross_entropy, epochs=1, checkpoints=kept, seed=1)
    with pytest.raises(TrainingError, match="normalise is True there and False here"):
        train_supernet(net, batches(1), loss=F.cross_entropy, epochs=1, checkpoints=kept, recipe=Recipe(normalise=False))
    again = train_supernet(net, batches(1), loss=F.cross_entropy, epochs=1, checkpoints=kept)
    assert again.resumed_at == again.steps == 1


@pytest.mark.parametrize("draws", ["uniform", "sandwich"])
def test_features_of_every_configuration_are_held_against_the_teachers(net: Supernet, draws: Any) -> None:
    teacher, names = network(), tuple(net.series)
    ((x, y),) = data = batches(1)
    drawn = net.sample(random.Random("0 0"))
    configs = [drawn] if draws == "uniform" else [net.space.uniform(99), net.space.uniform(0), drawn]

    def outputs(model: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: found.update({name: out}))
            for name in names
        ]
        with torch.no_grad():
            found[""] = model.eval()(x)
        for handle in handles:
            handle.remove()
        return found

    there, wanted = outputs(teacher), 0.0
    for config in configs:
        net.set_active(config)
        here = outputs(net.network)
        features = sum(F.mse_loss(here[name], there[name]) / there[name].square().mean() for name in names)
        wanted += float(0.5 * F.cross_entropy(here[""], y) + 0.5 * answer_loss(here[""], there[""], temperature=2.0))
        wanted += float(0.3 * features)
    options = lamina.Distillation(features=names, feature_weight=0.3, relative=True)
    record = train_supernet(
        net, data, loss=F.cross_entropy, epochs=1, teacher=teacher, distillation=options, recipe=Recipe(draws)
    )
    assert record.epochs[0].loss == pytest.approx(wanted / len(configs), rel=1e-4)
    assert not any(module._forward_hooks for module in (*net.modules(), *teacher.modules()))


def test_a_teacher_that_shares_weights_or_lacks_a_feature_is_refused(net: Supernet) -> None:
    with pytest.raises(TrainingError, match="the teacher shares"):
        train_supernet(net, batches(1), loss=F.cross_entropy, epochs=1, teacher=net.network)
    with pytest.raises(TrainingError, match="features names 'gone', which the network does not have"):
        options = lamina.Distillation(features=("gone",))
        train_supernet(net, batches(1), loss=F.cross_entropy, epochs=1, teacher=network(), distillation=options)
    with pytest.raises(TrainingError, match="needs somebody to learn from"):
        train_supernet(net, batches(1), loss=F.cross_entropy, epochs=1, distillation=lamina.Distillation())


@pytest.mark.parametrize(
    "options",
    [
        {"draws": "all"},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"momentum": -1.0},
        {"weight_decay": -1.0},
        {"clip": 0.0},
        {"milestones": (1.0,)},
    ],
    ids=str,
)
def test_a_recipe_of_numbers_that_make_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=next(iter(options))):
        Recipe(**options)


def test_keys_of_drawn_configurations_cover_the_space(net: Supernet) -> None:
    assert len({key(net.sample(random.Random(f"0 {n}"))) for n in range(400)}) == net.space.size
