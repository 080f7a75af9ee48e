"""Options shared by commands: what `--input` may say, and how a network is made ready."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer

from lamina import AtRatio, Energy, Evbmf, LaminaError, LargestStep, Plateau
from lamina.choose.rules import Rule
from lamina.cli.command import app
from lamina.cli.options import Conditions, DtypeName, Input, parse_input, parse_rule

READ = {
    "8,3,224,224": Input((((8, 3, 224, 224), None),)),
    "7": Input((((7,), None),)),
    "2,9:int64": Input((((2, 9), "int64"),)),
    "2,9:int64;2,9:bool;1": Input((((2, 9), "int64"), ((2, 9), "bool"), ((1,), None))),
    "8,3@0.5": Input((((8, 3), None),), 0.5),
    "2,9:int64;4@2": Input((((2, 9), "int64"), ((4,), None)), 2.0),
}


@pytest.mark.parametrize(("text", "expected"), READ.items(), ids=READ)
def test_an_input_is_read(text: str, expected: Input) -> None:
    assert parse_input(text) == expected


SHAPES = ["", "x", "1,,2", "1.5,2", "-1,2", "0", "1,2;", ";1"]
DTYPES = ["1:float31", "1:nn", "1:"]
WEIGHTS = ["1@", "1@x", "1@0", "1@nan", "1@inf", "1@2@3"]


@pytest.mark.parametrize("text", [*SHAPES, *DTYPES, *WEIGHTS])
def test_anything_else_is_wrong_use_and_repeated_as_typed(text: str) -> None:
    with pytest.raises(typer.BadParameter) as error:
        parse_input(text)
    assert repr(text) in str(error.value)


RULES: dict[str, Rule] = {
    "plateau": Plateau(),
    "plateau:0.1": Plateau(0.1),
    "largest-step": LargestStep(),
    "at-ratio": AtRatio(),
    "energy": Energy(),
    "energy:0.95": Energy(0.95),
    "evbmf:0.2": Evbmf(0.2),
}


@pytest.mark.parametrize(("text", "expected"), RULES.items(), ids=RULES)
def test_a_rule_is_read(text: str, expected: Rule) -> None:
    assert parse_rule(text) == expected


@pytest.mark.parametrize(
    "text", ["", "best", "Energy", "energy:", "energy:x", "energy:2", "energy:0.9:1", "at-ratio:2", ":0.9"]
)
def test_no_other_rule_is_read(text: str) -> None:
    with pytest.raises(typer.BadParameter) as error:
        parse_rule(text)
    assert repr(text) in str(error.value)


def test_inputs_take_the_networks_dtype_and_layout_where_none_is_named(here) -> None:
    conditions = Conditions(dtype=DtypeName.float64, channels_last=True)
    model = conditions.load("small_nets:net")
    assert model[0].weight.dtype == torch.float64
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last) and not model[0].weight.is_contiguous()
    floats, whole = conditions.examples([parse_input("2,4,6,6@3"), parse_input("2,9:int64;2,9:bool")], model)
    (x,) = floats.args
    assert x.dtype == torch.float64 and x.is_contiguous(memory_format=torch.channels_last) and floats.weight == 3
    assert [t.dtype for t in whole.args] == [torch.int64, torch.bool] and not whole.args[0].any()


def test_threads_and_autocast_are_put_back_also_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), Conditions(threads=2).applied(autocast=True):
        assert torch.get_num_threads() == 2 and torch.is_autocast_enabled("cpu")
        raise ZeroDivisionError
    assert torch.get_num_threads() == 1 and not torch.is_autocast_enabled("cpu")


def outputs() -> list[tuple[str, str, str]]:
    """Of every command what it writes: the command, the option, and whether that is a file, a folder or one of both."""
    named = {"--output", "--plot", "--checkpoints", "--track"}
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = [(command, option) for command, each in commands.items() for option in getattr(each, "params", ())]
    return [(command, option.opts[0], option.metavar) for command, option in found if named & set(option.opts)]


OUTPUTS = outputs()
WRITERS = {"apply", "bench", "calibrate", "export", "extract", "finetune", "measure", "pareto", "plan", "refine", "report"}


def test_every_command_that_writes_is_among_those_that_are_tried() -> None:
    assert {command for command, *_ in OUTPUTS} == WRITERS | {"search", "staircase", "supernet", "train"}
    assert {("pareto", "--output", "FOLDER"), ("pareto", "--plot", "FILE"), ("train", "--track", "FOLDER")} <= set(OUTPUTS)


@pytest.mark.parametrize(("command", "option", "kind"), OUTPUTS)
def test_what_cannot_be_written_is_refused_before_anything_else_is_looked_at(
    run, here: Path, command: str, option: str, kind: str
) -> None:
    (here / "file").touch()
    refused = {
        "-": f"- cannot be written: name a {kind.lower()}; on stdout --json prints the result",
        "file": {"FOLDER": "file cannot be written: it is a file"}.get(kind),
        ".": {"FILE": ". cannot be written: it is a folder"}.get(kind),
        "gone/file": {"FILE": "gone/file cannot be written: there is no folder gone"}.get(kind),
        "file/inside": {"FOLDER": f"file/inside cannot be written: {here / 'file'} is a file"}.get(kind),
    }
    for path, says in refused.items():
        if says:
            assert run(command, option, path).complaint(1) == f"error: {says}"
    assert sorted(path.name for path in here.iterdir()) == ["file", "small_nets.py"]


def test_of_many_processes_the_first_one_looks_whether_it_can_write(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("train", "-o", "small_nets.py").complaint(2).startswith("lamina train: Missing argument")


def test_a_gpu_that_is_not_there_is_said_in_a_line(here) -> None:
    with pytest.raises(LaminaError, match="device 'cuda:99' cannot be used here: ") as error:
        Conditions(device="cuda:99").load("small_nets:net")
    assert "\n" not in str(error.value)
