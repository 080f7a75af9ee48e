"""Block term decomposition as GroSS does it, arXiv 1912.00673, section 3: one term after the other.

    R   what the terms leave of the weight, (O, K, I)     U   output basis of a term (O, p), p = t / G
    G   groups, one a term                                V   input basis of a term (I, q), q = s / G

The paper's way under its own name, to compare with: the default is `block_term`, which solves for all terms at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .block_term import BlockTerms, balanced, core_widths, one_sided
from .least_squares import Terms
from .pure import pure
from .spectral import at_least_float32, left_singular, normalised
from .tucker import hooi


@pure
def block_term_sweep(
    W: Tensor,
    rank_in: int | None,
    rank_out: int | None,
    groups: int,
    *,
    tolerance: float = 1e-6,
    sweeps: int = 400,
    watch: Callable[[int, float], None] | None = None,
) -> BlockTerms:
    """Block term decomposition as GroSS does it: term after term is refitted to the residual of all the others.

    Arxiv 1912.00673, section 3. The residual is kept and updated. A term's first fit is `hooi`; a later one goes on from the
    term's own bases, so that no refit makes the error larger. Nothing damps cancelling terms.

    Args:
        W: Weight, ``(O, I, *kernel)``, any floating dtype.
        rank_in: ``s``, between 1 and I; None leaves the input side whole.
        rank_out: ``t``, between 1 and O; None leaves the output side whole.
        groups: ``G``, a divisor of both widths.
        tolerance: Stop when a sweep changes the relative error by less.
        sweeps: Most sweeps done.
        watch: Called after each sweep with its number and the relative error ``‖W − fit‖ / ‖W‖``.

    Returns:
        The factors, on the device of ``W``, in float32 or better, their Frobenius norms equal.

    Raises:
        RankError: A rank is outside its range, or the groups do not divide the widths.
    """
    s, t = core_widths(W, rank_in, rank_out, groups)
    if rank_in is None or rank_out is None:
        # The terms do not meet: refitting each once is the end.
        return one_sided(W, rank_in, rank_out, groups)
    unit, scale = normalised(at_least_float32(W).flatten(2))
    R = unit.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # O, K, I; it is written into
    norm = float(R.double().norm()) or 1.0
    fitted: list[tuple[Tensor, Tensor, Tensor]] = []
    last = math.inf
    for sweep in range(sweeps):
        for j in range(groups):
            if sweep == 0:
                fitted.append(_first_term(R, s // groups, t // groups))
            else:
                R += _term(*fitted[j])
                fitted[j] = _refitted_term(R, *fitted[j])
            R -= _term(*fitted[j])
        error = float(R.double().norm()) / norm
        if watch is not None:
            watch(sweep + 1, error)
        if abs(last - error) < tolerance:
            break
        last = error
    U, core, V = (torch.stack(parts).double() for parts in zip(*fitted, strict=True))
    terms = Terms(V.transpose(1, 2).contiguous(), U.transpose(1, 2).contiguous(), core.movedim(2, 3).contiguous())
    return balanced(terms, W, (True, True), scale)


def _term(U: Tensor, core: Tensor, V: Tensor) -> Tensor:
    """One term of the sweep as a dense weight ``(O, K, I)``, from ``(O, p)``, ``(p, K, q)`` and ``(I, q)``."""
    return (U @ (core @ V.T).flatten(1)).view(len(U), -1, len(V))


def _first_term(R: Tensor, q: int, p: int) -> tuple[Tensor, Tensor, Tensor]:
    tucker = hooi(R.transpose(1, 2), q, p)
    assert tucker.reduce is not None
    assert tucker.expand is not None
    U, V = torch.linalg.qr(tucker.expand).Q, torch.linalg.qr(tucker.reduce.T).Q
    return U, (U.T @ R.flatten(1)).view(p, -1, len(V)) @ V, V


def _refitted_term(R: Tensor, U: Tensor, core: Tensor, V: Tensor, *, tolerance: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """HOOI on the residual from a term's own bases: each basis in turn is made the best one for the other."""
    kept = 0.0
    for _ in range(50):
        U = _left((R @ V).flatten(1), U.shape[1])
        seen = (U.T @ R.flatten(1)).view(U.shape[1], -1, len(V))  # p, K, I
        V = _left(seen.flatten(0, 1).T, V.shape[1])
        core = seen @ V
        last, kept = kept, float(core.double().square().sum())
        if kept - last <= tolerance * kept:
            break
    return U, core, V


def _left(M: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of a matrix; a thin one is not squared."""
    if rank <= M.shape[1] < M.shape[0]:
        U: Tensor = torch.linalg.svd(M, full_matrices=False).U
        return U[:, :rank]
    return left_singular(M, rank)[1].to(M.dtype)
