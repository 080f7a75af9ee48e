"""Two real processes over gloo train as one does, through many phases, and hand their checkpoints to one another."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lamina

from ..processes import in_processes

SCRIPT = Path(__file__).with_name("together.py")

specification = importlib.util.spec_from_file_location("together", SCRIPT)
assert specification is not None and specification.loader is not None
together = importlib.util.module_from_spec(specification)
specification.loader.exec_module(together)


def what_each_got(folder: Path, *scenarios: str) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What each of two processes got, by scenario."""
    in_processes(2, SCRIPT, folder, *scenarios)
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


SAID: dict[str, str] = {
    "uneven": r"the processes differ: batches is 5 in process 0 and 4 in process \d",
    "batch_sizes": r"the processes differ: batches is 6 in process 0 and 3 in process \d",
    "sizes_of_lists": r"processes 0 and \d are given different data: pass the whole data in every process",
    "kinds": r"the processes differ: loader is list in process 0 and DataLoader in process \d",
    "own_shards": r"processes 0 and 1 are given different data",
    "own_orders": r"step 1 \(epoch 1\): the processes have drawn different samples for one batch",
    "rates": r"the processes differ: optimizer.lr is 0.2 in process 0 and 0.1 in process \d",
    "short_stream": r"step 3 \(epoch 1\): the loader fails: it yields 2 batches, where its length promises 6",
    "stream": "every sample once",
    "setting_up": r"process \d: RuntimeError: mine",
    "reading": r"process \d: step \d \(epoch \d\): the loader fails: RuntimeError: mine",
    "reading_a_stream": r"step \d \(epoch \d\): the loader fails: RuntimeError: mine",
    "feeding": r"process \d: step 4 \(epoch 1\): a batch cannot be read: RuntimeError: mine",
    "running": r"process \d: step 2 \(epoch 1\): the network does not run on a batch .*: RuntimeError: mine",
    "losing": r"process \d: step 9 \(epoch 2\): the loss cannot be computed .*: RuntimeError: mine",
    "losing_sharded": r"process \d: step 9 \(epoch 2\): the loss cannot be computed .*: RuntimeError: mine",
    "scoring": r"process \d: after 12 steps the score cannot be told: RuntimeError: mine",
    "stepping": r"process \d: step 5 \(epoch 1\): the optimizer or its schedule fails: RuntimeError: mine",
    "tracking": "process 0: tracking fails: RuntimeError: mine",
    "full_disk": "process 0: the checkpoint .*step-00000002 cannot be written: .*No space left",
    "full_disk_sharded": "process 0: the checkpoint .*step-00000002 cannot be written: .*No space left",
    "full_disk_of_one_part": "the checkpoint .*step-00000002 cannot be written: OSError: .*No space left",
    "no_folder": "process 0: the checkpoint .*step-00000002 cannot be written: ",
    "other_checkpoint": r"is of another training: clip is None there and 1.0 here; choose another folder",
    "half_sharded": r"3\.\w+\.weight is sharded and 0.weight is not: shard the whole network",
    "statistics_of_sharded": "alike",
    "parts": "each its part",
}
"""What is said in every process, by what goes wrong in one."""


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_what_fails_in_one_process_ends_all_in_the_same_words(tmp_path: Path, number: int) -> None:
    """A message that takes ten seconds fails (`failing.py`): nobody waits for one that has given up."""
    in_processes(number, SCRIPT.with_name("failing.py"), tmp_path, *SAID)
    first, *others = (json.loads((tmp_path / f"said.{rank}.json").read_text()) for rank in range(number))
    for scenario, wanted in SAID.items():
        assert re.match(f"TrainingError: (.* )?{wanted}", first[scenario]), (scenario, first[scenario])
        assert "\n" not in first[scenario], scenario
        assert all(other[scenario] == first[scenario] for other in others), (scenario, first[scenario], others)


@pytest.mark.slow
def test_where_a_process_is_killed_the_others_end_with_one_line(tmp_path: Path) -> None:
    in_processes(3, SCRIPT.with_name("failing.py"), tmp_path, "killed", dead=1)
    for rank in (0, 1):
        said = json.loads((tmp_path / f"said.{rank}.json").read_text())["killed"]
        assert said.startswith("TrainingError: ") and "\n" not in said, said
