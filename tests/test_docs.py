"""The documentation's code runs.

Each page is run from top to bottom in a process of its own and an empty folder, as a reader would: its Python blocks, and, on
how-to pages and in the README, the ``$ lamina …`` lines of its console blocks in between. What the first line of a fence says:

    python                               run
    python title="nets.py"               written to that file, and run by who imports it
    {.python .script title="train.py"}   written to that file, and run as a program
    {.python .no-run}                    compiled only; ``python no-run`` is the same, but MkDocs does not take it for a fence
    console                              lines that begin with ``$ lamina`` are run; output shown below them is not compared
    {.console .no-run}                   not run
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lamina

ROOT = Path(__file__).parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()]
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)(?P=ticks) *$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: the words of its first line, its text, and where the text begins."""

    language: str
    options: str
    text: str
    line: int

    @property
    def runs(self) -> bool:
        return "no-run" not in self.options

    @property
    def title(self) -> str | None:
        found = re.search(r'title="([^"]+)"', self.options)
        return found[1] if found else None

    def commands(self) -> list[list[str]]:
        """The ``$ lamina`` lines, each as the words after ``lamina``; a backslash at a line's end joins the next one."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.split(line)[2:] for line in lines if line.startswith("$ lamina ")]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        language, _, options = fence["info"].strip().strip("{}").strip().lstrip(".").partition(" ")
        found.append(Block(language, options, textwrap.dedent(fence["body"]), text.count("\n", 0, fence.start("body")) + 1))
    return found


def runnable(page: Path) -> list[Block]:
    with_commands = page.parent.name == "howto" or page.name == "README.md"
    return [block for block in blocks(page) if block.language == "python" or (with_commands and block.language == "console")]


def absent(words: list[str]) -> bool:
    """Whether a command names a network of a package that is not installed here."""
    named = {zoo for zoo in ("timm", "torchvision") for word in words if word.startswith(f"{zoo}:")}
    return any(importlib.util.find_spec(zoo) is None for zoo in named)


RUNNER = """
import json, sys
namespace = {"__name__": "__main__"}
sys.path.insert(0, "")
for kind, what, line in json.load(sys.stdin):
    if kind == "python":
        exec(compile("\\n" * line + what, "the page", "exec"), namespace)
    else:
        from lamina.cli import main
        assert not main(what), f"lamina {' '.join(what)} failed"
"""
"""Blank lines before the code make a traceback point to the page's own line."""


def steps(page: Path, folder: Path) -> list[tuple[str, object, int]]:
    """What a reader runs, in order: Python and commands. Files are written where the page names them."""
    found: list[tuple[str, object, int]] = []
    for block in runnable(page):
        if block.language == "console":
            found += [("lamina", words, block.line) for words in block.commands() if block.runs and not absent(words)]
            continue
        compile(block.text, str(page), "exec")
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
            if "script" in block.options:
                found.append(("python", f"import runpy\nrunpy.run_path({block.title!r}, run_name='__main__')", block.line))
        elif block.runs:
            found.append(("python", block.text, block.line - 1))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path):
    folder = tmp_path / "page"
    folder.mkdir()
    todo = steps(page, folder)
    if not todo:
        return
    ran = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(todo),
        cwd=folder,
        env=os.environ | {"LAMINA_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{page.name}: {ran.stderr[-3000:]}"


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_fence_is_closed_and_knows_its_language(page: Path):
    ticks = [line for line in page.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
    assert len(ticks) == 2 * len(blocks(page))
    assert not [block.line for block in blocks(page) if not block.language]


def anchors(page: Path) -> set[str]:
    """What can be linked to in a page: its headings, as MkDocs and GitHub name them."""
    text = re.sub(_FENCE, "", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path):
    text = re.sub(_FENCE, "", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in {re.sub(r"-+", "-", each) for each in anchors(target)} | anchors(target), link


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "howto").glob("*.md")), ids=lambda page: page.stem)
def test_every_how_to_page_names_what_it_needs_before_its_first_code_runs(page: Path):
    text = page.read_text(encoding="utf-8")
    assert re.search(r"^Needs\b", text[: text.index("```", text.index("```") + 3)], re.M)


QUOTING = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("index.md", "faq.md", "coming-from.md"))]


@pytest.mark.parametrize("page", QUOTING, ids=lambda page: page.name)
def test_every_figure_that_a_page_quotes_stands_in_the_results(page: Path):
    """Speed-ups and percentages, rounded perhaps; of the README but what the demo writes there itself."""
    text = re.sub(r"<!-- demo -->.*?<!-- /demo -->", "", re.sub(_FENCE, "", page.read_text(encoding="utf-8")), flags=re.S)
    pages = [ROOT / "docs" / "results.md", *(ROOT / "docs" / "results").glob("*.md")]
    known = {figure for each in pages for figure in re.findall(r"\d+\.\d+|\d+", each.read_text(encoding="utf-8"))}
    for figure in re.findall(r"[×÷](\d+\.\d+)|(\d+\.\d+) ?%", text):
        asked = figure[0] or figure[1]
        digits = len(asked.partition(".")[2])
        assert any(f"{float(each):.{digits}f}" == asked for each in known), f"{asked} is in no table of the results"


def test_every_test_that_the_page_of_promises_names_is_there():
    names = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")))
    written = {name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(names) > 50
    assert not names - written


# What lamina says, provoked here, must stand in docs/troubleshooting.md as it is said. There, … stands for what varies.


def quoted() -> list[re.Pattern[str]]:
    """The messages that the page quotes: its blocks of text, a message a line."""
    lines = [line for block in blocks(TROUBLESHOOTING) if block.language == "text" for line in block.text.splitlines() if line]
    return [re.compile(".+".join(map(re.escape, line.split("…"))), re.S) for line in lines]


def assert_quoted(message: str) -> None:
    assert any(pattern.fullmatch(message) for pattern in quoted()), f"docs/troubleshooting.md does not quote: {message}"


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Slow(nn.MultiheadAttention):
    def forward(self, *inputs):
        return super().forward(*inputs)


def with_a_gain() -> nn.Module:
    attention = nn.MultiheadAttention(8, 2)
    attention.gain = nn.Parameter(torch.ones(2))
    return attention


def without_its_output() -> nn.Module:
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = nn.Identity()
    return attention


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


def replaced_forward() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return nn.Sequential(layer)


def masked() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_buffer("mask", torch.ones(8, 8))
    return nn.Sequential(layer)


class Stepping(nn.LSTMCell):
    """A class of the user's own."""


REFUSED = {
    "tied": tied,
    "groups": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)),
    "groups, transposed": lambda: nn.Sequential(nn.ConvTranspose2d(64, 64, 3, groups=2)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)),
    "subclass": lambda: nn.Sequential(Scaled(8, 8)),
    "attention": lambda: nn.Sequential(Slow(8, 2)),
    "attention that holds more": with_a_gain,
    "attention without its output": without_its_output,
    "recurrent": lambda: nn.Sequential(nn.LSTM(8, 8, 2, bidirectional=True)),
    "recurrent, one's own": lambda: nn.Sequential(Stepping(8, 8)),
    "no reader": lambda: nn.Sequential(nn.Bilinear(8, 8, 8)),
    "parametrized": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
    "old weight_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8))),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(8)),
    "replaced forward": replaced_forward,
    "masked": masked,
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_each_refusal_is_quoted(make):
    from lamina.network.walk import walk

    refused = walk(make()).refused
    assert refused
    for reason in refused.values():
        assert_quoted(reason)


class Idle(nn.Module):
    """A network with a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return x


def net(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))


def plan_of(model: nn.Module, **options) -> lamina.Plan:
    return lamina.make_plan(model, torch.randn(2, 8), lamina.Ratio(2), rule=lamina.AtRatio(), **options)


def nan_weight() -> None:
    model = net()
    plan = plan_of(model)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    lamina.decompose(model, plan)


def cannot_be_copied() -> None:
    model = net()
    plan = plan_of(model)
    model.lock = threading.Lock()
    lamina.decompose(model, plan)


def needs_data() -> None:
    plan = plan_of(net())
    lamina.decompose(net(), plan.model_copy(update={"factors": plan.factors.model_copy(update={"calibration": "one"})}))


def of_a_supernet() -> None:
    plan = plan_of(net())
    lamina.decompose(net(), plan.model_copy(update={"factors": plan.factors.model_copy(update={"series": "nested"})}))


def calibrated(model: nn.Module, data: object = None) -> lamina.Calibration:
    return lamina.calibrate(model, torch.randn(8, 8) if data is None else data)


def another_calibration() -> None:
    model = net()
    plan = plan_of(model, data=calibrated(model))
    lamina.decompose(model, plan, torch.randn(8, 8))


def nan_in_the_data() -> None:
    calibrated(net(), [torch.full((2, 8), torch.nan)])


def nan_once_decomposed() -> None:
    def score(model: nn.Module) -> float:
        return 1.0 if isinstance(model[0], nn.Linear) else math.nan

    plan_of(net(), score=score)


def beside_the_layers() -> None:
    other = net()
    other[1] = nn.GELU()
    lamina.decompose(other, plan_of(net()))


def saved(folder: str = "out") -> Path:
    model = net()
    lamina.save(lamina.decompose(model, plan_of(model)), folder)
    return Path(folder)


def newer_format() -> None:
    plan_of(net()).save("plan.json")
    Path("plan.json").write_text(Path("plan.json").read_text().replace('"format": 1', '"format": 9'))
    lamina.Plan.load("plan.json")


def cut_short() -> None:
    weights = next(saved().glob("model-*"))
    weights.write_bytes(weights.read_bytes()[:-9])
    lamina.load(net(), "out")


def no_weights() -> None:
    next(saved().glob("model-*")).unlink()
    lamina.load(net(), "out")


def other_files() -> None:
    Path("out").mkdir()
    Path("out/notes.txt").touch()
    saved()


def other_dtype() -> None:
    lamina.load(net().double(), saved())


def other_timings() -> None:
    Path("timings.json").write_text("{}")
    lamina.make_plan(net(), torch.randn(2, 8), lamina.Ratio(2), timings="timings.json")


def layer_by_layer(
    change: Callable[[dict[str, torch.Tensor]], object] = lambda state: None,
    lost: str = "",
    full: bool = False,
    **factors: str,
) -> None:
    """Decompose the weights of a network, in a folder, after something was done to them."""
    state = net().state_dict()
    change(state)
    names = {name: f"{name}.safetensors" for name in state}
    Path("big").mkdir()
    for name, file in names.items():
        save_file({name: state[name]}, Path("big") / file)
    (Path("big") / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    if lost == "content":
        (Path("big") / "0.bias.safetensors").write_bytes(b"")
    elif lost:
        (Path("big") / lost).unlink()
    with torch.device("cpu" if full else "meta"):
        bare = net()
    plan = plan_of(net())
    plan = plan.model_copy(update={"factors": plan.factors.model_copy(update=factors)})
    lamina.decompose_checkpoint(bare, plan, "big", output="out")


def small() -> nn.Module:
    return lamina.decompose(net(), plan_of(net()))


def stale_optimizer() -> None:
    freezing = lamina.freeze(small(), lamina.SequentialFreezing())
    freezing.check(torch.optim.SGD(net().parameters(), lr=0.1))


def optimizer_without_the_resting() -> None:
    model = small()
    freezing = lamina.freeze(model, lamina.SequentialFreezing())
    freezing.check(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))


def frozen_twice() -> None:
    model = small()
    first = lamina.freeze(model, lamina.SequentialFreezing())
    lamina.freeze(model, lamina.SequentialFreezing())
    first.step()


ERRORS = {
    "factors of a supernet": of_a_supernet,
    "no timings": other_timings,
    "nothing to freeze": lambda: lamina.freeze(net(), lamina.SequentialFreezing()),
    "unknown exclude pattern": lambda: lamina.freeze(small(), lamina.SequentialFreezing(exclude=("conv*",))),
    "frozen twice": frozen_twice,
    "stale optimizer": stale_optimizer,
    "optimizer without the resting": optimizer_without_the_resting,
    "ratio below 1": lambda: lamina.Ratio(0.5),
    "no list of workloads": lambda: lamina.make_plan(net(), [torch.randn(2, 8)], lamina.Ratio(2)),
    "wrong shape": lambda: lamina.make_plan(net(), torch.randn(2, 9), lamina.Ratio(2)),
    "no layer is called": lambda: lamina.make_plan(Idle(), torch.randn(2, 8), lamina.Ratio(2)),
    "unknown pattern": lambda: plan_of(net(), skip=["conv*"]),
    "decomposed already": lambda: plan_of(lamina.decompose(net(), plan_of(net()))),
    "no such layer": lambda: plan_of(net()).with_form("22", lamina.Dense()),
    "rank too high": lambda: plan_of(net()).with_form("0", lamina.LowRank(80)),
    "wrong kind of form": lambda: plan_of(net()).with_form("0", lamina.BlockTerm(4, 4)),
    "refused layer": lambda: plan_of(nn.Sequential(net(), Scaled(8, 8))).with_form("1", lamina.Dense()),
    "another width": lambda: lamina.decompose(net(32), plan_of(net())),
    "another network": lambda: lamina.decompose(nn.Sequential(nn.Linear(8, 16)), plan_of(net())),
    "beside the layers": beside_the_layers,
    "NaN weight": nan_weight,
    "cannot be copied": cannot_be_copied,
    "needs data": needs_data,
    "newer format": newer_format,
    "no plan file": lambda: lamina.Plan.load("nowhere.json"),
    "not decomposed, saved": lambda: lamina.save(net(), "out"),
    "not decomposed, merged": lambda: lamina.merge(net()),
    "a file of many is missing": lambda: layer_by_layer(lost="0.bias.safetensors"),
    "a file of many is cut short": lambda: layer_by_layer(lost="content"),
    "no index": lambda: layer_by_layer(lost="model.safetensors.index.json"),
    "a tensor is missing": lambda: layer_by_layer(lambda state: state.pop("0.bias")),
    "a tensor is left over": lambda: layer_by_layer(lambda state: state.update({"3.bias": torch.zeros(1)})),
    "a tensor of another shape": lambda: layer_by_layer(lambda state: state.update({"0.bias": torch.zeros(1)})),
    "a tensor of another type": lambda: layer_by_layer(lambda state: state.update({"0.bias": torch.zeros(16).half()})),
    "a network with values": lambda: layer_by_layer(full=True),
    "a plan of a calibration": lambda: layer_by_layer(calibration="one"),
    "cut short": cut_short,
    "no weights": no_weights,
    "other files": other_files,
    "other dtype": other_dtype,
    "no such network": lambda: lamina.load_model("resnet50"),
    "no such module": lambda: lamina.load_model("no_such_module:net"),
    "no such function": lambda: lamina.load_model("torch.nn:Linaer"),
    "not a network": lambda: lamina.load_model("math:pi"),
    "a drop without a score": lambda: lamina.make_plan(net(), torch.randn(2, 8), lamina.Drop(0.1)),
    "a score of NaN": lambda: lamina.make_plan(net(), torch.randn(2, 8), lamina.Drop(0.1), score=lambda _: math.nan),
    "a score of NaN once decomposed": nan_once_decomposed,
    "another calibration": another_calibration,
    "a calibration of another network": lambda: plan_of(net(32), data=calibrated(net())),
    "no calibration in the folder": lambda: lamina.Calibration.load("nowhere"),
    "no network in the folder": lambda: lamina.load(net(), "nowhere"),
    "a spent iterator": lambda: calibrated(net(), iter(())),
    "data that reach no layer": lambda: calibrated(Idle()),
    "NaN in the data": nan_in_the_data,
    "a score that is no number": lambda: lamina.make_plan(net(), torch.randn(2, 8), lamina.Drop(0.1), score=lambda _: "good"),
    "nothing to train": lambda: lamina.compare(net().requires_grad_(False), net(), torch.randn(2, 8), mode=lamina.Training()),
}


@pytest.mark.parametrize("provoke", ERRORS.values(), ids=ERRORS)
def test_each_error_is_quoted(provoke, empty_folder: Path):
    with pytest.raises(lamina.LaminaError) as error:
        provoke()
    assert_quoted(str(error.value))


def test_the_warnings_of_the_timing_table_are_quoted(cache: Path, tmp_path: Path):
    from lamina.measure.table import TimingTable

    damaged, unusable = cache / "timings.sqlite", tmp_path / "file" / "timings.sqlite"
    damaged.write_bytes(b"no database" * 999)
    (tmp_path / "file").touch()
    for path in (damaged, unusable):
        with pytest.warns(UserWarning) as warned:
            TimingTable(path).close()
        assert_quoted(str(warned[0].message))
