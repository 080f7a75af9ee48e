"""Leading singular vectors from Gram matrices, the one numeric routine under every factorisation.

Only one orthonormal basis is taken from a Gram matrix and the other factor is the weight's projection on it, so a factorisation
loses what lies outside the basis and nothing else: at full rank the projection is the identity, however ill-conditioned the weight.
In float64 a Gram matrix still tells singular values apart down to 1e-8 of the largest, below what a float32 weight can hold.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unfold(W: Tensor, mode: int) -> Tensor:
    """The ``mode`` unfolding of a tensor: ``(W.shape[mode], everything else)``."""
    return W.movedim(mode, 0).reshape(W.shape[mode], -1)


def gram(M: Tensor) -> Tensor:
    """``M Mᵀ`` of a matrix ``(m, n)`` in float64."""
    M = M.double()
    return M @ M.T


def leading(G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading eigenpairs of a symmetric matrix.

    Args:
        G: ``(m, m)``, positive semi-definite, float64.
        rank: Number of pairs kept, at most m.

    Returns:
        Eigenvalues ``(rank,)``, largest first and not negative, and eigenvectors as columns ``(m, rank)``.
    """
    values, vectors = torch.linalg.eigh(G)
    return values.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]


def at_least_float32(W: Tensor) -> Tensor:
    """The weight in the precision it is factorised in: no decomposition exists below float32."""
    return W.detach().to(torch.promote_types(W.dtype, torch.float32))
