"""Tucker-2: the two channel sides of a convolution's weight on leading bases, with a small core between them.

    W   weight (O, I, *kernel)      U   output basis (O, t)      V   input basis (I, s)      C   core (t, s, *kernel)

    W ≈ C ×₁ U ×₂ V,   C = W ×₁ Uᵀ ×₂ Vᵀ

A basis of ``None`` leaves its side whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..errors import RankError
from .pure import pure
from .spectral import at_least_float32, evened, left_singular, normalised, spread, unfold


@final
@dataclass(frozen=True, slots=True)
class Tucker2:
    """Factors of a weight: ``reduce`` ``(s, I)``, ``core`` ``(t, s, *kernel)``, ``expand`` ``(O, t)``; None: a whole side."""

    reduce: Tensor | None
    core: Tensor
    expand: Tensor | None


@pure
def hosvd(W: Tensor, rank_in: int | None, rank_out: int | None) -> Tucker2:
    """Truncated higher-order SVD: each basis is the leading left singular vectors of its channel unfolding.

    De Lathauwer, De Moor and Vandewalle, 2000. Quasi-optimal: the squared error is at most twice the least possible.

    Args:
        W: Weight, ``(O, I, *kernel)``, any floating dtype.
        rank_in: ``s``, between 1 and I; None leaves the input side whole.
        rank_out: ``t``, between 1 and O; None leaves the output side whole.

    Returns:
        The factors, on the device of ``W``, in float32 or better, their Frobenius norms equal.

    Raises:
        RankError: A rank is outside its range.
    """
    return hooi(W, rank_in, rank_out, sweeps=0)


@pure
def hooi(W: Tensor, rank_in: int | None, rank_out: int | None, *, sweeps: int = 50, tolerance: float = 1e-4) -> Tucker2:
    """Higher-order orthogonal iteration: HOSVD, then each basis in turn is made the best one for the other.

    De Lathauwer, De Moor and Vandewalle, 2000b; as a convolution's compression Kim et al., arXiv 1511.06530; from paper A,
    arXiv 2309.03824, section 2. The error never grows from sweep to sweep, and is never above that of `hosvd`.

    Args:
        W: Weight, ``(O, I, *kernel)``, any floating dtype.
        rank_in: ``s``, between 1 and I; None leaves the input side whole.
        rank_out: ``t``, between 1 and O; None leaves the output side whole.
        sweeps: Most sweeps done.
        tolerance: Stop when a sweep lowers the squared error by less than this share of it.

    Returns:
        The factors, on the device of ``W``, in float32 or better, their Frobenius norms equal.

    Raises:
        RankError: A rank is outside its range.
    """
    for name, rank, full in (("in", rank_in, W.shape[1]), ("out", rank_out, W.shape[0])):
        if rank is not None and not 1 <= rank <= full:
            raise RankError(f"rank {name} {rank} is not between 1 and {full}, the channels of that side of {tuple(W.shape)}")
    W, scale = normalised(at_least_float32(W))
    energy = float(W.double().square().sum())
    U = None if rank_out is None else _basis(W, 0, rank_out)
    V = None if rank_in is None else _basis(W, 1, rank_in)
    # With one basis there is nothing to alternate; with a basis that spans its side neither.
    if U is not None and V is not None and U.shape[1] < U.shape[0] and V.shape[1] < V.shape[0]:
        kept = 0.0
        for _ in range(sweeps):
            U = _basis(_project(W, 1, V), 0, U.shape[1])
            Y = _project(W, 0, U)
            values, vectors = left_singular(unfold(Y, 1), V.shape[1])
            V = vectors.to(W.dtype)
            last, kept = kept, float(values.sum())
            if kept - last <= tolerance * max(energy - kept, 1e-12 * energy):
                break
    return _balanced(W, U, V, scale)


@pure
def left_out_of_sides(W: Tensor) -> Tensor:
    """What `hosvd` leaves out at every pair of ranks, as a share of ``‖W‖²``: prices all of them with one core.

    The core on full bases holds all of the weight; ranks ``t`` and ``s`` keep the squares of its leading ``t × s`` corner, so
    cumulative sums along both sides tell what is kept. `hooi` leaves out no more.

    Args:
        W: Weight, ``(O, I, *kernel)``, any floating dtype.

    Returns:
        ``(O + 1, I + 1)``, float64, on the CPU; entry ``[t, s]`` is that of rank out ``t`` and rank in ``s``, and the last row
        and column are those of a whole side. All 0 for a weight of zeros.
    """
    W, _ = normalised(at_least_float32(W))
    O, I = W.shape[:2]
    C = _project(_project(W, 0, _basis(W, 0, O)), 1, _basis(W, 1, I))
    squares = C.flatten(2).double().square().sum(2).cpu()
    kept = squares.new_zeros(O + 1, I + 1)
    kept[1:, 1:] = squares.cumsum(0).cumsum(1)
    total = kept[-1, -1]
    return (1 - kept / total).clamp_min(0) if total > 0 else torch.zeros_like(kept)


def _basis(W: Tensor, mode: int, rank: int) -> Tensor:
    return left_singular(unfold(W, mode), rank)[1].to(W.dtype)


def _project(W: Tensor, mode: int, basis: Tensor) -> Tensor:
    """``W ×_mode basisᵀ``."""
    projected: Tensor = torch.tensordot(basis, W, dims=([0], [mode]))
    return projected.movedim(0, mode)


def _balanced(W: Tensor, U: Tensor | None, V: Tensor | None, size: float) -> Tucker2:
    """The core of a weight times a size, the scale spread: channel by channel, then so that the factors' norms are equal."""
    C: Tensor = W.to(torch.float64, copy=True)
    U, V = (None if basis is None else basis.double() for basis in (U, V))
    if U is not None:
        C = _project(C, 0, U)
    if V is not None:
        C = _project(C, 1, V)
    share = 1 / (1 + (U is not None) + (V is not None))
    if U is not None:
        root = spread(unfold(C, 0).norm(dim=1), share)
        C, U = C / root.view(-1, *[1] * (C.ndim - 1)), U * root
    if V is not None:
        root = spread(unfold(C, 1).norm(dim=1), share)
        C, V = C / root.view(-1, *[1] * (C.ndim - 2)), V * root
    V, core, U = evened((V, C, U), size)
    assert core is not None
    reduce = None if V is None else V.T.to(W.dtype)
    expand = None if U is None else U.to(W.dtype)
    return Tucker2(reduce, core.to(W.dtype), expand)
