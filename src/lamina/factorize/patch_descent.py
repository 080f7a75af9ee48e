"""Block terms in a metric of patches: all factors at once, downhill from a fit by channels.

    W   weight (O, I, K)     H   moment of patches (I K, I K)     λ   damping
    Δ   W − Σ_g T_g          G   moment of gradients (O, O)       T   a term

    tr(G Δ H Δᵀ) + λ Σ_g ‖T_g‖²

The equations of one factor, whose matrix mixes all patches, cost no less to solve than a step of all three. So these are steps
of L-BFGS (Liu and Nocedal, 1989) with a line search; one costs a product of the error with H, or a few. The weight comes
whitened by channels, where H is near the identity. The second summand is that of `least_squares`, for the same reason.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_term import BlockTerms, assembled
from .least_squares import DAMPING

_HISTORY = 20
"""Steps whose curvature is remembered."""
_ENOUGH = 1e-7
"""Of the error without factors: a step that gains less is the last."""


def descended(W: Tensor, fit: BlockTerms, H: Tensor, G: Tensor | None, steps: int) -> BlockTerms:
    """Factors whose error is no larger than that of those given.

    Args:
        W: ``(O, I, *kernel)``, float64.
        fit: Where it starts.
        H: In the order of ``W.flatten(1)``, float64.
        G: float64; None: the identity.
        steps: Most steps done.
    """
    factors = [None if each is None else each.double().clone() for each in (fit.core, fit.reduce, fit.expand)]
    free = [each for each in factors if each is not None]
    whole = float(_lost(W, [torch.zeros_like(free[0]), *factors[1:]], fit.groups, H, G))
    if not whole > 0 or steps < 1:
        return fit
    before = float(_lost(W, factors, fit.groups, H, G))
    share = DAMPING * float(W.square().sum()) ** -1
    with torch.enable_grad():
        for each in free:
            each.requires_grad_()
        optimizer = torch.optim.LBFGS(
            free,
            max_iter=steps,
            max_eval=2 * steps,
            tolerance_grad=0.0,
            tolerance_change=_ENOUGH,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = _lost(W, factors, fit.groups, H, G) / whole + share * _sizes(factors, fit.groups)
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    factors = [None if each is None else each.detach() for each in factors]
    after = float(_lost(W, factors, fit.groups, H, G))
    core, reduce, expand = factors
    assert core is not None
    return BlockTerms(reduce, core, expand, fit.groups) if after < before else fit


def _lost(W: Tensor, factors: list[Tensor | None], groups: int, H: Tensor, G: Tensor | None) -> Tensor:
    """The error, whose gradient takes no second product with H."""
    core, reduce, expand = factors
    assert core is not None
    rest = (W - assembled(core, reduce, expand, groups)).flatten(1)
    with torch.no_grad():
        seen = rest @ H if G is None else G @ (rest @ H)
    value: Tensor = (seen * rest).sum()
    return 2 * value - value.detach()


def _sizes(factors: list[Tensor | None], groups: int) -> Tensor:
    """``Σ_g ‖T_g‖²``."""
    core, reduce, expand = factors
    assert core is not None
    t, q = core.shape[:2]
    C = core.reshape(groups, t // groups, q, -1)
    seen = C
    if reduce is not None:
        A = reduce.view(groups, q, -1)
        seen = torch.einsum("gpqk,gqr->gprk", seen, A @ A.mT)
    if expand is not None:
        B = expand.T.reshape(groups, t // groups, -1)
        seen = torch.einsum("gpr,grqk->gpqk", B @ B.mT, seen)
    size: Tensor = (C * seen).sum()
    return size
