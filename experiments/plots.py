"""What the plots of experiments share: names at the ends of lines, plain numbers at the ticks."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

SMALL = 7.5  # points of the letters of a name
LINES_APART = 10.0  # points between the names of two lines


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
