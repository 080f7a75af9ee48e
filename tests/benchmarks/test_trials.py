"""The trials of changed sources, on a package of a few lines; and the mutants and intervals that are reported."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FAULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "faults"

PACKAGE = """\
LIMIT = 3


def doubled(n):
    total = 0
    while n > 0:
        total += 2
        n -= 1
    return total


def unused(n):
    return n + LIMIT
"""

TESTS = """\
import os

import pytest

from lamina.toy import LIMIT, doubled


def test_doubled():
    assert doubled(3) == 6


def test_limit():
    assert LIMIT > 1


def test_that_fails_unchanged():
    assert os.environ.get("no such variable")


@pytest.mark.slow
def test_slow():
    raise AssertionError("slow tests are left out")
"""

SCRIPT = """\
import json, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import trials
tree = Path.cwd()
tempfile.tempdir = str(tree.parent)
trials.SECONDS = 0.5
tried = trials.Trials(tree, "toy", ["tests"])
old = (tree / "src/lamina/toy.py").read_text()
outcomes = {}
for name, before, after in json.loads(sys.argv[2]):
    assert old.count(before) == 1
    line = old[: old.index(before)].count("\\n") + 1
    outcome = tried.of(trials.Change("src/lamina/toy.py", old.replace(before, after), range(line, line + 1)))
    outcomes[name] = [outcome.killed, outcome.by]
assert (tree / "src/lamina/toy.py").read_text() == old, "the copy is as it was"
print(json.dumps([outcomes, tried.unchanged.failing]))
"""

CHANGES = {
    "noticed": ("total += 2", "total += 3", [True, "tests/test_toy.py::test_doubled"]),
    "not noticed": ("n > 0", "n != 0", [False, "1 tests"]),
    "not reached": ("n + LIMIT", "n - LIMIT", [False, "no test reaches it"]),
    "endless": ("n -= 1", "n -= 0", [True, "time limit"]),
    "no import": ("LIMIT = 3", "LIMIT = 1 / 0", [True, "import"]),
    "a constant is tried against all tests": ("LIMIT = 3", "LIMIT = 4", [False, "2 tests"]),
}


def test_changes_are_killed_by_the_tests_that_reach_them(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name, text in {
        "src/lamina/__init__.py": "",
        "src/lamina/toy.py": PACKAGE,
        "tests/conftest.py": "",
        "tests/test_toy.py": TESTS,
        "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['slow']\n",
        "benchmarks/faults/trials.py": "",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    changes = json.dumps([(name, before, after) for name, (before, after, _) in CHANGES.items()])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(FAULTS), changes],
        cwd=tree,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outcomes, failing = json.loads(done.stdout)
    assert outcomes == {name: expected for name, (_, _, expected) in CHANGES.items()}
    assert failing == ["tests/test_toy.py::test_that_fails_unchanged"]


def loaded(name: str) -> ModuleType:
    """One of the scripts as a module; they find each other on the path."""
    path = list(sys.path)
    sys.path.insert(0, str(FAULTS))
    specification = importlib.util.spec_from_file_location(name, FAULTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_no_mutant_is_the_file_itself_or_another_one_or_no_python(tmp_path: Path) -> None:
    mutation = loaded("mutation")
    (tmp_path / "toy.py").write_text(PACKAGE)
    mutants = list(mutation.mutants_of(tmp_path, "toy.py"))
    texts = [mutant.change.text for mutant in mutants]
    assert len({*texts, PACKAGE}) == len(texts) + 1 > 10
    for mutant in mutants:
        compile(mutant.change.text, mutant.name, "exec")
        old, new = PACKAGE.splitlines(), mutant.change.text.splitlines()
        assert [number for number, pair in enumerate(zip(old, new, strict=True), 1) if len(set(pair)) > 1] == [
            mutant.change.lines.start
        ]


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    mutation, trials = loaded("mutation"), loaded("trials")
    (tmp_path / "toy.py").write_text(PACKAGE)
    mutants = list(mutation.mutants_of(tmp_path, "toy.py"))[:5]
    asked = []

    class Stopped:
        work = tmp_path

        def of(self, change: object) -> object:
            if len(asked) == 3:
                raise KeyboardInterrupt
            asked.append(change)
            return trials.Outcome(len(asked) != 2, "a test", 0.1)

    with pytest.raises(KeyboardInterrupt):
        mutation.tried(Stopped(), "toy", mutants)
    first, asked = asked, []
    outcomes = mutation.tried(Stopped(), "toy", mutants)
    assert [*first, *asked] == [mutant.change for mutant in mutants]
    assert [outcomes[mutant.name].killed for mutant in mutants] == [True, False, True, True, False]
    found = mutation.reported(10, mutants, outcomes, {mutants[1].name: trials.Outcome(True, "another room", 0.1)})
    assert (found["killed"], found["survived"], found["of them killed elsewhere"], found["share killed"]) == (3, 2, 1, 0.6)
    assert [entry["at"] for entry in found["survivors"]] == [mutants[1].name, mutants[4].name]


@pytest.mark.parametrize(
    ("killed", "tried", "low", "high"), [(0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662), (10, 10, 0.7225, 1.0)]
)
def test_the_interval_of_a_share_is_wilsons(killed: int, tried: int, low: float, high: float) -> None:
    # 81 of 263 is the example of Newcombe, 1998.
    assert loaded("mutation").wilson(killed, tried) == pytest.approx((low, high), abs=1e-4)


def test_each_hand_written_mutant_has_a_name_of_its_own_and_changes_something() -> None:
    mutants = loaded("mutants").MUTANTS
    assert len({mutant.name for mutant in mutants}) == len(mutants) >= 60
    assert all(mutant.old != mutant.new for mutant in mutants)
