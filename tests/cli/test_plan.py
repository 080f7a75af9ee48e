"""`lamina plan`: the options reach the library, the plan is printed and written, and a mistake changes no file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lamina
from lamina.measure.table import TimingTable

UNTIMED = ("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--rule", "at-ratio")


def test_a_plan_is_written_and_printed(run, here: Path) -> None:
    ran = run(*UNTIMED, "-o", "plan.json")
    plan = lamina.Plan.load(here / "plan.json")
    assert ran.code == 0 and ran.out == f"{plan}\n"
    assert set(plan.layers) == {"0", "2", "5", "7"} and plan.decomposed and plan.setting is None


def test_as_json_the_plan_alone_stands_on_stdout(run, here: Path) -> None:
    ran = run(*UNTIMED, "--json", "-o", "plan.json")
    assert lamina.Plan.model_validate(ran.json) == lamina.Plan.load(here / "plan.json")


def test_without_an_output_nothing_is_written(run, here: Path) -> None:
    before = set(here.iterdir())
    assert run(*UNTIMED).code == 0
    assert set(here.iterdir()) - before <= {here / "__pycache__"}


def test_ranks_are_chosen_by_time_and_the_whole_network_is_judged(run) -> None:
    plan = lamina.Plan.model_validate(run("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--json").json)
    assert plan.rule.startswith("Plateau") and plan.setting and plan.setting.threads == 1
    assert all(layer.before.timing for layer in plan.layers.values())
    chosen = set(plan.decomposed) | set(plan.put_back)
    assert bool(chosen) == bool(plan.whole and plan.whole.speedup)


def test_never_slower_can_be_waived(run) -> None:
    plan = run("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--no-never-slower", "--json").json
    assert plan["put_back"] == {} and plan["whole"]["speedup"] is None


def test_patterns_say_which_layers_are_considered(run) -> None:
    plan = run(*UNTIMED, "--include", "[02]", "--include", "7", "--skip", "0", "--json").json
    dense = {name for name, layer in plan["layers"].items() if layer["form"]["form"] == "dense"}
    assert dense == {"0", "5"}
    assert plan["layers"]["0"]["reason"] == "skipped" and "include" in plan["layers"]["5"]["reason"]


def test_the_goal_rule_mode_and_beta_are_those_asked_for(run) -> None:
    words = ("--rule", "largest-step", "--mode", "training", "--ratio", "3", "--beta", "0.5", "--include", "2", "--json")
    plan = run("plan", "small_nets:net", "--input", "2,4,6,6", *words, "--no-never-slower").json
    assert plan["goal"]["value"] == 3 and plan["rule"] == "LargestStep()"
    assert plan["mode"] == plan["setting"]["mode"] == "training"
    halved = run(*UNTIMED, "--beta", "0.5", "--json").json["layers"]["2"]["form"]
    assert halved["rank_out"] == pytest.approx(halved["rank_in"] / 2, abs=1)


def test_a_rule_of_the_spectrum_is_taken_with_its_number(run) -> None:
    plan = run("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "1", "--rule", "energy:0.25", "--json").json
    assert plan["rule"] == "Energy(share=0.25)"
    assert any(
        "hold 0.25 of the weight" in layer["reason"] or "no rank is faster" in layer["reason"]
        for layer in plan["layers"].values()
    )


def test_the_conditions_asked_for_are_those_of_the_plan(run) -> None:
    words = ("--dtype", "float64", "--channels-last", "--threads", "2", "--autocast", "--include", "5")
    setting = run("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", *words, "--json").json["setting"]
    assert (setting["dtype"], setting["memory_format"], setting["threads"]) == ("float64", "channels_last", 2)
    assert setting["autocast"] != "off"


def test_several_workloads_are_planned_for_together_by_their_weights(run) -> None:
    inputs = ("--input", "1,4,6,6@3", "--input", "4,4,6,6")
    examples = run("plan", "small_nets:net", *inputs, "--ratio", "2", "--rule", "at-ratio", "--json").json["examples"]
    assert [(e["args"][0]["shape"], e["weight"]) for e in examples] == [([1, 4, 6, 6], 0.75), ([4, 4, 6, 6], 0.25)]


def test_several_tensors_of_their_own_dtypes_are_one_call(run) -> None:
    ran = run("plan", "small_nets:Embedded", "--input", "2,9:int64;1,1,16", "--ratio", "2", "--rule", "at-ratio", "--json")
    assert [(a["dtype"], a["shape"]) for a in ran.json["examples"][0]["args"]] == [("int64", [2, 9]), ("float32", [1, 1, 16])]


def test_by_times_of_another_machine_the_plan_is_the_one_made_there_and_this_machine_does_not_judge(run, here: Path) -> None:
    there = ("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--no-never-slower", "--json")
    assert run("measure", "small_nets:net", "--input", "2,4,6,6", "-o", "times.json").code == 0
    made_there = run(*there).json | {"shares": {}}  # where the time goes is not known here
    content = json.loads((here / "times.json").read_text())
    elsewhere = json.loads(json.dumps(content).replace(content["setting"]["device_name"], "another CPU"))
    (here / "times.json").write_text(json.dumps(elsewhere))
    ran = run("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--timings", "times.json", "--json")
    assert ran.json["setting"]["device_name"] == "another CPU" and ran.json["whole"]["speedup"] is None
    assert ran.err.startswith("note: by times taken elsewhere")
    assert json.loads(json.dumps(made_there).replace(content["setting"]["device_name"], "another CPU")) == ran.json
    complaint = run("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "5", "--timings", "times.json").complaint(1)
    assert "times.json has no time of" in complaint and "another CPU" in complaint


@pytest.mark.parametrize("name", ["model.safetensors", "times.json", "times"])
def test_only_a_file_of_lamina_measure_is_taken_for_timings_and_any_other_stays_as_it_was(run, here: Path, name: str) -> None:
    words = ("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--timings", name)
    assert f"{name}: no readable file of timings" in run(*words).complaint(1)
    assert not (here / name).exists()
    TimingTable(here / name).close()
    (here / "weights").write_bytes(b"PK\3\4" + bytes(999))
    for path, message in ((here / name, "is a table, no file of timings"), (here / "weights", "no readable file of timings")):
        before = path.read_bytes()
        assert message in run(*words[:-1], path).complaint(1)
        assert path.read_bytes() == before
    assert {path.name for path in here.glob("*.*")} <= {"small_nets.py", "__pycache__", name}


def test_that_times_were_taken_elsewhere_is_said_only_where_they_were(run) -> None:
    assert run("measure", "small_nets:net", "--input", "2,4,6,6", "--include", "5", "-o", "times.json").code == 0
    words = ("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--include", "5", "--timings", "times.json")
    for more in ([], ["--no-never-slower"]):
        assert "elsewhere" not in run(*words, *more).err


def test_a_forward_that_wants_more_arguments_is_told_which(run) -> None:
    said = run("plan", "small_nets:Embedded", "--input", "2,9:int64", "--ratio", "2", "--rule", "at-ratio").complaint(1)
    assert "missing 1 required positional argument: 'scale'; not given: scale" in said


def test_a_model_that_is_on_no_hub_and_in_no_cache_is_one_line(run, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("transformers")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = ("--input", "2,9:int64", "--ratio", "2")
    assert run("plan", "hf:gone/nowhere", *words).complaint(1).startswith("error: hf:gone/nowhere: ")


REFUSED = {
    "wrong example shape": (["--input", "2,5,6,6"], 1, "does not run on the example (2×5×6×6)"),
    "ratio below 1": (["--ratio", "0.5"], 1, "a ratio of 0.5 is not possible"),
    "ratio no number": (["--ratio", "half"], 2, "Invalid value for '--ratio'"),
    "no number": (["--ratio", "nan"], 1, "a ratio of nan is not possible"),
    "unknown pattern": (["--skip", "conv*"], 1, "pattern 'conv*' matches no layer"),
    "unknown rule": (["--rule", "best"], 2, "Invalid value for '--rule'"),
    "beta below 0": (["--beta", "-1"], 1, "β is -1.0"),
    "unknown option": (["--rank", "3"], 2, "No such option: --rank"),
    "no threads": (["--threads", "0"], 2, "--threads"),
    "far more threads than cores": (["--threads", "100000"], 2, "100000 threads are too many: this machine has"),
    "a device that computes nothing": (["--device", "meta", "--autocast"], 1, "device 'meta' cannot be used here"),
    "output named like stdout": (["-o", "-"], 1, "- cannot be written: name a file"),
    "shape of words": (["--input", "8,x"], 2, "'8,x': write a shape of whole numbers"),
    "shape of nothing": (["--input", ""], 2, "write a shape of whole numbers"),
    "side of 0": (["--input", "0,4,6,6"], 2, "write a shape of whole numbers above 0"),
    "unknown dtype": (["--input", "2,4,6,6:int99"], 2, "there is no dtype 'int99'"),
    "weight below 0": (["--input", "2,4,6,6@-1"], 2, "the weight after @ must be a positive number"),
    "unknown device": (["--device", "abacus"], 1, "device 'abacus' cannot be used here"),
    "missing weights": (["--weights", "gone.pt"], 1, "gone.pt: not readable weights"),
    "missing timings": (["--timings", "gone.json"], 1, "gone.json: no readable file of timings"),
    "output is a folder": (["-o", "."], 1, ". cannot be written: it is a folder"),
    "output in no folder": (["-o", "gone/plan.json"], 1, "gone/plan.json cannot be written: there is no folder gone"),
}


@pytest.mark.parametrize(("words", "code", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_one_line_and_changes_no_file(run, plan_file: Path, words: list[str], code: int, message: str) -> None:
    before = {path: path.read_bytes() for path in plan_file.parent.glob("*.*")}
    base = [] if "--input" in words else ["--input", "2,4,6,6"]
    goal = [] if "--ratio" in words else ["--ratio", "2"]
    rule = [] if "--rule" in words else ["--rule", "at-ratio"]
    output = [] if "-o" in words else ["-o", "plan.json"]
    assert message in run("plan", "small_nets:net", *base, *goal, *rule, *output, *words).complaint(code)
    assert {path: path.read_bytes() for path in plan_file.parent.glob("*.*")} == before


@pytest.mark.parametrize(
    ("model", "message"),
    {
        "resnet50": "names no network",
        "gone:net": "module gone cannot be imported",
        "small_nets:nett": "has no nett; did you mean net",
        "small_nets:on_gpu": "Found no NVIDIA driver",
    }.items(),
)
def test_an_unknown_model_is_one_line(run, model: str, message: str) -> None:
    assert message in run("plan", model, "--input", "1,4", "--ratio", "2", "-o", "plan.json").complaint(1)
    assert not Path("plan.json").exists()


def test_a_limit_on_the_whole_network_is_a_goal_and_several_hold_together(run) -> None:
    words = ("plan", "small_nets:net", "--input", "2,4,6,6", "--no-never-slower", "--json")
    goal = run(*words, "--macs", "1e9", "--speedup", "1.01", "--parameters", "1e9").json["goal"]
    assert goal == {
        "goal": "within",
        "limits": [{"goal": "speedup", "value": 1.01}, {"goal": "macs", "value": 1e9}, {"goal": "parameters", "value": 1e9}],
    }
    assert run(*words, "--milliseconds", "1000").json["goal"] == {"goal": "milliseconds", "value": 1000}


@pytest.mark.parametrize("words", [(), ("--speedup", "2", "--ratio", "2")], ids=["nothing", "both"])
def test_what_is_wanted_must_be_said_once(run, words: tuple[str, ...]) -> None:
    ran = run("plan", "small_nets:net", "--input", "2,4,6,6", *words)
    assert ran.code == 2 and "--speedup, --milliseconds, --macs, --parameters, or alone --drop or --ratio" in ran.err


def test_a_rule_belongs_to_a_ratio(run) -> None:
    ran = run("plan", "small_nets:net", "--input", "2,4,6,6", "--speedup", "2", "--rule", "plateau")
    assert ran.code == 1 and "a budget takes neither" in ran.err


def test_what_compiled_libraries_print_stays_out_of_the_result(run, here: Path) -> None:
    (here / "loud_nets.py").write_text(
        "import ctypes, os\nfrom small_nets import net as quiet\n"
        "def net():\n    ctypes.CDLL(None).puts(b'printed by C')\n    os.write(1, b'written by hand')\n    return quiet()\n"
    )
    command = [sys.executable, "-m", "lamina", "plan", "loud_nets:net", *UNTIMED[2:], "--json"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["goal"] == {"goal": "ratio", "value": 2}
    assert "printed by C" in done.stderr and "written by hand" in done.stderr


def test_a_plan_is_made_for_the_freezing_under_which_the_network_is_trained(run) -> None:
    words = ("plan", "small_nets:net", "--input", "2,4,6,6", "--ratio", "2", "--no-never-slower", "--json", "--include", "2")
    plan = run(*words, "--mode", "training", "--freezing", "sequential").json
    assert plan["mode"] == "training" and plan["freezing"]["freezing"] == "sequential"
    ran = run(*words, "--freezing", "vanilla")
    assert ran.code == 2 and "--freezing is for --mode training" in ran.err
