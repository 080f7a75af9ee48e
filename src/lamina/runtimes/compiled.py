"""``torch.compile``, by Inductor."""

from __future__ import annotations

import os
import shlex
import subprocess
import types
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, final

import torch
from torch import nn

from ..errors import LaminaError
from ..network.program import exporting
from ..network.running import said
from ..values import Workload
from .runtime import Prepared, Runtime, tensors_in, versions_of

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@final
@dataclass(frozen=True)
class Compiled(Runtime):
    """``torch.compile`` with Inductor, for inference, on the CPU (with a C++ compiler present) or a GPU.

    It runs on as many threads as torch is set to (`torch.set_num_threads`).

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

    def __str__(self) -> str:
        """``torch.compile default, frozen weights``; torch's version stands elsewhere."""
        return f"torch.compile {self.mode}" + (", frozen weights" if self.freezing else "")

    @property
    def label(self) -> str:
        """The same with what compiles it: the C++ compiler, Triton, and every setting of Inductor that is not as it comes."""
        return ", ".join(filter(None, [str(self), _compiler(), versions_of("triton"), *_settings(), *_variables()]))

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
            # What reads the network's code asks the configuration, and not the options, whether weights are to be constants.
            freezing = torch._inductor.config.patch(freezing=self.freezing)
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), freezing:
                for _ in range(2):  # graphs are captured in the second run
                    run()
        except Exception as error:  # the compiler, and a user's network in it, may raise anything
            raise LaminaError(f"torch.compile does not run it: {said(error)}") from error
        return Prepared(run, lambda: [each.clone() for each in tensors_in(run())])


@cache
def _compiler() -> str:
    """The first line that the C++ compiler says of itself; nothing where there is none."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        words = [*shlex.split(get_cpp_compiler()), "--version"]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except Exception:  # Inductor has errors of its own; what is missing is said where it is needed
        return ""
    return told.strip().partition("\n")[0]


def _settings() -> list[str]:
    """What was set in Inductor's configuration, such as ``max_autotune = True``; what decides no code is left out."""
    from torch._inductor import config

    ignored = tuple(getattr(config, "_cache_config_ignore_prefix", ()))
    lines = (line.partition(f"{config.__name__}.") for line in config.codegen_config().splitlines())
    return sorted(line for before, _, line in lines if not before and not line.startswith(ignored) and not _as_it_comes(line))


def _as_it_comes(line: str) -> bool:
    """Whether a setting has its first value again: what was set and set back, as in every compilation, is told as well."""
    from torch._inductor import config

    name, _, value = line.partition(" = ")
    entry = getattr(config, "_config", {}).get(name)
    return entry is not None and repr(entry.default) == value


def _variables() -> list[str]:
    """The environment that Inductor reads as it is loaded."""
    return [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(_PREFIX) and name not in _ASIDE]


_PREFIX = "TORCHINDUCTOR_"
_ASIDE = {"TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"}
"""Where compiled code is kept, which torch sets itself, and how many processes compile it."""


def _called(*args: Any, _network: Any = None, **kwargs: Any) -> Any:
    return _network(*args, **kwargs)
