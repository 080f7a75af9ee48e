"""The whole way on a GPU: what it gives is what a CPU gives, and nothing leaves the device.

Skipped where there is none. ``LAMINA_TEST_DEVICE=cpu`` runs the same tests on the CPU, to see that they hold at all.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lamina
from lamina.cli import main
from lamina.forms import BlockTerm, Form, LowRank, Separable
from lamina.measure.table import TimingTable

DEVICE = torch.device(os.environ.get("LAMINA_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(autouse=True)
def exact_arithmetic() -> Iterator[None]:
    """float32 that is float32: convolutions on a GPU round to TF32 otherwise, and nothing could be compared."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.third = nn.Conv2d(2 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.third(F.relu(self.second(x))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


FORMS: dict[str, Form] = {"second": BlockTerm(12, 20, 1), "third": LowRank(20), "head": LowRank(6)}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval().to(DEVICE)


@pytest.fixture
def x() -> Tensor:
    return drawn(8)


def drawn(number: int, seed: int = 1) -> Tensor:
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def labelled(batches: int = 6) -> list[tuple[Tensor, Tensor]]:
    x = drawn(16 * batches, seed=3)
    return list(zip(x.split(16), x.mean((1, 2, 3)).gt(0).long().split(16), strict=True))


def planned(model: nn.Module, x: Any, forms: dict[str, Form]) -> lamina.Plan:
    plan = lamina.make_plan(model, x, lamina.Ratio(2.0), rule=lamina.AtRatio())
    for name in plan.layers:
        plan = plan.with_form(name, forms.get(name, lamina.Dense()))
    return plan


def everything_there(model: nn.Module) -> bool:
    return all(t.device.type == DEVICE.type for t in itertools.chain(model.parameters(), model.buffers()))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm().cpu())


@pytest.mark.parametrize(
    "form",
    [BlockTerm(32, 64, 1), BlockTerm(None, 64, 1), BlockTerm(32, None, 1), BlockTerm(32, 64, 4), Separable(96)],
    ids=str,
)
def test_a_layer_at_full_rank_computes_what_the_dense_one_does(model: nn.Module, x: Tensor, form: Form) -> None:
    small = lamina.decompose(model, planned(model, x, {"second": form}))
    assert everything_there(small)
    if form != BlockTerm(32, 64, 4):  # groups have no full rank here
        with torch.no_grad():
            assert apart(small(x), model(x)) < 1e-5


def test_factors_are_those_of_the_cpu(model: nn.Module, x: Tensor) -> None:
    plan = planned(model, x, FORMS)
    there, here = lamina.decompose(model, plan), lamina.decompose(copy.deepcopy(model).cpu(), plan)
    for (name, a), b in zip(lamina.merge(there).state_dict().items(), lamina.merge(here).state_dict().values(), strict=True):
        assert a.device.type == DEVICE.type
        assert torch.allclose(a.cpu(), b, rtol=1e-3, atol=1e-5), name


def test_a_calibration_is_that_of_the_cpu_and_so_are_its_factors(model: nn.Module, x: Tensor) -> None:
    data = list(drawn(64).split(16))
    there = lamina.calibrate(model, data, outputs=lamina.Categorical())
    here = lamina.calibrate(copy.deepcopy(model).cpu(), [b.cpu() for b in data], outputs=lamina.Categorical())
    assert set(there.layers) == set(here.layers) == {"first", "second", "third", "head"}
    for name, moments in there.layers.items():
        assert apart(moments.inputs(), here.layers[name].inputs()) < 1e-4, name
        # Answers are drawn by each device's own numbers.
        pairs = zip(moments.curve.points, here.layers[name].curve.points, strict=True)
        assert all(ours == pytest.approx(others, rel=0.5) for ours, others in pairs), name
    plan = planned(model, x, FORMS)
    small = lamina.decompose(model, plan, there)
    elsewhere = lamina.decompose(copy.deepcopy(model).cpu(), plan, there)  # the same moments
    with torch.no_grad():
        assert everything_there(small) and apart(small(x), elsewhere(x.cpu())) < 1e-4
        assert apart(small(x), model(x)) < apart(lamina.decompose(model, plan)(x), model(x))


def test_a_calibration_goes_to_a_file_and_to_another_device(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    lamina.calibrate(model, [x]).save(tmp_path / "c")
    back = lamina.Calibration.load(tmp_path / "c")
    plan = planned(model, x, FORMS)
    assert everything_there(lamina.decompose(model, plan, back))
    lamina.decompose(copy.deepcopy(model).cpu(), plan, back)  # the weights are the same wherever they lie


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    half, x = model.to(dtype), x.to(dtype)
    calibration = lamina.calibrate(half, [x], outputs=lamina.Categorical())
    small = lamina.decompose(half, planned(half, x, FORMS), calibration)
    assert {p.dtype for p in small.parameters()} == {dtype}
    with torch.no_grad():
        assert small(x).isfinite().all() and apart(small(x), half(x)) < 0.5


@pytest.mark.parametrize("mode", [lamina.Inference(), lamina.Training()], ids=lambda mode: mode.name)
def test_a_budget_is_planned_measured_and_kept(model: nn.Module, mode: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = Net(256).eval().to(DEVICE)
    x = drawn(64)
    table = tmp_path / "t.sqlite"
    plan = lamina.make_plan(wide, x, lamina.Speedup(1.2), mode=mode, data=[x], timings=table)
    assert plan.setting and plan.setting.device.startswith(DEVICE.type)
    small = lamina.decompose(wide, plan, [x])
    assert everything_there(small)
    compared = lamina.compare(wide, small, x, mode=mode, seconds=0.5)
    assert compared.setting.device == plan.setting.device
    lamina.verify(wide, small, x)


def test_faster_and_the_front() -> None:
    torch.manual_seed(0)
    # Large enough that there is something to win: wide kernels on a map that keeps a GPU busy.
    layers = [m for _ in range(4) for m in (nn.Conv2d(256, 256, 5, padding=2), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 256, 3, padding=1), *layers).eval().to(DEVICE)
    x = torch.randn(4 if DEVICE.type == "cpu" else 64, 3, 16, 16).to(DEVICE)

    def score(net: nn.Module) -> float:
        with torch.no_grad():
            return -apart(net(x), model(x))

    options: dict[str, Any] = {"data": [x], "score": score, "seconds": 0.2, "timings": TimingTable(None)}
    result = lamina.faster(model, x, lamina.Speedup(1.5), **options)
    front = lamina.pareto(model, x, speedups=(1.2, 1.5), **options)
    assert everything_there(result.model) and result.plan.decomposed and front.points


def test_layers_are_timed_by_graphs_and_by_loops_where_they_cannot_be_captured(model: nn.Module, x: Tensor) -> None:
    from lamina.measure import layer_times
    from lamina.measure.graphs import captured

    conv = model.get_submodule("second")
    y, bound = torch.randn(8, 32, 16, 16, device=DEVICE), torch.zeros((), device=DEVICE)
    with torch.inference_mode():
        replays = captured([lambda: bound.add_(1), lambda: conv(y)], [lambda: None] * 2, DEVICE)
        assert (replays is None) == (DEVICE.type == "cpu")
        if replays:
            before = float(bound)
            replays[0]()
            assert float(bound) == before + layer_times.REPEATS  # the graph is that run, and as often
        assert captured([lambda: conv(y), lambda: float(y.sum())], [lambda: None] * 2, DEVICE) is None
        assert conv(y).isfinite().all()  # a capture that failed leaves the device usable,
        torch.manual_seed(7)
        drawn_after = torch.randn(4, device=DEVICE)  # and what is random can still be drawn, and be the same again
        torch.manual_seed(7)
        assert torch.equal(torch.randn(4, device=DEVICE), drawn_after)


def test_training_in_phases_is_the_same_twice_and_goes_on_where_it_stopped(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    plan = planned(model, x, FORMS)

    def trained(epochs: int, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        small = lamina.decompose(model, plan)
        optimizer: Any = lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.9)  # noqa: E731
        freezing = lamina.SequentialFreezing()
        lamina.finetune(
            small,
            labelled(),
            loss=F.cross_entropy,
            epochs=epochs,
            freezing=freezing,
            optimizer=optimizer,
            teacher=model,
            **options,
        )
        assert everything_there(small)
        return small.state_dict()

    whole, again = trained(2), trained(2)
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), again.values(), strict=True))
    checkpoints = lamina.Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stop = iter(range(100))

        def interrupted(output: Tensor, target: Tensor) -> Tensor:
            if next(stop) == 8:
                raise KeyboardInterrupt
            return F.cross_entropy(output, target)

        torch.manual_seed(0)
        lamina.finetune(
            lamina.decompose(model, plan),
            labelled(),
            loss=interrupted,
            epochs=2,
            freezing=lamina.SequentialFreezing(),
            optimizer=lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.9),
            teacher=model,
            checkpoints=checkpoints,
        )
    resumed = trained(2, checkpoints=checkpoints)
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), resumed.values(), strict=True))


def test_a_decomposed_network_goes_to_files_and_back(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    small = lamina.decompose(model, planned(model, x, FORMS))
    lamina.save(small, tmp_path / "out")
    back = lamina.load(Net().eval().to(DEVICE), tmp_path / "out")
    with torch.no_grad():
        assert everything_there(back) and torch.equal(back(x), small(x))


def test_a_supernet_is_made_trained_searched_and_its_winner_taken_out(model: nn.Module, x: Tensor) -> None:
    net = lamina.make_supernet(model, x, group_sizes=(1, 8, 32), timings=TimingTable(None))
    lamina.train_supernet(net, labelled(2), loss=F.cross_entropy, epochs=1)
    batches = labelled(2)

    def right(candidate: nn.Module) -> float:
        with torch.no_grad():
            return float(sum((candidate(a).argmax(1) == b).sum() for a, b in batches))

    found = lamina.search(net, right, limit=lamina.Macs(net.space.whole.macs), strategy=lamina.Sampled("random", 4))
    winner = net.extract(found.best.config)
    assert everything_there(winner)
    with torch.no_grad():
        assert winner(x).isfinite().all()


def test_the_command_line_takes_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu_nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = ["plan", "gpu_nets:net", "--input", "8,3,16,16", "--device", str(DEVICE), "--ratio", "2", "-o", "plan.json"]
    assert main(words) == 0
    plan = lamina.Plan.load(tmp_path / "plan.json")
    assert plan.setting and plan.setting.device.startswith(DEVICE.type)
