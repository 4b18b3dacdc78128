"""What the instruments print: tables of their figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.instruments.interference import PARTS
from moe_jax.instruments.knockout import PASSIVE, Worth
from moe_jax.terminal.table import Table, names, numbers


def notes(reasons: Mapping[str, str]) -> list[str]:
    """Returns lines that say what a table does not have, and why."""
    return [f"no {name}: {reason}" for name, reason in reasons.items()]


def replay(result: Mapping[str, Mapping[str, Any]], title: str) -> list[Table | str]:
    """Returns bits per byte under each routing, and its gap to the model's own, per domain too."""
    # The key is cut at both ends and not at slashes: a domain may have slashes in its name.
    head, tail = "domain/", "/bits_per_byte"
    keys = [key for key in result["own"] if key.startswith(head) and key.endswith(tail)]
    domains = [key.removeprefix(head).removesuffix(tail) for key in keys]
    gap_columns = [f"gap, {domain}" for domain in domains]
    table = Table([*names("routing"), *numbers("mean", "gap", *gap_columns)], title=title)
    # Why a routing has no figures: the note says it.
    reasons = {}
    for way, figures in result.items():
        if "note" in figures:
            reasons[way] = figures["note"]
            continue
        mean = f"{figures['bits_per_byte']:.4f}"
        gap = _signed(figures["gap/bits_per_byte"])
        domain_gaps = [_signed(figures[f"gap/{key}"]) for key in keys]
        table.add(way, mean, gap, *domain_gaps)
    return [table, *notes(reasons)]


def precision(result: Mapping[str, Any]) -> list[Table | str]:
    """Returns flips in percent of all decisions, and quantiles of the margin, per layer."""
    # Every perturbation has a share for each layer.
    any_share_L = next(iter(result["flips"].values()), [])
    layers = [f"layer {i}" for i in range(len(any_share_L))]
    table = Table([*names(""), *numbers(*layers)], title="routing decisions that flip, and margins")
    for perturbation, share_L in result["flips"].items():
        percentages = [f"{100 * share:.3f} %" for share in share_L]
        table.add(f"flips, {perturbation}", *percentages)
    for quantile, margin_L in result["margins"].items():
        percent = 100 * float(quantile)
        margins = [f"{margin:.2g}" for margin in margin_L]
        table.add(f"margin, {percent:g} % quantile", *margins)
    return [table, *notes(result["notes"])]


def of_numbers(result: Mapping[str, Mapping[str, Any]]) -> list[Table | str]:
    """Returns the held-out loss with feed-forwards of other numbers, and the flips per layer."""
    own, *others = result
    losses = list(result[own])
    reasons = {name: of_name["note"] for name, of_name in result.items() if "note" in of_name}
    measured = [name for name in others if name not in reasons]
    num_layers = max((len(result[name]["flips"]) for name in measured), default=0)
    columns = [f"{loss}{what}" for loss in losses for what in ("", ", gap")]
    columns += [f"flips, layer {layer}" for layer in range(num_layers)]
    title = f"feed-forwards of other numbers (the model's own: {own})"
    table = Table([*names("numbers"), *numbers(*columns)], title=title)
    for name in (own, *measured):
        figures, cells = result[name], []
        for loss in losses:
            gap = figures.get(f"gap/{loss}", 0.0)
            cells += [f"{figures[loss]:.4f}", _signed(gap)]
        share_L = figures.get("flips", [0.0] * num_layers)
        table.add(name, *cells, *(f"{100 * share:.3f} %" for share in share_L))
    return [table, *notes(reasons)]


def knockout(worth: Worth, domains: Sequence[str], way: str) -> list[Table | str]:
    """Returns what each domain loses without each expert, and the mean over domains that have rows,
    with its interval.
    """
    title = (
        f"bits per byte more when an expert is {PASSIVE[way]} (*: the 95 % interval leaves out 0)"
    )
    columns = numbers("load", "mean", "95 % from", "to", *domains)
    # Where a narrow terminal splits the table, each part has layer and expert.
    table = Table([*names("layer", "expert"), *columns], title=title, keys=2)
    num_layers, num_experts, _ = worth.change_LEZ.shape
    for layer in range(num_layers):
        table.section()
        for expert in range(num_experts):
            cells = _knockout_cells(worth, layer, expert)
            table.add(str(layer), str(expert), *cells)
    return [table]


def _knockout_cells(worth: Worth, layer: int, expert: int) -> list[str]:
    """Returns the load, the mean with the ends of its interval, and the change of each domain."""
    at = layer, expert
    percent = 100 * worth.load_LE[at]
    cells = [
        f"{percent:.1f} %",
        _change(worth.mean_LE[at]),
        _change(worth.mean_low_LE[at]),
        _change(worth.mean_high_LE[at]),
    ]
    of_domains = zip(worth.change_LEZ[at], worth.low_LEZ[at], worth.high_LEZ[at], strict=True)
    for change, low, high in of_domains:
        cells.append(_mark(low, high) + _change(change))
    return cells


def _signed(number: float) -> str:
    # "z": a number that rounds to zero has no minus.
    return f"{number:+z.4f}"


def _change(value: float) -> str:
    # A domain without held-out rows has no change.
    return "-" if np.isnan(value) else _signed(value)


def _mark(low: float, high: float) -> str:
    """Returns the star of an interval that leaves out 0."""
    return "*" if low > 0 or high < 0 else ""


def interference(result: Mapping[str, float]) -> list[Table | str]:
    """Returns the cosine and the norm ratio of each auxiliary loss against the language loss, one
    line a layer and part.
    """
    locations, losses = set(), set()
    # A key is "interference/LAYER/PART/LOSS_cosine", or "interference/outside/LOSS_cosine".
    for key in result:
        location, figure = key.removeprefix("interference/").rsplit("/", 1)
        # A loss may have "_" in its name; the kind of the figure has none.
        loss, _ = figure.rsplit("_", 1)
        locations.add(location)
        losses.add(loss)
    columns = [(loss, kind) for loss in sorted(losses) for kind in ("cosine", "ratio")]
    headers = [f"{loss} {kind}" for loss, kind in columns]
    title = "gradients of auxiliary losses against the language loss"
    table = Table([*names("layer", "part"), *numbers(*headers)], title=title, keys=2)
    for location in sorted(locations, key=_position):
        layer, _, part = location.partition("/")
        values = [result[f"interference/{location}/{loss}_{kind}"] for loss, kind in columns]
        table.add(layer, part, *(f"{value:.3g}" for value in values))
    return [table]


def _position(location: str) -> tuple[bool, int, int]:
    """Returns the key by which lines are sorted: layers by number, in each the parts as PARTS has
    them and then the rest; what is outside of layers comes last.
    """
    if location == "outside":
        return True, 0, 0
    layer, _, part = location.partition("/")
    number = int(layer.removeprefix("layer_"))
    place = PARTS.index(part) if part in PARTS else len(PARTS)
    return False, number, place
