"""The plot of a study: its arms, the search of their learning rates, and its claims.

What is equal between the arms stands in the title.
"""

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.study import judge

WIDTH, HEIGHT = 15.0, 5.2  # inches
# Of a line of the title.
TITLE_LETTERS = 150
# Of a line of a claim.
LABEL_LETTERS = 38
COLOURS = {
    judge.AGREES: "tab:green",
    judge.DISAGREES: "tab:red",
    judge.TOO_SMALL: "tab:gray",
    judge.INCONCLUSIVE: "tab:orange",
}
# Colours of matplotlib, "C0" to "C9", and the shape of the mean. Ten lines have colours enough.
LOOKS = [(f"C{number}", marker) for marker in ("o", "s", "^") for number in range(10)]
# Arms whose names have room inside the panel of their curves.
FEW = 6
# Arms whose names have room side by side below the axis.
MANY = 8


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draws the plot of figures.json."""
    # Imported here: matplotlib takes a second, and most commands draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", dpi=110)
    question = textwrap.fill(figures["question"], TITLE_LETTERS)
    equal = textwrap.fill(f"equal: {figures['equal']}", TITLE_LETTERS)
    figure.suptitle(f"{question}\n{equal}", fontsize=11)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1, 1.1))
    # An arm looks the same in all panels.
    looks = dict(zip(figures["arms"], LOOKS * len(figures["arms"]), strict=False))
    _arms(left, figures, looks)
    _rates(middle, figures, looks)
    _claims(right, figures)
    # Set last: a canvas draws a figure, whatever backend the process has.
    FigureCanvasAgg(figure).print_figure(str(path))


def _arms(axes: Any, figures: Mapping[str, Any], looks: Mapping[str, tuple[str, str]]) -> None:
    """Draws the figure of every arm with its interval, by its place or side by side."""
    figure, places = figures["figure"], figures["x"]
    # The place of each arm that is drawn.
    x_of_arm: dict[str, float] = {}
    for i, (name, arm) in enumerate(figures["arms"].items()):
        of_seeds = [run.get(figure) for run in arm["runs"].values()]
        # A run that diverged has no figure.
        of_seeds = [value for value in of_seeds if value is not None]
        if not of_seeds:
            continue
        x = places.get(name, i) if places else i
        x_of_arm[name] = x
        colour, marker = looks[name]
        mean, low, high, _ = judge.interval(of_seeds)
        # One seed has no interval: its ends are NaN.
        bars = None if math.isnan(low) else [[mean - low], [high - mean]]
        axes.errorbar(x, mean, bars, marker=marker, capsize=3, color=colour)
        # A short line for each seed.
        axes.plot([x] * len(of_seeds), of_seeds, "_", color=colour, alpha=0.5)
        if places:
            # The axis has numbers, so the name stands beside the point.
            offset = {"xytext": (6, 4), "textcoords": "offset points"}
            axes.annotate(name, (x, mean), fontsize=8, rotation=20, **offset)
    if places:
        # Places are sizes: twice as many is one step.
        axes.set_xscale("log", base=2)
        axes.set_xlabel(figures["x_label"])
        _plain_ticks(axes, sorted(set(x_of_arm.values())))
    elif x_of_arm:
        # Side by side the names stand below the axis.
        names, xs = list(x_of_arm), list(x_of_arm.values())
        rotation = 30 if len(names) <= MANY else 60
        axes.set_xticks(xs, names, rotation=rotation, ha="right")
    axes.margins(x=0.15, y=0.15)
    label = figure.replace("_", " ")
    axes.set_ylabel(f"{label} (mean, 95 %; ticks: seeds)")
    axes.set_title("arms", fontsize=10)


def _rates(axes: Any, figures: Mapping[str, Any], looks: Mapping[str, tuple[str, str]]) -> None:
    """Draws the search of every arm's learning rate; a star is what was taken."""
    rates_shown: set[float] = set()
    any_drawn = False
    for name, arm in figures["arms"].items():
        rates_shown.update(rate for rate, _ in arm["tried"])
        # At a rate at which the run diverged there is no loss.
        loss_at = {rate: loss for rate, loss in arm["tried"] if loss is not None}
        if not loss_at:
            continue
        any_drawn = True
        rates, losses = list(loss_at), list(loss_at.values())
        colour, marker = looks[name]
        axes.plot(rates, losses, marker=marker, markersize=4, color=colour, label=name)
        rate = arm["rate"]
        # A search that is undecided has taken none.
        if rate in loss_at and not arm["undecided"]:
            axes.plot(rate, loss_at[rate], marker="*", markersize=11, color=colour)
    axes.set_title("search of the learning rate (its own seeds)", fontsize=10)
    if not any_drawn:
        axes.text(0.5, 0.5, "the arms declare their rates", ha="center", va="center")
        axes.set_axis_off()
        return
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    _plain_ticks(axes, sorted(rates_shown))
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    axes.legend(fontsize=7, **(beside if len(figures["arms"]) > FEW else {}))


def _plain_ticks(axes: Any, places: list[float]) -> None:
    """Puts a tick at each place of a logarithmic axis, with its number as people write it."""
    axes.set_xticks(places, [f"{place:g}" for place in places])
    # The ticks between the powers would crowd them.
    axes.set_xticks([], minor=True)


def _claims(axes: Any, figures: Mapping[str, Any]) -> None:
    """Draws every claim as its interval relative to its bound, in units of the interval's reach.

    Claims have different units, so each has a scale of its own: 0 is the bound.
    """
    # The first claim is on top.
    verdicts = list(reversed(figures["verdicts"]))
    labels = []
    for y, verdict in enumerate(verdicts):
        claim = f"{verdict['claim']} ({verdict['rule']} {verdict['unit']})"
        labels.append(f"{textwrap.fill(claim, LABEL_LETTERS)}\n{verdict['word']}")
        _claim(axes, y, verdict)
    axes.axvline(0, color="black", linewidth=0.8)
    # An interval is drawn from -1 to 1 at most.
    axes.set_yticks(range(len(verdicts)), labels, fontsize=7)
    axes.set_ylim(-0.7, len(verdicts) - 0.3)
    axes.set_xlim(-1.25, 1.25)
    axes.set_xticks([0], ["bound"])
    axes.set_title("claims, each on a scale of its own", fontsize=10)


def _claim(axes: Any, y: int, verdict: Mapping[str, Any]) -> None:
    """Draws the interval of one claim at a height, and its bounds where it has two."""
    interval, bound = verdict["interval"], verdict["bound"]
    # No seed, or one: there is no interval.
    if interval["number"] == 0 or math.isnan(interval["low"]):
        return
    # "within 0.1": the bounds are -0.1 and 0.1, and 0 lies between them.
    is_within = verdict["rule"].startswith("within")
    centre = 0.0 if is_within else bound
    # An interval that is the bound itself has no reach.
    reach = max(abs(interval[end] - centre) for end in ("low", "high")) or 1.0
    low, mean, high = ((interval[end] - centre) / reach for end in ("low", "mean", "high"))
    bars = [[mean - low], [high - mean]]
    colour = COLOURS[verdict["word"]]
    axes.errorbar(mean, y, xerr=bars, marker="o", capsize=4, color=colour)
    if is_within:
        for end in (-bound / reach, bound / reach):
            axes.plot([end, end], [y - 0.3, y + 0.3], color="black", linewidth=0.8)
