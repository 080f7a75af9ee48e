"""What makes a factorisation a pure function: nothing that surrounds the call shows in its factors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def pure(factorise: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """The same function of a weight, bit for bit, whatever surrounds the call.

    Autocast would round to half precision within, gradients would be recorded, and the factors of a call in inference mode
    could never be trained. A default device or dtype is nothing that can be put aside here: no tensor may be made without its
    own.
    """

    @wraps(factorise)
    def alone(W: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as around:
            around.enter_context(torch.inference_mode(False))
            around.enter_context(torch.no_grad())
            for kind in sorted({"cpu", W.device.type}):
                if torch.amp.is_autocast_available(kind):
                    around.enter_context(torch.autocast(kind, enabled=False))
            return factorise(W, *args, **kwargs)

    return alone
