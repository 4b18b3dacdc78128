"""The learning rate of an arm: searched in a bracket until the best one has worse neighbours.

The search has seeds of its own (`Study.tuning_seeds`), so the runs that are compared have not
chosen anything. A rate is judged by the mean of their runs: one run alone chose between two rates
by luck, and its arm lost by 0.07 bits per byte. The search begins with the study's rate and one
step of `factor` to each side, and goes on beyond the end that is best, at most REACH steps from
where it began. A rate that is best at an end has not been shown to be the best one: the verdict is
then "inconclusive".
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.study.contract import Study

REACH = 4


class Search(NamedTuple):
    """Holds what is known of the learning rate of an arm.

    Fields:
      wanted: rates that are still to be tried; none = the search is over.
      best: the rate with the smallest figure; NaN before there is one.
      interior: whether both neighbours of the best rate are worse.
    """

    wanted: tuple[float, ...]
    best: float
    interior: bool


def rates(study: Study) -> list[float]:
    """Returns all rates that a search may try, in order."""
    steps = range(-REACH, REACH + 1)
    return [float(f"{study.rate * study.factor**i:.4g}") for i in steps]


def search(study: Study, figures: Mapping[float, float]) -> Search:
    """Returns the state of a search from the figures that were measured, by rate.

    A run that diverged counts as infinite. The neighbours of the best rate are always tried.
    """
    known = rates(study)
    beginning = known[REACH - 1 : REACH + 2]
    missing = tuple(rate for rate in beginning if rate not in figures)
    if missing:
        return Search(missing, math.nan, False)
    finite = {rate: value for rate, value in figures.items() if math.isfinite(value)}
    if not finite:
        # All diverge: lower ones may not.
        lower = [rate for rate in known if rate not in figures and rate < min(figures)]
        return Search(tuple(lower[-1:]), math.nan, False)
    best = min(finite, key=lambda rate: finite[rate])
    place = known.index(best)
    neighbours = [known[i] for i in (place - 1, place + 1) if 0 <= i < len(known)]
    wanted = tuple(rate for rate in neighbours if rate not in figures)
    return Search(wanted, best, not wanted and len(neighbours) == 2)
