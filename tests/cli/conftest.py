"""An empty folder with two small networks in it, and a way to run commands there in this process."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lamina.cli import main

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(4, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8),
    )

def wider():
    return nn.Sequential(*list(net())[:-1], nn.Linear(16, 9))

class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(10, 16), nn.Linear(16, 16)
    def forward(self, tokens, scale):
        return self.last(self.table(tokens)) * scale

def loud():
    print("a network that prints")
    return net()

def nan():
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    return model

def on_gpu():
    raise RuntimeError("Found no NVIDIA driver on your system.")

def interrupted():
    raise KeyboardInterrupt
"""


@dataclass(frozen=True)
class Ran:
    """How a command ended: its exit code, what stood on stdout and what on stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    def complaint(self, code: int) -> str:
        """The one line with which a command ended that has printed nothing else."""
        # On a slow machine lines of progress may stand before it.
        lines = [line for line in self.err.splitlines() if not re.match(r" *\d+ s  ", line)]
        assert (self.code, self.out, len(lines)) == (code, "", 1), self
        return lines[0]


Run = Callable[..., Ran]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "small_nets.py").write_text(NETS)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("small_nets", None)


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("plan", "small_nets:net", …)``, as a shell would."""

    def call(*words: str | Path) -> Ran:
        capsys.readouterr()
        code = main(list(map(str, words)))
        return Ran(code, *capsys.readouterr())

    return call


INPUT = ("--input", "2,4,6,6")
UNTIMED = ("plan", "small_nets:net", *INPUT, "--ratio", "2", "--rule", "at-ratio")


@pytest.fixture
def plan_file(run: Run, here: Path) -> Path:
    """An untimed plan of ``small_nets:net`` at ratio 2."""
    assert run(*UNTIMED, "-o", "plan.json").code == 0
    return here / "plan.json"


@pytest.fixture
def saved(run: Run, plan_file: Path, here: Path) -> Path:
    """``small_nets:net`` decomposed by that plan and saved."""
    assert run("apply", "small_nets:net", plan_file, "-o", "out").code == 0
    return here / "out"
