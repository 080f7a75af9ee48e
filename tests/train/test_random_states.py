"""Random states: what was taken is set again, on every kind of device."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lamina.train.random_states import Apart, random_states, set_random_states

CPU = torch.device("cpu")


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(1))


def test_what_follows_draws_the_same_numbers_again() -> None:
    states = random_states(CPU)
    first = draws()
    set_random_states(states, CPU)
    assert draws() == first
    assert draws() != first


def test_a_stream_apart_is_moved_by_what_is_drawn_in_it_alone_and_follows_from_its_seed() -> None:
    states = random_states(CPU)
    undisturbed = [draws(), draws()]
    set_random_states(states, CPU)
    found, stream = [], Apart(3, 1)
    for wanted in undisturbed:
        with stream:
            found.append(draws())
        assert draws() == wanted
    other, again = Apart(3, 2), Apart(3, 1)
    with again:
        assert [draws(), draws()] == found
    with other:
        assert draws() not in found


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_state_of_an_accelerator_is_taken_and_set_and_one_of_another_kind_left_out(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerators that are not there: their states are tensors here."""
    device, state = torch.device(kind, 1), torch.zeros(16, dtype=torch.uint8)
    module = torch.get_device_module(kind)
    monkeypatch.setattr(module, "get_rng_state", lambda asked: state.clone() if asked == device else None)
    monkeypatch.setattr(module, "set_rng_state", lambda new, asked: state.copy_(new) if asked == device else None)
    states = random_states(device)
    state += 5
    set_random_states(states, device)
    assert not state.any()
    state += 7
    set_random_states(states | {"device": torch.zeros(44, dtype=torch.uint8)}, device)
    set_random_states(random_states(CPU), device)
    assert bool((state == 7).all())
    set_random_states(states, device)
    assert not state.any()
