"""Many processes: what they agree on, how a network is wrapped for them, and tensors that are spread over them.

Accelerate (or the user's own script) sets the processes up; here stands what one training needs of them. All of it also works
in a single process, where it does nothing.

DDP settles at wrapping which parameters it waits for. A freezing phase changes that set, so a network is wrapped *anew* in
every phase; changing ``requires_grad`` under an old wrapper hangs or aborts now and then. FSDP2 (``fully_shard``) needs no
such thing: it reads ``requires_grad`` whenever it gathers a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LaminaError, PlanError
from ..plan import Plan


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def wait_for_all() -> None:
    """Return once every process is here."""
    if processes() > 1:
        dist.barrier()


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


def mean(value: Tensor) -> Tensor:
    """The mean over all processes; no gradient flows through it."""
    if processes() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / processes()


def agreed(make: Callable[[], Plan]) -> Plan:
    """A plan made once, by process 0, and handed to all: ranks chosen by measured time would differ from process to process.

        >>> plan = agreed(lambda: lamina.make_plan(model, example, lamina.Ratio(2.0)))

    The others wait meanwhile, so that they do not disturb the clock.

    Raises:
        PlanError: Process 0 could not make it; every process then says why.
    """
    made: dict[str, str] = {}
    failure: BaseException | None = None
    if rank() == 0:
        try:
            made["plan"] = make().model_dump_json()
        except Exception as error:  # raised below, after the others have heard of it
            failure, made["error"] = error, f"{type(error).__name__}: {error}"
    made = from_first(made)
    if failure is not None:
        if isinstance(failure, LaminaError) or processes() == 1:
            raise failure
        raise PlanError(made["error"]) from failure
    if "error" in made:
        raise PlanError(f"process 0 could not make the plan: {made['error']}")
    return Plan.model_validate_json(made["plan"])


def sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over the processes (FSDP2, tensor parallelism)."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its values, on every process; one that is not spread is returned as it is."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


def spread_like(values: Tensor, like: Tensor) -> Tensor:
    """Values, the same on every process, laid out and spread as another tensor of that shape is."""
    if getattr(like, "full_tensor", None) is None:
        return torch.empty_like(like, dtype=values.dtype, requires_grad=False).copy_(values)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements)


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
    wait_for_all()
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=find_unused_parameters)


def unsynchronised(model: nn.Module) -> AbstractContextManager[Any]:
    """For all but the last backward of a step: gradients are summed here, and not yet exchanged."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    if processes() > 1 and callable(getattr(model, "set_requires_gradient_sync", None)):
        return _Unsynchronised(model)
    return nullcontext()


class _Unsynchronised:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self.model.set_requires_gradient_sync(True)


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of process 0: running statistics are those of each process's own part of the batches."""
    if processes() > 1 and not sharded(model):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
