"""Damped alternating least squares: block terms fitted to a weight from where they stand, one factor at a time for all terms.

    W   weight of norm 1, (O, I, K)     A   reduce (G, q, I)     S   Gram of A     λ   damping
    G   groups, one a term              B   expand (G, p, O)     P   Gram of B     μ   pull of an anchor
    g, h   a term each                  C   core (G, p, q, K)    T   a term

    ‖W − Σ_g T_g‖² + λ Σ_g ‖T_g‖²,   T_g = C_g ×₁ B_gᵀ ×₂ A_gᵀ

The second summand is what keeps terms from growing without bound while they cancel (a best fit need not exist without it). It
does not depend on how a term is split into its factors, and in the normal equations of each factor it is a factor 1 + λ on the
diagonal blocks. An anchor adds ``Σ_X μ_X ‖X − X₀‖²`` over the factors X.

Where a fit starts is the business of `block_term_start`; what a user asks for, of `block_term`. All is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .spectral import at_least_float32, normalised, root

DAMPING = 1e-5
"""λ, of a weight of norm 1. The terms' norms are held to some hundreds with it, so that float32 holds the fit."""

_DIRECT = 100
"""Where the cores' n unknowns a tap are solved for directly: while n² is at most this many times the K (s + t) of a step of
conjugate gradients, which is the way for all larger ones."""


@dataclass(frozen=True, slots=True)
class Terms:
    """All terms at once, float64: ``A`` ``(G, q, I)``, ``B`` ``(G, p, O)``, ``C`` ``(G, p, q, K)``."""

    A: Tensor
    B: Tensor
    C: Tensor

    def beyond(self, before: Terms, step: float) -> Terms:
        """Some steps further on the line from the terms before."""
        new = (x + step * (x - y) for x, y in ((self.A, before.A), (self.B, before.B), (self.C, before.C)))
        return Terms(*new)


@dataclass(frozen=True, slots=True)
class Problem:
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

    @property
    def roots(self) -> tuple[float, float]:
        """By how much each factor of a fit of the real weight is larger than that of the same fit of this one: their product.

        It is beyond float64 where there is only one factor and the weight is at the end of the range.
        """
        factors = 1 + sum(self.free)
        return root(self.size, factors), root(self.norm, factors)

    @classmethod
    def of(cls, W: Tensor, free: tuple[bool, bool] = (True, True)) -> Problem:
        """That of a weight ``(O, I, *kernel)``, any floating dtype."""
        unit, size = normalised(at_least_float32(W).flatten(2))
        unit = unit.double()
        norm = float(unit.norm())
        unit = unit / (norm or 1.0)
        O, I, _ = unit.shape
        return cls(W, unit.permute(1, 2, 0).reshape(I, -1), unit.permute(0, 2, 1).reshape(O, -1), size, norm, free)

    def from_input(self, A: Tensor, K: int) -> Tensor:
        """``W ×₂ A`` as ``(G, q K, O)``."""
        G, q, _ = A.shape
        return (A @ self.inward).view(G, q * K, -1)

    def from_output(self, B: Tensor, K: int) -> Tensor:
        """``W ×₁ B`` as ``(G, p K, I)``."""
        G, p, _ = B.shape
        return (B @ self.outward).view(G, p * K, -1)


@dataclass(frozen=True, slots=True)
class _Anchor:
    """Where factors are held, and how strongly: μ of each channel of A and B, as a column, and of each entry pair of C."""

    terms: Terms
    A: Tensor
    B: Tensor
    C: Tensor

    @classmethod
    def at(cls, terms: Terms, strength: float) -> _Anchor:
        S, P = _gram(terms.A), _gram(terms.B)
        G, p, q, _ = terms.C.shape
        A = _seen(terms.C.transpose(1, 2), P).diagonal().view(G, q, 1)
        B = _seen(terms.C, S).diagonal().view(G, p, 1)
        C = P.diagonal().view(G, p, 1, 1) * S.diagonal().view(G, 1, q, 1)
        # A channel that is dead, or nearly, is held as one of a thousandth of the mean.
        pulls = (strength * curved.clamp_min(1e-3 * float(curved.mean())) for curved in (A, B, C))
        return cls(terms, *pulls)

    def penalty(self, terms: Terms) -> float:
        """``Σ_X μ_X ‖X − X₀‖²``."""
        held = self.terms
        trio = ((self.A, terms.A, held.A), (self.B, terms.B, held.B), (self.C, terms.C, held.C))
        return sum(float((pull * (x - y).square()).sum()) for pull, x, y in trio)


def alternate(problem: Problem, terms: Terms, sweeps: int, tolerance: float, anchor: float = 0.0) -> tuple[Terms, float]:
    """Sweeps of alternating least squares, each from a point extrapolated along the last one where this helps.

    Args:
        problem: The weight.
        terms: Where it starts.
        sweeps: Most sweeps done.
        tolerance: Stop when a sweep lowers the objective by less than this share of it.
        anchor: How strongly the factors are held to the start, see `refit`; 0 leaves them free.

    Returns:
        The terms, and their squared error for the weight of norm 1.
    """
    held = _Anchor.at(terms, anchor * _lost(problem, terms)) if anchor else None
    reach, before, last, lost = 0.5, None, math.inf, math.inf
    for sweep in range(sweeps):
        if held is None and sweep % 10 == 0:
            # Orthonormal bases keep the equations well conditioned; an anchored fit must stay in the coordinates of its anchor.
            terms, before = orthonormal(terms, problem.free), None
        start = terms if before is None else terms.beyond(before, reach)
        new, value, lost_now = _sweep(problem, start, held)
        if not value <= last and before is not None:
            reach /= 2
            new, value, lost_now = _sweep(problem, terms, held)
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


def _sweep(problem: Problem, terms: Terms, anchor: _Anchor | None) -> tuple[Terms, float, float]:
    """Each factor solved for all terms, given the others: B, C, A, C. The terms, the objective and the squared error."""
    A, B, C = terms.A, terms.B, terms.C
    G, p, q, K = C.shape
    X = problem.from_input(A, K)
    if problem.free[1]:
        B = _solved_side(C, _gram(A), C.flatten(2) @ X, (anchor.B, anchor.terms.B) if anchor else None)
        C = solved_core(A, B, C, (X @ B.mT).view(G, q, K, p).permute(0, 3, 1, 2), anchor)[0]
    if problem.free[0]:
        Y = problem.from_output(B, K)
        turned = C.transpose(1, 2)
        A = _solved_side(turned, _gram(B), turned.flatten(2) @ Y, (anchor.A, anchor.terms.A) if anchor else None)
        seen = (Y @ A.mT).view(G, p, K, q).transpose(2, 3)
    else:
        seen = (X @ B.mT).view(G, q, K, p).permute(0, 3, 1, 2)
    C, value, lost = solved_core(A, B, C, seen, anchor)
    new = Terms(A, B, C)
    return new, value + (anchor.penalty(new) if anchor else 0.0), lost


def _lost(problem: Problem, terms: Terms) -> float:
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


def _solved_side(C: Tensor, S: Tensor, seen: Tensor, anchor: tuple[Tensor, Tensor] | None) -> Tensor:
    """A side's factor ``(G, p, O)`` for all terms at once, from what it sees of the weight."""
    H = _seen(C, S)
    _own(H, C.shape[1]).mul_(1 + DAMPING)
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


def solved_core(
    A: Tensor, B: Tensor, C: Tensor, seen: Tensor, anchor: _Anchor | None, damping: float = DAMPING
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

        C = conjugate_gradients(lambda C: normal(C) + pull * C, near_inverse, right, C)
        image = normal(C)
    damped = 1 - 2 * float((C * seen).sum()) + float((C * image).sum())
    size = float((C * torch.einsum("gab,gbqk,gqr->gark", own_P, C, own_S)).sum())
    return C, damped, max(damped - damping * size, 0.0)


def conjugate_gradients(
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


def orthonormal(terms: Terms, free: tuple[bool, bool] = (True, True)) -> Terms:
    """The same fit, each term with orthonormal bases: its core then has the term's norm."""
    A, B, C = terms.A, terms.B, terms.C
    if free[0]:
        Q, R = torch.linalg.qr(A.mT)
        A, C = Q.mT.contiguous(), torch.einsum("gpqk,grq->gprk", C, R)
    if free[1]:
        Q, R = torch.linalg.qr(B.mT)
        B, C = Q.mT.contiguous(), torch.einsum("gpqk,grp->grqk", C, R)
    return Terms(A, B, C.contiguous())
