"""What int8 needs: batches of a user's data in the shapes in which a network is exported, and what the processor adds up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError, ExampleError, LaminaError
from ..values import Workload, input_of


def checked_data(data: Any, what: str) -> None:
    """Make sure that these are data that can be iterated, or None.

    Raises:
        CalibrationError: They are something else, or a calibration, which keeps sums and no inputs.
    """
    if data is None:
        return
    if hasattr(data, "layers") and hasattr(data, "record"):
        raise CalibrationError(
            f"{what}: a lamina.Calibration keeps second moments and no inputs, and int8 is calibrated on inputs: give the data "
            "that the calibration was made on"
        )
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise CalibrationError(f"{what} is a {type(data).__name__}; give batches of unlabelled inputs, as to lamina.calibrate")


def batches_like(data: Iterable[Any], workload: Workload, most: int) -> Iterator[list[Tensor]]:
    """Items of some data, batched anew in the shapes of an example: the tensors of one run at a time.

    Args:
        data: Batches of any size, with targets or without.
        workload: The example; the first side of each of its tensors is the batch, unless it is the same in every item.
        most: So many batches at most.

    Raises:
        CalibrationError: The data do not fit the example, or hold too few items for one batch.
    """
    wanted = [tuple(tensor.shape) for tensor in workload.tensors]
    size = wanted[0][0] if wanted and wanted[0] else 1
    held: list[list[Tensor]] = [[] for _ in wanted]
    given = 0
    for item in data:
        try:
            tensors = input_of(item).tensors
        except ExampleError as error:
            raise CalibrationError(str(error)) from error
        if [t.shape[1:] for t in tensors] != [torch.Size(shape[1:]) for shape in wanted]:
            shapes = ", ".join("×".join(map(str, t.shape)) for t in tensors)
            raise CalibrationError(
                f"an item of the data is {shapes or 'no tensor'}, the example {workload}: only their batch may differ"
            )
        for kept, tensor, like in zip(held, tensors, workload.tensors, strict=True):
            kept.append(tensor.detach().to(like.device, like.dtype))
        while sum(len(t) for t in held[0]) >= size:
            joined = [torch.cat(kept) for kept in held]
            yield [each[:size] for each in joined]
            held = [[each[size:]] for each in joined]
            given += 1
            if given == most:
                return
    if not given:
        number = sum(len(t) for t in held[0]) if held else 0
        raise CalibrationError(f"the data hold {number} items, fewer than one batch of the example ({workload})")


def first_of(data: Any) -> list[Any]:
    """The first item, where there is one.

    Raises:
        LaminaError: There is none.
    """
    for item in data:
        return [item]
    raise LaminaError("the data are empty")


@cache
def runs_over() -> bool:
    """Whether products of int8 are added up in 16 bits, as on x86 processors without VNNI: weights then need a bit less."""
    flags = re.search(r"^flags\s*:(.*)$", _cpuinfo(), re.M)
    return flags is not None and not {"avx512_vnni", "avx_vnni"} & set(flags[1].split())


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""
