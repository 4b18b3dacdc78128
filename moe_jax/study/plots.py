"""The plot of a study: its arms, the search of their learning rates, and its claims.

What is equal between the arms stands in the title.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.study import judge

WIDTH, HEIGHT = 15.0, 5.2  # inches
COLOURS = {
    judge.AGREES: "tab:green",
    judge.DISAGREES: "tab:red",
    judge.TOO_SMALL: "tab:gray",
    judge.INCONCLUSIVE: "tab:orange",
}


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draws the plot of figures.json."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", dpi=110)
    title = f"{figures['question']}\nequal: {figures['equal']}"
    figure.suptitle("\n".join(textwrap.fill(line, 150) for line in title.split("\n")), fontsize=11)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1.1))
    colours = {name: f"C{i % 10}" for i, name in enumerate(figures["arms"])}
    _arms(left, figures, colours)
    _rates(middle, figures, colours)
    _claims(right, figures)
    # Set last: a canvas draws a figure, whatever backend the process has.
    FigureCanvasAgg(figure).print_figure(str(path))


def _arms(axes: Any, figures: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Draws the figure of every arm with its interval, by its place or side by side."""
    places = figures["x"]
    shown = []
    for i, (name, arm) in enumerate(figures["arms"].items()):
        found = [run.get(figures["figure"]) for run in arm["runs"].values()]
        found = [value for value in found if value is not None]
        if not found:
            continue
        x = places.get(name, i) if places else i
        mean, low, high, _ = judge.interval(found)
        bars = None if low != low else [[mean - low], [high - mean]]
        axes.errorbar(x, mean, bars, marker="o", capsize=3, color=colours[name])
        axes.plot([x] * len(found), found, "_", color=colours[name], alpha=0.5)
        shown.append((x, name))
        # Side by side the names stand below the axis.
        if places:
            at, beside = (x, mean), {"xytext": (6, 4), "textcoords": "offset points"}
            axes.annotate(name, at, fontsize=8, rotation=20, **beside)
    if places:
        axes.set_xscale("log", base=2)
        axes.set_xlabel(figures["x_label"])
        _plain_ticks(axes, sorted({x for x, _ in shown}))
    elif shown:
        axes.set_xticks([x for x, _ in shown], [name for _, name in shown], rotation=30, ha="right")
    axes.margins(x=0.15, y=0.15)
    axes.set_ylabel(f"{figures['figure'].replace('_', ' ')} (mean, 95 %; ticks: seeds)")
    axes.set_title("arms", fontsize=10)


def _rates(axes: Any, figures: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Draws the search of every arm's learning rate; a star is what was taken."""
    any_drawn = False
    for name, arm in figures["arms"].items():
        tried = [(rate, value) for rate, value in arm["tried"] if value is not None]
        if not tried:
            continue
        any_drawn = True
        axes.plot(*zip(*tried), marker=".", color=colours[name], label=name)
        taken = [pair for pair in tried if pair[0] == arm["rate"]]
        if taken and not arm["undecided"]:
            axes.plot(*taken[0], marker="*", markersize=11, color=colours[name])
    axes.set_title("search of the learning rate (its own seed)", fontsize=10)
    if not any_drawn:
        axes.text(0.5, 0.5, "the arms declare their rates", ha="center", va="center")
        axes.set_axis_off()
        return
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    _plain_ticks(
        axes, sorted({rate for arm in figures["arms"].values() for rate, _ in arm["tried"]})
    )
    axes.legend(fontsize=7)


def _plain_ticks(axes: Any, places: list[float]) -> None:
    """Puts a tick at each place of a logarithmic axis, with its number as people write it."""
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_xticks([], minor=True)


def _claims(axes: Any, figures: Mapping[str, Any]) -> None:
    """Draws every claim as its interval relative to its bound, in units of the interval's reach.

    Claims have different units, so each has a scale of its own: 0 is the bound.
    """
    verdicts = list(reversed(figures["verdicts"]))
    labels = []
    for y, each in enumerate(verdicts):
        found, bound = each["interval"], each["bound"]
        text = f"{each['claim']} ({each['rule']} {each['unit']})"
        labels.append(f"{textwrap.fill(text, 38)}\n{each['word']}")
        if found["number"] == 0 or found["low"] != found["low"]:
            continue
        centre = 0.0 if each["rule"].startswith("within") else bound
        reach = max(abs(found[end] - centre) for end in ("low", "high")) or 1.0
        low, mean, high = ((found[end] - centre) / reach for end in ("low", "mean", "high"))
        bars = [[mean - low], [high - mean]]
        axes.errorbar(mean, y, xerr=bars, marker="o", capsize=4, color=COLOURS[each["word"]])
        if each["rule"].startswith("within"):
            axes.plot([-bound / reach] * 2, [y - 0.3, y + 0.3], color="black", linewidth=0.8)
            axes.plot([bound / reach] * 2, [y - 0.3, y + 0.3], color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(verdicts)), labels, fontsize=7)
    axes.set_ylim(-0.7, len(verdicts) - 0.3)
    axes.set_xlim(-1.25, 1.25)
    axes.set_xticks([0], ["bound"])
    axes.set_title("claims, each on a scale of its own", fontsize=10)
