"""What a score on a limited number of questions says: intervals, and tests of a difference. No torch.

Shapes: P pictures, K sums, B resamples. Questions about one picture are not independent, so pictures are what is drawn
again. A benchmark's figure is a function of sums over pictures (of right answers, of questions, of true positives), so a
resample costs one product of matrices, whatever the number of questions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Figure = Callable[[Floats], Floats]
"""A benchmark's figure from sums over pictures: ``(..., K)`` to ``(...)``; NaN where there is nothing to divide by."""

RESAMPLES = 2000
LEVEL = 0.95
_DRAWS_AT_A_TIME = 4_000_000


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a proportion, 95 % for the default ``z``: Wilson's score interval.

    The values of p with ``|correct / n - p| <= z sqrt(p (1 - p) / n)``, that is ``(p' + z^2 / 2n -+ z sqrt(p' (1 - p') / n +
    z^2 / 4n^2)) / (1 + z^2 / n)`` with ``p' = correct / n``. Holds for independent trials.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927), 209-212.
    """
    if total == 0:
        return 0.0, 1.0
    p, n = correct / total, total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)  # rounding alone leads out of 0..1


def resampled_sums(sums_PK: Floats, strata_P: npt.NDArray[np.int64], seed: tuple[int, ...], resamples: int) -> Floats:
    """Sums over pictures that are drawn with replacement, as many as there are within each stratum: shape ``(B, K)``.

    The same seed, strata and number of resamples draw the same pictures, whatever is summed: two models are compared on the
    same draws by putting their sums side by side.

    Source: B. Efron and R. J. Tibshirani, An introduction to the bootstrap (1993), chapters 6 and 8 (the unit that is drawn is
    the independent one: a cluster).
    """
    random = np.random.default_rng(seed)
    count = len(sums_PK)
    groups = [np.flatnonzero(strata_P == stratum) for stratum in np.unique(strata_P)]
    sums_BK = np.empty((resamples, sums_PK.shape[1]))
    at_a_time = max(1, _DRAWS_AT_A_TIME // max(1, count))
    for start in range(0, resamples, at_a_time):
        rows = min(at_a_time, resamples - start)
        weights = np.zeros((rows, count))
        for members in groups:
            drawn = random.integers(0, len(members), size=(rows, len(members))) + np.arange(rows)[:, None] * len(members)
            weights[:, members] = np.bincount(drawn.ravel(), minlength=rows * len(members)).reshape(rows, -1)
        sums_BK[start : start + rows] = weights @ sums_PK
    return sums_BK


def percentile_interval(values_B: Floats, level: float = LEVEL) -> tuple[float, float] | None:
    """The middle ``level`` of resampled figures; None where all are alike, so that they say nothing of the uncertainty.

    Resamples without a figure (NaN: nothing to divide by) are left out. Source: Efron and Tibshirani, chapter 13.
    """
    found = values_B[np.isfinite(values_B)]
    if not len(found) or np.ptp(found) < 1e-9:
        return None
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def two_sided_p(differences_B: Floats) -> float:
    """How often the resampled difference falls on the other side of zero: ``2 (min(#<=0, #>=0) + 1) / (B + 1)``, at most 1.

    It is below 0.05 about where the 95 % percentile interval leaves zero out; it cannot be less than ``2 / (B + 1)``.

    Source: Efron and Tibshirani, sections 13.3 and 15.4 (the achieved significance level of a percentile interval); one is
    added to both counts as in A. C. Davison and D. V. Hinkley, Bootstrap methods and their application (1997), section 4.2.
    """
    found = differences_B[np.isfinite(differences_B)]
    tiny = 1e-9  # sums of the same numbers in another order
    fewer = min(np.count_nonzero(found <= tiny), np.count_nonzero(found >= -tiny))
    return min(1.0, 2 * (fewer + 1) / (len(found) + 1))


@dataclass(frozen=True)
class Difference:
    """Figure of a second model less that of a first one, on the same questions. ``interval``: None where it never varies."""

    value: float
    interval: tuple[float, float] | None
    p: float

    @classmethod
    def of(cls, value: float, differences_B: Floats) -> "Difference":
        """From the difference on all questions, and those on the resamples: the paired bootstrap."""
        return cls(value, percentile_interval(differences_B), two_sided_p(differences_B))
