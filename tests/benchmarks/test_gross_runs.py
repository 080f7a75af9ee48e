"""What the experiments of GroSS are judged by: images told right, paired differences and their intervals, and kept runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gross"


@pytest.fixture(scope="module")
def runs(load: Any) -> Any:
    return load("runs")


@pytest.fixture(scope="module")
def paper(load: Any) -> Any:
    return load("paper")


@pytest.mark.parametrize("number", [1, 7, 64, 10_000])
def test_which_images_are_told_right_is_read_as_it_was_written(runs: Any, number: int) -> None:
    found = torch.rand(number, generator=torch.Generator().manual_seed(0)) < 0.9
    assert torch.equal(runs.read(runs.kept(found), number), found.double())


def test_points_above_are_those_of_images_paired_with_themselves(runs: Any) -> None:
    """Two networks that differ on two of 100 images, whichever the others are."""
    draw = torch.Generator().manual_seed(0)
    one = [(torch.rand(100, generator=draw) < 0.5).double() for _ in range(5)]
    other = [each.clone() for each in one]
    for a, b in zip(one, other, strict=True):
        a[:2], b[:2] = 1.0, 0.0
    assert runs.above(one, one) == "+0.00 ± 0.00"
    # 2 % of the images differ, in each seed alike: 1.96 √(0.02 · 0.98 · 100/99 / 100) points of 100.
    assert runs.above(one, other) == "+2.00 ± 2.76"
    assert runs.above(other, one) == "-2.00 ± 2.76"


def test_what_differs_between_seeds_widens_the_interval(runs: Any) -> None:
    zeros = [torch.zeros(1000, dtype=torch.double) for _ in range(2)]
    apart = [torch.zeros(1000, dtype=torch.double), torch.cat([torch.ones(100), torch.zeros(900)]).double()]
    told, half = runs.above(apart, zeros).split(" ± ")
    assert told == "+5.00" and float(half) == pytest.approx(
        1.96 * ((10**2 / 2) / 2 + 100**2 * 0.025 * 0.9 / 100 / 10) ** 0.5, rel=0.05
    )


def test_the_loss_and_the_share_told_right_are_those_of_the_outputs(runs: Any, load: Any) -> None:
    data = load("data")
    labels = torch.arange(10)
    ones = torch.ones(1, 1, 1, 1)
    images = data.Images(torch.zeros(10, 1, 32, 32, dtype=torch.uint8), labels, ones * 0, ones)
    always_three = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with torch.no_grad():
        always_three[1].weight.zero_()
        always_three[1].bias.copy_(torch.eye(10)[3])
    loss, right = runs.told(always_three, images)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(torch.eye(10)[3].expand(10, 10), labels)), abs=1e-2)
    assert runs.read(right, 10).tolist() == torch.eye(10)[3].tolist()
    assert runs.judged(always_three, images) == [loss, 0.1]


def test_a_result_is_made_once_and_kept_for_the_next_process(
    runs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    monkeypatch.setattr(runs, "WEIGHTS", tmp_path / "weights")
    assert runs.Runs("a").get("one", lambda: [1, "×2"]) == [1, "×2"]
    assert runs.Runs("a").get("one", lambda: pytest.fail("made twice")) == [1, "×2"]


def test_rho_of_what_agrees_is_one_and_its_interval_holds_it(paper: Any) -> None:
    assert paper.rho(range(60), range(60)) == "1.00 (1.00 to 1.00)"
    draw = torch.Generator().manual_seed(0)
    a = torch.rand(60, generator=draw)
    told = paper.rho(a.tolist(), (a + 0.3 * torch.randn(60, generator=draw)).tolist())
    middle, low, high = (float(each.strip("()")) for each in told.replace(" to ", " ").split(" "))
    assert low < middle < high and 0.4 < middle < 0.95
