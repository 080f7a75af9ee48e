"""`lamina.report`: the page holds what the plan and its evidence say, escapes what is not its own, and shows what there is."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lamina
from lamina import Front, LaminaError, MissingExtra, Plan, PlanError
from lamina.cli import main
from lamina.report.commands import commands
from lamina.report.evidence import Evidence, gathered
from lamina.report.figures import plotted_front, plotted_staircases, plotted_times

from ..machine import Machine, Net, X


def page_of(told: dict[str, Any], path: Path) -> str:
    lamina.report(told.pop("source"), path, **told)
    return path.read_text()


def words(page: str) -> str:
    """What a reader sees, without what is drawn."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", body)).split())


def test_the_first_lines_say_what_was_asked_and_what_came_of_it(told: dict[str, Any], tmp_path: Path) -> None:
    plan = Plan.load(told["source"] / "plan.json")
    assert plan.whole and plan.whole.speedup and plan.scores
    text = words(page_of(told, tmp_path / "r.html"))
    first = text[: text.index("Accuracy against time")]
    assert f"Asked for: {plan.goal}. The network is {plan.whole.speedup:.2f} times as fast as the original" in first
    assert f"{len(plan.decomposed)} of its {len(plan.layers)} layers are decomposed" in first
    assert f"×{plan.whole.speedup:.2f}" in first and f"{plan.scores.after:.4g}" in first and "÷" in first
    assert len(plan.accuracy()) == 2 and all(line in first for line in plan.accuracy())  # the score, and the predicted loss


def test_a_plan_without_a_score_has_that_of_its_point_on_the_front(told: dict[str, Any], tmp_path: Path) -> None:
    front = Front.load(told["front"])
    point = front.points[-1]
    told["source"] = point.plan.model_copy(update={"scores": None})
    assert point.score is not None and front.before is not None
    text = words(page_of(told, tmp_path / "r.html"))
    assert f"{front.before + 0.0:.4g} → {point.score + 0.0:.4g}" in text[: text.index("Accuracy against time")]


def test_every_layer_stands_there_with_its_form_its_numbers_and_its_reason(told: dict[str, Any], tmp_path: Path) -> None:
    plan = Plan.load(told["source"] / "plan.json")
    text = words(page_of(told, tmp_path / "r.html"))
    for name, layer in plan.layers.items():
        row = text[text.index(f"{name} {layer.geometry}") :][:600]
        for said in (str(layer.form), layer.reason, layer.lost or "–"):
            assert said in row


def test_the_front_in_the_picture_is_that_of_the_table_and_of_the_file(told: dict[str, Any]) -> None:
    front = Front.load(told["front"])
    chosen, *others = plotted_front(front)["data"]
    out = front.dominated
    assert chosen["x"] == [point.speedup for point in front.points if point not in out]
    assert chosen["y"] == [point.score for point in front.points if point not in out]
    uniform = next(trace for trace in others if trace["name"] == "the same ratio for every layer")
    assert uniform["x"] == [point.speedup for point in front.uniform] and uniform["y"] == [p.score for p in front.uniform]


def test_time_before_and_after_adds_up_to_what_the_plan_says(told: dict[str, Any]) -> None:
    plan = Plan.load(told["source"] / "plan.json")
    figure = plotted_times(plan)
    assert figure
    after, before = figure["data"]
    assert sum(before["x"]) == pytest.approx(100 * sum(plan.shares.values()))
    kept = dict(zip(after["y"], after["x"], strict=True))
    for name, share in plan.shares.items():
        layer = plan.layers.get(name)
        if layer and layer.before.timing and layer.after.timing:
            assert kept[name] == pytest.approx(100 * share * layer.after.timing.median_s / layer.before.timing.median_s)


def test_a_staircase_has_every_form_that_was_timed_and_marks_the_chosen_one(told: dict[str, Any], machine: Machine) -> None:
    evidence = gathered(told["source"], timings=told["timings"])
    assert evidence.staircases.keys() == evidence.plan.layers.keys()
    for name, figure in plotted_staircases(evidence).items():
        layer, staircase = evidence.plan.layers[name], evidence.staircases[name]
        drawn = {text for trace in figure["data"][:-1] for text in trace["text"]}
        assert drawn == {str(form) for form in staircase.shares}
        star = figure["data"][-1]
        assert star["name"] == f"chosen: {layer.form}"
        if layer.decomposed and layer.before.timing and layer.after.timing:
            share = layer.after.timing.median_s / layer.before.timing.median_s
            assert star["y"] == [pytest.approx(100 * share)]


def test_what_is_not_there_is_left_out(model: Net, machine: Machine, tmp_path: Path) -> None:
    plan = lamina.make_plan(model, X, lamina.Ratio(2.0), rule=lamina.AtRatio())
    plan.save(tmp_path / "plan.json")
    lamina.report(tmp_path / "plan.json", tmp_path / "r.html", timings=None)
    text = words((tmp_path / "r.html").read_text())
    assert "how fast that is was not measured" in text and "not timed" in text
    for part in ("Accuracy against time", "Where the time goes", "Staircases", "Runtimes side by side"):
        assert part not in text
    nothing = plan
    for name in plan.layers:
        nothing = nothing.with_form(name, lamina.Dense())
    lamina.report(nothing, tmp_path / "n.html")
    assert "No layer is decomposed: the network stays as it was" in words((tmp_path / "n.html").read_text())


def test_a_warning_stands_before_everything_else(model: Net, machine: Machine, tmp_path: Path) -> None:
    plan = lamina.make_plan(model, X, lamina.Ratio(30.0), rule=lamina.AtRatio())
    assert plan.warning
    lamina.report(plan, tmp_path / "r.html")
    text = words((tmp_path / "r.html").read_text())
    assert text.index(plan.warning) < text.index("Asked for")


def test_names_cannot_break_out_of_the_page(model: Net, machine: Machine, tmp_path: Path) -> None:
    evil = '</script><script>window.broken=1</script><b id="x" onclick="y">'
    plan = lamina.make_plan(model, X, lamina.Ratio(2.0), rule=lamina.AtRatio())
    first = next(iter(plan.layers))
    layers = {evil: plan.layers[first].model_copy(update={"reason": evil})}
    plan = plan.model_copy(update={"layers": plan.layers | layers, "refused": {evil: evil}, "shares": {evil: 0.5}})
    lamina.report(plan, tmp_path / "r.html", model=evil)
    page = (tmp_path / "r.html").read_text()
    assert evil in words(page) and "<b id=" not in page and "window.broken=1</script><b" not in page


def test_a_front_of_another_network_is_refused(told: dict[str, Any], tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    plan = lamina.make_plan(other, torch.randn(4, 64), lamina.Ratio(2.0), rule=lamina.AtRatio())
    with pytest.raises(PlanError, match="another network than the plan"):
        lamina.report(plan, tmp_path / "r.html", front=told["front"])
    assert not (tmp_path / "r.html").exists()


def test_a_page_that_cannot_be_written_says_so(told: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match="cannot be written"):
        lamina.report(told["source"], tmp_path / "none" / "r.html", timings=told["timings"])


@pytest.mark.parametrize("package", ["jinja2", "plotly"])
def test_without_its_packages_the_extra_is_named(
    told: dict[str, Any], tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, "plotly.graph_objects", "plotly.offline"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingExtra, match=r"pip install 'lamina\[report\]'"):
        lamina.report(told["source"], tmp_path / "r.html", timings=told["timings"])


def test_the_command_takes_files_of_the_others(
    told: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = tmp_path / "bench.json"
    told["comparisons"][0].save(bench)
    assert lamina.Comparison.load(bench) == told["comparisons"][0]
    argv = ["report", str(told["source"]), "-o", str(tmp_path / "r.html"), "--front", str(told["front"]), "--bench", str(bench)]
    assert main(argv) == 0
    assert f"the report is in {tmp_path / 'r.html'}" in capsys.readouterr().out
    (low, high), change = told["comparisons"][0].interval, told["comparisons"][0].change
    row = f"×{told['comparisons'][0].speedup:.2f} {low:.2f} to {high:.2f} {change:.2g}"
    assert change > 0 and row in words((tmp_path / "r.html").read_text())


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("{", "no comparison of lamina's"), ("{}", "no comparison of lamina's")],
)
def test_a_comparison_that_is_none_is_named(
    told: dict[str, Any], tmp_path: Path, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = tmp_path / "bench.json"
    if content is not None:
        bench.write_text(content)
    assert main(["report", str(told["source"]), "-o", str(tmp_path / "r.html"), "--bench", str(bench)]) == 1
    error = capsys.readouterr().err
    assert str(bench) in error and said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "r.html").exists()


def test_the_commands_are_those_that_make_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed runs as it stands, for a network by name, and gives the same forms."""
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef network():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    x = torch.randn(8, 64)
    plan = lamina.make_plan(lamina.load_model("nets:network"), x, lamina.Ratio(2.0), rule=lamina.AtRatio())
    made, applied, compared = commands(Evidence(plan, "nets:network"))
    for line in (made, applied, compared):
        program, *argv = shlex.split(line)
        assert program == "lamina" and main(argv) == 0, line
    assert not Plan.load("plan.json").differences(plan)
    assert json.loads(Path("out/plan.json").read_text())["fingerprint"] == plan.fingerprint
