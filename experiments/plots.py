"""What the plots of experiments share: arms that stand side by side, names where the arms are,
plain numbers at the ticks.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

SMALL = 7.5  # points of the letters of a name
APART = 13.0  # points between two arms, so that a name fits over each
LINES_APART = 10.0  # points between the names of two lines


class Arm(NamedTuple):
    """A mean with its interval. `half` may be infinite (one seed): then no interval is drawn."""

    name: str
    x: float
    y: float
    half: float
    style: dict[str, Any]  # of matplotlib's errorbar


def arms(axes: Any, shown: Sequence[Arm], *, log: bool = False) -> None:
    """Draws arms with their names upright at the ends of their intervals.

    Arms of nearly the same x would hide each other: they are moved apart sideways, as little as
    that needs. Call it when the labels of the axes are set.
    """
    reach = [arm.half if math.isfinite(arm.half) else 0.0 for arm in shown]
    axes.set_xscale("log" if log else "linear")
    ends = [arm.y + sign * half for arm, half in zip(shown, reach, strict=True) for sign in (-1, 1)]
    axes.set_ylim(_limits(ends, 0.2, False))  # room for the names
    placed = _moved_apart(axes, [arm.x for arm in shown], log)
    middle = sum(axes.get_ylim()) / 2
    for arm, half, x in zip(shown, reach, placed, strict=True):
        axes.errorbar(x, arm.y, half or None, linestyle="none", capsize=3, **arm.style)
        up = arm.y < middle
        place = {
            "xytext": (0, 5 if up else -5),
            "textcoords": "offset points",
            "va": "bottom" if up else "top",
        }
        text = axes.annotate(
            arm.name, (x, arm.y + half if up else arm.y - half), rotation=90, ha="center", **place
        )
        text.set(fontsize=SMALL, color=arm.style["color"], in_layout=False)
        # A thin line leads down to the place on the axis where the arm belongs.
        axes.plot(
            [arm.x, x],
            [0, 0.05],
            transform=axes.get_xaxis_transform(),
            color=arm.style["color"],
            linewidth=0.8,
        )


def _moved_apart(axes: Any, wanted: Sequence[float], log: bool) -> list[float]:
    """Places on the x axis, APART points from each other; the limits of the axis are set so that
    all are inside.
    """
    placed = list(wanted)
    for _ in range(
        4
    ):  # wider limits bring the arms nearer together, which needs wider limits still
        axes.set_xlim(_limits([*wanted, *placed], 0.08, log))
        axes.figure.draw_without_rendering()  # settles where the axes are
        on_page = [axes.transData.transform((x, 1))[0] for x in wanted]
        apart = spread(on_page, APART * axes.figure.dpi / 72)
        placed = [float(axes.transData.inverted().transform((x, 0))[0]) for x in apart]
    return placed


class Line(NamedTuple):
    """A curve; `low` and `high` are the ends of a bar at each point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    style: dict[str, Any]  # of matplotlib's errorbar


def lines(axes: Any, shown: Sequence[Line]) -> None:
    """Draws curves on logarithmic axes, each with its name at its right end and its points a little
    beside those of the others.
    """
    axes.set(xscale="log", yscale="log")
    for number, line in enumerate(shown):
        beside = np.asarray(line.x) * 1.04 ** (number - (len(shown) - 1) / 2)
        bars = np.asarray(line.y) - line.low, np.asarray(line.high) - line.y
        axes.errorbar(beside, line.y, bars, marker="o", markersize=4, capsize=2, **line.style)
    last = max(max(line.x) for line in shown)
    left, right = axes.get_xlim()
    axes.set_xlim(left, last * (right / left) ** 0.42)  # room for the names
    axes.figure.draw_without_rendering()
    points = axes.figure.dpi / 72
    whole = [line for line in shown if max(line.x) == last]
    wanted = [axes.transData.transform((last, line.y[-1]))[1] for line in whole]
    heights = dict(
        zip((line.name for line in whole), spread(wanted, LINES_APART * points), strict=True)
    )
    for line in shown:
        end = line.x[-1] * 1.15, line.y[-1]
        x, y = axes.transData.transform(end)
        place = axes.transData.inverted().transform((x + 6 * points, heights.get(line.name, y)))
        text = axes.annotate(
            line.name, end, place, va="center", arrowprops={"arrowstyle": "-", "color": "0.7"}
        )
        text.set(fontsize=SMALL, color=line.style["color"], in_layout=False)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """The positions nearest to the wanted ones (least squares) of which no two are closer than
    `gap`; their order stays.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(order))
    placed = np.empty(len(order))
    placed[order] = isotonic_regression(np.asarray(wanted)[order] - steps).x + steps
    return placed.tolist()


def plain(value: float, place: int | None = None) -> str:
    """A number as people write it:

    0.5 and 2,000, not 5 x 10^-1 and 2e+03. `place` is given by matplotlib, and not used.
    """
    del place
    return f"{value:,.10g}"


def plain_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, as many as it has room for."""
    from matplotlib import ticker

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    subs = (1,) if decades > 2.5 else (1, 2, 5) if decades > 1.2 else (1, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(plain)
    axis.set_minor_locator(ticker.NullLocator())


def _limits(values: Sequence[float], room: float, log: bool) -> tuple[float, float]:
    """Those of the values, and a share of their span beside."""
    low, high = (math.log(f(values)) if log else f(values) for f in (min, max))
    span = high - low
    beside = room * (span if span > 1e-9 else 1)  # equal values may differ in their last bit
    ends = low - beside, high + beside
    return (math.exp(ends[0]), math.exp(ends[1])) if log else ends
