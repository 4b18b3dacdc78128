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

    Raises UserError for an unknown law, and where there are fewer runs than coefficients.
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
    # A fit takes up some of the noise: so much larger it was.
    residuals = (losses - fitted) * np.sqrt(len(points) / spare)
    rng = np.random.default_rng(seed)
    # Coefficients of fits to losses with other noise.
    drawn = []
    for _ in range(DRAWS):
        noisy = fitted + rng.choice(residuals, len(residuals))
        drawn.append(form.fit(points, noisy, names))
    low, high = _ends(drawn, names)
    unknown += _undecided(form, values, low, high, names)

    def predict(at: Sequence[Point]) -> np.ndarray:
        return form.predict(values, at)

    def draw(at: Sequence[Point]) -> np.ndarray:
        # A run differs from the law by its own noise, beside that of the coefficients.
        noise = rng.choice(residuals, (DRAWS, len(at)))
        return np.array([form.predict(each, at) for each in drawn]) + noise

    return Fit(law, values, low, high, predict, draw, unknown)


def _visible(form: Law, points: Sequence[Point]) -> tuple[list[str], list[str]]:
    """Returns the coefficients that the points can show, and what they cannot."""
    names, unknown = [], []
    for name, needs in form.about.items():
        # A quantity of a point that is the same in all of them.
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
    """Returns the lower and the upper end of the interval of each coefficient, by its name."""
    # On each side, half of what the interval leaves out.
    tail = (1 - CONFIDENCE) / 2
    low, high = {}, {}
    for name in names:
        of_draws = [values[name] for values in drawn]
        low[name] = float(np.quantile(of_draws, tail))
        high[name] = float(np.quantile(of_draws, 1 - tail))
    return low, high


def _undecided(
    form: Law,
    values: dict[str, float],
    low: dict[str, float],
    high: dict[str, float],
    names: Sequence[str],
) -> list[str]:
    """Returns a sentence for each coefficient that the runs leave open."""
    sentences = []
    for name in names:
        ends = f"{low[name]:.3g} to {high[name]:.3g}"
        if name in form.strength and low[name] <= 0 <= high[name]:
            sentences.append(f"{name} may be 0 (95 %: {ends}): the ladder does not show its effect")
        # The interval is as wide as the coefficient itself.
        elif high[name] - low[name] > abs(values[name]):
            sentences.append(f"{name} is hardly known (95 %: {ends}): the ladder is too short")
    return sentences


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
    of_smaller = fit(law, kept, seed)
    drawn = of_smaller.draw(left_out)
    tail = (1 - CONFIDENCE) / 2
    # An interval for each run: models of the largest N may differ in tokens or experts.
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    measured = np.array([point.loss for point in left_out])
    is_inside = (low <= measured) & (measured <= high)
    return Prediction(
        size=largest,
        measured=float(measured.mean()),
        predicted=float(of_smaller.predict(left_out).mean()),
        low=float(low.min()),
        high=float(high.max()),
        holds=bool(is_inside.all()),
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
    """Returns each quantity of all points, by its letter in QUANTITIES."""
    return {name: np.array([getattr(p, name) for p in points], float) for name in QUANTITIES}


# Clark et al.


def _clark_terms(points: Sequence[Point]) -> dict[str, np.ndarray]:
    """Returns what each coefficient is multiplied by: log L is linear in all of them."""
    of = _columns(points)
    log_n, log_e = np.log(of["n"]), np.log(of["e"])
    return {"a": log_n, "b": log_e, "c": log_n * log_e, "d": np.ones_like(log_n)}


def _fit_clark(
    points: Sequence[Point], losses: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    """Returns the coefficients of the least squares of log L, by name."""
    terms = _clark_terms(points)
    matrix = np.stack([terms[name] for name in names], 1)
    # The noise of the bootstrap may push a loss below 0.
    log_losses = np.log(np.maximum(losses, 1e-9))
    solution, *_ = np.linalg.lstsq(matrix, log_losses, rcond=None)
    return {name: float(value) for name, value in zip(names, solution, strict=True)}


def _predict_clark(values: dict[str, float], points: Sequence[Point]) -> np.ndarray:
    """Returns the loss of each point by the law."""
    terms = _clark_terms(points)
    log_loss = np.sum([value * terms[name] for name, value in values.items()], 0)
    return np.exp(log_loss)


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
    """Returns the coefficients of the least squares of L, by name.

    Exponents are searched from several starts; for each of them the best linear coefficients that
    are not negative follow.
    """
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

    def residuals(powers: np.ndarray) -> np.ndarray:
        return solve(powers)[1]

    # There is more than one minimum: the lowest of several is taken.
    best = None
    for start in STARTS:
        first = np.array(start[: len(exponents)])
        solution = least_squares(residuals, first, bounds=EXPONENTS)
        if best is None or solution.cost < best.cost:
            best = solution
    assert best is not None
    coefficients, _ = solve(best.x)
    values = dict(zip(exponents, map(float, best.x), strict=True))
    return values | dict(zip(linear, map(float, coefficients), strict=True))


def _predict_krajewski(values: dict[str, float], points: Sequence[Point]) -> np.ndarray:
    """Returns the loss of each point by the law; a coefficient that is left out adds nothing."""
    terms = _krajewski_terms(values, points)
    shown = [values[name] * term for name, term in terms.items() if name in values]
    return np.sum(shown, 0)


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
