"""The demo runs, on few images; and what it shows: a table with a column a network, the front beside the uniform ratios."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina import Front, Point

from ..machine import Machine
from ..test_plan import a_plan

FOLDER = Path(__file__).parents[2] / "examples" / "demo"
BESIDE = ("fashion", "network", "training")
"""Names by which the script imports what lies beside it; other tests have files of these names too."""


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    others = {name: sys.modules.pop(name) for name in BESIDE if name in sys.modules}
    monkeypatch.syspath_prepend(str(FOLDER))
    specification = importlib.util.spec_from_file_location("the_demo", FOLDER / "demo.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    for name in BESIDE:
        sys.modules.pop(name, None)
    sys.modules.update(others)


def point(speedup: float, score: float) -> Point:
    return Point(asked=speedup, speedup=speedup, interval=(speedup, speedup), score=score, plan=a_plan())


def test_the_picture_shows_the_front_and_the_uniform_ratios_on_the_same_axes(demo: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points, uniform = (point(1.5, 0.93), point(2.0, 0.92)), (point(1.4, 0.91), point(1.8, 0.9))
    front = Front(before=0.93, points=points, uniform=uniform, example="32×1×28×28", conditions="here")
    (axes,) = demo.picture(front, tmp_path / "front.png").axes
    lines = [[tuple(place) for place in line.get_xydata()] for line in axes.lines]
    assert [(1.0, 0.93), (1.5, 0.93), (2.0, 0.92)] in lines and [(1.4, 0.91), (1.8, 0.9)] in lines
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "the same ratio for every layer" in labels and "front" in labels
    assert (tmp_path / "front.png").stat().st_size > 0


def test_the_table_has_a_column_a_network_and_a_dash_where_one_was_not_looked_at(demo: Any) -> None:
    timing = {"speedup": 2.0, "interval": (1.9, 2.1)}
    costs = [{"parameters": 300, "macs": 900}, {"parameters": 100, "macs": 300}]
    both = {"asked": 2.0, "times": dict.fromkeys(demo.BATCHES, timing), "costs": costs}
    accuracies = {"before": 0.9, "untuned": 0.89}
    results = [
        both | {"accuracy": accuracies | {"tuned": 0.9}, "training": {"decomposed": timing}},
        both | {"accuracy": accuracies},
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in demo.readme_table(results).splitlines()]
    assert all(len(row) == 3 for row in rows)
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["test accuracy with 512 unlabelled images, nothing fine-tuned"] == ["89.00% (-1.00)", "89.00% (-1.00)"]
    assert [cells for name, cells in by_name.items() if name.startswith("after 2 epochs")] == [["90.00% (+0.00)", "–"]]
    assert by_name["training step"] == ["**×2.00** (1.90 to 2.10)", "–"]
    assert by_name["parameters"] == ["÷3.00", "÷3.00"]


def test_what_is_published_has_the_seconds_of_the_whole_run_in_its_conditions(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "HERE", tmp_path / "examples" / "demo")
    monkeypatch.setattr(demo, "readme_table", lambda results: "| the table |")
    (tmp_path / "README.md").write_text("before\n<!-- demo -->\nold\n<!-- /demo -->\nafter\n")
    demo.publish([], "a CPU, 2 threads", 321.4, tmp_path / "no picture")
    before, mark, table, gap, conditions, *after = (tmp_path / "README.md").read_text().splitlines()
    assert [before, mark, table, gap, *after] == ["before", "<!-- demo -->", "| the table |", "", "<!-- /demo -->", "after"]
    assert conditions.startswith("Measured ") and conditions.endswith(", the whole demo in 321 s, on a CPU, 2 threads.")


@pytest.mark.slow
def test_it_runs_and_leaves_a_picture_a_front_and_every_figure(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    Machine.instead(monkeypatch).compares(monkeypatch)  # whatever else this machine does
    for name, most in (("test_images", 256), ("tuning_images", 128)):
        images = getattr(demo, name)()[:most]
        monkeypatch.setattr(demo, name, lambda images=images: images)
    for name, value in {"UNLABELLED": 64, "TUNED": 128, "EPOCHS": 1, "UNIFORM": (2.0,), "BATCHES": (32,)}.items():
        monkeypatch.setattr(demo, name, value)
    # Fits by patches and in groups are most of the demo's time.
    monkeypatch.setattr(lamina, "calibrate", partial(lamina.calibrate, memory=3e7))
    monkeypatch.setattr(lamina.forms, "_GROUP_SIZES", ())
    readme = (FOLDER.parents[1] / "README.md").read_bytes()
    assert demo.main(["--speedups", "1.5", "2", "--tuned", "1.5", "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    assert (out / "front.png").stat().st_size > 0
    front = lamina.Front.load(out / "front")
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["asked"] for run in runs] == [point.asked for point in front.points]
    assert len(runs) >= 1 and all(run["identical"] for run in runs)
    assert ["tuned" in run["accuracy"] for run in runs] == [run["asked"] <= 1.5 for run in runs]
    for run, point in zip(runs, front.points, strict=True):
        assert run["accuracy"]["untuned"] == point.score and run["accuracy"]["before"] == front.before
        small = lamina.load(demo.fashion_net(), out / f"speedup-{run['asked']:g}" / "network").eval()
        assert lamina.decomposition.plan_of(small).decomposed
    told = capsys.readouterr().out
    assert "saved, loaded into a fresh network: outputs bit-identical" in told
    assert "predicted loss: " in told and "change by " in told
    assert (FOLDER.parents[1] / "README.md").read_bytes() == readme


def test_each_runtime_has_a_line_and_one_that_is_missing_names_its_extra(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.runtimes import openvino

    model, x = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten()).eval(), torch.randn(2, 1, 6, 6)
    compare = lamina.compare
    monkeypatch.setattr(lamina, "compare", lambda *words, seconds, **named: compare(*words, seconds=0.01, **named))
    assert all(cell.startswith("×") for cell in list(demo.in_runtimes(model, model, x, [x])[0].columns[3].cells))
    openvino._package.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    try:
        told = list(demo.in_runtimes(model, model, x, [x])[0].columns[1].cells)
    finally:
        openvino._package.cache_clear()
    assert sum("pip install 'lamina[openvino]'" in cell for cell in told) == 2
