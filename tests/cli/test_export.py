"""`lamina export`, and `--runtime` of the commands that time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

QUICK = ("--seconds", "0.02")
NET = ("--input", "2,4,6,6")


def answered(path: Path, x: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_a_saved_network_becomes_a_file_that_answers_what_it_answers(run: Any, saved: Path, here: Path) -> None:
    import small_nets

    import lamina

    said = run("export", "small_nets:net", saved, "-o", "model.onnx", "--dynamic-batch", *QUICK)
    assert said.code == 0 and "model.onnx: ONNX, opset" in said.out and "against the original" in said.out
    small, x = lamina.load(small_nets.net(), saved).eval(), torch.randn(5, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(answered(here / "model.onnx", x), small(x), rtol=1e-4, atol=1e-5)


def test_the_help_names_every_format(run: Any) -> None:
    said = " ".join(run("export", "--help").out.split())
    assert all(suffix in said for suffix in (".onnx", ".pt2", ".pte", "openvino"))


def test_an_original_that_cannot_be_exported_is_told_beside_the_file(
    run: Any, saved: Path, here: Path, monkeypatch: Any
) -> None:
    import lamina

    write = lamina.OnnxRuntime.onnx
    calls: list[int] = []

    def once(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise lamina.LaminaError("not this one")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(lamina.OnnxRuntime, "onnx", once)
    said = run("export", "small_nets:net", saved, "-o", "model.onnx", *QUICK)
    assert said.code == 0 and (here / "model.onnx").exists()
    assert "not timed against the original: exported alike, it fails: not this one" in said.out


def test_as_json_it_tells_format_runtime_and_times(run: Any, saved: Path) -> None:
    found = run("export", "small_nets:net", saved, "-o", "served", "--runtime", "openvino", *NET, *QUICK, "--json").json
    assert found["format"] == "OpenVINO" and found["runtime"].startswith("OpenVINO") and found["difference"] < 1e-4
    assert found["comparison"]["speedup"] > 0


def test_in_int8_by_a_function_of_the_users(run: Any, saved: Path, here: Path) -> None:
    (here / "images.py").write_text("import torch\ndef few():\n    return [torch.randn(4, 4, 6, 6) for _ in range(3)]\n")
    for runtime, path in (("onnxruntime", "int8.onnx"), ("openvino", "int8")):
        words = ("-o", path, "--runtime", runtime, "--int8", "images:few", *QUICK)
        assert "int8" in run("export", "small_nets:net", saved, *words).out
    assert "--int8 is for --runtime onnxruntime or openvino" in run(
        "export", "small_nets:net", saved, "-o", "a.pt2", "--runtime", "compile", "--int8", "images:few"
    ).complaint(2)


@pytest.mark.parametrize("words", [("-o", "model.bin"), ("-o", "no/model.onnx")], ids=" ".join)
def test_a_path_that_will_not_do_is_one_line(run: Any, saved: Path, words: tuple[str, ...]) -> None:
    assert run("export", "small_nets:net", saved, *words).complaint(1)


def test_plans_are_made_and_compared_in_the_runtime_that_is_named(run: Any, saved: Path) -> None:
    found = run("plan", "small_nets:net", *NET, "--ratio", "2", "--runtime", "onnxruntime", "--json").json
    assert found["setting"]["runtime"].startswith("ONNX Runtime")
    found = run("bench", "small_nets:net", saved, *NET, *QUICK, "--runtime", "folded", "--json").json
    assert found["setting"]["runtime"] == "eager, batch norms folded"
    assert "runs no training step" in run(
        "bench", "small_nets:net", saved, *NET, "--runtime", "openvino", "--mode", "training"
    ).complaint(1)


def test_verify_takes_a_network_to_the_targets_that_are_named(run: Any, saved: Path) -> None:
    said = run("verify", "small_nets:net", saved, *NET, "--export", "torch.export", "--export", "onnxruntime")
    assert said.code == 0 and "onnxruntime: it answers the same" in said.out
    assert "did you mean onnx" in run("verify", "small_nets:net", saved, *NET, "--export", "onxx").complaint(1)
