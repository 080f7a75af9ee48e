"""What layers save in their places, beside what they save alone, learnt from whole networks that were timed.

    n, s   a network that was timed, a structure of forms      P   seconds that layers of a structure save alone, (n, s)
    y      seconds that a network saved, (n,)                  k   share of each structure that is kept, (s,)
    m      decomposed layers of a network, (n,)                c   seconds that each of them costs beside

y = P k − m c + noise, where k lies about 1, some of its deviation shared by all structures and some each one's own, and c about
nothing: a Gaussian process whose mean is asked for. One network tells of all structures at once; several tell that in some
runtime grouped forms keep half of what they promise, and ranks all of it, or that layers that save little alone save nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np

_SHARED, _OWN = 0.5, 0.3
"""Standard deviations of the shares: what all have in common, and what each has beside it."""
_EACH = 0.25
"""Standard deviation of what a layer costs beside, in seconds that layers promised in the mean."""
_LEAST, _MOST = 0.1, 3.0


@final
@dataclass(frozen=True, slots=True)
class Trial:
    """A whole network that was timed.

    Attributes:
        promised: Structure → the seconds that layers of it save alone.
        layers: How many are decomposed.
        saved_s: What the network saved.
        noise_s: The standard deviation of that; above 0.
    """

    promised: Mapping[Hashable, float]
    layers: int
    saved_s: float
    noise_s: float


@final
@dataclass(frozen=True, slots=True)
class InPlace:
    """What is kept in their places of what layers save alone.

    Attributes:
        kept: The share of each structure that was in a trial.
        otherwise: That of all others.
        each_s: The seconds that every decomposed layer costs beside.
    """

    kept: Mapping[Hashable, float] = field(default_factory=dict)
    otherwise: float = 1.0
    each_s: float = 0.0

    def saved_s(self, structure: Hashable, alone_s: float) -> float:
        """What a decomposed layer saves that saves ``alone_s`` alone."""
        return self.kept.get(structure, self.otherwise) * alone_s - self.each_s


def in_place(trials: Sequence[Trial]) -> InPlace:
    """What was learnt from some trials; without any, all is kept."""
    structures = list(dict.fromkeys(structure for trial in trials for structure in trial.promised))
    if not structures:
        return InPlace()
    P = np.array([[trial.promised.get(structure, 0.0) for structure in structures] for trial in trials])
    y, m, noise = np.array([(trial.saved_s, trial.layers, trial.noise_s) for trial in trials]).T
    together = P.sum(1)
    mean = max(together.sum(), 0.0) / max(m.sum(), 1)
    for scale in (_EACH * mean, 0.0):  # what only the other sign would explain, the shares do
        covariance = _SHARED**2 * np.outer(together, together) + _OWN**2 * P @ P.T + scale**2 * np.outer(m, m)
        weights = np.linalg.solve(covariance + np.diag(noise**2), y - together)
        each = -(scale**2) * float(m @ weights)
        if each >= 0:
            break
    shared = 1 + _SHARED**2 * together @ weights
    clipped = np.clip([*(shared + _OWN**2 * P.T @ weights), shared], _LEAST, _MOST).tolist()
    return InPlace(dict(zip(structures, clipped, strict=False)), clipped[-1], min(each, _MOST * mean))
