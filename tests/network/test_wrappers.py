"""What a network is called inside wrappers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lamina.network.wrappers import plain, unwrapped


def distributed(model: nn.Module) -> nn.Module:
    """DDP without a group of processes: nothing but the module that it wraps."""
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


WRAP: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "DataParallel": DataParallel,
    "DDP": distributed,
    "torch.compile": lambda model: torch.compile(model),  # type: ignore[return-value]
    "DDP of torch.compile": lambda model: distributed(torch.compile(model)),  # type: ignore[arg-type]
    "torch.compile of DataParallel": lambda model: torch.compile(DataParallel(model)),  # type: ignore[return-value]
}


@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)
def test_the_network_itself_is_found_in_any_number_of_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Linear(2, 2)
    assert unwrapped(wrap(model)) is model


def test_a_network_that_holds_another_as_its_module_is_no_wrapper() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self._orig_mod = nn.Linear(2, 2), nn.Linear(2, 2)

    class OptimizedModule(Mine):
        """Of the compiler's name, and none of its."""

    for model in (Mine(), OptimizedModule()):
        assert unwrapped(model) is model


NAMES = {
    "": "",
    "a.b": "a.b",
    "_orig_mod": "",
    "_orig_mod.a.b": "a.b",
    "a._fsdp_wrapped_module.b": "a.b",
    "a._checkpoint_wrapped_module": "a",
    "_orig_mod.a._fsdp_wrapped_module._checkpoint_wrapped_module.b": "a.b",
    "a_orig_mod.module": "a_orig_mod.module",
}


@pytest.mark.parametrize(("name", "wanted"), NAMES.items())
def test_names_are_those_without_wrappers(name: str, wanted: str) -> None:
    assert plain(name) == wanted
