"""What a runtime is: it prepares a network and an example once, and then runs them, as often as it is asked to.

A new one is one file in this room, with a class that prepares; whoever times or compares asks for nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import LaminaError
from ..network.memory import devices_of
from ..network.running import run
from ..values import Mode, Setting, Training, Workload


@final
@dataclass(frozen=True, slots=True)
class Prepared:
    """A network and an example, made ready.

    Attributes:
        run: One run. What it returns is the runtime's own, and may be overwritten by the next run.
        answers: One run, and the tensors that the network answers, in the order in which they stand in its output.
    """

    run: Callable[[], Any]
    answers: Callable[[], list[Tensor]]


class Runtime(ABC):
    """How a network is run. Values that compare equal run it alike."""

    @property
    def eager(self) -> bool:
        """Whether the network itself runs, module by module, so that these can be looked at, and weights moved, meanwhile."""
        return False

    def __str__(self) -> str:
        """As it stands in a message: name, version and precision."""
        return self.label

    @property
    @abstractmethod
    def label(self) -> str:
        """Everything of it that decides how long a network takes, but the machine and the number of threads."""

    @abstractmethod
    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        """Make a network ready for an example. It is in eval mode, and only read.

        Raises:
            LaminaError: It cannot be run here; the message says what is missing.
            MissingExtra: The runtime is not installed.
        """

    def prepare_layer(self, module: nn.Module, x: Tensor) -> Prepared:
        """Make a single layer ready, as a network of its own: a plain one, or a stack of factors."""
        return self.prepare(module, Workload(x))

    def neighbours(self, x: Tensor) -> Prepared | None:
        """What stands around a convolution in `prepare_layer`, where a map like this is read or written; None: nothing does."""
        return None

    def check(self, models: Sequence[nn.Module], mode: Mode) -> None:
        """Make sure that networks can be timed in it.

        Raises:
            LaminaError: They cannot, and why.
            MissingExtra: It is not installed.
        """
        named = self.label  # which asks for its version, and so whether it is there
        if isinstance(mode, Training):
            raise LaminaError(f"{named} runs no training step: time it with lamina.Eager(), or use lamina.Inference()")
        if device := next((device for device in devices_of(*models) if device.type not in self.devices), None):
            raise LaminaError(
                f"the network is on {device}, and {self} runs on {' or '.join(self.devices)}: move it there first"
            )

    @property
    def exact(self) -> bool:
        """Whether what it answers differs from eager PyTorch by rounding alone: it computes in the network's own precision."""
        return True

    def roughly(self) -> Runtime:
        """One in which networks take as long, made ready more quickly; what they answer does not matter then."""
        return self

    @property
    def devices(self) -> tuple[str, ...]:
        """The types of devices on which a network may lie."""
        return ("cpu",)

    @property
    def own_threads(self) -> int | None:
        """How many threads it was told to use; None: as many as torch does."""
        return None

    def within(self, setting: Setting) -> Setting:
        """The conditions of a timing in it."""
        return dataclasses.replace(setting, runtime=self.label, threads=self.own_threads or setting.threads)


@final
class Once(Runtime):
    """A runtime that prepares each network for each example once, as long as both live."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._kept: dict[tuple[int, int], tuple[nn.Module, Workload, Prepared]] = {}

    @property
    def eager(self) -> bool:
        """As the runtime says."""
        return self.runtime.eager

    @property
    def label(self) -> str:
        """The runtime's."""
        return self.runtime.label

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        """What the runtime made of them the first time; a network that does not run on the example is found out before.

        Raises:
            ExampleError: It does not.
        """
        key = id(model), id(workload)
        if key not in self._kept:
            if not self.eager:
                run(model, workload)
            self._kept[key] = model, workload, self.runtime.prepare(model, workload)
        return self._kept[key][2]

    def forget(self, model: nn.Module) -> None:
        """Let go of what was prepared of a network."""
        self._kept = {key: kept for key, kept in self._kept.items() if kept[0] is not model}


def checked_runtime(runtime: Any) -> Runtime | None:
    """A ``runtime`` argument.

    Raises:
        LaminaError: It is none.
    """
    if runtime is not None and not isinstance(runtime, Runtime):
        choices = "lamina.Eager(), Compiled(), OnnxRuntime(), OpenVINO(), ExecuTorch() or TensorRT()"
        raise LaminaError(f"runtime is {runtime!r}; give {choices}")
    return runtime


def versions_of(*packages: str) -> str:
    """``onnx 1.23.2, onnxscript 0.7.2``: those of some packages that are installed."""
    return ", ".join(f"{package} {version}" for package in packages if (version := _version(package)))


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@contextmanager
def quietly(*loggers: str) -> Iterator[None]:
    """What other libraries print, log and warn of as they work is not the user's: their errors are raised."""
    levels = [(logger := logging.getLogger(name or None), logger.level) for name in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in what a network answers, in their order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def checked_threads(threads: Any) -> None:
    """Make sure that it is a number of threads, or None.

    Raises:
        LaminaError: It is something else.
    """
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise LaminaError(f"threads is {threads!r}; give a whole number above 0, or None for as many as torch uses")
