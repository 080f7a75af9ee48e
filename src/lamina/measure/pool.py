"""Random weights for timing: views into one pool, which is walked, so that every call finds its weights equally cold.

In a network the other layers' weights have passed through the caches since a layer last ran. Timed alone, a layer would find
its own still there, and how warm they are would depend on what else is timed beside it. So each run's weights lie where none
lay for a while, in which more was read than the last cache holds. The pool bounds the memory too: all forms of a layer at once
would take many times the layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .conditions import cache_bytes

# Beyond the largest form, which may lie across the place where the last walk began.
CACHES, MOST_BYTES = 4, 512 * 2**20
# Bytes, to which PyTorch's allocators of a CPU and of accelerators align.
_CACHE_LINE, _BLOCK = 64, 512
# Weights of a layer with about a thousand inputs: activations stay far from infinity and from denormals, either of which would
# distort a timing, for a few inputs and for a hundred thousand.
_SCALE = 1 / 32


@final
class Pool:
    """Random numbers of one device and dtype; `pool_of` gives the one that is in use. It takes no memory before `reserve`."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._numbers = torch.empty(0, device=device, dtype=dtype)
        self._place = 0
        # A weight lies where an allocator would put it: from elsewhere some kernels are slower, or others are taken.
        self._step = (_CACHE_LINE if device.type == "cpu" else _BLOCK) // dtype.itemsize

    def reserve(self, largest: int) -> None:
        """Hold enough numbers for weights of so many together, and as many more as the caches need to forget them."""
        wanted = largest + self._step + min(CACHES * cache_bytes(self.device), MOST_BYTES) // self.dtype.itemsize
        if wanted > self._numbers.numel():
            self._numbers = torch.empty(0, device=self.device, dtype=self.dtype)  # gone before the larger one comes
            with torch.inference_mode(False):  # or a later training could not use them
                # A million and its copies: to a kernel as good as all of them drawn, and made much faster.
                drawn = (torch.randn(min(wanted, 2**20), device=self.device) * _SCALE).to(self.dtype)
                self._numbers = drawn.repeat(-(-wanted // drawn.numel()))

    def view(self, like: Tensor) -> Tensor:
        """A weight of the shape and the strides of another one, at the place after the last one's."""
        if self._place + like.numel() > self._numbers.numel():
            self._place = 0
        found = self._numbers.as_strided(like.shape, like.stride(), self._place)
        self._place += -(-like.numel() // self._step) * self._step
        return found


_POOLS: WeakValueDictionary[tuple[torch.device, torch.dtype], Pool] = WeakValueDictionary()


def pool_of(weight: Tensor) -> Pool:
    """The pool for layers like one; it lives as long as somebody holds it."""
    key = weight.device, weight.dtype
    pool = _POOLS.get(key)
    if pool is None:
        pool = _POOLS[key] = Pool(*key)
    return pool


def moving(pool: Pool, weights: Sequence[nn.Parameter]) -> Callable[[], None]:
    """What puts some weights at the next places of a pool."""

    def move() -> None:
        for weight in weights:
            weight.data = pool.view(weight)

    return move
