"""Sums of outer products: the upper half of a symmetric matrix, in float64, in blocks of rows that plain products fill.

    n   side of the matrix      S   the sum so far, Σ x xᵀ      m   columns that come in together

Products of float32 columns are made in float32 and added up in float64. A product sums at most `MOST_COLUMNS` of them, so that
what is lost in it stays near the rounding of a single number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

MOST_COLUMNS = 2**15
_HEIGHT = 256
"""Rows of a block: thin enough that little is kept twice, thick enough for products at full speed."""


def extents(n: int) -> Iterator[tuple[int, int]]:
    """First row and end of each block."""
    for start in range(0, n, _HEIGHT):
        yield start, min(start + _HEIGHT, n)


def packed(n: int) -> int:
    """Numbers that are kept of an n × n matrix: little more than half of them."""
    return sum((stop - start) * (n - start) for start, stop in extents(n))


@final
class Gram:
    """``S``, an n × n sum of outer products.

    Args:
        n: Its side.
        flat: What is kept of it, `packed` numbers; by default zeros in float64 on the CPU.
        device: Where those zeros lie.
    """

    def __init__(self, n: int, flat: Tensor | None = None, device: torch.device | None = None) -> None:
        self.n = n
        self.flat = torch.zeros(packed(n), dtype=torch.float64, device=device) if flat is None else flat

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Each block, ``(stop - start, n - start)``, a view, with its first row and its end; below the diagonal it is void."""
        at = 0
        for start, stop in extents(self.n):
            size = (stop - start) * (self.n - start)
            yield start, stop, self.flat[at : at + size].view(stop - start, self.n - start)
            at += size

    def add(self, columns: Tensor) -> None:
        """Take in ``(n, m)``, float32 or float64."""
        add_to([self], columns)

    def add_at(self, row: int, column: int, part: Tensor) -> None:
        """Add a part of the sum that begins at a row and a column, the row no later than the column."""
        height, width = part.shape
        for start, stop, block in self.blocks():
            top, bottom, left = max(start, row), min(stop, row + height), max(start, column)
            if top < bottom:
                into = block[top - start : bottom - start, left - start : column + width - start]
                into += part[top - row : bottom - row, left - column :].to(block.device)

    def times(self, Z: Tensor) -> Tensor:
        """``S Z`` for ``(n, p)``, float64."""
        result = torch.zeros_like(Z)
        for start, stop, block in self.blocks():
            square, rest = block[:, : stop - start], block[:, stop - start :]
            result[start:stop] += _mirrored(square) @ Z[start:stop] + rest @ Z[stop:]
            result[stop:] += rest.T @ Z[start:stop]
        return result

    def over_taps(self, taps: int) -> Tensor:
        """The mean of the blocks of each tap with itself, ``(n / taps, n / taps)``, without making the whole matrix."""
        I = self.n // taps
        S = self.flat.new_zeros(I, I)
        for start, stop, block in self.blocks():
            for first in range(start // I * I, stop, I):
                top, bottom = max(start, first), min(stop, first + I)
                part = block[top - start : bottom - start, top - start : first + I - start]
                S[top - first : bottom - first, top - first :] += part
        S = S.triu_().div_(taps)
        return S.add_(S.triu(1).T)

    def dense(self) -> Tensor:
        """``S``, ``(n, n)``, symmetric to the last bit."""
        S = self.flat.new_empty(self.n, self.n)
        for start, stop, block in self.blocks():
            S[start:stop, start:] = block
            S[start:, start:stop] = block.T
            S[start:stop, start:stop] = _mirrored(block[:, : stop - start])
        return S


def add_to(grams: Sequence[Gram], columns: Tensor) -> None:
    """Let several sums of one side take in the same columns ``(n, m)``, whose products are made once."""
    for part in torch.split(columns, MOST_COLUMNS, dim=1):
        for blocks in zip(*(gram.blocks() for gram in grams), strict=True):
            start, stop, _ = blocks[0]
            product = part[start:stop] @ part[start:].T
            for _, _, block in blocks:
                block += product.to(block.device)


def _mirrored(S: Tensor) -> Tensor:
    """A square by its upper half."""
    upper = S.triu()
    return upper + upper.triu(1).T


def home(device: torch.device) -> torch.device:
    """Where sums over a device's numbers are kept: there, or on the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def summed(columns: Tensor, where: torch.device) -> Tensor:
    """The sum of ``(n, m)`` columns, ``(n,)``, float64."""
    if where != columns.device:
        return columns.sum(1).to(where).double()
    return columns.sum(1, dtype=torch.float64)


def exact_products(device: torch.device) -> bool:
    """Whether float32 products on a device are float32 now: TF32 and its like keep ten bits of each number."""
    x = torch.full((128, 128), 1 + 2.0**-20, device=device)
    return bool((x @ torch.eye(128, device=device) == x).all())


@final
class Scatter:
    """How far a mean of batches lies from what more of them would give, as their own scatter tells.

    Of a moment M = Σ T_b / Σ m_b, a sum T_b and a weight m_b a batch, the relative error in the Frobenius norm is

        √(B / (B − 1) · Σ ‖(T_b − m_b M) Z‖²) / ‖Σ T_b Z‖,    Z of some random columns, which keep norms on average

    ``T_b Z = Σ x (xᵀ Z)`` is added up from the columns themselves: to multiply the sum so far by Z would read n² numbers.
    Everything is kept as sums, so that those of several processes can be added. Nothing is known from one batch.
    """

    COLUMNS = 4

    def __init__(self, n: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(n)
        self.Z = torch.randn(n, self.COLUMNS, dtype=torch.float64, generator=generator).to(device)
        self.sum = torch.zeros_like(self.Z)  # Σ T_b Z
        self.weighted = torch.zeros_like(self.Z)  # Σ m_b T_b Z
        self.scalars = torch.zeros(4, dtype=torch.float64, device=device)  # B, Σ m_b, Σ m_b², Σ ‖T_b Z‖²
        self.batch = torch.zeros_like(self.Z)  # T_b Z so far

    @staticmethod
    def size(n: int) -> int:
        """Numbers kept for a moment of side n."""
        return 4 * n * Scatter.COLUMNS + 4

    def take(self, columns: Tensor) -> None:
        """Take in ``(n, m)`` of the batch at hand."""
        Z = self.Z.to(columns.device, columns.dtype)
        self.batch += (columns @ (columns.T @ Z)).to(self.batch)

    def end(self, weight: int) -> bool:
        """End the batch at hand, of some weight; whether all in it is finite."""
        T, self.batch = self.batch, torch.zeros_like(self.batch)
        self.sum += T
        self.weighted += weight * T
        self.scalars += torch.stack([*(T.new_tensor(float(x)) for x in (1, weight, weight**2)), T.square().sum()])
        return bool(torch.isfinite(T).all())

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is to be added up over processes."""
        return self.sum, self.weighted, self.scalars

    def error(self) -> float | None:
        """The relative error, None where it is not known."""
        batches, weights, squares, norms = self.scalars.tolist()
        size = float(self.sum.norm())
        if batches < 2 or not size:
            return None
        mean = self.sum / weights
        apart = norms - 2 * float((self.weighted * mean).sum()) + squares * float(mean.square().sum())
        return float((batches / (batches - 1) * max(apart, 0.0)) ** 0.5 / size)
