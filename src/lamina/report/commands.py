"""The commands that make the same again on this machine, in the shell; what a plan does not record stands in capitals."""

from __future__ import annotations

import shlex

from ..examples import ExampleShape, TensorShape
from ..goals import Ratio, limits_in
from .evidence import Evidence

MODEL, SHAPE, FOLDER, SCORE, DATA, RUNTIME = "MODEL", "SHAPE", "CALIBRATION", "PACKAGE:SCORE", "PACKAGE:DATA", "RUNTIME"
_FLOAT = "float32"


def commands(evidence: Evidence) -> list[str]:
    """From the network to a saved one, and the comparison of both."""
    plan, model = evidence.plan, shlex.quote(evidence.model) if evidence.model else MODEL
    inputs = " ".join(f"--input {_input(each)}" for each in plan.examples) if plan.examples else f"--input {SHAPE}"
    how = [inputs]
    if plan.setting:
        how += [f"--threads {plan.setting.threads}"] if plan.setting.device == "cpu" else [f"--device {plan.setting.device}"]
        how += ["--channels-last"] if plan.setting.memory_format != "contiguous" else []
        how += ["--autocast"] if plan.setting.autocast != "off" else []
    timed = [f"--runtime {RUNTIME}"] if plan.setting and plan.setting.runtime != "eager" else []
    if plan.mode == "training":
        timed += ["--mode training", *([f"--freezing {plan.freezing.freezing}"] if plan.freezing else [])]
    asked = [f"--{each.goal} {each.value:.6g}" for each in limits_in(plan.goal)]
    if isinstance(plan.goal, Ratio) and (rule := _rule(plan.rule)) != "plateau":
        asked.append(f"--rule {rule}")
    data = [f"--calibration {FOLDER}"] if plan.factors.calibration else []
    made = [f"lamina calibrate {model} --data {DATA} -o {FOLDER}"] if data else []
    scored = [f"--score {SCORE}"] if plan.scores else []
    return [
        *made,
        " ".join(["lamina plan", model, *how, *asked, *timed, *data, *scored, "-o plan.json"]),
        " ".join(["lamina apply", model, "plan.json", *data, "-o out/"]),
        " ".join(["lamina bench", model, "out/", *how, *timed]),
    ]


def _input(example: ExampleShape) -> str:
    """As ``--input`` has it, where it can be told so."""
    tensors = [each for each in example.args if isinstance(each, TensorShape)]
    if example.kwargs or len(tensors) != len(example.args):
        return SHAPE
    told = ";".join(",".join(map(str, t.shape)) + ("" if t.dtype == _FLOAT else f":{t.dtype}") for t in tensors)
    return shlex.quote(told if example.weight == 1 else f"{told}@{example.weight:g}")


def _rule(text: str) -> str:
    """``AtRatio()`` as the command line has it: ``at-ratio``."""
    name = text.partition("(")[0]
    return "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("-")
