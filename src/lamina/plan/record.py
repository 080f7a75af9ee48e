"""What a plan remembers of how it came about: its factors, the network as a whole, and scores."""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import Field, NonNegativeFloat, PositiveFloat

from ..files import FileValue
from ..values import Cost


@final
class Refined(FileValue):
    """A training of factors to the original's answers, by `lamina.refine`.

    ``steps`` were made on inputs of which ``data`` is a hash, in an order drawn by ``seed``. ``before`` and ``after`` are nats
    of divergence from the original's answers for each item held out.
    """

    steps: Annotated[int, Field(ge=1, lt=2**63)]
    seed: int
    data: str
    before: NonNegativeFloat
    after: NonNegativeFloat


@final
class InSequence(FileValue):
    """A fit of layers one after the other, each on what those before it then hand it, by ``decompose(…, sequential=…)``.

    ``data`` is a hash of the inputs. ``before`` and ``after`` are nats of divergence from the original's answers for each item
    held out; where they are the same, no factor has changed.
    """

    data: str
    before: NonNegativeFloat
    after: NonNegativeFloat


@final
class FactorMethod(FileValue):
    """How the factors of a plan are found, so that applying it twice gives the same network.

    ``calibration`` is the ``identity`` of the `Calibration` that they are fitted to, so that they change the answers on its
    data least; without one they are fitted to the weights alone. ``damping`` is the share of its mean diagonal entry by which
    each of its moments is damped; without it each layer has that of the calibration. ``weights_alone`` says that such factors
    scored better than those fitted to the calibration that the plan was made with: `decompose` then leaves data aside.
    ``sequential`` says on which inputs layers were fitted one after the other.
    ``series`` names the way in which the series of a supernet was fitted, where the factors were taken out of one: they have
    been trained there, and ``decompose`` can only fit new ones. So it is with factors that were ``refined``, once or several
    times.
    """

    low_rank: Literal["svd"] = "svd"
    block_term: Literal["hooi"] = "hooi"
    separable: Literal["svd"] = "svd"
    calibration: str | None = None
    damping: PositiveFloat | None = None
    weights_alone: bool = False
    sequential: InSequence | None = None
    series: Literal["nested", "faithful"] | None = None
    refined: tuple[Refined, ...] = ()


@final
class WholeModel(FileValue):
    """The network's own cost, measured as a whole: before, as predicted from the layers, and as it came out.

    ``predicted_s`` is the time before less what the layers save alone; where they take longer alone than the network does with
    all of them, they save as much less. ``speedup`` is the median of the paired ratios of interleaved runs, with its 95 %
    interval; None where nothing is decomposed.
    """

    before: Cost
    after: Cost
    predicted_s: float | None = None
    speedup: PositiveFloat | None = None
    interval: tuple[PositiveFloat, PositiveFloat] | None = None


@final
class ScoredPoint(FileValue):
    """A network that was decomposed and scored on the way to a plan.

    ``speedup`` is the measured one; None where the whole network was not timed. ``score`` is None where it was no finite
    number, ``nats`` where no loss was predicted: without a calibration and its gradients, and for factors of the weights alone.
    """

    speedup: PositiveFloat | None
    score: float | None
    nats: float | None = None
    weights_alone: bool = False


@final
class Scores(FileValue):
    """What the user's score said: of the network itself, of this plan's network, and of all that were tried, in their order.

    ``recalibrated`` says that batch norms of this plan's network were recalibrated on data before it was scored so.
    """

    before: float
    after: float
    tried: tuple[ScoredPoint, ...] = ()
    recalibrated: bool = False

    @property
    def drop(self) -> float:
        """By how much the score fell."""
        return self.before - self.after

    def __str__(self) -> str:
        """``0.9337 → 0.932, a drop of 0.0017``."""
        before, after = self.before + 0.0, self.after + 0.0  # not -0
        how = "; batch norm recalibrated" if self.recalibrated else ""
        return f"{before:.6g} → {after:.6g}, a {'drop' if self.drop >= 0 else 'gain'} of {abs(self.drop):.3g}{how}"
