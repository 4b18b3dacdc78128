"""Scaling laws of sparse models, fitted to the runs of a ladder.

    clark       log L = a log N + b log E^ + c log N log E^ + d
                (Clark et al. 2022, arXiv:2202.01169, equation 2; E^ = E)
    krajewski   L = c + (g / G^gamma + a) / N^alpha + b / D^beta
                (Krajewski et al. 2024, arXiv:2402.07871, equation 9)

N is the active parameters of a model without embedding and head, E its number of experts, D its
tokens, G its granularity, L its held-out loss. Clark's E^ saturates at both ends; that needs
hundreds of experts to be seen, so E stands in its place here.

Intervals are bootstrapped: the residuals of the fit, made larger by sqrt(n / (n - p)) for p
coefficients, are dealt out anew, and the law is fitted again. A fit says what the ladder cannot
tell: a coefficient whose quantity does not vary is left out, and one whose interval holds 0 (or is
as wide as the coefficient itself) is named. Whether a law predicts is another question than
whether it fits: `leave_largest_out` fits without the largest models, and predicts them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import UserError
from moe_jax.study.contract import Figures

DRAWS = 200
# Of both sides together.
CONFIDENCE = 0.95
# Where the exponents of krajewski's law are looked for.
EXPONENTS = (0.02, 2.0)
STARTS = ((0.1, 0.1, 0.5), (0.3, 0.3, 0.5), (0.7, 0.5, 1.0))


class Point(NamedTuple):
    """A run: parameters N, tokens D, experts E, granularity G, and the loss L in nats."""

    n: float
    d: float
    e: float
    g: float
    loss: float


class Fit(NamedTuple):
    """A law with the coefficients that the ladder shows.

    Fields:
      coefficients: {name: value}.
      low, high: the ends of their 95 % intervals.
      predict: points -> losses [n].
      draw: points -> losses of the bootstrap [DRAWS, n].
      unknown: sentences that say what the ladder cannot tell.
    """

    law: str
    coefficients: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    predict: Callable[[Sequence[Point]], np.ndarray]
    draw: Callable[[Sequence[Point]], np.ndarray]
    unknown: list[str]


class Law(NamedTuple):
    """A form of law.

    Fields:
      about: {coefficient: what must vary for it to be seen}; "" = nothing.
      fit: (points, losses, names of coefficients) -> values by name.
      predict: (values, points) -> losses.
      strength: coefficients that are 0 where their quantity does nothing.
    """

    about: dict[str, tuple[str, ...]]
    fit: Callable[[Sequence[Point], np.ndarray, Sequence[str]], dict[str, float]]
    predict: Callable[[dict[str, float], Sequence[Point]], np.ndarray]
    strength: tuple[str, ...]


def fit(law: str, points: Sequence[Point], seed: int = 0) -> Fit:
    """Fits a law to runs.

    Raises UserError for a law that there is not, and where there are fewer runs than coefficients.
    """
    if law not in LAWS:
        raise UserError(f"no law is called {law!r}: choose from {', '.join(LAWS)}")
    form = LAWS[law]
    names, unknown = _visible(form, points)
    losses = np.array([point.loss for point in points])
    spare = len(points) - len(names)
    if spare < 1:
        raise UserError(
            f"{len(points)} runs are too few for the {len(names)} coefficients of {law}: train "
            "more sizes or more seeds"
        )
    values = form.fit(points, losses, names)
    fitted = form.predict(values, points)
    residuals = (losses - fitted) * np.sqrt(len(points) / spare)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(DRAWS):
        again = fitted + rng.choice(residuals, len(residuals))
        drawn.append(form.fit(points, again, names))
    low, high = _ends(drawn, names)
    unknown += _undecided(form, values, low, high, names)

    def predict(at: Sequence[Point]) -> np.ndarray:
        return form.predict(values, at)

    def draw(at: Sequence[Point]) -> np.ndarray:
        noise = rng.choice(residuals, (DRAWS, len(at)))
        return np.array([form.predict(each, at) for each in drawn]) + noise

    return Fit(law, values, low, high, predict, draw, unknown)


def _visible(form: Law, points: Sequence[Point]) -> tuple[list[str], list[str]]:
    """Returns the coefficients that the points can show, and what they cannot."""
    names, unknown = [], []
    for name, needs in form.about.items():
        constant = [of for of in needs if len({getattr(point, of) for point in points}) < 2]
        if constant:
            quantity = " and ".join(QUANTITIES[of] for of in constant)
            unknown.append(f"{name} cannot be told: {quantity} is the same in all runs")
        else:
            names.append(name)
    return names, unknown


def _ends(
    drawn: Sequence[dict[str, float]], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    tail = (1 - CONFIDENCE) / 2
    low, high = {}, {}
    for name in names:
        found = [values[name] for values in drawn]
        low[name], high[name] = (float(np.quantile(found, q)) for q in (tail, 1 - tail))
    return low, high


def _undecided(
    form: Law,
    values: dict[str, float],
    low: dict[str, float],
    high: dict[str, float],
    names: Sequence[str],
) -> list[str]:
    """Returns a sentence for each coefficient that the runs leave open."""
    found = []
    for name in names:
        ends = f"{low[name]:.3g} to {high[name]:.3g}"
        if name in form.strength and low[name] <= 0 <= high[name]:
            found.append(f"{name} may be 0 (95 %: {ends}): the ladder does not show its effect")
        elif high[name] - low[name] > abs(values[name]):
            found.append(f"{name} is hardly known (95 %: {ends}): the ladder is too short")
    return found


class Prediction(NamedTuple):
    """The largest models, predicted by a fit to all others.

    Fields:
      size: N of the models that were left out.
      measured: the mean of their losses.
      predicted: by the law, with the ends of the interval of one run.
      holds: whether the measured loss of every run lies in its interval.
    """

    size: float
    measured: float
    predicted: float
    low: float
    high: float
    holds: bool


def leave_largest_out(law: str, points: Sequence[Point], seed: int = 0) -> Prediction:
    """Fits a law without the models of the largest N, and predicts them.

    Raises UserError where too few runs are left.
    """
    largest = max(point.n for point in points)
    kept = [point for point in points if point.n < largest]
    left_out = [point for point in points if point.n == largest]
    found = fit(law, kept, seed)
    drawn = found.draw(left_out)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    measured = np.array([point.loss for point in left_out])
    holds = bool(((low <= measured) & (measured <= high)).all())
    return Prediction(
        largest,
        float(measured.mean()),
        float(found.predict(left_out).mean()),
        float(low.min()),
        float(high.max()),
        holds,
    )


def of_figures(figures: Figures) -> Point:
    """Returns the point of a run of a study."""
    return Point(
        n=figures["active_body"],
        d=figures["tokens"],
        e=figures["num_experts"],
        g=figures["granularity"],
        loss=figures["loss"],
    )


QUANTITIES = {
    "n": "the number of parameters",
    "d": "the number of tokens",
    "e": "the number of experts",
    "g": "the granularity",
}


def _columns(points: Sequence[Point]) -> dict[str, np.ndarray]:
    return {name: np.array([getattr(p, name) for p in points], float) for name in "ndeg"}


# Clark et al.


def _clark_terms(points: Sequence[Point]) -> dict[str, np.ndarray]:
    of = _columns(points)
    log_n, log_e = np.log(of["n"]), np.log(of["e"])
    return {"a": log_n, "b": log_e, "c": log_n * log_e, "d": np.ones_like(log_n)}


def _fit_clark(
    points: Sequence[Point], losses: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    terms = _clark_terms(points)
    matrix = np.stack([terms[name] for name in names], 1)
    solution, *_ = np.linalg.lstsq(matrix, np.log(np.maximum(losses, 1e-9)), rcond=None)
    return {name: float(value) for name, value in zip(names, solution, strict=True)}


def _predict_clark(values: dict[str, float], points: Sequence[Point]) -> np.ndarray:
    terms = _clark_terms(points)
    return np.exp(np.sum([value * terms[name] for name, value in values.items()], 0))


# Krajewski et al.: linear in c, g, a and b once the exponents are given.


def _krajewski_terms(exponents: dict[str, float], points: Sequence[Point]) -> dict[str, Any]:
    """Returns the factors of c, a, g and b for given exponents."""
    of = _columns(points)
    with_n = of["n"] ** -exponents["alpha"]
    terms = {"c": np.ones_like(with_n), "a": with_n}
    if "gamma" in exponents:
        terms["g"] = with_n * of["g"] ** -exponents["gamma"]
    if "beta" in exponents:
        terms["b"] = of["d"] ** -exponents["beta"]
    return terms


def _fit_krajewski(
    points: Sequence[Point], losses: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    # Imported here: training imports nothing of this, and scipy takes a second.
    from scipy.optimize import least_squares, nnls

    exponents = [name for name in ("alpha", "beta", "gamma") if name in names]
    linear = [name for name in ("c", "a", "g", "b") if name in names]

    def solve(powers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the linear coefficients for given exponents, and the residuals."""
        terms = _krajewski_terms(dict(zip(exponents, powers, strict=True)), points)
        matrix = np.stack([terms[name] for name in linear], 1)
        # Columns of very different sizes would be cut off as if they were zero.
        scale = np.linalg.norm(matrix, axis=0)
        solution, _ = nnls(matrix / scale, losses)
        return solution / scale, (matrix / scale) @ solution - losses

    best = None
    for start in STARTS:
        first = np.array(start[: len(exponents)])
        found = least_squares(lambda x: solve(x)[1], first, bounds=EXPONENTS)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    values = dict(zip(exponents, map(float, best.x), strict=True))
    return values | dict(zip(linear, map(float, solve(best.x)[0]), strict=True))


def _predict_krajewski(values: dict[str, float], points: Sequence[Point]) -> np.ndarray:
    terms = _krajewski_terms(values, points)
    return np.sum([values[name] * term for name, term in terms.items() if name in values], 0)


LAWS: dict[str, Law] = {
    "clark": Law(
        about={"a": ("n",), "b": ("e",), "c": ("n", "e"), "d": ()},
        fit=_fit_clark,
        predict=_predict_clark,
        strength=("a", "b", "c"),
    ),
    "krajewski": Law(
        about={
            "c": (),
            "a": ("n",),
            "alpha": ("n",),
            "g": ("g", "n"),
            "gamma": ("g", "n"),
            "b": ("d",),
            "beta": ("d",),
        },
        fit=_fit_krajewski,
        predict=_predict_krajewski,
        strength=("a", "g", "b"),
    ),
}
