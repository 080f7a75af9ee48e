"""Leading singular vectors, the one numeric routine under every factorisation.

Only one orthonormal basis is taken and the other factor is the weight's projection on it, so a factorisation loses what lies
outside the basis and nothing else: at full rank the projection is the identity, however ill-conditioned the weight.
A Gram matrix in float64 tells singular values apart down to 1e-8 of the largest, below what a float32 weight can hold; a
float64 weight holds more, so for that the basis comes from its triangular factor, unsquared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_PART = 2**23
"""Numbers of a matrix that are in float64 at a time."""


def unfold(W: Tensor, mode: int) -> Tensor:
    """The ``mode`` unfolding of a tensor: ``(W.shape[mode], everything else)``."""
    return W.movedim(mode, 0).reshape(W.shape[mode], -1)


def gram(M: Tensor) -> Tensor:
    """``M Mᵀ`` of a matrix ``(m, n)`` in float64; of a large one in parts, which no second copy of it has to be held for."""
    first, *others = in_parts(M.shape[1], M.shape[0])
    part = M[:, first].double()
    G: Tensor = part @ part.T
    for columns in others:
        part = M[:, columns].double()
        G.addmm_(part, part.T)
    return G


def in_parts(length: int, width: int) -> list[slice]:
    """A side of a matrix in parts, none of which is so large that it cannot be held in float64 beside it."""
    step = max(_PART // max(width, 1), 1)
    return [slice(at, min(at + step, length)) for at in range(0, max(length, 1), step)]


def leading(G: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading eigenpairs of a symmetric matrix.

    Args:
        G: ``(m, m)``, positive semi-definite, float64.
        rank: Number of pairs kept, at most m.

    Returns:
        Eigenvalues ``(rank,)``, largest first and not negative, and eigenvectors as columns ``(m, rank)``.
    """
    values, vectors = torch.linalg.eigh(G)
    return values.flip(0)[:rank].clamp_min(0), vectors[:, vectors.shape[1] - rank :].flip(1)


def left_singular(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors of a matrix, with their squared singular values.

    Args:
        M: ``(m, n)``, float32 or float64.
        rank: Number of vectors kept, at most m.

    Returns:
        Squares ``(rank,)``, largest first, and orthonormal vectors as columns ``(m, rank)``, both in float64.
    """
    if M.dtype != torch.float64:
        return leading(gram(M), rank)
    # M = Rᵀ Qᵀ: the small R has the left singular vectors and values of M.
    U, values, _ = torch.linalg.svd(torch.linalg.qr(M.T, mode="r").R.T, full_matrices=True)
    squares = torch.zeros(M.shape[0], dtype=M.dtype, device=M.device)
    squares[: len(values)] = values.square()
    return squares[:rank], U[:, :rank]


def squares(M: Tensor) -> Tensor:
    """The squared singular values of a matrix of ordinary size, largest first: ``(min(m, n),)``, float64, on the CPU."""
    small = M if M.shape[0] <= M.shape[1] else M.T
    found: Tensor = torch.linalg.eigvalsh(gram(small)).flip(0).clamp_min(0).cpu()
    return found


def normalised(W: Tensor) -> tuple[Tensor, float]:
    """A weight divided by a scale, so that its squares neither overflow nor vanish, and the scale.

    The scale is a power of two, which rounds nothing, and 1 for a weight of ordinary size, which is not copied then. A weight
    below float32 that has to be scaled is so in float32.
    """
    lowest, highest = W.aminmax()
    largest = max(-float(lowest), float(highest))
    if largest == 0 or 2.0**-60 < largest < 2.0**60:
        return W, 1.0
    W = at_least_float32(W)
    # Neither the scale nor its reciprocal may leave the dtype's range.
    end = -math.frexp(torch.finfo(W.dtype).tiny)[1]
    scale = 2.0 ** min(max(math.frexp(largest)[1], -end), end)
    return W / scale, scale


def spread(norm: Tensor, share: float) -> Tensor:
    """For each channel the power of its norm that goes over to the factor beside it; never 0."""
    return norm.clamp_min(float(norm.max()) * 1e-6 + 1e-300).pow(share)


def evened(parts: Sequence[Tensor | None], *sizes: float) -> list[Tensor | None]:
    """Factors scaled to equal Frobenius norms, so that what they make is as many times larger as the sizes say.

    The sizes are taken one by one: the norm of a weight at the end of float64 lies beyond it. Factors of which one is zero
    stay as they are, and so does None.
    """
    norms = [1.0 if part is None else float(part.norm()) for part in parts]
    if min(norms) == 0:
        return list(parts)
    count = sum(part is not None for part in parts)
    mean = math.prod(root(norm, count) for norm in norms)
    size = math.prod(root(size, count) for size in sizes)
    return [None if part is None else part * (mean / norm * size) for part, norm in zip(parts, norms, strict=True)]


def root(value: float, degree: int) -> float:
    """The root of a degree up to three, to the last digit: the power of ⅓ would lose two at the ends of float64."""
    return (float, math.sqrt, math.cbrt)[degree - 1](value)


def at_least_float32(W: Tensor) -> Tensor:
    """The weight in the precision it is factorised in: no decomposition exists below float32."""
    return W.to(torch.promote_types(W.dtype, torch.float32))
