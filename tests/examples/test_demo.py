"""What the demo shows of its results: a table with a column a network, and the front with the uniform ratios on its axes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lamina
from lamina import Front, Point

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
    front = Front(before=0.93, points=(point(1.5, 0.93), point(2.0, 0.92)), example="32×1×28×28", conditions="here")
    uniform = [(1.8, 0.9), (1.4, 0.91)]
    (axes,) = demo.picture(front, uniform, tmp_path / "front.png").axes
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


def test_each_runtime_has_a_line_and_one_that_is_missing_names_its_extra(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.runtimes import openvino

    model, x = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten()).eval(), torch.randn(2, 1, 6, 6)
    compare = lamina.compare
    monkeypatch.setattr(lamina, "compare", lambda *words, seconds, **named: compare(*words, seconds=0.01, **named))
    assert all(cell.startswith("×") for cell in list(demo.in_runtimes(model, model, x, [x]).columns[3].cells))
    openvino._package.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    try:
        told = list(demo.in_runtimes(model, model, x, [x]).columns[1].cells)
    finally:
        openvino._package.cache_clear()
    assert sum("pip install 'lamina[openvino]'" in cell for cell in told) == 2
