"""What is compared between two runs of one config, how far apart they may be, and where they part
first.

check       of                                     deviation                               limit
forward     loss of the step                       absolute, nats per token                1e-10
tokens      loss of every token                    absolute, nats                          1e-10
counts      assignments per row, layer, expert;    how many differ                         0
            the expert of each choice of a token
drops       dropped assignments per row, layer;    how many differ                         0
            whether each choice was dropped
sums        all other statistics per row; gates;   relative to 1 or the value              1e-10
            what would be logged
gradients   every parameter's gradient             relative to the parameter's largest     1e-9
state       parameters and router state after k    absolute                                1e-8
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from moe_jax.verify.program import Probe

LIMITS = {
    "tokens": 1e-10,
    "counts": 0.0,
    "drops": 0.0,
    "sums": 1e-10,
    "forward": 1e-10,
    "gradients": 1e-9,
    "state": 1e-8,
}
# What must be equal to the last one, by check: of the sums per row, and of the record of every
# choice (program.recordable).
EXACT = {"counts": ("counts", "expert"), "drops": ("dropped", "dropped")}
# As the step computes them: the first that deviates is nearest to the cause.
ORDER = tuple(LIMITS)


class Deviation(NamedTuple):
    """The worst deviation of one kind over the steps."""

    check: str
    value: float
    # The name of the worst parameter or statistic; "" where there is but one.
    where: str
    # Of the worst deviation.
    step: int

    @property
    def sound(self) -> bool:
        # NaN is within no limit.
        return self.value <= LIMITS[self.check]


def deviations(
    want: Sequence[Probe],
    have: Sequence[Probe],
    want_state: Mapping[str, Any],
    have_state: Mapping[str, Any],
) -> tuple[dict[str, Deviation], Deviation | None]:
    """Returns, of the same steps of two runs, the worst deviation of every kind and the first
    beyond its limit, or None.

    States are given by the names of their arrays.
    """
    worst: dict[str, Deviation] = {}
    first = None
    for step, (want_probe, have_probe) in enumerate(zip(want, have, strict=True)):
        now = {deviation.check: deviation for deviation in _of_step(want_probe, have_probe, step)}
        if step == len(want) - 1:
            # Parameters are compared once, after the last step: they hold the deviations of all
            # steps.
            now["state"] = _worst("state", _absolute(want_state, have_state), step)
        for check in ORDER:
            if check not in now:
                continue
            # In ORDER, so that of one step the check nearest to the cause is named.
            if first is None and not now[check].sound:
                first = now[check]
            # `largest`, because NaN is worse than any number.
            both = {"before": worst.get(check, now[check]), "now": now[check]}
            which, _ = largest({name: deviation.value for name, deviation in both.items()})
            worst[check] = both[which]
    return worst, first


def _of_step(want: Probe, have: Probe, step: int) -> Iterator[Deviation]:
    """Yields the deviations of one step, kind by kind."""
    yield Deviation("forward", abs(want.loss - have.loss), "", step)
    losses = {"": (want.nll, have.nll)}
    losses |= {name: (nll, have.further[name]) for name, nll in want.further.items()}
    yield _worst("tokens", {name: far(*pair) for name, pair in losses.items()}, step)
    if want.sums:
        yield from _of_sums(want, have, step)
    yield _worst("gradients", relative_gradients(want.grads, have.grads), step)


def _of_sums(want: Probe, have: Probe, step: int) -> Iterator[Deviation]:
    """Yields the deviations of what MoE layers count, and of all other statistics."""
    for check, (of_rows, of_choices) in EXACT.items():
        differ = {}
        if of_rows in want.sums:
            differ["rows"] = unequal(want.sums[of_rows], have.sums[of_rows])
        if of_choices in want.routing:
            pair = want.routing[of_choices], have.routing[of_choices]
            differ["single choices"] = unequal(*pair)
        yield _worst(check, differ, step)
    pairs = {
        name: (value, have.sums[name])
        for name, value in want.sums.items()
        if name not in ("counts", "dropped")
    }
    if want.routing:
        pairs["gates of single choices"] = (want.routing["gate"], have.routing["gate"])
    pairs |= {f"metric {name}": pair for name, pair in metrics(want, have).items()}
    # Relative to the value, but to 1 where that is smaller.
    relative = {name: far(a, b, np.maximum(np.abs(a), 1)) for name, (a, b) in pairs.items()}
    yield _worst("sums", relative, step)


def metrics(want: Probe, have: Probe) -> dict[str, tuple[Any, Any]]:
    """Returns pairs of what the two runs would log of the step, by name.

    It leaves out what is by its definition of each micro-batch, or of each array, which a scan
    stacks.
    """
    skip = ("micro_batch_balance_loss", "finite_leaves")

    def flat(probe):
        kept = {name: value for name, value in probe.metrics.items() if name not in skip}
        flattened = flatten_dict(kept, sep="/")
        return {name: np.asarray(value, np.float64) for name, value in flattened.items()}

    want_values, have_values = flat(want), flat(have)
    return {name: (value, have_values[name]) for name, value in want_values.items()}


def relative_gradients(
    want: Mapping[str, np.ndarray], have: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Returns the deviation of every gradient relative to its largest entry, or to a millionth of
    the largest of all: some are only rounding.
    """
    sizes = {name: float(np.abs(gradient).max()) for name, gradient in want.items()}
    # Where all are 0, equal is no deviation: the scale must not be 0 too.
    floor = max(1e-6 * max(sizes.values(), default=0.0), np.finfo(np.float64).tiny)
    return {
        name: far(gradient, have[name], max(sizes[name], floor)) for name, gradient in want.items()
    }


def unequal(a: np.ndarray, b: np.ndarray) -> float:
    """Returns how many entries differ; soft MoE counts fractions, which may differ by rounding."""
    if a.dtype == bool:
        return float((a != b).sum())
    # Whole numbers must be equal; fractions have rounding.
    allowed = 0 if whole(a) else 1e-10
    return float((np.abs(a - b) > allowed).sum())


def whole(a: np.ndarray) -> bool:
    """Returns whether all entries are whole numbers."""
    return np.array_equal(a, np.round(a))


def far(a: Any, b: Any, scale: Any = 1.0) -> float:
    """Returns the largest |a - b| / scale; NaN where either is."""
    difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    return float((difference / scale).max(initial=0.0))


def largest(values: Mapping[str, float]) -> tuple[str, float]:
    """Returns (name, value) of the largest value, ("", 0) of none.

    NaN counts as larger than any number, which for `max` it is not.
    """
    with_infinity = {name: np.inf if np.isnan(value) else value for name, value in values.items()}
    name = max(values, key=lambda name: with_infinity[name], default="")
    return name, values.get(name, 0.0)


def _absolute(want: Mapping[str, Any], have: Mapping[str, Any]) -> dict[str, float]:
    return {name: far(x, have[name]) for name, x in want.items()}


def _worst(check: str, values: Mapping[str, float], step: int) -> Deviation:
    name, value = largest(values)
    return Deviation(check, value, name, step)


class Rounded(NamedTuple):
    """A float32 run beside one device's: reported, never judged, because one rounding tie flips a
    routing and the curves part.
    """

    # Largest deviation of the loss over the steps, relative.
    loss: float
    # The first step whose counts differ.
    flip: int | None
    steps: int


def rounded(want: Sequence[Probe], have: Sequence[Probe]) -> Rounded:
    """Returns how a float32 run compares with one device's, step by step."""
    losses, flip = [], None
    for step, (a, b) in enumerate(zip(want, have, strict=True)):
        losses.append(abs(a.loss - b.loss) / abs(a.loss))
        counts_differ = "counts" in a.sums and not _alike(a.sums["counts"], b.sums["counts"])
        if counts_differ and flip is None:
            flip = step
    return Rounded(max(losses), flip, len(want))


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    # Soft MoE counts fractions, which float32 rounds.
    return np.array_equal(a, b) if whole(a) else np.allclose(a, b, rtol=1e-3)
