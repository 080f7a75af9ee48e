"""``torch.compile``, by Inductor."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import nn

from ..errors import LaminaError
from ..network.program import exporting
from ..network.running import said
from ..values import Workload
from .runtime import Prepared, Runtime, tensors_in

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@final
@dataclass(frozen=True)
class Compiled(Runtime):
    """``torch.compile`` with Inductor, for inference, on the CPU (with a C++ compiler present) or a GPU.

    Args:
        mode: As `torch.compile` takes it. ``"reduce-overhead"`` captures graphs on a GPU.
        freezing: Weights become constants of what is compiled, so that batch norms are folded and weights laid out beforehand.
            For what is served; a network whose weights change afterwards must be compiled anew.

    Raises:
        LaminaError: An argument is none of these.
    """

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    freezing: bool = True

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise LaminaError(f"mode is {self.mode!r}; give one of {', '.join(map(repr, _MODES))}")

    @property
    def label(self) -> str:
        """``torch.compile default, frozen weights``; torch's version stands elsewhere."""
        return f"torch.compile {self.mode}" + (", frozen weights" if self.freezing else "")

    @property
    def devices(self) -> tuple[str, ...]:
        """A CPU or a CUDA GPU."""
        return ("cpu", "cuda")

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        """The network compiled for the shapes of the example.

        Raises:
            LaminaError: It cannot be compiled, or there is no compiler.
        """
        options = dict(torch._inductor.list_mode_options(self.mode)) | {"freezing": self.freezing}
        # A code object of its own: what is compiled is kept with the code, for eight networks of one class and no more.
        code = _called.__code__.replace()
        alone = types.FunctionType(code, globals(), "called")
        alone.__kwdefaults__ = {"_network": model}
        compiled = torch.compile(alone, options=options, dynamic=False)

        def run() -> Any:
            with exporting():
                return compiled(*workload.args, **workload.kwargs)

        try:
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                for _ in range(2):  # graphs are captured in the second run
                    run()
        except Exception as error:  # the compiler, and a user's network in it, may raise anything
            raise LaminaError(f"torch.compile does not run it: {said(error)}") from error
        return Prepared(run, lambda: [each.clone() for each in tensors_in(run())])


def _called(*args: Any, _network: Any = None, **kwargs: Any) -> Any:
    return _network(*args, **kwargs)
