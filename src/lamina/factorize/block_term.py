"""Block term decomposition: a convolution's weight as a sum of small Tucker-2 terms, which is a grouped core between two 1×1s.

    W   weight (O, I, K), K taps     A   reduce (G, q, I), q = s / G     C   core (G, p, q, K)
    G   groups, one a term           B   expand (G, p, O), p = t / G     T   a term

    W ≈ Σ_g T_g,   T_g = C_g ×₁ B_gᵀ ×₂ A_gᵀ

Two ways to it: the sweep of GroSS (arXiv 1912.00673), which refits one term after the other, and alternating least squares for
all terms at once, which is the default. The latter minimises

    ‖W − Σ_g T_g‖² + λ Σ_g ‖T_g‖²

The second summand is what keeps terms from growing without bound while they cancel (a best fit need not exist without it). It
does not depend on how a term is split into its factors, and in the normal equations of each factor it is a factor 1 + λ on the
diagonal blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..errors import RankError
from .spectral import at_least_float32, left_singular, normalised
from .tucker import hooi, hosvd

_DAMPING = 1e-5
"""λ, of a weight of norm 1."""

_ROUNDING = 5e-6
"""Most that float32 may change of a fit, as a share of it."""

_PUSH = 0.3
"""By how much of its length a start's basis vector is pushed at random."""

_DIRECT = 100
"""Where the cores' n unknowns a tap are solved for directly: while n² is at most this many times the K (s + t) of a step of
conjugate gradients, which is the way for all larger ones."""


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
        G, (t, q, *kernel) = self.groups, self.core.shape
        core = self.core.reshape(G, t // G, q, -1)
        A = _eye(G, q, self.core) if self.reduce is None else self.reduce.reshape(G, q, -1)
        weight = torch.einsum("gpqk,gqi->gpik", core, A).reshape(t, A.shape[2], -1)
        if self.expand is not None:
            weight = torch.einsum("ot,tik->oik", self.expand, weight)
        return weight.reshape(*weight.shape[:2], *kernel)


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
    s, t = _check(W, rank_in, rank_out, groups)
    if groups == 1:
        tucker = hooi(W, rank_in, rank_out)
        return BlockTerms(tucker.reduce, tucker.core, tucker.expand, 1)
    if rank_in is None or rank_out is None:
        return _one_sided(W, rank_in, rank_out, groups)
    problem = _Problem.of(W)
    cut, kept = _cut(problem, s, t, groups)
    if problem.norm == 0:
        return problem.finished(cut)
    terms, lost = _robust(problem, _start(problem, s, t, groups, seed), sweeps, tolerance)
    if lost > 1 - kept:
        # Rare: a weight that is block diagonal in a basis that the start does not see.
        other, other_lost = _robust(problem, cut, sweeps, tolerance)
        if other_lost < lost:
            terms, lost = other, other_lost
        if 1 - kept < lost:
            terms = cut
    return problem.finished(terms)


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
    s, t = _check(W, rank_in, rank_out, groups)
    if rank_in is None or rank_out is None:
        # The terms do not meet: refitting each once is the end.
        return _one_sided(W, rank_in, rank_out, groups)
    unit, scale = normalised(at_least_float32(W).flatten(2))
    R = unit.transpose(1, 2).contiguous()  # O, K, I
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
    terms = _Terms(V.transpose(1, 2).contiguous(), U.transpose(1, 2).contiguous(), core.movedim(2, 3).contiguous())
    return _balanced(terms, scale, W, (True, True))


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
    problem = _Problem.of(W, (start.reduce is not None, start.expand is not None))
    G, (t, q) = start.groups, start.core.shape[:2]
    if problem.norm == 0:
        return start
    scale = problem.size * problem.norm
    # The unit weight's core; sides keep their scale.
    core = start.core.double().reshape(G, t // G, q, -1) / scale
    A = _eye(G, q, core) if start.reduce is None else start.reduce.double().reshape(G, q, -1)
    B = _eye(G, t // G, core) if start.expand is None else start.expand.double().T.reshape(G, t // G, -1)
    terms, _ = _robust(problem, _Terms(A.contiguous(), B.contiguous(), core.contiguous()), sweeps, tolerance, anchor)
    if not anchor:
        return problem.finished(terms)
    dtype = at_least_float32(W).dtype
    return BlockTerms(
        None if start.reduce is None else terms.A.flatten(0, 1).to(dtype),
        (terms.C * scale).reshape(start.core.shape).to(dtype),
        None if start.expand is None else terms.B.flatten(0, 1).T.to(dtype).contiguous(),
        G,
    )


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
    problem = _Problem.of(W)
    A = torch.linalg.qr(fit.reduce.double().reshape(G, q, -1).transpose(1, 2)).Q.transpose(1, 2)
    B = torch.linalg.qr(fit.expand.double().T.reshape(G, t // G, -1).transpose(1, 2)).Q.transpose(1, 2)
    gain = _energies(problem, A.flatten(0, 1), B.flatten(0, 1)).view(G, t // G, G, q).sum((1, 3))
    order = torch.arange(G, device=gain.device)[:, None]
    for count in groups:
        merged = len(order) // count
        chosen = _clustered(gain, merged)
        order = order[chosen].reshape(count, -1)
        gain = gain[chosen][:, chosen].view(count, merged, count, merged).sum((1, 3))
    flat = order.flatten()
    reduce = fit.reduce.reshape(G, q, -1)[flat].flatten(0, 1)
    core = fit.core.reshape(G, t // G, *fit.core.shape[1:])[flat].flatten(0, 1)
    expand = fit.expand.T.reshape(G, t // G, -1)[flat].flatten(0, 1).T.contiguous()
    return BlockTerms(reduce, core, expand, G)


def _check(W: Tensor, rank_in: int | None, rank_out: int | None, groups: int) -> tuple[int, int]:
    """The widths of the core."""
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


def _eye(G: int, n: int, like: Tensor) -> Tensor:
    """The identity as the factor of a whole side, ``(G, n, G n)``."""
    return torch.eye(G * n, dtype=like.dtype, device=like.device).view(G, n, G * n)


@dataclass(frozen=True, slots=True)
class _Terms:
    """All terms at once, float64: ``A`` ``(G, q, I)``, ``B`` ``(G, p, O)``, ``C`` ``(G, p, q, K)``."""

    A: Tensor
    B: Tensor
    C: Tensor

    def beyond(self, before: _Terms, step: float) -> _Terms:
        """Some steps further on the line from the terms before."""
        new = (x + step * (x - y) for x, y in ((self.A, before.A), (self.B, before.B), (self.C, before.C)))
        return _Terms(*new)


@dataclass(frozen=True, slots=True)
class _Problem:
    """A weight of norm 1, laid out for the products with either side's factor; the real one is ``size · norm`` times it."""

    W: Tensor
    """As given."""
    inward: Tensor
    """``(I, K O)``."""
    outward: Tensor
    """``(O, K I)``."""
    size: float
    norm: float
    free: tuple[bool, bool]
    """Whether reduce and expand are there to be fitted."""

    @classmethod
    def of(cls, W: Tensor, free: tuple[bool, bool] = (True, True)) -> _Problem:
        unit, size = normalised(at_least_float32(W).flatten(2))
        unit = unit.double()
        norm = float(unit.norm())
        unit = unit / (norm or 1.0)
        O, I, _ = unit.shape
        return cls(W, unit.permute(1, 2, 0).reshape(I, -1), unit.permute(0, 2, 1).reshape(O, -1), size, norm, free)

    def from_input(self, A: Tensor, K: int) -> Tensor:
        """``W ×₂ A`` as ``(G, q K, O)``."""
        G, q, _ = A.shape
        return (A.flatten(0, 1) @ self.inward).view(G, q * K, -1)

    def from_output(self, B: Tensor, K: int) -> Tensor:
        """``W ×₁ B`` as ``(G, p K, I)``."""
        G, p, _ = B.shape
        return (B.flatten(0, 1) @ self.outward).view(G, p * K, -1)

    def finished(self, terms: _Terms) -> BlockTerms:
        return _balanced(terms, self.size * self.norm, self.W, self.free)


@dataclass(frozen=True, slots=True)
class _Anchor:
    """Where factors are held, and how strongly: μ of each channel of A and B, as a column, and of each entry pair of C."""

    terms: _Terms
    A: Tensor
    B: Tensor
    C: Tensor

    @classmethod
    def at(cls, terms: _Terms, strength: float) -> _Anchor:
        S, P = _gram(terms.A), _gram(terms.B)
        G, p, q, _ = terms.C.shape
        A = _seen(terms.C.transpose(1, 2), P).diagonal().view(G, q, 1)
        B = _seen(terms.C, S).diagonal().view(G, p, 1)
        C = P.diagonal().view(G, p, 1, 1) * S.diagonal().view(G, 1, q, 1)
        # A channel that is dead, or nearly, is held as one of a thousandth of the mean.
        pulls = (strength * curved.clamp_min(1e-3 * float(curved.mean())) for curved in (A, B, C))
        return cls(terms, *pulls)

    def penalty(self, terms: _Terms) -> float:
        """``Σ_X μ_X ‖X − X₀‖²``."""
        held = self.terms
        trio = ((self.A, terms.A, held.A), (self.B, terms.B, held.B), (self.C, terms.C, held.C))
        return sum(float((pull * (x - y).square()).sum()) for pull, x, y in trio)


def _robust(problem: _Problem, terms: _Terms, sweeps: int, tolerance: float, anchor: float = 0.0) -> tuple[_Terms, float]:
    """The fit and its squared error, damped until float32 holds it."""
    held = _Anchor.at(terms, anchor * _lost(problem, terms)) if anchor else None
    damping = _DAMPING
    while True:
        terms, lost = _alternate(problem, terms, sweeps, tolerance, damping, held)
        if _float32_error(terms) <= _ROUNDING or damping > 1:
            return terms, lost
        damping *= 30


def _alternate(
    problem: _Problem, terms: _Terms, sweeps: int, tolerance: float, damping: float, anchor: _Anchor | None
) -> tuple[_Terms, float]:
    """Sweeps of alternating least squares, each from a point extrapolated along the last one where this helps."""
    reach, before, last, lost = 0.5, None, math.inf, math.inf
    for sweep in range(sweeps):
        if anchor is None and sweep % 10 == 0:
            # Orthonormal bases keep the equations well conditioned; an anchored fit must stay in the coordinates of its anchor.
            terms, before = _orthonormal(terms, problem.free), None
        start = terms if before is None else terms.beyond(before, reach)
        new, value, lost_now = _sweep(problem, start, damping, anchor)
        if not value <= last and before is not None:
            reach /= 2
            new, value, lost_now = _sweep(problem, terms, damping, anchor)
        else:
            reach = min(1.2 * reach, 3.0)
        if not value <= last:
            # Only rounding is left.
            break
        terms, before, lost = new, terms, lost_now
        if last - value <= tolerance * max(value, 1e-12):
            break
        last = value
    return terms, lost


def _sweep(problem: _Problem, terms: _Terms, damping: float, anchor: _Anchor | None) -> tuple[_Terms, float, float]:
    """Each factor solved for all terms, given the others: B, C, A, C. The terms, the objective and the squared error."""
    A, B, C = terms.A, terms.B, terms.C
    G, p, q, K = C.shape
    X = problem.from_input(A, K)
    if problem.free[1]:
        B = _solved_side(C, _gram(A), C.flatten(2) @ X, damping, (anchor.B, anchor.terms.B) if anchor else None)
        C = _solved_core(A, B, C, (X @ B.mT).view(G, q, K, p).permute(0, 3, 1, 2), damping, anchor)[0]
    if problem.free[0]:
        Y = problem.from_output(B, K)
        turned = C.transpose(1, 2)
        A = _solved_side(turned, _gram(B), turned.flatten(2) @ Y, damping, (anchor.A, anchor.terms.A) if anchor else None)
        seen = (Y @ A.mT).view(G, p, K, q).transpose(2, 3)
    else:
        seen = (X @ B.mT).view(G, q, K, p).permute(0, 3, 1, 2)
    C, value, lost = _solved_core(A, B, C, seen, damping, anchor)
    new = _Terms(A, B, C)
    return new, value + (anchor.penalty(new) if anchor else 0.0), lost


def _lost(problem: _Problem, terms: _Terms) -> float:
    """The squared error."""
    K = terms.C.shape[3]
    seen = torch.einsum("gpqk,gqi->gpki", terms.C, terms.A).reshape(-1, K * terms.A.shape[2])
    return float((problem.outward - terms.B.flatten(0, 1).T @ seen).square().sum())


def _gram(factor: Tensor) -> Tensor:
    flat = factor.flatten(0, 1)
    return flat @ flat.T


def _seen(C: Tensor, S: Tensor) -> Tensor:
    """The normal matrix of the side before the cores: entry (g p, h p′) is ``Σ_k C_gk S_gh C_hkᵀ``, where S is the Gram of the
    side behind them.
    """  # noqa: D205 - a formula
    G, p, q, K = C.shape
    if p == q == 1:
        flat = C.reshape(G, K)
        return S * (flat @ flat.T)
    behind = S.view(G * q, G, q).transpose(0, 1) @ C.transpose(1, 2).flatten(2)  # h, (g q), (p′ K)
    behind = behind.view(G, G, q, p, K).permute(1, 2, 4, 0, 3).reshape(G, q * K, G * p)
    return (C.flatten(2) @ behind).reshape(G * p, G * p)


def _own(H: Tensor, n: int) -> Tensor:
    """The diagonal blocks of a matrix, a view ``(n, n, G)``."""
    G = len(H) // n
    return H.view(G, n, G, n).diagonal(dim1=0, dim2=2)


def _solved_side(C: Tensor, S: Tensor, seen: Tensor, damping: float, anchor: tuple[Tensor, Tensor] | None) -> Tensor:
    """A side's factor ``(G, p, O)`` for all terms at once, from what it sees of the weight."""
    H = _seen(C, S)
    _own(H, C.shape[1]).mul_(1 + damping)
    if anchor:
        pull, value = anchor
        H.diagonal().add_(pull.flatten())
        seen = seen + pull * value
    return _solve(H, seen.flatten(0, 1)).view_as(seen)


def _solve(H: Tensor, right: Tensor) -> Tensor:
    """``H⁻¹ right`` for a positive semi-definite matrix, scaled to a unit diagonal and damped at the edge of float64."""
    root = H.diagonal().sqrt()
    root = root.clamp_min(float(root.max()) * 1e-12 + 1e-150)
    unit = H / root / root[:, None]
    L = None
    for jitter in (1e-12, 1e-10, 1e-8, 1e-6):
        L, failed = torch.linalg.cholesky_ex(unit + jitter * torch.eye(len(unit), dtype=unit.dtype, device=unit.device))
        if not int(failed):
            break
    assert L is not None
    return torch.cholesky_solve(right / root[:, None], L) / root[:, None]


def _solved_core(
    A: Tensor, B: Tensor, C: Tensor, seen: Tensor, damping: float, anchor: _Anchor | None
) -> tuple[Tensor, float, float]:
    """The cores for all terms at once, the damped squared error, and the squared error.

    The normal equations are ``Σ_h P_gh C_h S_hg + λ P_gg C_g S_gg = seen_g``, where S and P are the Grams of A and B.
    """
    G, p, q, K = C.shape
    S, P = _gram(A), _gram(B)
    pull = anchor.C if anchor else seen.new_zeros(1, 1, 1, 1)
    right = seen + pull * anchor.terms.C if anchor else seen
    own_P, own_S = _own(P, p).permute(2, 0, 1), _own(S, q).permute(2, 0, 1)
    if (G * p * q) ** 2 <= _DIRECT * K * G * (p + q):
        N = (P.view(G, p, 1, G, p, 1) * S.view(G, 1, q, G, 1, q)).reshape(G * p * q, G * p * q)
        _own(N, p * q).mul_(1 + damping)
        C = _solve(N + torch.diag(pull.expand(G, p, q, 1).flatten()) if anchor else N, right.reshape(-1, K))
        image = (N @ C).view(G, p, q, K)
        C = C.view(G, p, q, K)
    else:
        columns, rows = S.view(G, q, G * q), P.view(G, p, G * p)

        def normal(C: Tensor) -> Tensor:
            inner = C.transpose(2, 3).reshape(G, p * K, q)
            seen = (inner @ columns).view(G * p, K, G, q).permute(2, 0, 1, 3).reshape(G, G * p, K * q)
            all_terms = rows @ seen
            own = own_P @ (inner @ own_S).view(G, p, K * q)
            return (all_terms + damping * own).view(G, p, K, q).transpose(2, 3)

        # Each term's own block, inverted in the eigenbases of its two Grams.
        (at_P, turn_P), (at_S, turn_S) = torch.linalg.eigh(own_P), torch.linalg.eigh(own_S)
        curved = (1 + damping) * at_P.view(G, p, 1, 1) * at_S.view(G, 1, q, 1) + pull.mean((1, 2), keepdim=True)
        curved = curved.clamp_min(float(curved.max()) * 1e-12 + 1e-280)

        def near_inverse(C: Tensor) -> Tensor:
            turned = torch.einsum("gpa,gpqk,gqb->gabk", turn_P, C, turn_S) / curved
            return torch.einsum("gpa,gabk,gqb->gpqk", turn_P, turned, turn_S)

        C = _conjugate_gradients(lambda C: normal(C) + pull * C, near_inverse, right, C)
        image = normal(C)
    damped = 1 - 2 * float((C * seen).sum()) + float((C * image).sum())
    size = float((C * torch.einsum("gab,gbqk,gqr->gark", own_P, C, own_S)).sum())
    return C, damped, max(damped - damping * size, 0.0)


def _conjugate_gradients(
    normal: Callable[[Tensor], Tensor], near_inverse: Callable[[Tensor], Tensor], right: Tensor, x: Tensor, steps: int = 5
) -> Tensor:
    """Some steps towards ``normal(x) = right``; the quadratic's value never grows."""
    rest = right - normal(x)
    scaled = near_inverse(rest)
    direction, weight = scaled, float((rest * scaled).sum())
    enough = 1e-16 * float((right * near_inverse(right)).sum())
    for _ in range(steps):
        if weight <= enough:
            break
        image = normal(direction)
        step = weight / float((direction * image).sum())
        x, rest = x + step * direction, rest - step * image
        scaled = near_inverse(rest)
        new = float((rest * scaled).sum())
        direction, weight = scaled + (new / weight) * direction, new
    return x


def _orthonormal(terms: _Terms, free: tuple[bool, bool] = (True, True)) -> _Terms:
    """The same fit, each term with orthonormal bases: its core then has the term's norm."""
    A, B, C = terms.A, terms.B, terms.C
    if free[0]:
        Q, R = torch.linalg.qr(A.mT)
        A, C = Q.mT.contiguous(), torch.einsum("gpqk,grq->gprk", C, R)
    if free[1]:
        Q, R = torch.linalg.qr(B.mT)
        B, C = Q.mT.contiguous(), torch.einsum("gpqk,grp->grqk", C, R)
    return _Terms(A, B, C.contiguous())


def _float32_error(terms: _Terms) -> float:
    """What rounding the factors to float32 changes of the fit, as a share of it."""

    def composed(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return B.flatten(0, 1).T @ torch.einsum("gpqk,gqi->gpik", C, A).reshape(B.shape[0] * B.shape[1], -1)

    exact = composed(terms.A, terms.B, terms.C)
    rounded = composed(*(part.float().double() for part in (terms.A, terms.B, terms.C)))
    return float((exact - rounded).norm()) / max(float(exact.norm()), 1e-300)


def _balanced(terms: _Terms, scale: float, W: Tensor, free: tuple[bool, bool]) -> BlockTerms:
    """Factors of a scaled fit, the scale spread over them: channel by channel, then so that their norms are equal."""
    terms = _orthonormal(terms, free)
    A, B, C = terms.A, terms.B, terms.C
    share = 1 / (1 + sum(free))
    if free[1]:
        root = _spread(C.norm(dim=(2, 3)), share)
        C, B = C / root[..., None, None], B * root[..., None]
    if free[0]:
        root = _spread(C.norm(dim=(1, 3)), share)
        C, A = C / root[:, None, :, None], A * root[..., None]
    parts = [part for part, there in ((A, free[0]), (B, free[1]), (C, True)) if there]
    norms = [float(part.norm()) for part in parts]
    if min(norms) > 0 and scale > 0:
        mean = math.prod(norm ** (1 / len(norms)) for norm in norms) * scale ** (1 / len(norms))
        A, B, C = (
            part * (mean / float(part.norm())) if there else part for part, there in ((A, free[0]), (B, free[1]), (C, True))
        )
    dtype = at_least_float32(W).dtype
    G, p, q, _ = C.shape
    return BlockTerms(
        A.flatten(0, 1).to(dtype) if free[0] else None,
        C.reshape(G * p, q, *W.shape[2:]).to(dtype),
        B.flatten(0, 1).T.to(dtype).contiguous() if free[1] else None,
        G,
    )


def _spread(norm: Tensor, share: float) -> Tensor:
    """For each channel the power of its norm that goes over to the factor beside it; never 0."""
    return norm.clamp_min(float(norm.max()) * 1e-6 + 1e-300).pow(share)


def _one_sided(W: Tensor, rank_in: int | None, rank_out: int | None, groups: int) -> BlockTerms:
    """The best fit with a whole side: each term alone sees its channels there, so it is that slice's truncated SVD."""
    problem = _Problem.of(W, (rank_in is not None, rank_out is not None))
    O, I, *_ = W.shape
    unit = problem.outward.view(O, -1, I).transpose(1, 2)
    G, K = groups, unit.shape[2]
    if rank_in is not None:
        slices = unit.reshape(G, O // G, I, K)  # G, p, I, K
        A = _bases(slices.transpose(1, 2).flatten(2), rank_in // G)
        terms = _Terms(A, _eye(G, O // G, unit), torch.einsum("gpik,gqi->gpqk", slices, A))
    elif rank_out is not None:
        slices = unit.reshape(O, G, I // G, K).transpose(0, 1)  # G, O, q, K
        B = _bases(slices.flatten(2), rank_out // G)
        terms = _Terms(_eye(G, I // G, unit), B, torch.einsum("goqk,gpo->gpqk", slices, B))
    else:
        core = _own_blocks(unit, G)
        terms = _Terms(_eye(G, I // G, unit), _eye(G, O // G, unit), core)
    return problem.finished(terms)


def _own_blocks(W: Tensor, G: int) -> Tensor:
    """The diagonal blocks of a weight ``(t, s, K)``, as ``(G, t / G, s / G, K)``."""
    t, s, K = W.shape
    return W.reshape(G, t // G, G, s // G, K).diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def _bases(M: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of matrices ``(G, m, n)`` as rows, ``(G, rank, m)``."""
    U: Tensor = torch.linalg.svd(M, full_matrices=rank > M.shape[2]).U
    return U[..., :rank].mT.contiguous()


def _cut(problem: _Problem, s: int, t: int, G: int) -> tuple[_Terms, float]:
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
        core = _own_blocks(torch.einsum("oik,ot,is->tsk", unit, U, V), G)
        terms = _Terms(V.T.reshape(G, s // G, I).contiguous(), U.T.reshape(G, t // G, O).contiguous(), core)
        found.append((terms, float(core.square().sum())))
    return max(found, key=lambda pair: pair[1])


def _start(problem: _Problem, s: int, t: int, G: int, seed: int) -> _Terms:
    """Terms spanned by the largest singular triples of the weight's spatial modes, those that interact most together."""
    p, q = t // G, s // G
    O, I = len(problem.outward), len(problem.inward)
    K = problem.inward.shape[1] // O
    r = max(p, q)
    U, V, values = _triples(problem, G * r, seed)
    if r > 1:
        chosen = _clustered(_energies(problem, V, U), r)
        U, V, values = U[chosen], V[chosen], values[chosen]
    U, V = U.view(G, r, O), V.view(G, r, I)
    heavy = values.view(G, r, 1)
    # The thinner side of a term is the best basis of those it is given.
    B = U if p == r else _bases((heavy * U).mT, p)
    A = V if q == r else _bases((heavy * V).mT, q)
    # Pushed off the symmetric points at which alternating updates would stand still.
    generator = torch.Generator().manual_seed(seed)
    A, B = (basis + _PUSH * basis.shape[2] ** -0.5 * _normal(basis.shape, generator, basis.device) for basis in (A, B))
    C = torch.zeros(G, p, q, K, dtype=A.dtype, device=A.device)
    terms = _orthonormal(_Terms(A, B, C))
    seen = (problem.from_input(terms.A, K) @ terms.B.mT).view(G, q, K, p).permute(0, 3, 1, 2)
    return _Terms(terms.A, terms.B, _solved_core(terms.A, terms.B, C, seen, 1e-3, None)[0])


def _triples(problem: _Problem, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
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
    generator = torch.Generator().manual_seed(seed)
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


def _normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Normal numbers that are the same on every device."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(device)


def _energies(problem: _Problem, V: Tensor, U: Tensor) -> Tensor:
    """``Σ_k (u W_k v)²`` for every pair of output vectors ``(n, O)`` and input vectors ``(m, I)``: ``(n, m)``."""
    seen = (V @ problem.inward).view(len(V), -1, U.shape[1]) @ U.T
    return seen.square().sum(1).T


def _clustered(gain: Tensor, size: int) -> Tensor:
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
