"""Two real processes over gloo, each with half of the data, find what one does with all of them, and fail together."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import lamina

from ..processes import in_processes

SCRIPT = Path(__file__).with_name("together.py")

specification = importlib.util.spec_from_file_location("calibrating_together", SCRIPT)
assert specification is not None and specification.loader is not None
together = importlib.util.module_from_spec(specification)
specification.loader.exec_module(together)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    in_processes(2, SCRIPT, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "memory"), [("whole", 2e9), ("parted", 40_000)])
def test_two_processes_find_the_moments_of_all_data(scratch: Path, kind: str, memory: float) -> None:
    alone = lamina.calibrate(together.network(), together.data(), outputs=together.loss, memory=memory)
    both = [lamina.Calibration.load(scratch / f"{kind}.{rank}") for rank in (0, 1)]
    assert both[0].record.processes == 2 and both[0].record.passes == alone.record.passes
    assert both[0].identity == both[1].identity and (both[0].record.passes > 1) == (kind == "parted")
    for found in both:
        assert (found.samples, found.held_out) == (alone.samples, alone.held_out)
        for name, moments in alone.layers.items():
            other = found.layers[name]
            torch.testing.assert_close(other.inputs(), moments.inputs())
            assert other.damping == moments.damping
            torch.testing.assert_close(other.gradients(), moments.gradients())
            torch.testing.assert_close(other.mean(), moments.mean())
            assert other.input_error == pytest.approx(moments.input_error)
            assert other.gradient_error == pytest.approx(moments.gradient_error)


@pytest.mark.slow
def test_answers_that_are_drawn_lead_both_to_the_same_moments_curves_and_directions(scratch: Path) -> None:
    both = [lamina.Calibration.load(scratch / f"drawn.{rank}") for rank in (0, 1)]
    assert both[0].identity == both[1].identity and both[0].together == both[1].together
    for name, moments in both[0].layers.items():
        other = both[1].layers[name]
        assert moments.curve.points == other.curve.points != ()
        assert moments.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(tensor, other.tensors[what]) for what, tensor in moments.tensors.items())


@pytest.mark.slow
def test_along_directions_two_processes_find_the_sums_of_all_data(scratch: Path) -> None:
    found = lamina.Calibration.load(scratch / "drawn.0").layers["2"]
    p, K, eye = found.record.directions, found.geometry.taps, torch.eye(found.geometry.taps, dtype=torch.float64)
    whole = together.drawn(together.data(), memory=2e9).layers["2"]
    assert p > 0 and whole.taps == K
    E, H = torch.kron(found.tensors["directions"].view(p, -1), eye), whole.inputs() * 32
    W = together.wide()[2].weight.detach().flatten(1)
    torch.testing.assert_close(found.tensors["cross"].view(-1, p * K), W @ H @ E.T)


@pytest.mark.slow
def test_each_process_draws_answers_of_its_own(scratch: Path) -> None:
    """Both were given the same data: only then could equal answers be told."""
    both = lamina.Calibration.load(scratch / "same.0").layers
    for name, moments in together.drawn(together.data()[:8]).layers.items():
        torch.testing.assert_close(both[name].inputs(), moments.inputs())
        assert (both[name].gradients() - moments.gradients()).norm() > 0.01 * moments.gradients().norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        (
            "nan",
            "CalibrationError",
            "0: its inputs hold NaN or infinities in batch 5 of the data; leave that batch out, or skip the layer; "
            "in float16 try bfloat16 or float32",
        ),
        (
            "empty",
            "ExampleError",
            "the data hold no batch, so there is nothing to calibrate on: an iterator that was gone through is empty, "
            "so make it anew, or give a loader, a list or a tensor",
        ),
    ],
)
def test_what_fails_in_one_process_fails_in_both(scratch: Path, name: str, kind: str, text: str) -> None:
    assert (scratch / f"{name}.1").read_text() == text
    assert (scratch / f"{name}.0").read_text() == f"process 1 has failed: {kind}: {text}"
