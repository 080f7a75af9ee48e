"""Fine-tuning is the loop one would write by hand, and leaves behind what it should: better weights, nothing else."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import lamina
from lamina.train.data import Share, batches

CLASSES = 3


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, CLASSES),
    )  # fmt: skip


def decomposed(model: nn.Module) -> nn.Module:
    plan = lamina.make_plan(model, torch.zeros(1, 2, 5, 5), lamina.Ratio(2.0), rule=lamina.AtRatio())
    forms = {"0": lamina.Dense(), "3": lamina.BlockTerm(4, 4, 1), "8": lamina.LowRank(2)}
    for name, form in forms.items():
        plan = plan.with_form(name, form)
    return lamina.decompose(model, plan, check=False)


@pytest.fixture
def model() -> nn.Module:
    return network().eval()


@pytest.fixture
def small(model: nn.Module) -> nn.Module:
    return decomposed(model)


def data(number: int = 6, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number * size, 2, 5, 5, generator=generator)
    y = torch.randint(0, CLASSES, (number * size,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def plain_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def constant(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


# The loop


def by_hand(small: nn.Module, model: nn.Module, loader: list[Any], epochs: int, schedule: Any) -> list[float]:
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    freezing = lamina.freeze(small, schedule)
    losses = []
    for epoch in range(epochs):
        small.train()
        freezing.start_epoch(epoch)
        total = 0.0
        for x, y in loader:
            output = small(x)
            with torch.no_grad():
                wanted = (model(x) / 3).log_softmax(1)
            answers = 9 * F.kl_div((output / 3).log_softmax(1), wanted, log_target=True, reduction="none").sum(1).mean()
            loss = (1 - 0.25) * F.cross_entropy(output, y) + 0.25 * answers
            loss.backward()
            optimizer.step()
            cosine.step()
            optimizer.zero_grad()
            freezing.step()
            total += float(loss.detach()) * len(y)
        losses.append(total / sum(len(y) for _, y in loader))
    freezing.release()
    return losses


def test_in_eval_mode_batch_norm_keeps_its_statistics_and_dropout_does_nothing(model: nn.Module, small: nn.Module) -> None:
    seen: list[bool] = []
    dropout = small.get_submodule("7")
    dropout.register_forward_hook(lambda _, args, output: seen.append(torch.equal(args[0], output)))
    statistics = state(small[1])  # type: ignore[index]
    lamina.finetune(small, data(), loss=F.cross_entropy, epochs=1, eval_mode=True)
    assert seen and all(seen)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(statistics[name], small[1].state_dict()[name]), name  # type: ignore[index]
    assert not torch.equal(statistics["weight"], small[1].weight)  # type: ignore[index]


@pytest.mark.parametrize(
    "schedule",
    [lamina.SequentialFreezing(), lamina.SequentialFreezing(period=2, unit="steps"), lamina.VanillaFreezing()],
    ids=["epochs", "steps", "vanilla"],
)
def test_it_gives_the_bits_of_the_loop_written_by_hand(model: nn.Module, schedule: Any) -> None:
    ours, theirs = decomposed(model), decomposed(model)
    loader = [*data()[:-1], tuple(part[:1] for part in data()[-1])]  # the last batch is a smaller one
    torch.manual_seed(7)
    record = lamina.finetune(
        ours,
        loader,
        loss=F.cross_entropy,
        epochs=3,
        freezing=schedule,
        teacher=model,
        distillation=lamina.Distillation(weight=0.25, temperature=3.0),
    )
    torch.manual_seed(7)
    losses = by_hand(theirs, model, loader, 3, schedule)
    assert_equal(state(ours), state(theirs))
    assert [epoch.loss for epoch in record.epochs] == pytest.approx(losses, rel=1e-6)


def test_what_rests_keeps_its_bits_and_the_record_says_what_rested(small: nn.Module) -> None:
    before = state(small)
    record = lamina.finetune(small, data(), loss=F.cross_entropy, epochs=1, freezing=lamina.VanillaFreezing())
    resting = set(record.epochs[0].resting)
    assert resting == {"3.reduce.weight", "3.expand.weight", "8.first.weight"}
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in resting), name


def test_the_sets_change_places_every_epoch(small: nn.Module) -> None:
    record = lamina.finetune(small, data(), loss=F.cross_entropy, epochs=4, freezing=lamina.SequentialFreezing(unfrozen_last=1))
    first, second, third, last = (set(epoch.resting) for epoch in record.epochs)
    assert first and second and first == third and not first & second and not last


def test_two_half_batches_accumulated_are_one_batch() -> None:
    def train(size: int, accumulate: int) -> dict[str, Tensor]:
        small = decomposed(nn.Sequential(*(m for m in network() if not isinstance(m, nn.BatchNorm2d | nn.Dropout))).eval())
        lamina.finetune(small, data(24 // size, size), loss=F.cross_entropy, epochs=2, accumulate=accumulate, clip=0.1)
        return state(small)

    def decomposed(model: nn.Module) -> nn.Module:
        plan = lamina.make_plan(model, torch.zeros(1, 2, 5, 5), lamina.Ratio(2.0), rule=lamina.AtRatio())
        return lamina.decompose(model, plan, check=False)

    whole, halves = train(8, 1), train(4, 2)
    for name in whole:
        torch.testing.assert_close(whole[name], halves[name], rtol=1e-4, atol=1e-6)


def test_a_step_is_no_longer_than_clip(small: nn.Module) -> None:
    """Plain SGD at rate 1 moves the weights by the gradients, whose norm was cut."""
    before = state(small)
    lamina.finetune(
        small,
        data(1),
        loss=lambda o, y: 1e3 * F.cross_entropy(o, y),
        epochs=1,
        optimizer=plain_sgd,
        schedule=constant,
        clip=0.01,
    )
    moved = [(p.detach() - before[name]).flatten() for name, p in small.named_parameters()]
    assert float(torch.cat(moved).norm()) == pytest.approx(0.01, rel=1e-3)


def test_steps_of_an_epoch_are_its_batches_by_accumulate_rounded_up(small: nn.Module) -> None:
    assert lamina.finetune(small, data(5), loss=F.cross_entropy, epochs=2, accumulate=3).steps == 4


def test_the_schedule_is_told_how_many_steps_there_are_and_reaches_its_end(small: nn.Module) -> None:
    told = []

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        told.append(steps)
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    record = lamina.finetune(small, data(5), loss=F.cross_entropy, epochs=2, accumulate=2, schedule=schedule)
    assert told == [6] and record.epochs[-1].rate == 0.0 and record.epochs[0].rate == pytest.approx(0.005)


# What a network is fed


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor, labels: Tensor | None = None) -> Any:
        scores = self.layer(a) + b
        return scores if labels is None else {"loss": F.cross_entropy(scores, labels), "logits": scores}


A, B, Y = torch.randn(8, 4), torch.randn(8, 2), torch.randint(0, 2, (8,))


@pytest.mark.parametrize(
    ("loader", "loss"),
    [
        ([((A, B), Y)], F.cross_entropy),
        ([({"a": A, "b": B}, Y)], F.cross_entropy),
        ([{"a": A, "b": B, "labels": Y}], lambda output, batch: output["loss"]),
        ([{"a": A, "b": B}], lambda output, batch: F.cross_entropy(output, Y) + 0 * batch["a"].sum()),
        (DataLoader([((a, b), y) for a, b, y in zip(A, B, Y, strict=True)], 8), F.cross_entropy),
    ],
    ids=["positional", "keywords", "own loss", "batch is the target", "collated"],
)
def test_every_form_of_a_batch_leads_to_the_same_step(loader: Any, loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, wanted = Pair(), Pair()
    wanted.load_state_dict(model.state_dict())
    lamina.finetune(model, loader, loss=loss, epochs=1, optimizer=plain_sgd, schedule=constant)
    F.cross_entropy(wanted(A, B), Y).backward()
    plain_sgd(list(wanted.parameters())).step()
    assert_equal(state(model), state(wanted))


class Stream(IterableDataset[Any]):
    def __init__(self, promised: int, given: int) -> None:
        self.promised, self.given = promised, given

    def __len__(self) -> int:
        return self.promised

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(2, 5, 5), 1)] * self.given)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffling_loader_hands_out_every_sample_once_an_epoch(workers: int) -> None:
    loader = DataLoader(TensorDataset(torch.arange(10)), 4, shuffle=True, num_workers=workers)
    epochs = batches(loader)
    orders = []
    for epoch in range(2):
        shares: list[Share] = list(epochs.start(epoch))
        assert [share.samples for share in shares] == [4, 4, 2] and all(share.weight == 1 for share in shares)
        orders.append(torch.cat([share.batch[0] for share in shares]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]


# What it leaves behind


@contextlib.contextmanager
def failing(fails: bool) -> Iterator[Callable[..., Tensor]]:
    calls = iter(range(100))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if fails and next(calls) == 3:
            raise RuntimeError("in the middle")
        return F.cross_entropy(output, target)

    with pytest.raises(lamina.TrainingError, match="in the middle") if fails else contextlib.nullcontext():
        yield loss


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
def test_modes_flags_plan_and_teacher_are_as_they_were(model: nn.Module, small: nn.Module, fails: bool) -> None:
    model.train()
    model[1].eval()  # type: ignore[index]
    small.eval()
    small[1].train()  # type: ignore[index]
    small[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    before, plan = state(model), lamina.decomposition.plan_of(small)
    kept = state(small)["0.weight"]
    flags = [(m.training for m in net.modules()) for net in (model, small)]
    flags = [list(flag) for flag in flags]  # type: ignore[misc]
    trains = {name: p.requires_grad for name, p in small.named_parameters()}
    with failing(fails) as loss:
        lamina.finetune(
            small,
            data(),
            loss=loss,
            epochs=2,
            freezing=lamina.SequentialFreezing(),
            teacher=model,
            distillation=lamina.Distillation(features=("3",)),
        )
    assert [[m.training for m in net.modules()] for net in (model, small)] == flags
    assert {name: p.requires_grad for name, p in small.named_parameters()} == trains
    assert all(p.grad is None for net in (model, small) for p in net.parameters())
    assert not any(m._forward_hooks for net in (model, small) for m in net.modules())
    assert_equal(state(model), before)
    assert torch.equal(small[0].weight, kept)  # type: ignore[index]
    assert lamina.decomposition.plan_of(small) is plan


def test_a_tuned_network_is_saved_and_loaded(model: nn.Module, small: nn.Module, tmp_path: Path) -> None:
    lamina.finetune(small, data(), loss=F.cross_entropy, epochs=1, freezing=lamina.SequentialFreezing())
    lamina.save(small, tmp_path / "tuned")
    assert_equal(state(lamina.load(network(5), tmp_path / "tuned")), state(small))


def test_a_network_with_nothing_decomposed_trains_without_freezing(model: nn.Module) -> None:
    before = state(model)
    lamina.finetune(model, data(), loss=F.cross_entropy, epochs=1)
    assert not torch.equal(before["8.weight"], model.state_dict()["8.weight"])


# Scores


def test_the_score_is_asked_in_eval_mode_without_gradients_and_disturbs_nothing(model: nn.Module) -> None:
    def score(net: nn.Module) -> float:
        assert not any(m.training for m in net.modules()) and not torch.is_grad_enabled()
        torch.manual_seed(99)
        return float(torch.rand(()))

    ours, theirs = decomposed(model), decomposed(model)
    torch.manual_seed(3)
    record = lamina.finetune(ours, data(), loss=F.cross_entropy, epochs=2, score=score)
    torch.manual_seed(3)
    lamina.finetune(theirs, data(), loss=F.cross_entropy, epochs=2)
    assert_equal(state(ours), state(theirs))
    assert record.epochs[0].score == record.epochs[1].score


@pytest.mark.parametrize(
    ("scores", "made", "best", "stopped"),
    [([1, 2, 3, 4], 4, 3, "finished"), ([1, 3, 2, 3, 4], 4, 1, "patience"), ([5, 4, 3, 9], 3, 0, "patience")],
)
def test_it_stops_when_patience_ends(small: nn.Module, scores: list[float], made: int, best: int, stopped: str) -> None:
    coming = iter(scores)
    epochs = len(scores)
    record = lamina.finetune(small, data(1), loss=F.cross_entropy, epochs=epochs, patience=2, score=lambda _: next(coming))
    assert (len(record.epochs), record.best.number, record.stopped) == (made, best, stopped)


def test_without_a_score_the_lowest_loss_is_best(small: nn.Module) -> None:
    record = lamina.finetune(small, data(), loss=F.cross_entropy, epochs=3)
    assert record.best.loss == min(epoch.loss for epoch in record.epochs)


def test_the_record_prints_a_line_an_epoch(small: nn.Module) -> None:
    text = str(lamina.finetune(small, data(), loss=F.cross_entropy, epochs=2, freezing=lamina.VanillaFreezing()))
    assert text.count("samples/s, 3 weights at rest") == 2 and "12 steps, finished" in text


# Precision, trackers, progress


def test_in_bfloat16_the_network_runs_lower_and_the_weights_and_the_loss_do_not(small: nn.Module) -> None:
    ran: list[torch.dtype] = []
    small[0].register_forward_hook(lambda m, a, output: ran.append(output.dtype))  # type: ignore[index]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        assert output.dtype == torch.float32
        return F.cross_entropy(output, target)

    lamina.finetune(small, data(1), loss=loss, epochs=1, precision="bfloat16")
    lamina.finetune(small, data(1), loss=loss, epochs=1)
    assert ran == [torch.bfloat16, torch.float32]
    assert all(p.dtype == torch.float32 for p in small.parameters())


@pytest.mark.slow
def test_numbers_reach_tensorboard(small: nn.Module, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lamina.finetune(
        small,
        data(),
        loss=F.cross_entropy,
        epochs=2,
        freezing=lamina.VanillaFreezing(),
        score=lambda _: 0.5,
        tracking=lamina.Tracking(tmp_path, run="mine", every=2),
    )
    events = event_accumulator.EventAccumulator(str(tmp_path / "mine"))
    events.Reload()
    assert [entry.step for entry in events.Scalars("loss")] == [2, 4, 6, 8, 10, 12]
    assert [(entry.step, entry.value) for entry in events.Scalars("score")] == [(6, 0.5), (12, 0.5)]
    assert [entry.value for entry in events.Scalars("weights_at_rest")] == [3, 3]
    assert {"learning_rate", "samples_per_s", "epoch_loss"} <= set(events.Tags()["scalars"])


def test_the_bar_shows_throughput_and_what_rests(
    small: nn.Module, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    schedule = lamina.VanillaFreezing()
    lamina.finetune(
        small, data(), loss=F.cross_entropy, epochs=2, freezing=schedule, progress=True, score=lambda _: print("scored") or 0.5
    )
    said, shown = capsys.readouterr()
    assert all(words in shown for words in ("epoch 2/2", "6/6", "loss ", "samples/s", "outer factors rest"))
    assert said == "scored\n" * 2, "what the user's own code prints is not the bar's"


# What is wrong


def nothing_trains(small: nn.Module) -> dict[str, Any]:
    small.requires_grad_(False)
    return {}


WRONG: dict[str, tuple[Callable[[nn.Module], dict[str, Any]], str]] = {
    "no epochs": (lambda _: {"epochs": 0}, "epochs is 0"),
    "half an epoch": (lambda _: {"epochs": 0.5}, "epochs is 0.5"),
    "no batches to a step": (lambda _: {"accumulate": 0}, "accumulate is 0"),
    "no patience": (lambda _: {"patience": 0}, "patience is 0"),
    "clip to nothing": (lambda _: {"clip": 0.0}, "clip is 0.0"),
    "unknown precision": (lambda _: {"precision": "float16"}, "'float16' is not supported"),
    "empty loader": (lambda _: {"loader": []}, "yields nothing"),
    "used up": (lambda _: {"loader": iter(data())}, "only once"),
    "no length": (lambda _: {"loader": DataLoader(Endless())}, "how many batches"),
    "fewer than promised": (lambda _: {"loader": DataLoader(Stream(4, 2), 1)}, "2 batches, where its length promises 4"),
    "none as promised": (lambda _: {"loader": DataLoader(Stream(4, 0), 1)}, "yields nothing, where its length promises 4"),
    "loader fails": (lambda _: {"loader": DataLoader([1, "x"], 2)}, "step 1.*the loader fails"),  # type: ignore[arg-type]
    "no tensors": (lambda _: {"loader": [("x", "y")]}, "no tensor"),
    "input does not fit": (lambda _: {"loader": [(torch.ones(2, 7, 5, 5), torch.ones(2))]}, r"step 1.*2×7×5×5"),
    "target does not fit": (
        lambda _: {"loader": [(torch.ones(2, 2, 5, 5), torch.ones(5).long())]},
        r"output \(2, 3\), target \(5,\)",
    ),
    "loss is no scalar": (lambda _: {"loss": lambda output, target: output}, r"no scalar tensor but \(4, 3\)"),
    "nothing trains": (nothing_trains, "nothing to train"),
    "no optimizer": (lambda _: {"optimizer": lambda parameters: None}, "must be an optimizer"),
    "stale optimizer": (lambda _: {"optimizer": torch.optim.SGD(network().parameters())}, "not of this network"),
    "score is no number": (lambda _: {"score": lambda _: math.nan}, "the score is NaN"),
    "distillation alone": (lambda _: {"distillation": lamina.Distillation()}, "teacher="),
    "its own teacher": (lambda small: {"teacher": small}, "shares"),
}


@pytest.mark.parametrize("case", WRONG, ids=WRONG)
def test_what_cannot_be_is_said_in_one_line(small: nn.Module, case: str) -> None:
    make, message = WRONG[case]
    arguments = {"loader": data(), "loss": F.cross_entropy, "epochs": 1} | make(small)
    with pytest.raises(lamina.TrainingError, match=message) as caught:
        lamina.finetune(small, arguments.pop("loader"), **arguments)
    assert "\n" not in str(caught.value)


def test_freezing_says_what_does_not_fit(model: nn.Module, small: nn.Module) -> None:
    arguments: dict[str, Any] = {"loss": F.cross_entropy, "epochs": 1, "freezing": lamina.SequentialFreezing()}
    with pytest.raises(lamina.FreezingError, match="nothing in this network is decomposed"):
        lamina.finetune(model, data(), **arguments)
    with pytest.raises(lamina.FreezingError, match="not of this network"):
        lamina.finetune(small, data(), optimizer=torch.optim.SGD(model.parameters()), **arguments)
    assert all(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_it_does_harm(small: nn.Module, tmp_path: Path, bad: float) -> None:
    calls = iter(range(100))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * (bad if next(calls) == 4 else 1.0)

    with pytest.raises(lamina.TrainingError, match=r"step 5 \(epoch 1\): the loss is (nan|inf); the checkpoints in"):
        lamina.finetune(small, data(), loss=loss, epochs=1, checkpoints=lamina.Checkpoints(tmp_path, every=4))
    assert_equal(state(lamina.load(network(5), tmp_path / "last")), state(small))


def test_a_batch_that_is_no_number_leaves_no_trace_in_running_statistics(small: nn.Module) -> None:
    loader = data()
    loader[4][0].fill_(math.nan)
    wanted = decomposed(network().eval())
    torch.manual_seed(7)
    lamina.finetune(wanted, loader[:4], loss=F.cross_entropy, epochs=1, schedule=constant, optimizer=plain_sgd)
    torch.manual_seed(7)
    with pytest.raises(lamina.TrainingError, match=r"step 5 \(epoch 1\): the loss is nan"):
        lamina.finetune(small, loader, loss=F.cross_entropy, epochs=1, schedule=constant, optimizer=plain_sgd)
    assert_equal(state(small), state(wanted))


def test_statistics_that_are_no_numbers_are_not_kept_but_a_mask_of_infinities_is(small: nn.Module, tmp_path: Path) -> None:
    small.register_buffer("mask", torch.full((3,), -math.inf))
    options, steps = lamina.Checkpoints(tmp_path, every=1), itertools.count()

    class Spoils(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            if next(steps) == 1:
                small.get_buffer("1.running_var").fill_(math.inf)

    with pytest.raises(lamina.TrainingError, match=r"after step 2 1\.running_var is NaN or infinite"):
        lamina.finetune(small, data(), loss=F.cross_entropy, epochs=1, optimizer=Spoils, checkpoints=options)
    assert (tmp_path / "last").resolve().name == "step-00000001"


def test_weights_that_are_no_numbers_are_not_kept(small: nn.Module, tmp_path: Path) -> None:
    steps = itertools.count()

    class Spoils(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.inf if next(steps) == 1 else 0.1)

    with pytest.raises(lamina.TrainingError, match=r"after step 2 0.weight is NaN or infinite: no checkpoint was written"):
        lamina.finetune(
            small, data(), loss=F.cross_entropy, epochs=1, optimizer=Spoils, checkpoints=lamina.Checkpoints(tmp_path, 2)
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_that_are_no_numbers_move_nothing(small: nn.Module, clip: float | None) -> None:
    before = state(small)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.detach()).abs().sqrt().sum()  # its value is 0, its gradient infinite

    with pytest.raises(lamina.TrainingError, match=r"step 1 \(epoch 1\): the gradient of 0.weight is NaN or infinite"):
        lamina.finetune(small, data(), loss=loss, epochs=1, clip=clip)
    assert_equal(state(small), before)


def test_memory_that_runs_out_is_told_as_it_is_so_that_smaller_batches_can_be_tried(small: nn.Module) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        lamina.finetune(small, data(), loss=loss, epochs=1)


def test_a_loader_that_is_divided_already_is_refused_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = TensorDataset(torch.ones(8))
    loader = DataLoader(dataset, 2, sampler=DistributedSampler(dataset, 2, 0))
    assert len(batches(loader)) == 2
    monkeypatch.setattr("lamina.train.data.processes", lambda: 2)
    with pytest.raises(lamina.TrainingError, match="divided among the processes already"):
        batches(loader)


def test_a_missing_accelerate_is_named(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(lamina.MissingExtra, match=r"lamina\[train\]"):
        lamina.finetune(small, data(), loss=F.cross_entropy, epochs=1)
