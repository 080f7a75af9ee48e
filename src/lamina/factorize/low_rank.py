"""Truncated singular value decomposition of a weight matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RankError
from .pure import pure
from .spectral import at_least_float32, in_parts, left_singular, normalised, squares


@pure
def low_rank(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best factors of a weight at a given rank, in the Frobenius norm.

    Eckart and Young, 1936; for trained layers Hajimolahoseini et al., arXiv 2309.03824, section 2.

    Args:
        W: Weight, ``(O, I)``, any floating dtype.
        rank: Number of singular values kept, ``1 ≤ rank ≤ min(O, I)``.

    Returns:
        ``A``, ``(rank, I)``, and ``B``, ``(O, rank)``, on the device of ``W`` and in float32 or better.
        ``‖W − B A‖²`` is the sum of the squared singular values left out, and ``‖a_i‖ = ‖b_i‖`` for each of the ``rank`` pairs:
        weight decay and half precision then treat the two factors alike.

    Raises:
        RankError: The rank is outside its range.
    """
    O, I = W.shape
    if not 1 <= rank <= min(O, I):
        raise RankError(f"rank {rank} is not between 1 and {min(O, I)}, the full rank of a {tuple(W.shape)} weight")
    dtype = torch.promote_types(W.dtype, torch.float32)
    W, scale = normalised(W)  # of a large one no copy is made as a whole: in float64 it would be four times one in bfloat16
    if O < I:
        # W = U (Uᵀ W): project on the smaller side's basis.
        B = left_singular(W, rank)[1]
        A = torch.empty(rank, I, dtype=torch.float64, device=W.device)
        for columns in in_parts(I, O):
            A[:, columns] = B.T @ W[:, columns].double()
        norm = A.norm(dim=1)
    else:
        A = left_singular(W.T, rank)[1].T
        B = torch.empty(O, rank, dtype=torch.float64, device=W.device)
        for rows in in_parts(O, I):
            B[rows] = W[rows].double() @ A.T
        norm = B.norm(dim=0)
    # A pair of a vanishing singular value: any scale will do, as long as none is infinite.
    root = norm.clamp_min(norm.max() * 1e-12 + 1e-300).sqrt()
    half = scale**0.5
    if O < I:
        B, A = B.mul_(root), A.div_(root[:, None])
    else:
        B, A = B.div_(root), A.mul_(root[:, None])
    return A.mul_(half).to(dtype), B.mul_(half).to(dtype)


@pure
def left_out(W: Tensor) -> Tensor:
    """What `low_rank` leaves out at every rank: the tail of the squared singular values, as a share of their sum.

    Args:
        W: Weight, ``(O, I)``, any floating dtype.

    Returns:
        ``(min(O, I) + 1,)``, float64, on the CPU; entry ``r`` is that of rank ``r``. All 0 for a weight of zeros.
    """
    W, _ = normalised(at_least_float32(W))
    own = squares(W)
    kept = torch.cat([own.new_zeros(1), own.cumsum(0)])
    return (1 - kept / kept[-1]).clamp_min(0) if kept[-1] > 0 else torch.zeros_like(kept)
