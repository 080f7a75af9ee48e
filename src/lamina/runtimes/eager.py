"""Eager PyTorch: the network as it is. And with batch norms folded into the convolutions before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from ..network.folding import folded
from ..network.program import exporting
from ..values import Mode, Training, Workload
from .runtime import Prepared, Runtime, tensors_in


@final
@dataclass(frozen=True)
class Eager(Runtime):
    """PyTorch, one operation after the other, on as many threads as torch is set to (`torch.set_num_threads`).

    Args:
        folded: Batch norms are folded into the convolutions that feed them, as every runtime for serving does, in both of two
            networks that are compared: what is gained then is the decomposition's alone. For inference.
    """

    folded: bool = False

    @property
    def eager(self) -> bool:
        """Unless norms are folded, which makes it another network."""
        return not self.folded

    @property
    def label(self) -> str:
        """``eager``, or ``eager, batch norms folded``."""
        return "eager, batch norms folded" if self.folded else "eager"

    def prepare(self, model: nn.Module, workload: Workload) -> Prepared:
        """The network itself, or one in which its batch norms are folded.

        Raises:
            LaminaError: It is to be folded, and cannot be exported, which tells what feeds what.
        """
        if self.folded:
            with exporting():
                model = folded(model, workload)
        return Prepared(lambda: workload.run(model), lambda: tensors_in(workload.run(model)))

    def prepare_layer(self, module: nn.Module, x: Tensor) -> Prepared:
        """The layer as it is: no norm stands behind it."""
        return Prepared(lambda: module(x), lambda: tensors_in(module(x)))

    def check(self, models: Sequence[nn.Module], mode: Mode) -> None:
        """Anything runs in it; batch norms are folded for inference alone."""
        if self.folded and isinstance(mode, Training):
            super().check(models, mode)


EAGER = Eager()
