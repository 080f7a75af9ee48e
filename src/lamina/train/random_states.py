"""Random states: taken and set again, so that a training which goes on draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and of the device's own, as tensors and plain values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": (version, torch.tensor(words), gauss),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if generators := _generators(device):
        states["device"] = generators.get_rng_state(device)
    return states


def _generators(device: torch.device) -> Any:
    """What holds the random states of an accelerator; None of the CPU, whose state is torch's own."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") else None


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set what `random_states` took; a state of another kind of device is left out."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    generators = _generators(device)
    # Generators of other kinds have other states.
    if generators and "device" in states and states["device"].shape == generators.get_rng_state(device).shape:
        generators.set_rng_state(states["device"].cpu(), device)


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the random states are afterwards as they were."""
    before = random_states(device)
    try:
        yield
    finally:
        set_random_states(before, device)


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators alike, from 0 ≤ seed < 2⁶³."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
