"""How far figures of held-out rows would move with other rows: intervals by the bootstrap.

Rows of one domain are drawn anew with replacement, as many as there are. The interval is the figure
plus and minus Student's t times the standard error of the draws, which is made larger by sqrt(n /
(n - 1)) for n rows: with few rows plain percentiles of the draws are far too narrow (Hesterberg
2015, arXiv:1411.5279).

Shapes: R rows, Z domains, N draws; "..." stands for any number of figures of a row.
"""

from typing import NamedTuple

import numpy as np

DRAWS = 1000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """The ends of 95 % intervals; NaN where a domain has fewer than two rows, of which no interval
    can be known.
    """

    low: np.ndarray
    high: np.ndarray


def ratios(
    sum_R: np.ndarray, size_R: np.ndarray, domain_R: np.ndarray, num_domains: int, seed: int
) -> tuple[Interval, Interval]:
    """Returns intervals of ratios of sums: of sum_R over size_R in each domain, [..., Z], and of
    their mean over the domains that have rows, [...].

    Args:
      sum_R: [..., R], such as the nats of each row.
      size_R: [R], such as its bytes; rows of size 0 are left out.
      seed: equal seeds give equal intervals.
    """
    rng = np.random.default_rng(seed)
    shape = sum_R.shape[:-1]
    each = Interval(np.full((*shape, num_domains), np.nan), np.full((*shape, num_domains), np.nan))
    ratio, variance, freedom, domains = np.zeros(shape), np.zeros(shape), 0, 0
    for domain in range(num_domains):
        chosen = np.flatnonzero((domain_R == domain) & (size_R > 0))
        num = len(chosen)
        if not num:
            continue
        one = sum_R[..., chosen].sum(-1) / size_R[chosen].sum()
        error = _standard_error(sum_R[..., chosen], size_R[chosen], rng)
        each.low[..., domain], each.high[..., domain] = _interval(one, error, num - 1)
        ratio, variance = ratio + one, variance + error**2
        freedom, domains = freedom + num - 1, domains + 1
    every = max(domains, 1)
    return each, _interval(ratio / every, np.sqrt(variance) / every, freedom)


def _standard_error(sum_R: np.ndarray, size_R: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the standard error [...] of the ratio in one domain; NaN of a single row."""
    num = len(size_R)
    if num < 2:
        return np.full(sum_R.shape[:-1], np.nan)
    times_NR = rng.multinomial(num, np.full(num, 1 / num), DRAWS)
    drawn = (sum_R @ times_NR.T) / (size_R @ times_NR.T)
    return drawn.std(-1, ddof=1) * np.sqrt(num / (num - 1))


def _interval(figure: np.ndarray, error: np.ndarray, freedom: int) -> Interval:
    """Returns the interval of a figure whose standard error has `freedom` degrees of freedom."""
    from scipy import stats  # here: training imports this module, and scipy takes a second

    reach = stats.t.ppf((1 + CONFIDENCE) / 2, max(freedom, 1)) * error
    return Interval(figure - reach, figure + reach)
