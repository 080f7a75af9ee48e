"""What layers save in their places, as shares of what they save alone, learnt from whole networks that were timed.

    n, s   a network that was timed, a structure of forms      P   seconds that layers of a structure save alone, (n, s)
    y      seconds that a network saved, (n,)                  k   share of each structure, (s,)

y = P k + noise, where k lies about 1, some of its deviation shared by all structures and some each one's own: a Gaussian
process whose mean is asked for. One network tells of all structures at once; several tell that in some runtime grouped forms
keep half of what they promise, and ranks all of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

_SHARED, _OWN = 0.5, 0.3
"""Standard deviations of the shares: what all have in common, and what each has beside it."""
_LEAST, _MOST = 0.1, 3.0

Promised = Mapping[Hashable, float]
"""Structure → the seconds that layers of it save alone."""


def shares_kept(trials: Sequence[tuple[Promised, float, float]]) -> tuple[dict[Hashable, float], float]:
    """The share of each structure that was in a trial, and that of all others.

    Args:
        trials: What each network's layers promised, what it saved, and the standard deviation of that, in seconds; above 0.
    """
    structures = list(dict.fromkeys(structure for promised, *_ in trials for structure in promised))
    if not structures:
        return {}, 1.0
    P = np.array([[promised.get(structure, 0.0) for structure in structures] for promised, *_ in trials])
    y, noise = (np.array([trial[at] for trial in trials]) for at in (1, 2))
    together = P.sum(1)
    covariance = _SHARED**2 * np.outer(together, together) + _OWN**2 * P @ P.T + np.diag(noise**2)
    weights = np.linalg.solve(covariance, y - together)
    shared = 1 + _SHARED**2 * together @ weights
    kept = shared + _OWN**2 * P.T @ weights
    clipped = np.clip([*kept, shared], _LEAST, _MOST).tolist()
    return dict(zip(structures, clipped, strict=False)), clipped[-1]
