"""Two real processes over gloo train as one does, through many phases, and hand their checkpoints to one another."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lamina

from ..two_processes import in_two_processes

SCRIPT = Path(__file__).with_name("together.py")

specification = importlib.util.spec_from_file_location("together", SCRIPT)
assert specification is not None and specification.loader is not None
together = importlib.util.module_from_spec(specification)
specification.loader.exec_module(together)


def what_each_got(folder: Path, *scenarios: str) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What each of two processes got, by scenario."""
    in_two_processes(SCRIPT, folder, *scenarios)
    files = {s: tuple(load_file(folder / f"{s}.{rank}.safetensors") for rank in (0, 1)) for s in scenarios}
    return files  # type: ignore[return-value]


def in_one_process(scenario: str, folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = getattr(together, scenario)(folder)
    return found


def assert_same(found: tuple[dict[str, Tensor], dict[str, Tensor]], wanted: dict[str, Tensor]) -> None:
    """Equal bits in both processes; equal to one process but for the order of sums over dozens of steps."""
    assert found[0].keys() == found[1].keys() == wanted.keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), f"{name} differs between the processes"
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_two_processes_train_as_one_does_through_many_phases(tmp_path: Path) -> None:
    exact = ["swaps", "accumulated", "poisoned", "plans"]
    found = what_each_got(tmp_path, *exact, "statistics")
    for scenario in exact:
        assert_same(found[scenario], in_one_process(scenario, tmp_path))
    for name, tensor in found["statistics"][0].items():
        assert torch.equal(tensor, found["statistics"][1][name]), name


@pytest.mark.slow
def test_sharded_networks_train_as_whole_ones_do_through_many_phases(tmp_path: Path) -> None:
    scenarios = ["sharded_loop", "sharded_finetune"]
    found = what_each_got(tmp_path, *scenarios)
    for scenario in scenarios:
        assert_same(found[scenario], in_one_process(scenario, tmp_path))


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_the_other_way_round(tmp_path: Path) -> None:
    wanted = together.kept(tmp_path / "undisturbed") | {"from": torch.tensor(8)}
    kinds = ("", "_sharded")
    for kind in kinds:
        in_one_process(f"stops{kind}", tmp_path)
    found = what_each_got(tmp_path, *(f"{what}{kind}" for what in ("goes_on", "stops") for kind in kinds))
    for kind in kinds:
        assert_same(found[f"goes_on{kind}"], wanted)
        alone_again = in_one_process(f"goes_on{kind}", tmp_path)
        assert_same((alone_again, alone_again), wanted)


def test_one_process_agrees_with_itself_and_hears_of_errors_as_they_are() -> None:
    plan = together.plan(together.network())
    assert together.agreed(lambda: plan) == plan

    def fail() -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        together.agreed(fail)
    assert lamina.train.distributed.processes() == 1
