"""Separable kernels: a 2-d convolution as one along the columns of the map, then one along its rows.

    W   weight (O, I, kh, kw)      V   vertical filters (r, I, kh)      H   horizontal filters (O, r, kw)

    W[o, i, a, b] ≈ Σ_r H[o, r, b] V[r, i, a]

Read as a matrix of (o, b) and (i, a), this is a truncated singular value decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .low_rank import left_out, low_rank
from .pure import pure


@pure
def separable(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best vertical and horizontal filters of a weight at a given rank, in the Frobenius norm.

    Jaderberg, Vedaldi and Zisserman, 2014, scheme 2; in closed form Tai et al., arXiv 1511.06067.

    Args:
        W: Weight, ``(O, I, kh, kw)``, any floating dtype.
        rank: Number of filters between, ``1 ≤ rank ≤ min(I kh, O kw)``.

    Returns:
        ``V``, ``(rank, I, kh, 1)``, and ``H``, ``(O, rank, 1, kw)``, on the device of ``W``, in float32 or better, scaled as
        the factors of `low_rank`. `left_out_separable` tells the error.

    Raises:
        RankError: The rank is outside its range.
    """
    O, I, kh, kw = W.shape
    A, B = low_rank(_matrix(W), rank)
    return A.reshape(rank, I, kh, 1), B.reshape(O, kw, 1, rank).permute(0, 3, 2, 1).contiguous()


@pure
def left_out_separable(W: Tensor) -> Tensor:
    """What `separable` leaves out at every rank, as a share of ``‖W‖²``; see `left_out`.

    Args:
        W: Weight, ``(O, I, kh, kw)``, any floating dtype.

    Returns:
        ``(min(I kh, O kw) + 1,)``, float64, on the CPU.
    """
    return left_out(_matrix(W))


def filtered(V: Tensor, H: Tensor) -> Tensor:
    """The weight ``(O, I, kh, kw)`` that filters make one after the other, in float64."""
    return torch.einsum("orb,ria->oiab", H[:, :, 0].double(), V[..., 0].double())


def _matrix(W: Tensor) -> Tensor:
    """``(O kw, I kh)``."""
    matrix: Tensor = W.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
    return matrix
