"""Ways of other libraries to save a network, which would write factors that nobody reads: refused aloud."""

from __future__ import annotations

from typing import Any, final

from torch import nn

from ..errors import LaminaError

_SAVING = ("save_pretrained", "push_to_hub")


@final
class Refused:
    """Stands in the place of a method of a decomposed network."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any, **__: Any) -> None:
        """Say what to do instead.

        Raises:
            LaminaError: Always.
        """
        raise LaminaError(
            f"{self.name} would write factors that from_pretrained does not read: what it makes of them is another network. "
            "lamina.save and lamina.load keep a decomposed network; lamina.merge makes a dense one, which it may save"
        )


def refuse_saving(model: nn.Module) -> None:
    """Let a network refuse what would lose its factors, where its class has such methods."""
    vars(model).update({name: Refused(name) for name in _SAVING if hasattr(type(model), name)})


def allow_saving(model: nn.Module) -> None:
    """Let a network's own methods stand again."""
    for name in _SAVING:
        if isinstance(vars(model).get(name), Refused):
            del vars(model)[name]
