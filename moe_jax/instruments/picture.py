"""Pictures of the experts: which domains they serve (`routing`), and what their loss costs
(`knockout`).

Both have a panel for each MoE layer: figures of each expert above, domain by expert below.
picture_page.py says where on the page they are.

Shapes: L MoE layers, Z domains, E experts, R held-out rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.instruments import information
from moe_jax.instruments.knockout import PASSIVE, Worth
from moe_jax.instruments.picture_page import GAP, LINE, NUMBERED, SMALL, Page, Plan, broken, plan

# Inches of the title of a panel.
TITLE = 0.25
# Letters of a domain's name.
LONGEST = 32
MISSING = "0.85"  # grey
INK, ALERT = "0.35", "#c44e52"

INFORMATION = (
    "How much the expert of a token tells about its domain: mutual information, in bits (0: all "
    "domains use the experts alike). "
    "Red line: chance; a bar that ends before it shows nothing."
)
ORIGIN = (
    "Where the tokens of an expert come from, in percent, if every domain had equally many (a "
    "column adds up to 100 %; white: the "
    "even share; grey: no tokens). Bars: the load, an expert's share of all assignments (dashed: "
    "the even share)."
)


def routing(
    counts_LZE: np.ndarray,
    experts_RLE: np.ndarray,
    domain_R: np.ndarray,
    domains: Sequence[str],
    path: Path,
) -> np.ndarray:
    """Draws what an expert tells about the domain; saves a PNG at `path` and returns it as an image
    [H, W, 3], uint8.

    Above: the mutual information of each layer, beside what chance gives and the most that is
    possible. Below, for each layer: the load of every expert, and the domains that its tokens come
    from.

    Args:
      counts_LZE: assignments of all held-out rows.
      experts_RLE: the assignments of each row, or of the first ones, for what chance gives.
      domain_R: their domains.
    """
    layers, num_domains, num_experts = counts_LZE.shape
    names = [_short(name) for name in domains]
    panels = plan(layers, num_experts, names, above=0.5)
    # The bars of information need that much for the words beside them.
    width = max(9.0, panels.total)

    # Where things begin and how high they are, from the top to the bottom.
    first_title = 0.1
    bars = first_title + LINE * len(broken(INFORMATION, width)) + 0.1
    bars_height = 0.22 * layers
    second_title = bars + bars_height + 0.6
    first_panel = second_title + LINE * len(broken(ORIGIN, width)) + 0.1
    page = Page(width, first_panel + panels.lines * panels.panel + 0.2)

    # What the expert of a token tells about its domain.
    page.title(first_title, INFORMATION)
    chance_L = information.chance(experts_RLE, domain_R, num_domains, seed=0)
    _draw_information(page, counts_LZE, chance_L, bars, bars_height)

    # Load and origin, in a panel for each layer.
    page.title(second_title, ORIGIN)
    counts_LE = counts_LZE.sum(1)
    load_LE = counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1)
    # Domains without tokens have no share: the even one is that of the others.
    is_present_Z = counts_LZE.sum((0, 2)) > 0
    num_present = max(int(is_present_Z.sum()), 1)
    even = 1 / num_present
    most_load = max(load_LE.max(), 1 / num_experts)
    pairs = _pairs(page, first_panel, panels, layers)
    for layer, (above, below) in enumerate(pairs):
        _draw_load(above, load_LE[layer], most_load)
        _draw_origin(below, counts_LZE[layer], names, even)
    _name_panels(pairs, panels.columns, "load")

    # The bar of colours has three marks: nothing, the even share and the most.
    bar = _colour_bar(page, panels, first_panel, pairs)
    marks = {0: "0 %", even: f"{100 / num_present:.0f} % (even)"}
    if num_present > 1:
        marks[bar.vmax] = f"{100 * bar.vmax:.0f} %"
    bar.set_ticks(list(marks), labels=list(marks.values()))
    return page.save(path)


def _draw_information(
    page: Page, counts_LZE: np.ndarray, chance_L: np.ndarray, top: float, height: float
) -> None:
    """Draws a bar for each layer, and writes beside it what it means."""
    bits_L, most_L = information.mutual_information(counts_LZE), information.ceiling(counts_LZE)
    # Inches of the names of layers, and of the words behind the bars.
    left, words = 1.0, 4.4
    ax = page.axes(left, top, page.width - left - words, height)
    layer_L = np.arange(len(bits_L))
    ax.barh(layer_L, bits_L, height=0.6, color="C0")
    ax.vlines(chance_L, layer_L - 0.42, layer_L + 0.42, color=ALERT, linewidth=1.5)
    # Not 0, where nothing is told at all: an axis needs a length.
    end = 1.05 * max(bits_L.max(), chance_L.max(), 1e-3)
    for layer, (bits, most, chance) in enumerate(zip(bits_L, most_L, chance_L, strict=True)):
        # With one domain, or one expert, nothing can be told.
        if most > 1e-9:
            share = f"{100 * bits / most:.1f} % of the {most:.2f} that are possible"
        else:
            share = "no more is possible"
        text = f"{bits:.3f} bits, {share}; chance: {chance:.2g}"
        ax.text(1.02 * end, layer, text, va="center", fontsize=SMALL)
    # Layer 0 is on top.
    ax.set(xlim=(0, end), ylim=(len(bits_L) - 0.5, -0.5))
    ax.set_yticks(layer_L, [f"MoE layer {layer}" for layer in layer_L])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    ax.set_xlabel("bits", fontsize=SMALL, labelpad=1)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_load(ax: Any, load_E: np.ndarray, most: float) -> None:
    """Draws the load of each expert; `most` is the highest load of all layers, so that the bars of
    layers can be compared.
    """
    even = 1 / len(load_E)
    ax.bar(np.arange(len(load_E)), load_E, width=0.8, color=INK)
    ax.axhline(even, color=ALERT, linestyle="--", linewidth=1)
    ax.set_ylim(0, 1.1 * most)
    ax.set_yticks([even], [f"{100 * even:.3g} %"])


def _draw_origin(ax: Any, counts_ZE: np.ndarray, names: Sequence[str], even: float) -> None:
    """Draws where tokens come from; the colours reach to three times the even share, so that layers
    and runs can be compared.
    """
    from matplotlib.colors import TwoSlopeNorm

    share_ZE = information.origin(counts_ZE)
    # A single domain has all of every expert; the colours must reach beyond the even share.
    darkest = min(3 * even, 1) if even < 1 else 2
    image = _heat_map(ax, share_ZE, names, TwoSlopeNorm(even, 0, darkest))
    # The cells are too narrow for their percentages.
    if counts_ZE.shape[1] > NUMBERED:
        return
    for (domain, expert), share in np.ndenumerate(share_ZE):
        # Both ends of the colours are dark; the middle, 0.5, is white.
        is_dark = abs(image.norm(share) - 0.5) > 0.38
        colour = "white" if is_dark else "black"
        text = "" if np.isnan(share) else f"{100 * share:.0f}"
        ax.text(expert, domain, text, ha="center", va="center", fontsize=6.5, color=colour)


def knockout(worth: Worth, domains: Sequence[str], way: str, path: Path) -> None:
    """Draws what the loss of each expert costs, in bits per byte; saves a PNG at `path`.

    Above, for each layer: the mean over domains, with its 95 % interval over held-out rows. Below:
    every domain, with a dot where the interval leaves out 0.
    """
    # Domains without held-out rows have no figures.
    measured = np.flatnonzero(~np.isnan(worth.base_Z))
    names = [_short(domains[int(domain)]) for domain in measured]
    layers, num_experts, _ = worth.change_LEZ.shape
    panels = plan(layers, num_experts, names, above=0.9)
    title = (
        f"Bits per byte more when an expert is {PASSIVE[way]}. Above: mean over domains, with its "
        "95 % interval over held-out rows. "
        "Below: each domain; a dot where the 95 % interval of the cell leaves out 0."
    )
    width = max(7.0, panels.total)
    top = 0.2 + LINE * len(broken(title, width))
    page = Page(width, top + panels.lines * panels.panel + 0.2)
    page.title(0.1, title)
    pairs = _pairs(page, top, panels, layers)
    change_LEZ = worth.change_LEZ[:, :, measured]
    # NaN compares as False: no dot where no interval is known.
    leaves_out_0_LEZ = (worth.low_LEZ > 0) | (worth.high_LEZ < 0)
    leaves_out_0_LEZ = leaves_out_0_LEZ[:, :, measured]
    # Axes and colours are the same for all layers, so that they can be compared.
    limits = _limits(worth)
    most = max(float(np.abs(change_LEZ).max()), 1e-9)
    for layer, (above, below) in enumerate(pairs):
        means = worth.mean_LE[layer], worth.mean_low_LE[layer], worth.mean_high_LE[layer]
        _draw_means(above, *means, limits)
        _draw_changes(below, change_LEZ[layer].T, leaves_out_0_LEZ[layer].T, names, most)
    _name_panels(pairs, panels.columns, "mean")
    _colour_bar(page, panels, top, pairs)
    page.save(path)


def _limits(worth: Worth) -> tuple[float, float]:
    """Returns the ends of the axis of the means, which holds all intervals of all layers, and 0."""
    ends = np.stack([worth.mean_LE, worth.mean_low_LE, worth.mean_high_LE])
    low, high = min(0, np.nanmin(ends)), max(0, np.nanmax(ends))
    # Not 0, where no expert changes anything: an axis needs a length.
    margin = max(0.08 * (high - low), 1e-9)
    return low - margin, high + margin


def _draw_means(
    ax: Any, mean_E: np.ndarray, low_E: np.ndarray, high_E: np.ndarray, limits: tuple[float, float]
) -> None:
    """Draws the mean of each expert with its interval."""
    # No interval is known of a domain with one row.
    reach = np.abs(np.nan_to_num([mean_E - low_E, high_E - mean_E]))
    ax.axhline(0, color="black", linewidth=0.8)
    ax.errorbar(
        np.arange(len(mean_E)),
        mean_E,
        reach,
        fmt="o",
        markersize=3,
        capsize=2,
        linewidth=1,
        color=INK,
    )
    ax.set_ylim(limits)


def _draw_changes(
    ax: Any, change_ZE: np.ndarray, dots_ZE: np.ndarray, names: Sequence[str], most: float
) -> None:
    """Draws the change of each domain by each expert, and a dot where it is more than noise."""
    from matplotlib.colors import Normalize

    # White is no change.
    _heat_map(ax, change_ZE, names, Normalize(-most, most))
    domain, expert = np.nonzero(dots_ZE)
    ax.plot(expert, domain, "o", markersize=2.5, color="black")


def _pairs(page: Page, top: float, panels: Plan, layers: int) -> list[tuple[Any, Any]]:
    """Returns (upper axes, lower axes) of each layer, with its title."""
    pairs = []
    for layer in range(layers):
        line, column = divmod(layer, panels.columns)
        left = panels.left + column * (panels.width + GAP)
        upper = top + line * panels.panel + TITLE
        lower = upper + panels.above + 0.08
        above = page.axes(left, upper, panels.width, panels.above)
        below = page.axes(left, lower, panels.width, panels.below)
        above.set_title(f"MoE layer {layer}", fontsize=SMALL + 1, pad=3)
        pairs.append((above, below))
    return pairs


def _name_panels(pairs: Sequence[tuple[Any, Any]], columns: int, what: str) -> None:
    """Writes the names of domains, and of what is drawn above, at the first column, and "expert"
    below the last line.
    """
    for layer, (above, below) in enumerate(pairs):
        # The bar of an expert stands over its column of cells.
        above.set_xlim(below.get_xlim())
        above.set_xticks([])
        above.spines[["top", "right"]].set_visible(False)
        is_first_column = layer % columns == 0
        if is_first_column:
            above.set_ylabel(what, fontsize=SMALL, rotation=0, ha="right", va="top", y=1)
        else:
            for ax in (above, below):
                ax.set_yticklabels([])
        # Nothing stands below it, in the last line or in the one before.
        if layer + columns >= len(pairs):
            below.set_xlabel("expert", fontsize=SMALL, labelpad=1)


def _heat_map(ax: Any, values_ZE: np.ndarray, names: Sequence[str], norm: Any) -> Any:
    """Draws a cell for each domain and expert, and returns the image that a bar of colours needs.

    `norm` says which value has which colour: blue is low, red is high.
    """
    from matplotlib import colormaps

    num_experts = values_ZE.shape[1]
    # NaN is a colour of its own.
    colours = colormaps["RdBu_r"].with_extremes(bad=MISSING)
    image = ax.imshow(values_ZE, cmap=colours, norm=norm, aspect="auto")
    # Of many experts eight have their number.
    numbered_each = 1 if num_experts <= NUMBERED else num_experts // 8
    ax.set_xticks(range(0, num_experts, numbered_each))
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    return image


def _colour_bar(page: Page, panels: Plan, top: float, pairs: Sequence[tuple[Any, Any]]) -> Any:
    """Draws the bar of colours to the right of the panels, which all have the same colours."""
    left = panels.left + panels.columns * (panels.width + GAP)
    height = min(3.0, panels.lines * panels.panel - 0.6)
    axes = page.axes(left, top + TITLE, 0.16, height)
    bar = page.figure.colorbar(pairs[0][1].images[0], cax=axes)
    bar.ax.tick_params(labelsize=SMALL)
    return bar


def _short(name: str) -> str:
    """Returns a name of at most LONGEST letters: its beginning and its end."""
    if len(name) <= LONGEST:
        return name
    half = LONGEST // 2
    return f"{name[: half - 1]}…{name[1 - half :]}"
