"""Block term decomposition: a convolution's weight as a sum of small Tucker-2 terms, which is a grouped core between two 1×1s.

    W   weight (O, I, K), K taps     A   reduce (G, q, I), q = s / G     C   core (G, p, q, K)
    G   groups, one a term           B   expand (G, p, O), p = t / G     T   a term

    W ≈ Σ_g T_g,   T_g = C_g ×₁ B_gᵀ ×₂ A_gᵀ

Two ways to it: the sweep of GroSS (arXiv 1912.00673), which refits one term after the other (`block_term_sweep`), and
alternating least squares for all terms at once, which is the default: here is what is asked of it, in `block_term_start` where
it starts, in `least_squares` how it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RankError
from .block_term_start import bases, clustered, clustered_triples, cut_core, energies, own_blocks
from .least_squares import Problem, Terms, alternate, orthonormal
from .pure import pure
from .spectral import at_least_float32, evened, spread
from .tucker import hooi


@final
@dataclass(frozen=True, slots=True)
class BlockTerms:
    """Factors of a weight: ``reduce`` ``(s, I)``, ``core`` ``(t, s / groups, *kernel)``, ``expand`` ``(O, t)``.

    None stands for a whole side: the core then reads, or writes, the layer's own channels.
    """

    reduce: Tensor | None
    core: Tensor
    expand: Tensor | None
    groups: int

    def composed(self) -> Tensor:
        """The dense weight that the factors make, ``(O, I, *kernel)``."""
        return _composed(self.core, self.reduce, self.expand, self.groups)

    def left_out(self, W: Tensor) -> float:
        """The squared error against a weight, as a share of the weight's squared norm; 0 for a weight of zeros."""
        W = W.double()
        size = float(W.square().sum())
        return float((W - self.composed().double()).square().sum()) / size if size else 0.0


@pure
def block_term(
    W: Tensor,
    rank_in: int | None,
    rank_out: int | None,
    groups: int,
    *,
    sweeps: int = 100,
    tolerance: float = 2e-5,
    seed: int = 0,
) -> BlockTerms:
    """Block term decomposition by damped alternating least squares, each factor solved for all terms at once.

    De Lathauwer and Nion, 2008, part III; the form is that of arXiv 1912.00673. It starts from the largest singular triples of
    the weight's spatial modes, those that interact most in one group, and extrapolates from sweep to sweep as long as this
    helps (Ang, Cohen and Gillis, 2019). In one group it is Tucker-2 (`hooi`); with a whole side the best fit is known and
    returned.

    Args:
        W: Weight, ``(O, I, *kernel)``, any floating dtype.
        rank_in: ``s``, between 1 and I; None leaves the input side whole.
        rank_out: ``t``, between 1 and O; None leaves the output side whole.
        groups: ``G``, a divisor of both widths.
        sweeps: Most sweeps done.
        tolerance: Stop when a sweep lowers the squared error by less than this share of it.
        seed: Of the small push that the start is given. The global generator is not used.

    Returns:
        The factors, on the device of ``W``, in float32 or better, their Frobenius norms equal. The error is at most that of
        cutting the core of `hosvd` into its diagonal blocks, and rounding the factors to float32 changes the fit by at most
        1e-5 of it.

    Raises:
        RankError: A rank is outside its range, or the groups do not divide the widths.
    """
    s, t = core_widths(W, rank_in, rank_out, groups)
    if groups == 1:
        tucker = hooi(W, rank_in, rank_out)
        return BlockTerms(tucker.reduce, tucker.core, tucker.expand, 1)
    if rank_in is None or rank_out is None:
        return one_sided(W, rank_in, rank_out, groups)
    problem = Problem.of(W)
    cut, kept = cut_core(problem, s, t, groups)
    if problem.norm == 0:
        return _finished(problem, cut)
    terms, lost = alternate(problem, clustered_triples(problem, s, t, groups, seed), sweeps, tolerance)
    if lost > 1 - kept:
        # Rare: a weight that is block diagonal in a basis that the start does not see.
        terms, lost = alternate(problem, cut, sweeps, tolerance)
        if lost > 1 - kept:
            terms = cut
    return _finished(problem, terms)


@pure
def refit(W: Tensor, start: BlockTerms, *, anchor: float = 0.0, sweeps: int = 20, tolerance: float = 1e-4) -> BlockTerms:
    """A better fit near a given one, by the alternating least squares of `block_term`.

    Minimises ``‖W − fit‖² + λ Σ ‖T_g‖² + Σ_X μ_X ‖X − X₀‖²`` over the factors X, where X₀ is where they start and μ_X is
    ``anchor`` times the mean curvature of the first summand in X.

    Args:
        W: Weight, ``(O, I, *kernel)``, any floating dtype.
        start: Factors of the wanted shapes; a side that is whole stays whole.
        anchor: How strongly the factors are held to the start; 0 leaves them free.
        sweeps: Most sweeps done.
        tolerance: Stop when a sweep lowers the objective by less than this share of it.

    Returns:
        The factors, on the device of ``W``, in float32 or better: in the scale of the start where they are held to it,
        otherwise their Frobenius norms equal.
    """
    problem = Problem.of(W, (start.reduce is not None, start.expand is not None))
    G, (t, q) = start.groups, start.core.shape[:2]
    if problem.norm == 0:
        return start
    size, norm = problem.roots
    core = start.core.double().reshape(G, t // G, q, -1) / size / norm
    A = _eye(G, q, core) if start.reduce is None else start.reduce.double().reshape(G, q, -1) / size / norm
    B = _eye(G, t // G, core) if start.expand is None else start.expand.double().T.reshape(G, t // G, -1) / size / norm
    terms, _ = alternate(problem, Terms(A.contiguous(), B.contiguous(), core.contiguous()), sweeps, tolerance, anchor)
    if not anchor:
        return _finished(problem, terms)
    return _laid_out(Terms(*(X * norm * size for X in (terms.A, terms.B, terms.C))), W, problem.free)


@pure
def for_merging(W: Tensor, fit: BlockTerms, groups: Sequence[int]) -> BlockTerms:
    """The same fit with its terms in an order in which neighbours gain from being merged.

    Two terms gain by the part of the weight that lies in the output basis of one and the input basis of the other. Greedy,
    level by level.

    Args:
        W: Weight, ``(O, I, *kernel)``.
        fit: Its block terms; returned as they are where a side is whole, whose channels cannot move.
        groups: The group counts to come, each dividing the one before.
    """
    if fit.reduce is None or fit.expand is None or not groups:
        return fit
    G, (t, q) = fit.groups, fit.core.shape[:2]
    problem = Problem.of(W)
    A = torch.linalg.qr(fit.reduce.double().reshape(G, q, -1).transpose(1, 2)).Q.transpose(1, 2)
    B = torch.linalg.qr(fit.expand.double().T.reshape(G, t // G, -1).transpose(1, 2)).Q.transpose(1, 2)
    gain = energies(problem, A.flatten(0, 1), B.flatten(0, 1)).view(G, t // G, G, q).sum((1, 3))
    order = torch.arange(G, device=gain.device)[:, None]
    for count in groups:
        merged = len(order) // count
        chosen = clustered(gain, merged)
        order = order[chosen].reshape(count, -1)
        gain = gain[chosen][:, chosen].view(count, merged, count, merged).sum((1, 3))
    flat = order.flatten()
    reduce = fit.reduce.reshape(G, q, -1)[flat].flatten(0, 1)
    core = fit.core.reshape(G, t // G, *fit.core.shape[1:])[flat].flatten(0, 1)
    expand = fit.expand.T.reshape(G, t // G, -1)[flat].flatten(0, 1).T.contiguous()
    return BlockTerms(reduce, core, expand, G)


def core_widths(W: Tensor, rank_in: int | None, rank_out: int | None, groups: int) -> tuple[int, int]:
    """The widths ``s`` and ``t`` of the core that is asked for; None stands for all channels of a side.

    Raises:
        RankError: A rank is outside its range, or the groups do not divide the widths.
    """
    widths = []
    for name, rank, full in (("in", rank_in, W.shape[1]), ("out", rank_out, W.shape[0])):
        if rank is not None and not 1 <= rank <= full:
            raise RankError(f"rank {name} {rank} is not between 1 and {full}, the channels of that side of {tuple(W.shape)}")
        widths.append(rank or full)
    if groups < 1 or any(width % groups for width in widths):
        raise RankError(
            f"{groups} groups do not divide the core's widths {widths[0]} and {widths[1]} of a {tuple(W.shape)} weight"
        )
    return widths[0], widths[1]


@pure
def _composed(core: Tensor, reduce: Tensor | None, expand: Tensor | None, G: int) -> Tensor:
    return assembled(core, reduce, expand, G)


def assembled(core: Tensor, reduce: Tensor | None, expand: Tensor | None, G: int) -> Tensor:
    """The dense weight of factors, ``(O, I, *kernel)``, through which gradients pass.

    Args:
        core: ``(t, s / G, *kernel)``.
        reduce: ``(s, I)``; None where the input side is whole.
        expand: ``(O, t)``; None where the output side is whole.
        G: In how many groups the core is.
    """
    t, q, *kernel = core.shape
    terms = core.reshape(G, t // G, q, -1)
    if reduce is not None:
        terms = torch.einsum("gpqk,gqi->gpik", terms, reduce.reshape(G, q, -1))
    elif G > 1:
        terms = torch.stack([F.pad(term, (0, 0, g * q, (G - 1 - g) * q)) for g, term in enumerate(terms)])
    weight = terms.flatten(0, 1)
    if expand is not None:
        weight = torch.einsum("ot,tik->oik", expand, weight)
    return weight.reshape(*weight.shape[:2], *kernel)


def _eye(G: int, n: int, like: Tensor) -> Tensor:
    """The identity as the factor of a whole side, ``(G, n, G n)``."""
    return torch.eye(G * n, dtype=like.dtype, device=like.device).view(G, n, G * n)


@pure
def one_sided(W: Tensor, rank_in: int | None, rank_out: int | None, groups: int) -> BlockTerms:
    """The best fit with a whole side: each term alone sees its channels there, so it is that slice's truncated SVD."""
    O, I, *kernel = W.shape
    if rank_in is None and rank_out is None:
        core = own_blocks(at_least_float32(W).flatten(2), groups).clone()
        return BlockTerms(None, core.reshape(O, I // groups, *kernel), None, groups)
    problem = Problem.of(W, (rank_in is not None, rank_out is not None))
    unit = problem.outward.view(O, -1, I).transpose(1, 2)
    G, K = groups, unit.shape[2]
    if rank_in is not None:
        slices = unit.reshape(G, O // G, I, K)  # G, p, I, K
        A = bases(slices.transpose(1, 2).flatten(2), rank_in // G)
        terms = Terms(A, _eye(G, O // G, unit), torch.einsum("gpik,gqi->gpqk", slices, A))
    else:
        assert rank_out is not None
        slices = unit.reshape(O, G, I // G, K).transpose(0, 1)  # G, O, q, K
        B = bases(slices.flatten(2), rank_out // G)
        terms = Terms(_eye(G, I // G, unit), B, torch.einsum("goqk,gpo->gpqk", slices, B))
    return _finished(problem, terms)


def _finished(problem: Problem, terms: Terms) -> BlockTerms:
    """The factors of a fit of the unit weight, in the scale of the real one."""
    return balanced(terms, problem.W, problem.free, problem.size, problem.norm)


def balanced(terms: Terms, W: Tensor, free: tuple[bool, bool], *sizes: float) -> BlockTerms:
    """Factors of a fit times its sizes, the scale spread over them: channel by channel, then so that their norms are equal."""
    terms = orthonormal(terms, free)
    A, B, C = terms.A, terms.B, terms.C
    share = 1 / (1 + sum(free))
    if free[1]:
        root = spread(C.norm(dim=(2, 3)), share)
        C, B = C / root[..., None, None], B * root[..., None]
    if free[0]:
        root = spread(C.norm(dim=(1, 3)), share)
        C, A = C / root[:, None, :, None], A * root[..., None]
    parts = evened((A if free[0] else None, B if free[1] else None, C), *sizes)
    A, B, C = (part if even is None else even for part, even in zip((A, B, C), parts, strict=True))
    return _laid_out(Terms(A, B, C), W, free)


def _laid_out(terms: Terms, W: Tensor, free: tuple[bool, bool]) -> BlockTerms:
    """Terms as the factors of a weight: in its precision, in the shapes of its convolutions, whole sides left out."""
    dtype = at_least_float32(W).dtype
    G, p, q, _ = terms.C.shape
    return BlockTerms(
        terms.A.flatten(0, 1).to(dtype) if free[0] else None,
        terms.C.reshape(G * p, q, *W.shape[2:]).to(dtype),
        terms.B.flatten(0, 1).T.to(dtype).contiguous() if free[1] else None,
        G,
    )
