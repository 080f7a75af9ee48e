"""Random states: taken and set again, and streams of random numbers beside the training's."""

from __future__ import annotations

import random
from typing import Any, final

import numpy as np
import torch

from ..network.preserve import repeatable

_CPU = torch.device("cpu")


def random_states(device: torch.device = _CPU) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and of the device's own."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
    }
    if generators := _generators(device):
        states["device"] = generators.get_rng_state(device)
    return states


def _generators(device: torch.device) -> Any:
    """What holds the random states of an accelerator; None of the CPU, whose state is torch's own."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") else None


def set_random_states(states: dict[str, Any], device: torch.device = _CPU) -> None:
    """Set what `random_states` took; a state of another kind of device is left out."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    generators = _generators(device)
    # Generators of other kinds have other states.
    if generators and "device" in states and states["device"].shape == generators.get_rng_state(device).shape:
        generators.set_rng_state(states["device"].cpu(), device)


@final
class Apart:
    """A stream of random numbers beside the training's: what is drawn inside ``with`` moves this one alone.

    It concerns the generators of the CPU.

    Args:
        seed: Whole numbers, from 0. Streams of other numbers are other streams.
    """

    def __init__(self, *seed: int) -> None:
        with repeatable():
            seed_all(*seed)
            self.states = random_states()
        self._outside: dict[str, Any] = {}

    def __enter__(self) -> None:
        self._outside = random_states()
        set_random_states(self.states)

    def __exit__(self, *_: object) -> None:
        self.states = random_states()
        set_random_states(self._outside)


def seed_all(*seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators alike, from whole numbers, from 0; those of accelerators are left alone."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.default_generator.manual_seed(mixed)
