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
    """What became of a claim.

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
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Interval(math.nan, math.nan, math.nan, 0)
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
    arms = claim.statistic.arms
    whole = [seed for seed, found in runs.items() if set(arms) <= set(found)]
    values = [_value(claim, runs[seed]) for seed in whole]
    found = interval(values)
    why = [undecided[arm] for arm in arms if arm in undecided]
    if found.number < len(values):
        why.append("a run diverged")
    if found.number < LEAST_SEEDS:
        why.append(f"{found.number} of at least {LEAST_SEEDS} seeds")
    word = INCONCLUSIVE if why else word_of(claim, found)
    rule = f"{claim.holds} {claim.bound:g}"
    why_text = "; ".join(dict.fromkeys(why))
    unit, bound, paper = claim.unit, claim.bound, claim.paper
    return Verdict(claim.says, rule, unit, found, bound, paper, word, why_text)


def _value(claim: Claim, runs: OneSeed) -> float:
    # Of runs that diverged: a curve without points, a fit of NaN.
    try:
        return claim.statistic(runs)
    except (ArithmeticError, LookupError, ValueError):
        return math.nan


def word_of(claim: Claim, found: Interval) -> str:
    """Returns the verdict by the rule of this module."""
    low, high, bound = found.low, found.high, claim.bound
    is_above, is_below = low > bound, high < bound
    if claim.holds == WITHIN:
        inside, outside = -bound < low and high < bound, low > bound or high < -bound
        agrees, disagrees = inside, outside
    elif claim.holds == ABOVE:
        agrees, disagrees = is_above, is_below
    elif claim.holds == BELOW:
        agrees, disagrees = is_below, is_above
    else:
        raise ValueError(f"a claim holds {ABOVE}, {BELOW} or {WITHIN}, not {claim.holds!r}")
    return AGREES if agrees else DISAGREES if disagrees else TOO_SMALL


def as_json(verdict: Verdict) -> dict[str, Any]:
    return {**verdict._asdict(), "interval": verdict.interval._asdict()}
