"""The verdict of each claim, by a stated rule on an interval.

The statistic is computed of the runs of each seed; its interval is the bootstrap of
instruments/bootstrap.py over seeds (95 %, both sides together). Then, for a claim

    above b     agrees if the whole interval lies above b, disagrees if it lies below b
    below b     the same with the sides exchanged
    within b    agrees if the whole interval lies in [-b, b], disagrees if it lies outside of it

and "too small to say" in all other cases: the effect is too small for so many seeds. A verdict is
"inconclusive" where the protocol is not kept: fewer than three seeds, a run that is missing or
diverged, or a learning rate that is the best at the end of its search.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.instruments import bootstrap
from moe_jax.study.contract import ABOVE, BELOW, WITHIN, Claim, Figures, OneSeed, Study

AGREES, DISAGREES = "agrees", "disagrees"
TOO_SMALL, INCONCLUSIVE = "too small to say", "inconclusive"
LEAST_SEEDS = 3


class Interval(NamedTuple):
    """A mean over seeds with the ends of its interval, which are NaN of fewer than two seeds."""

    mean: float
    low: float
    high: float
    number: int

    def __str__(self) -> str:
        if self.number == 0:
            return "-"
        if not math.isfinite(self.low):
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


class Verdict(NamedTuple):
    """Holds what became of a claim.

    Fields:
      paper: what the paper measured; "" = nothing that can be put beside ours.
      why: the reason of an inconclusive verdict.
    """

    claim: str
    rule: str
    unit: str
    interval: Interval
    bound: float
    paper: str
    word: str
    why: str


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean and its bootstrapped interval. Values are of one seed each."""
    # A run that diverged has NaN.
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Interval(math.nan, math.nan, math.nan, 0)
    # The bootstrap is of ratios: the mean of n values is their sum over n ones.
    ones = np.ones(len(known))
    of_seed = np.zeros(len(known), int)
    bounds, _ = bootstrap.ratios(np.asarray(known), ones, of_seed, 1, seed=0)
    low, high = float(bounds.low[0]), float(bounds.high[0])
    return Interval(float(np.mean(known)), low, high, len(known))


def judge(
    study: Study, runs: Mapping[int, Mapping[str, Figures]], undecided: Mapping[str, str]
) -> list[Verdict]:
    """Returns the verdict of each claim.

    Args:
      runs: the figures of every run that is compared, by seed and arm.
      undecided: why the learning rate of an arm is not known, by arm.
    """
    return [_judge(claim, runs, undecided) for claim in study.claims]


def _judge(claim: Claim, runs: Mapping[int, OneSeed], undecided: Mapping[str, str]) -> Verdict:
    """Returns the verdict of a claim. `runs`: by seed; a seed counts if it has all of its arms."""
    arms = claim.statistic.arms
    whole_seeds = [seed for seed, of_seed in runs.items() if set(arms) <= set(of_seed)]
    values = [_value(claim, runs[seed]) for seed in whole_seeds]
    measured = interval(values)
    # Whatever breaks the protocol is a reason; without one the interval decides.
    reasons = [undecided[arm] for arm in arms if arm in undecided]
    if measured.number < len(values):
        reasons.append("a seed has no value: a run diverged, or a dense ladder does not fall")
    if measured.number < LEAST_SEEDS:
        reasons.append(f"{measured.number} of at least {LEAST_SEEDS} seeds")
    return Verdict(
        claim=claim.says,
        rule=f"{claim.holds} {claim.bound:g}",
        unit=claim.unit,
        interval=measured,
        bound=claim.bound,
        paper=claim.paper,
        word=INCONCLUSIVE if reasons else word_of(claim, measured),
        # Each reason once: an arm may stand in a claim twice.
        why="; ".join(dict.fromkeys(reasons)),
    )


def _value(claim: Claim, runs: OneSeed) -> float:
    """Returns the statistic of a claim for one seed; NaN where it has none."""
    # Runs that diverged leave a curve without points, or a fit of NaN; a ladder may be none.
    try:
        return claim.statistic(runs)
    except (ArithmeticError, LookupError, ValueError):
        return math.nan


def word_of(claim: Claim, found: Interval) -> str:
    """Returns the verdict by the rule of this module."""
    low, high, bound = found.low, found.high, claim.bound
    # The whole interval decides. A NaN compares as False, so it neither agrees nor disagrees.
    is_above, is_below = low > bound, high < bound
    if claim.holds == WITHIN:
        agrees = -bound < low and high < bound
        disagrees = low > bound or high < -bound
    elif claim.holds == ABOVE:
        agrees, disagrees = is_above, is_below
    elif claim.holds == BELOW:
        agrees, disagrees = is_below, is_above
    else:
        raise ValueError(f"a claim holds {ABOVE}, {BELOW} or {WITHIN}, not {claim.holds!r}")
    if agrees:
        return AGREES
    return DISAGREES if disagrees else TOO_SMALL


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Returns a verdict as nested dicts; a tuple would become a list without names."""
    return {**verdict._asdict(), "interval": verdict.interval._asdict()}
