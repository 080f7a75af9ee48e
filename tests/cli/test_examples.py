"""The example below the help of each command runs as it stands, one after the other in the order of the help."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.cli import _COMMANDS, app, main
from lamina.cli.cache import cache

NETS = """
import torch
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()


def images():
    return [torch.randn(8, 3, 32, 32) for _ in range(4)]


def labelled():
    torch.manual_seed(1)
    return [(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))) for _ in range(4)]


def score(net):
    return -sum(nn.functional.cross_entropy(net(x), y).item() for x, y in labelled())
"""


def example(name: str) -> str:
    group, _, own = name.rpartition(" ")
    (found,) = [each for each in (cache if group else app).registered_commands if each.name == own]
    return (found.epilog or "").removeprefix("Example: ")


NAMES = [name for name in _COMMANDS if name not in ("cache", "demo")]
EVERY = [*NAMES, "cache show", "cache clear"]


@pytest.mark.parametrize("name", EVERY)
def test_every_command_shows_an_example_of_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert example(name).startswith(f"lamina {name} ") or example(name) == f"lamina {name}"
    assert main([*name.split(), "--help"]) == 0
    assert example(name) in " ".join(capsys.readouterr().out.split())


def test_commands_stand_in_the_help_in_the_order_of_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("│ ") and line[2] != " "]
    assert [word for word in shown if word in NAMES] == NAMES


@pytest.mark.slow
def test_the_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "optuna", "accelerate", "plotly"):
        pytest.importorskip(package)
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    for name in EVERY:
        assert main(shlex.split(example(name))[1:]) == 0, example(name)
    for made in ("seen", "plan.json", "front", "out", "eager.json", "report.html", "refined", "tuned", "net", "extracted"):
        assert (tmp_path / made).exists(), made


@pytest.mark.parametrize(("line", "offered"), [("lamina pl", "plan"), ("lamina show --re", "--reasons")])
def test_the_shell_completes_commands_and_options(line: str, offered: str) -> None:
    asked = {"_LAMINA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    told = subprocess.run(
        [sys.executable, "-m", "lamina"], env=os.environ | asked, capture_output=True, text=True, timeout=120, check=False
    )
    assert offered in told.stdout.split()
