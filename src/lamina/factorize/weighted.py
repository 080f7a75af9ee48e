"""Factors of a weight that are best in a metric, and the prices of ranks in it.

    W   weight (O, I, *kernel)     G½, H½   roots of the metric's moments     ½ both sides: W → G½ W H½

In a metric of channels the whitened weight is factorised in the plain norm, and the roots' inverses go to the outer factors.
That is exact wherever a factor stands on the side: any matrix can be multiplied into it. A side left whole takes the inverse
into its core, which in groups holds blocks on the diagonal alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .block_term import BlockTerms, balanced, block_term, core_widths
from .block_term_start import own_blocks
from .least_squares import Terms
from .low_rank import left_out, low_rank
from .metric import Metric, on_sides
from .patch_descent import descended
from .patch_regression import Fit, Problem, alternate, input_whole
from .pure import pure
from .separable import filtered, left_out_separable, separable
from .spectral import at_least_float32, evened, normalised
from .tucker import Tucker2, hooi, hosvd, left_out_of_sides


@pure
def weighted_low_rank(W: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """Best factors of a weight at a given rank, in a metric of channels.

    Args:
        W: Weight, ``(O, I)``, any floating dtype.
        rank: Number of pairs kept, ``1 ≤ rank ≤ min(O, I)``.
        metric: What an error costs.

    Returns:
        ``A``, ``(rank, I)``, and ``B``, ``(O, rank)``, on the device of ``W`` and in float32 or better. The error in the metric
        is the squared singular values of the whitened weight that are left out (`price_of_ranks`), and ``‖a_i‖ = ‖b_i‖`` for
        each of the pairs. The first r pairs are the best factors of rank r.

    Raises:
        RankError: The rank is outside its range.
        LaminaError: The metric is not one of such a weight.
    """
    metric = metric.fitting(W)
    dtype = at_least_float32(W).dtype
    W, size = normalised(at_least_float32(W))
    A, B = low_rank(metric.whiten(W), rank)
    A = on_sides(A, None if metric.inputs is None else metric.inputs.inverse, None)
    B = on_sides(B, None, None if metric.gradients is None else metric.gradients.inverse)
    # The inverse roots made the two of a pair unequal. Where they vanish any scale will do, as in `low_rank`.
    a, b = (norm.clamp_min(float(norm.max()) * 1e-12 + 1e-300) for norm in (A.norm(dim=1), B.norm(dim=0)))
    root = (b / a).sqrt()
    half = size**0.5
    return (A * root[:, None] * half).to(dtype), (B / root * half).to(dtype)


@pure
def price_of_ranks(W: Tensor, metric: Metric) -> Tensor:
    """The error in a metric of channels that `weighted_low_rank` makes at every rank.

    Args:
        W: Weight, ``(O, I)``, any floating dtype.
        metric: What an error costs.

    Returns:
        ``(min(O, I) + 1,)``, float64, on the CPU; entry ``r`` is that of rank ``r``, the first is ``metric.error(W)``.

    Raises:
        LaminaError: The metric is not one of such a weight.
    """
    white, square = whitened(W, metric)
    return left_out(white) * square


@pure
def weighted_separable(W: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """`separable` of the weight whitened by the moments of channels, the best there is in such a metric.

    In a metric of patches the filters of the weight alone are returned where they cost less.

    Args:
        W: Weight, ``(O, I, kh, kw)``, any floating dtype.
        rank: Number of filters between, ``1 ≤ rank ≤ min(I kh, O kw)``.
        metric: What an error costs.

    Returns:
        ``V``, ``(rank, I, kh, 1)``, and ``H``, ``(O, rank, 1, kw)``, on the device of ``W``, in float32 or better.

    Raises:
        RankError: The rank is outside its range.
        LaminaError: The metric is not one of such a weight.
    """
    metric = metric.fitting(W)
    dtype = at_least_float32(W).dtype
    V, H = separable(metric.whiten(W), rank)
    V = on_sides(V, None if metric.inputs is None else metric.inputs.inverse, None)
    H = on_sides(H, None, None if metric.gradients is None else metric.gradients.inverse)
    if metric.patches is not None:
        V, H = min((V, H), separable(W, rank), key=lambda fit: metric.error(W.double() - filtered(*fit)))
    even = (float(H.norm()) / (float(V.norm()) or 1.0)) ** 0.5 or 1.0
    return (V * even).to(dtype), (H / even).to(dtype)


@pure
def price_of_separable(W: Tensor, metric: Metric) -> Tensor:
    """The error in a metric of channels that `weighted_separable` makes at every rank.

    Args:
        W: Weight, ``(O, I, kh, kw)``, any floating dtype.
        metric: What an error costs.

    Returns:
        ``(min(I kh, O kw) + 1,)``, float64, on the CPU.

    Raises:
        LaminaError: The metric is not one of such a weight.
    """
    white, square = whitened(W, metric)
    return left_out_separable(white) * square


@pure
def weighted_tucker(
    W: Tensor, rank_in: int | None, rank_out: int | None, metric: Metric, *, sweeps: int = 10, tolerance: float = 1e-3
) -> Tucker2:
    """Tucker-2 in a metric: `hooi` of the whitened weight, or the bases of `hooi` of the weight itself where these are better.

    A metric of patches does not split into sides. The fit in that of its channels is where it starts; then the factors are
    solved for in turn (`patch_regression`), from whichever of the two input bases is better. With the input side whole the best
    fit is known and returned. Where patches are known along some directions of the channels, and no more are asked for, factors
    are fitted to the layer's outputs in the same way, along them.

    Args:
        W: Weight, ``(O, I, *kernel)``, any floating dtype.
        rank_in: ``s``, between 1 and I; None leaves the input side whole.
        rank_out: ``t``, between 1 and O; None leaves the output side whole.
        metric: What an error costs.
        sweeps: Most sweeps done, in a metric of patches.
        tolerance: Stop when a sweep lowers the error by less than this share of it.

    Returns:
        The factors, on the device of ``W``, in float32 or better, their Frobenius norms equal. Their error in the metric is at
        most that of the best core on the bases of `hooi`, and with a side whole in a metric of channels the least possible.
        Along directions that holds of the error there, of what these tell of both.

    Raises:
        RankError: A rank is outside its range.
        LaminaError: The metric is not one of such a weight.
    """
    core_widths(W, rank_in, rank_out, 1)
    metric = metric.fitting(W)
    if rank_in is None and rank_out is None:
        return hooi(W, None, None)
    unit, sizes = _unit(W)
    if metric.along is not None and rank_in is not None and rank_in <= len(metric.along.directions):
        fit = _tucker_along(unit, rank_in, rank_out, metric, sweeps, tolerance, sizes)
    elif metric.patches is None:
        fit = _unwhitened(_tucker_of_channels(unit, rank_in, rank_out, metric), metric)
    else:
        fit = _tucker_of_patches(unit, rank_in, rank_out, metric, sweeps, tolerance)
    return _in_own_bases(fit, W, sizes)


@pure
def leading_directions(W: Tensor, count: int, metric: Metric) -> Tensor:
    """The directions of the input channels that a weight sees most of, in a metric of channels.

    Args:
        W: Weight, ``(O, I, *kernel)``, any floating dtype.
        count: p, between 1 and I.
        metric: What an error costs.

    Returns:
        E, ``(p, I)``, float64: along them inputs are uncorrelated, and of size 1 if the metric is that of the inputs.
    """
    metric = metric.fitting(W).of_channels()
    V = _bases(metric.whiten(_unit(W)[0]), count, None)[0]
    assert V is not None
    return on_sides(V.T, None if metric.inputs is None else metric.inputs.inverse, None)


@pure
def price_of_sides(W: Tensor, metric: Metric) -> Tensor:
    """The error in a metric of channels at every pair of ranks, by one core: that of `hosvd` of the whitened weight.

    `weighted_tucker` makes none that is larger in such a metric. In a metric of patches this is the price by its channels.

    Args:
        W: Weight, ``(O, I, *kernel)``, any floating dtype.
        metric: What an error costs.

    Returns:
        ``(O + 1, I + 1)``, float64, on the CPU; entry ``[t, s]`` is that of rank out ``t`` and rank in ``s``, and the last row
        and column are those of a whole side.

    Raises:
        LaminaError: The metric is not one of such a weight.
    """
    white, square = whitened(W, metric)
    return left_out_of_sides(white) * square


@pure
def weighted_block_term(
    W: Tensor,
    rank_in: int | None,
    rank_out: int | None,
    groups: int,
    metric: Metric,
    *,
    sweeps: int = 100,
    tolerance: float = 2e-5,
    tucker_sweeps: int = 10,
    steps: int = 40,
    seed: int = 0,
) -> BlockTerms:
    """Block terms in a metric: `block_term` of the weight whitened by the moments of channels; in one group `weighted_tucker`.

    With both sides factored the 1×1s of a fit of the whitened weight and those of the weight itself go over into each other. A
    core that reads or writes the layer's own channels in groups cannot take up a root that mixes the groups: of a whole side
    only the blocks of its moment on the diagonal count therefore. In a metric of patches that fit is where all factors go
    downhill from together (`patch_descent`). Where the fit of the weight alone costs less after all it is returned.

    Args:
        W: Weight, ``(O, I, *kernel)``, any floating dtype.
        rank_in: ``s``, between 1 and I; None leaves the input side whole.
        rank_out: ``t``, between 1 and O; None leaves the output side whole.
        groups: ``G``, a divisor of both widths.
        metric: What an error costs.
        sweeps: Most sweeps done.
        tolerance: Stop when a sweep lowers the squared error by less than this share of it.
        tucker_sweeps: Most sweeps of `weighted_tucker`, which in a metric of patches cost far more.
        steps: Most steps downhill, in a metric of patches.
        seed: Of the small push that the start is given. The global generator is not used.

    Returns:
        The factors, on the device of ``W``, in float32 or better, their Frobenius norms equal.

    Raises:
        RankError: A rank is outside its range, or the groups do not divide the widths.
        LaminaError: The metric is not one of such a weight.
    """
    core_widths(W, rank_in, rank_out, groups)
    if groups == 1:
        tucker = weighted_tucker(W, rank_in, rank_out, metric, sweeps=tucker_sweeps)
        return BlockTerms(tucker.reduce, tucker.core, tucker.expand, 1)
    metric = metric.fitting(W)
    free = (rank_in is not None, rank_out is not None)
    if not any(free):
        return block_term(W, None, None, groups)
    unit, sizes = _unit(W)
    space = metric.in_blocks(*(1 if factored else groups for factored in free))
    white = block_term(space.whiten(unit), rank_in, rank_out, groups, sweeps=sweeps, tolerance=tolerance, seed=seed)
    if metric.patches is not None:
        white = descended(space.whiten(unit), white, *_whitened_by(space, metric), steps)
    fit = _unwhitened(white, space)
    plain = block_term(unit, rank_in, rank_out, groups, sweeps=sweeps, tolerance=tolerance, seed=seed)
    fit = min(fit, plain, key=lambda fit: metric.error(unit - fit.composed()))
    return balanced(_terms(fit), W, free, *sizes)


def _unit(W: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """A weight at norm 1, in float64, and the two sizes that it is divided by: the same to the last bit at any size."""
    unit, size = normalised(at_least_float32(W))
    unit = unit.double()
    norm = float(unit.norm()) or 1.0
    return unit / norm, (size, norm)


def whitened(W: Tensor, metric: Metric) -> tuple[Tensor, float]:
    """The whitened weight in float64, in whose plain norm a metric of channels is, and what its squared norm costs."""
    metric = metric.fitting(W)
    unit, size = normalised(at_least_float32(W))
    white = metric.whiten(unit)
    return white, float(white.square().sum()) * metric.scale * size * size


def _whitened_by(space: Metric, metric: Metric) -> tuple[Tensor, Tensor | None]:
    """The moments of patches and gradients that weights are priced by which another metric of channels has whitened.

    None for the identity, which is left of gradients where that metric has all of their moment.
    """
    assert metric.patches is not None and space.inputs is not None
    near, I = space.inputs.inverse, len(space.inputs.moment)
    H = torch.tensordot(near, metric.patches.view(I, -1), dims=([1], [0])).view(len(metric.patches), I, -1)
    H = torch.einsum("nik,ij->njk", H, near).reshape(len(metric.patches), -1)
    if metric.gradients is None or space.gradients is None or space.gradients is metric.gradients:
        return H, None
    far = space.gradients.inverse
    return H, far @ metric.gradients.moment @ far


def _unwhitened(fit: BlockTerms, metric: Metric) -> BlockTerms:
    """The fit of a weight from that of the whitened one: each inverse root goes to the factor on its side, or into the core."""
    G, (t, q, *kernel) = fit.groups, fit.core.shape
    core, reduce, expand = fit.core.reshape(G, t // G, q, -1), fit.reduce, fit.expand
    if metric.inputs is not None:
        inverse = metric.inputs.inverse
        if reduce is not None:
            reduce = reduce @ inverse
        else:
            core = torch.einsum("gpqk,gqr->gprk", core, own_blocks(inverse[..., None], G)[..., 0])
    if metric.gradients is not None:
        inverse = metric.gradients.inverse
        if expand is not None:
            expand = inverse @ expand
        else:
            core = torch.einsum("grp,gpqk->grqk", own_blocks(inverse[..., None], G)[..., 0], core)
    return BlockTerms(reduce, core.reshape(t, q, *kernel), expand, G)


def _terms(fit: BlockTerms) -> Terms:
    """The factors of each term; those of a whole side are stand-ins of one row."""
    G, (t, q) = fit.groups, fit.core.shape[:2]
    core = fit.core.reshape(G, t // G, q, -1)
    A = core.new_ones(G, 1, 1) if fit.reduce is None else fit.reduce.reshape(G, q, -1)
    B = core.new_ones(G, 1, 1) if fit.expand is None else fit.expand.T.reshape(G, t // G, -1)
    return Terms(A, B, core)


def _bases(M: Tensor, rank_in: int | None, rank_out: int | None) -> tuple[Tensor | None, Tensor | None]:
    """The input and output bases of `hooi`, with orthonormal columns in float64.

    Found in float32: what that changes in a basis changes the error in its square alone, and the core is taken in float64.
    """
    fit = hooi(M.float(), rank_in, rank_out)
    V = None if fit.reduce is None else torch.linalg.qr(fit.reduce.double().T).Q
    U = None if fit.expand is None else torch.linalg.qr(fit.expand.double()).Q
    return V, U


def _turned(basis: Tensor | None, matrix: Tensor | None) -> Tensor | None:
    """An orthonormal basis of what a matrix makes of the space of a basis."""
    return basis if basis is None or matrix is None else torch.linalg.qr(matrix @ basis).Q


def _tucker_of_channels(W: Tensor, rank_in: int | None, rank_out: int | None, metric: Metric) -> BlockTerms:
    """Factors of the whitened weight."""
    white = metric.whiten(W)
    pairs = [_bases(white, rank_in, rank_out)]
    if rank_in is not None and rank_out is not None:
        V, U = _bases(W, rank_in, rank_out)
        near, far = (None if side is None else side.root for side in (metric.inputs, metric.gradients))
        pairs.append((_turned(V, near), _turned(U, far)))
    fits = [(V, on_sides(white, V, None if U is None else U.T), U) for V, U in pairs]
    # What a core on orthonormal bases keeps is its square: the better fit is the one with the larger core.
    V, core, U = max(fits, key=lambda fit: float(fit[1].square().sum()))
    return BlockTerms(None if V is None else V.T, core, U, 1)


def _tucker_of_patches(
    W: Tensor,
    rank_in: int | None,
    rank_out: int | None,
    metric: Metric,
    sweeps: int,
    tolerance: float,
    others: tuple[Tensor, ...] = (),
) -> BlockTerms:
    """Factors of the weight itself; from one of some other input bases, where that is better."""
    problem = Problem.of(W.flatten(2), metric)
    if rank_in is None:
        assert rank_out is not None
        fit = input_whole(problem, rank_out)
    else:
        channels = metric.of_channels()
        white = _turned(
            _bases(channels.whiten(W), rank_in, rank_out)[0], None if channels.inputs is None else channels.inputs.inverse
        )
        plain = _bases(W, rank_in, rank_out)[0]
        starts = [basis for basis in (white, plain, *others) if basis is not None]
        fit = alternate(problem, starts, rank_out, sweeps, tolerance)
    return _of_weight(fit, W, metric)


def _tucker_along(
    W: Tensor, rank_in: int, rank_out: int | None, metric: Metric, sweeps: int, tolerance: float, sizes: tuple[float, float]
) -> BlockTerms:
    """Factors of the weight that best answers along some directions of the channels.

    The basis of the weight alone reads beyond them, so it starts from what they tell of what that reads.
    """
    along, (size, norm) = metric.along, sizes
    assert along is not None
    unit = (along.weight() / size / norm).view(W.shape[0], -1, *W.shape[2:])
    plain = _bases(W, rank_in, rank_out)[0]
    assert plain is not None
    told = torch.linalg.qr(along.predicted(plain.T, metric.inputs).T).Q
    fit = _tucker_of_patches(unit, rank_in, rank_out, along.metric, sweeps, tolerance, (told,))
    assert fit.reduce is not None
    return BlockTerms(fit.reduce @ along.directions, fit.core, fit.expand, 1)


def _of_weight(fit: Fit, W: Tensor, metric: Metric) -> BlockTerms:
    """A fit of rows that the gradients whitened, as factors of the weight."""
    core = fit.C.transpose(1, 2).reshape(fit.C.shape[0], fit.C.shape[2], *W.shape[2:])
    white = BlockTerms(None if fit.V is None else fit.V.T, core, fit.U, 1)
    return _unwhitened(white, replace(metric, inputs=None))


def _in_own_bases(fit: BlockTerms, W: Tensor, sizes: tuple[float, float]) -> Tucker2:
    """The same fit, times its sizes, on the bases and in the scale that `hosvd` of the weight it makes would have."""
    V, A = (None, None) if fit.reduce is None else torch.linalg.qr(fit.reduce.T)
    U, B = (None, None) if fit.expand is None else torch.linalg.qr(fit.expand)
    core = on_sides(fit.core, None if A is None else A.T, B)
    inner = hosvd(core, None if V is None else V.shape[1], None if U is None else U.shape[1])
    reduce, middle, expand = evened((inner.reduce, inner.core, inner.expand), *sizes)
    dtype = at_least_float32(W).dtype
    assert middle is not None
    return Tucker2(
        None if reduce is None or V is None else (reduce @ V.T).to(dtype),
        middle.to(dtype),
        None if expand is None or U is None else (U @ expand).to(dtype),
    )
