"""Many processes: what they tell each other, how a network is wrapped for them, and tensors that are spread over them.

Accelerate (or the user's own script) sets the processes up. All of this works in a single process too, where it does nothing.

What fails in one process is handed round where all meet anyway: when everything is set up, before and after the forward of a
batch, around a score and a checkpoint. Then all end with the same words, and nobody waits for one that has given up. Inside a
backward, or a forward of sharded layers, nothing can be handed round: there the others end when the process that failed ends.

DDP settles at wrapping which parameters it waits for. A freezing phase changes that set, so a network is wrapped *anew* in
every phase; changing ``requires_grad`` under an old wrapper hangs or aborts now and then. FSDP2 (``fully_shard``) needs no
such thing: it reads ``requires_grad`` whenever it gathers a parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LaminaError, MissingExtra, TrainingError
from ..network.running import said
from ..plan import Plan


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def from_first(value: Any) -> Any:
    """The value that process 0 passed, in every process."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def from_each(value: Any) -> list[Any]:
    """What every process passed, in the order of their numbers."""
    if processes() == 1:
        return [value]
    values: list[Any] = [None] * processes()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together(count: int = 0) -> Iterator[list[float]]:
    """What fails inside in one process fails in all. Nothing inside may wait for another process.

    Yields so many numbers, which are set inside; afterwards each is its sum over all processes.

    Raises:
        LaminaError: The failure of the first process that has one, in all in the same words; or a process is gone.
    """
    numbers = [0.0] * count
    if processes() == 1:
        yield numbers
        return
    from accelerate import PartialState

    failure: Exception | None = None
    try:
        yield numbers
    except Exception as error:
        failure = error
    try:
        box = torch.tensor([float(failure is not None), *numbers], dtype=torch.float64, device=PartialState().device)
        dist.all_reduce(box)
        failed, *sums = box.tolist()
        if failed:
            _raise_alike(failure)
        numbers[:] = sums
    finally:
        failure = None  # its traceback knows this frame: together they would keep the network alive


def _raise_alike(failure: Exception | None) -> None:
    mine: tuple[type[LaminaError], str] | None = None
    if failure is not None:
        # A class of ours says what the user may catch; the constructor of this one takes no message.
        ours = isinstance(failure, LaminaError) and not isinstance(failure, MissingExtra)
        mine = (type(failure) if ours else TrainingError, str(failure) if ours else said(failure))  # type: ignore[assignment]
    told = from_each(mine)
    number, (kind, text) = next((n, one) for n, one in enumerate(told) if one is not None)
    alike = all(one == told[0] for one in told)
    raise kind(text if alike else f"process {number}: {text}") from (failure and (failure.__cause__ or failure))


@contextmanager
def in_touch() -> Iterator[None]:
    """Where a message to another process fails, say so in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what all of torch's backends raise
        if processes() == 1:
            raise
        raise TrainingError(
            f"the processes have lost each other, one of them has ended and says why itself ({said(error)})"
        ) from error


def agreed(make: Callable[[], Plan]) -> Plan:
    """A plan made once, by process 0, and handed to all: ranks chosen by measured time would differ from process to process.

        >>> plan = agreed(lambda: lamina.make_plan(model, example, lamina.Ratio(2.0)))

    The others wait meanwhile, so that they do not disturb the clock.

    Raises:
        LaminaError: Process 0 could not make it; every process then says why.
    """
    plan: Plan | None = None
    with together():
        if rank() == 0:
            plan = make()
    made: Plan = from_first(plan)
    return made


def sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over the processes (FSDP2, tensor parallelism).

    Raises:
        TrainingError: Some of what trains is and some is not: the processes would drift apart in the rest.
    """
    spread = {name: is_spread(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(set(spread.values())) > 1:
        one, other = (next(name for name, is_so in spread.items() if is_so is wanted) for wanted in (True, False))
        raise TrainingError(
            f"{one} is sharded and {other} is not: shard the whole network, fully_shard(model), or nothing of it"
        )
    return any(spread.values())


def is_spread(tensor: Any) -> bool:
    """Whether a tensor is spread over the processes (a DTensor)."""
    return getattr(tensor, "full_tensor", None) is not None


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its values, on every process; one that is not spread is returned as it is."""
    return tensor.full_tensor().detach() if is_spread(tensor) else tensor.detach()  # type: ignore[attr-defined]


# A step sends them itself (`share_buffers`): in a forward nobody waits for another. Older PyTorch has another name for it.
_OPTIONS = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False}


def wrapped(model: nn.Module, earlier: nn.Module | None, *, find_unused_parameters: bool = False) -> nn.Module:
    """The network as a step must call it: in several processes a new DDP around the same module, unless it is sharded.

    Args:
        model: The bare network, with the ``requires_grad`` of the phase that begins.
        earlier: What this returned for the phase before. Its hooks are taken off the parameters; it must not be used again.
        find_unused_parameters: For DDP: not every parameter takes part in every step.
    """
    if isinstance(earlier, nn.parallel.DistributedDataParallel):
        # The old reducer would go on counting gradients of parameters it no longer gets, and abort.
        earlier._remove_autograd_hooks()  # type: ignore[no-untyped-call]
    if processes() == 1 or sharded(model):
        return model
    dist.barrier()
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
        **_NO_BUFFERS,
    )


@contextmanager
def unsynchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """For all but the last backward of a step: gradients are summed here, and not yet exchanged."""
    sync: Callable[[bool], Any] | None = getattr(model, "set_requires_gradient_sync", None)  # FSDP2's
    if last or processes() == 1:
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    elif sync is not None:
        sync(False)
        try:
            yield
        finally:
            sync(True)
    else:
        yield


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of process 0: running statistics are those of each process's own part of the batches."""
    if processes() > 1:
        copies = copied(buffer for buffer in model.buffers() if not is_spread(buffer))
        for _, values in copies:
            dist.broadcast(values, 0)
        put_back(copies)


Copies = list[tuple[list[Tensor], Tensor]]


@torch.no_grad()
def copied(tensors: Iterable[Tensor]) -> Copies:
    """What tensors hold, of all that are of one dtype and device in one tensor: one kernel copies it, one message sends it."""
    alike: dict[Any, list[Tensor]] = {}
    for tensor in map(own_part, tensors):
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return [(same, torch.cat([tensor.reshape(-1) for tensor in same])) for same in alike.values()]


@torch.no_grad()
def put_back(copies: Copies) -> None:
    """Let the tensors hold what was copied."""
    for tensors, values in copies:
        for tensor, part in zip(tensors, torch.split(values, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
