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
# Of both sides together.
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
    low_Z, high_Z = np.full((2, *shape, num_domains), np.nan)
    ratio_sum, variance_sum = np.zeros(shape), np.zeros(shape)
    freedom, num_measured = 0, 0
    for domain in range(num_domains):
        rows = np.flatnonzero((domain_R == domain) & (size_R > 0))
        # A domain without rows is in no mean.
        if not len(rows):
            continue
        ratio = sum_R[..., rows].sum(-1) / size_R[rows].sum()
        error = _standard_error(sum_R[..., rows], size_R[rows], rng)
        # n rows leave n - 1 degrees of freedom beside their ratio.
        interval = _interval(ratio, error, len(rows) - 1)
        low_Z[..., domain], high_Z[..., domain] = interval
        # Domains are drawn apart from each other, so that the variances of their ratios add up.
        ratio_sum = ratio_sum + ratio
        variance_sum = variance_sum + error**2
        freedom += len(rows) - 1
        num_measured += 1
    # mean = sum / Z, and its standard error is sqrt(sum of variances) / Z.
    divisor = max(num_measured, 1)
    mean = _interval(ratio_sum / divisor, np.sqrt(variance_sum) / divisor, freedom)
    return Interval(low_Z, high_Z), mean


def _standard_error(sum_R: np.ndarray, size_R: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the standard error [...] of the ratio in one domain; NaN of a single row."""
    num_rows = len(size_R)
    if num_rows < 2:
        return np.full(sum_R.shape[:-1], np.nan)
    # How often a draw with replacement takes each row is multinomial: one product with these
    # numbers stands for the sums of all draws.
    times_NR = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), DRAWS)
    # [..., R] @ [R, N]: the ratio of sums in every draw.
    ratio_N = (sum_R @ times_NR.T) / (size_R @ times_NR.T)
    return ratio_N.std(-1, ddof=1) * np.sqrt(num_rows / (num_rows - 1))


def _interval(figure: np.ndarray, error: np.ndarray, freedom: int) -> Interval:
    """Returns the interval of a figure whose standard error has `freedom` degrees of freedom."""
    # Imported here: training imports this module, and scipy takes a second.
    from scipy import stats

    # figure +- t * error, with t such that (1 - CONFIDENCE) / 2 lie beyond each end.
    t = stats.t.ppf((1 + CONFIDENCE) / 2, max(freedom, 1))
    reach = t * error
    return Interval(figure - reach, figure + reach)
