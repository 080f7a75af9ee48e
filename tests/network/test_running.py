"""Modes, and what a network says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lamina.network.running import first_line, outside_inference_mode, said, set_mode


def ones(size: int, *, scale: float = 1.0) -> Tensor:
    """Some ones."""
    return torch.ones(size) * scale


def test_a_function_makes_ordinary_tensors_wherever_it_is_called_and_keeps_its_name() -> None:
    function = outside_inference_mode(ones)
    assert function.__name__ == "ones" and function.__doc__ == "Some ones."
    with torch.inference_mode():
        assert ones(2).is_inference()
        made = function(2, scale=3.0)
        assert torch.is_inference_mode_enabled()
    assert not made.is_inference() and made.tolist() == [3, 3] and function(1, scale=2.0).tolist() == [2]


@pytest.mark.parametrize("training", [False, True])
def test_a_mode_is_set_by_the_flags_alone(training: bool) -> None:
    class Own(nn.Sequential):
        def train(self, mode: bool = True) -> Own:
            raise AssertionError("it was called")

    model = Own(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    set_mode(model, training)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize(
    ("message", "line"), [("one\ntwo", "one"), ("\n  one \ntwo", "one "), ("", "no message"), (" \n ", "no message")]
)
def test_of_an_error_the_first_line_is_told(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line and said(ValueError(message)) == f"ValueError: {line}"
