"""The benchmarks of runtimes, on a tiny network: what they change of factors keeps the function, and rows are told apart."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamina
from lamina.forms import BlockTerm, LowRank
from lamina.layers.decomposed import DecomposedLayer

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small(planned: Callable[..., lamina.Plan]) -> nn.Module:
    """A convolution of plain factors, one with groups in the middle, and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip
    forms = {"2": BlockTerm(8, 8), "4": BlockTerm(8, 8, 2), "8": LowRank(4)}
    return lamina.decompose(model, planned(model, X, forms))


def weights_of(model: nn.Module) -> list[Tensor]:
    stacks = (module for module in model.modules() if isinstance(module, DecomposedLayer))
    return [factor.weight.detach().clone() for stack in stacks for factor in stack.factors()]


@pytest.mark.parametrize("way", ["scales", "rotations"])
def test_other_factors_of_the_same_layers_keep_the_function(load: Any, small: nn.Module, way: str) -> None:
    gauge = load("gauge")
    with torch.no_grad():
        expected, before = small(X), weights_of(small)
        if way == "scales":
            gauge.balance(small, [lambda network: network(X)], share=0.5)
        else:
            gauge.rotate(small)
        torch.testing.assert_close(small(X), expected, rtol=1e-4, atol=1e-5)
    changed = [not torch.equal(old, new) for old, new in zip(before, weights_of(small), strict=True)]
    # The middle factor of "4" has groups: its channels can be scaled, and no rotation goes through it.
    assert changed == ([True] * 8 if way == "scales" else [True] * 3 + [False] * 3 + [True] * 2)


def test_a_served_network_answers_batch_by_batch_what_the_network_answers(load: Any, small: nn.Module) -> None:
    runtimes = load("runtimes")
    run = runtimes.served(runtimes.in_runtime(lamina.Eager()), small, X)
    with torch.inference_mode():
        for batch in (X.flip(0), X[1:3]):
            torch.testing.assert_close(run(batch), small(batch))


# ---- rows ----


@pytest.fixture
def runtimes(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load("runtimes")
    monkeypatch.setattr(module, "KEPT", tmp_path)
    return module


def asked(**options: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"part": "tiny", "runtime": None, "neighbours": None, "compile_ranks": False, "seconds": 0.02, "ratio": 2.0} | options
    )


def made() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval(), X


def test_a_row_that_fails_is_named_and_tried_again_and_one_that_stands_is_not(
    runtimes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def gained(model: nn.Module, x: Tensor, way: Any, *_: Any) -> list[str]:
        tried.append(str(way.chosen_by))
        if "ONNX" in tried[-1]:
            raise RuntimeError("no such | operator\nand more")
        return ["×1"] * 5 + ["0.80", "1 s", "2 of 2", "÷2", "÷2"]

    monkeypatch.setattr(runtimes, "gained", gained)
    monkeypatch.setattr(lamina, "make_plan", lambda *_, **__: None)
    page = runtimes.gains("tiny", made, asked(runtime=["eager", "onnxruntime"]))
    again = runtimes.gains("tiny", made, asked(runtime=["eager", "onnxruntime"]))
    assert [name.partition(" ")[0] for name in tried] == ["eager", "ONNX", "ONNX"] and page == again
    assert "| onnxruntime | failed: no such / operator |" in page
    assert "Whole times foretold within 10 % of the measured ones: 0 of 1; others: eager 0.80." in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert {row.count(" | ") for row in rows} == {len(runtimes.GAINS) - 1}


def test_rows_of_another_setting_or_revision_are_not_mixed_in(runtimes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(x: Tensor = X, **options: Any) -> Any:
        return runtimes.Rows("tiny", made()[0], x, asked(**options))

    rows().keep(["a", "1"])
    assert set(rows().found) == {"a"} and not rows(neighbours="none").found
    with monkeypatch.context() as patch:
        patch.setattr(runtimes, "revision", lambda: "another")
        assert not rows().found
    assert not runtimes.Rows("tiny", made()[0].double(), X.double(), asked()).found


@pytest.mark.parametrize("part", ["resnet50", "vit", "demo", "parity"])
def test_an_unknown_runtime_is_one_error_that_says_which_there_are(
    runtimes: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "resnet50_made", made)
    monkeypatch.setattr(runtimes, "vit_made", made)
    with pytest.raises(SystemExit, match=r"^--runtime: no abacus; "):
        runtimes.PARTS[part](asked(part=part, runtime=["abacus"]))


def test_ranks_are_chosen_for_the_compiler_where_that_is_asked_for(runtimes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "runs_here", lambda *_: True)
    assert "compile-ranks" not in runtimes.in_runtimes(X, asked())
    ways = runtimes.in_runtimes(X, asked(compile_ranks=True))
    assert isinstance(ways["compile-ranks"].chosen_by, lamina.Compiled) and ways["compile-ranks"].own
    assert ways["compile"].chosen_by == lamina.Eager() and not ways["compile"].own


@pytest.mark.parametrize("runtime", [lamina.OnnxRuntime(), lamina.OpenVINO()], ids=["ONNX Runtime", "OpenVINO"])
def test_layers_can_be_timed_alone(runtimes: Any, runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (runtimes.onnxruntime, runtimes.openvino):
        for name in ("layer_bytes", "neighbours_bytes"):
            monkeypatch.setattr(room, name, getattr(room, name))
    conv = nn.Conv2d(3, 16, 3).eval()
    assert runtime.neighbours(X) is not None
    runtimes.layers_alone()
    assert runtime.neighbours(X) is None
    with torch.no_grad():
        torch.testing.assert_close(runtime.prepare_layer(conv, X).answers()[0], conv(X), rtol=1e-4, atol=1e-5)


# ---- parity ----


def test_what_is_looked_at_are_networks_of_the_zoo(runtimes: Any) -> None:
    for package in ("torchvision", "timm", "transformers"):
        pytest.importorskip(package)
    assert set(runtimes.SMALL) <= set(runtimes.networks())


def test_networks_within_rounding_are_counted_and_all_others_named(runtimes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "torch a": {"dense": [1e-7, 1e-6], "layers": "2 of 2", "decomposed": [1e-7, 9e-5]},
        "torch b": {"dense": [1e-7, 1e-6], "layers": "2 of 2", "decomposed": [1e-7, 2e-4]},
        "torch c": {"error": "not done after 3 s"},
        "torch d": {"dense": [1e-7, "no operator"], "layers": "2 of 2", "decomposed": [1e-7, 1e-7]},
        "torch e": {"dense": [1e-7, 1e-7], "layers": "refused: odd"},
        "torch f": {"dense": [1e-7, 1e-7], "layers": "0 of 3", "decomposed": []},
    }
    monkeypatch.setattr(runtimes, "networks", lambda: dict.fromkeys([*found, "open_clip g"]))
    monkeypatch.setattr(runtimes, "apart", lambda script, arguments, seconds: found[arguments[2]])
    page = runtimes.parity(asked(part="parity", threads=1, limit=3.0))
    assert (
        "\n1 of 6 within 0.0001; others: torch b (decomposed, OpenVINO: 2.0e-04); torch c (not done after 3 s); torch d "
        "(dense, OpenVINO: no operator); torch e (not decomposed: refused: odd); torch f (not decomposed: 0 of 3).\n"
    ) in page
    assert "| torch a | 2 of 2 | 1.0e-07, 1.0e-06 | 1.0e-07, 9.0e-05 |" in page and "| torch c | – |  |  |" in page


def test_a_network_is_looked_at_in_both_runtimes(runtimes: Any) -> None:
    found = runtimes.looked_at("torch ConvTranspose2d")
    assert runtimes.exact(found) and found["layers"] == "4 of 4"
