"""`lamina calibrate`: a network and a function that gives unlabelled batches go in, a saved calibration comes out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer

import lamina
from lamina.cli.calibrate import parse_size

DATA = """
import torch

def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, 6, 6, generator=generator) for _ in range(5)]

def pairs():
    return [(x, torch.zeros(4)) for x in batches()]

def empty():
    return []

def total(output):
    return output.sin().sum()
"""


@pytest.fixture
def data(here: Path):
    (here / "my_images.py").write_text(DATA)
    yield "my_images:batches"
    sys.modules.pop("my_images", None)


def test_the_calibration_is_saved_and_told(run, here: Path, data: str) -> None:
    ran = run("calibrate", "small_nets:net", "--data", data, "--outputs", "categorical", "-o", "seen")
    assert ran.code == 0, ran.err
    found = lamina.Calibration.load(here / "seen")
    assert ran.out.startswith(str(found)) and "seen: " in ran.out and found.samples == 20
    sys.path.append(str(here))
    import small_nets

    found.check(small_nets.net())


def test_json_holds_the_record_and_options_reach_the_calibration(run, here: Path, data: str) -> None:
    words = ("--data", "my_images:pairs", "--loss", "my_images:total", "--memory", "60 kB", "--seed", "3", "--tolerance", "0")
    told = run("calibrate", "small_nets:net", *words, "--skip", "7", "-o", "seen", "--json").json
    record = told["calibration"]
    assert (told["folder"], record["seed"], record["tolerance"], record["outputs"]["name"]) == ("seen", 3, None, "total")
    assert "7" not in record["layers"] and record["layers"]["2"]["inputs"] == "channels"
    assert lamina.Calibration.load(here / "seen").record.seed == 3


WRONG = {
    "no such function": (("--data", "my_images:batchez"), 1, "has no batchez"),
    "nothing": (("--data", "my_images:empty"), 1, "hold no batch"),
    "a dimension of numbers": (("--data", "my_images:batches", "--dim", "1"), 2, "--dim says where the classes are"),
    "a size that is none": (("--data", "my_images:batches", "--memory", "much"), 2, "'much': write a number of bytes"),
    "too little": (("--data", "my_images:batches", "--memory", "1kB"), 1, "raise memory to"),
}


@pytest.mark.parametrize(("words", "code", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_one_line_and_nothing_is_saved(run, here: Path, data: str, words, code: int, message: str) -> None:
    assert message in run("calibrate", "small_nets:net", *words, "-o", "seen").complaint(code)
    assert not (here / "seen").exists()


@pytest.mark.parametrize(("text", "size"), [("2GB", 2e9), ("1.5 mb", 1.5e6), ("4096", 4096), ("7K", 7e3)])
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "2 GiB", "1e9", "2,5GB"])
def test_other_sizes_are_wrong_use(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)
