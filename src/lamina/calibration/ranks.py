"""Several processes: each runs on data of its own, and the sums are added up once, at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from ..errors import CalibrationError


def processes() -> int:
    """How many calibrate together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def added_up(tensors: Iterable[Tensor]) -> None:
    """Let each tensor become its sum over all processes."""
    if processes() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


@contextmanager
def together() -> Iterator[None]:
    """Work that fails in every process where it fails in one: nobody is left waiting for it.

    Raises:
        CalibrationError: Another process has failed.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # raised below, after the others have heard of it
        failure = error
    if processes() > 1:
        said: list[str | None] = [None] * processes()
        dist.all_gather_object(said, None if failure is None else f"{type(failure).__name__}: {failure}")
        other = next((f"process {number} has failed: {text}" for number, text in enumerate(said) if text), None)
        if failure is None and other is not None:
            raise CalibrationError(other)
    if failure is not None:
        raise failure
