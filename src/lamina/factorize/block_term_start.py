"""Where the alternating least squares of block terms start: two guesses from the weight's singular vectors.

    W   weight of norm 1, (O, I, K)     A   reduce (G, q, I), q = s / G     U, u   output vectors
    G   groups, one a term              B   expand (G, p, O), p = t / G     V, v   input vectors
    W_k   a spatial mode of it          C   core (G, p, q, K)

`cut_core` keeps the diagonal blocks of a Tucker core; `clustered_triples` spans each term by singular triples of the spatial
modes that interact. Improving on either is the business of `least_squares`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .least_squares import Problem, Terms, orthonormal, solved_core
from .tucker import hosvd

_PUSH = 0.3
"""By how much of its length a start's basis vector is pushed at random."""


def cut_core(problem: Problem, s: int, t: int, G: int) -> tuple[Terms, float]:
    """The core of a truncated higher-order SVD, or of the weight where no rank is truncated, cut into its diagonal blocks.

    Returns:
        Terms with orthonormal bases, and the share of the weight's square that they keep.
    """
    O, I = len(problem.outward), len(problem.inward)
    unit = problem.outward.view(O, -1, I).transpose(1, 2)
    tucker = hosvd(unit.float(), s, t)
    assert tucker.reduce is not None
    assert tucker.expand is not None
    V, U = torch.linalg.qr(tucker.reduce.double().T).Q, torch.linalg.qr(tucker.expand.double()).Q
    cores = [(U, V)]
    if (s, t) == (I, O):
        cores.append((torch.eye(O, dtype=U.dtype, device=U.device), torch.eye(I, dtype=U.dtype, device=U.device)))
    found = []
    for U, V in cores:
        core = own_blocks(torch.einsum("oik,ot,is->tsk", unit, U, V), G)
        terms = Terms(V.T.reshape(G, s // G, I).contiguous(), U.T.reshape(G, t // G, O).contiguous(), core)
        found.append((terms, float(core.square().sum())))
    return max(found, key=lambda pair: pair[1])


def clustered_triples(problem: Problem, s: int, t: int, G: int, seed: int) -> Terms:
    """Terms spanned by the largest singular triples of the weight's spatial modes, those that interact most together."""
    p, q = t // G, s // G
    O, I = len(problem.outward), len(problem.inward)
    K = problem.inward.shape[1] // O
    r = max(p, q)
    U, V, values = _triples(problem, G * r, seed)
    if r > 1:
        chosen = clustered(energies(problem, V, U), r)
        U, V, values = U[chosen], V[chosen], values[chosen]
    U, V = U.view(G, r, O), V.view(G, r, I)
    heavy = values.view(G, r, 1)
    # The thinner side of a term is the best basis of those it is given.
    B = U if p == r else bases((heavy * U).mT, p)
    A = V if q == r else bases((heavy * V).mT, q)
    # Pushed off the symmetric points at which alternating updates would stand still.
    generator = _generator(seed)
    A, B = (basis + _PUSH * basis.shape[2] ** -0.5 * _normal(basis.shape, generator, basis.device) for basis in (A, B))
    C = torch.zeros(G, p, q, K, dtype=A.dtype, device=A.device)
    terms = orthonormal(Terms(A, B, C))
    seen = (problem.from_input(terms.A, K) @ terms.B.mT).view(G, q, K, p).permute(0, 3, 1, 2)
    return Terms(terms.A, terms.B, solved_core(terms.A, terms.B, C, seen, None, damping=1e-3)[0])


def _triples(problem: Problem, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triples over all spatial modes of a weight: ``(count, O)``, ``(count, I)`` and values ``(count,)``.

    The spatial modes are the weight's slices after its kernel was turned so that they are orthogonal. Where there are too few
    triples, random unit vectors of value 0 stand.
    """
    O, I = len(problem.outward), len(problem.inward)
    slices = problem.outward.view(O, -1, I).transpose(0, 1)
    flat = slices.reshape(len(slices), -1)
    modes = (torch.linalg.eigh(flat @ flat.T).eigenvectors.T @ flat).view_as(slices)
    wide = modes if O <= I else modes.mT
    near = torch.linalg.eigh(wide @ wide.mT).eigenvectors.mT
    far = near @ wide
    values = far.norm(dim=2)
    order = values.flatten().argsort(descending=True, stable=True)[:count]
    near, far, values = near.flatten(0, 1)[order], far.flatten(0, 1)[order], values.flatten()[order]
    generator = _generator(seed)
    filled = []
    weak = (values <= 1e-9 * values[0])[:, None]
    for vectors in (near, far / values.clamp_min(1e-300)[:, None]):
        noise = _normal((count, vectors.shape[1]), generator, vectors.device)
        noise /= noise.norm(dim=1, keepdim=True)
        noise[: len(vectors)] = torch.where(weak, noise[: len(vectors)], vectors)
        filled.append(noise)
    values = torch.cat([values, values.new_zeros(count - len(values))])
    near, far = filled
    return (near, far, values) if O <= I else (far, near, values)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Normal numbers that are the same on every device: drawn on one, whatever the default is."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu").to(device)


def energies(problem: Problem, V: Tensor, U: Tensor) -> Tensor:
    """``Σ_k (u W_k v)²`` for every pair of output vectors ``(n, O)`` and input vectors ``(m, I)``: ``(n, m)``."""
    seen = (V @ problem.inward).view(len(V), -1, U.shape[1]) @ U.T
    return seen.square().sum(1).T


def clustered(gain: Tensor, size: int) -> Tensor:
    """An order in which runs of ``size`` have much gain among themselves: from the first free one on, the best for the run."""
    gain = gain + gain.T
    n = len(gain)
    free = torch.ones(n, dtype=torch.bool, device=gain.device)
    order = torch.empty(n, dtype=torch.long, device=gain.device)
    for at in range(n):
        if at % size == 0:
            best = free.to(torch.uint8).argmax()
            total = gain[best].clone()
        else:
            best = torch.where(free, total, -1.0).argmax()
            total += gain[best]
        order[at] = best
        free[best] = False
    return order


def own_blocks(W: Tensor, G: int) -> Tensor:
    """The diagonal blocks of a weight ``(t, s, K)``, as ``(G, t / G, s / G, K)``."""
    t, s, K = W.shape
    return W.reshape(G, t // G, G, s // G, K).diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def bases(M: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of matrices ``(G, m, n)`` as rows, ``(G, rank, m)``."""
    U: Tensor = torch.linalg.svd(M, full_matrices=rank > M.shape[2]).U
    return U[..., :rank].mT.contiguous()
