"""What the instruments print: tables of their figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.instruments.interference import PARTS
from moe_jax.instruments.knockout import PASSIVE, Worth
from moe_jax.terminal.table import Table, names, numbers


def notes(found: Mapping[str, str]) -> list[str]:
    """Returns lines that say what a table does not have, and why."""
    return [f"no {name}: {text}" for name, text in found.items()]


def replay(result: Mapping[str, Mapping[str, Any]], title: str) -> list[Table | str]:
    """Returns bits per byte under each routing, and its gap to the model's own, per domain too."""
    # A domain may have slashes in its name.
    head, tail = "domain/", "/bits_per_byte"
    keys = [key for key in result["own"] if key.startswith(head) and key.endswith(tail)]
    domains = [key.removeprefix(head).removesuffix(tail) for key in keys]
    columns = ["mean", "gap", *(f"gap, {domain}" for domain in domains)]
    table = Table([*names("routing"), *numbers(*columns)], title=title)
    missing = {}
    for name, row in result.items():
        if "note" in row:
            missing[name] = row["note"]
            continue
        gaps = [row["gap/bits_per_byte"], *(row[f"gap/{key}"] for key in keys)]
        table.add(name, f"{row['bits_per_byte']:.4f}", *(f"{gap:+z.4f}" for gap in gaps))
    return [table, *notes(missing)]


def precision(result: Mapping[str, Any]) -> list[Table | str]:
    """Returns flips in percent of all decisions, and quantiles of the margin, per layer."""
    num_layers = len(next(iter(result["flips"].values()), []))
    layers = [f"layer {i}" for i in range(num_layers)]
    table = Table([*names(""), *numbers(*layers)], title="routing decisions that flip, and margins")
    for name, share_L in result["flips"].items():
        table.add(f"flips, {name}", *(f"{100 * share:.3f} %" for share in share_L))
    for quantile, margin_L in result["margins"].items():
        name = f"margin, {100 * float(quantile):g} % quantile"
        table.add(name, *(f"{margin:.2g}" for margin in margin_L))
    return [table, *notes(result["notes"])]


def knockout(worth: Worth, domains: Sequence[str], way: str) -> list[Table | str]:
    """Returns what the loss of each expert costs every domain, and the mean over domains that have
    rows, with its interval.
    """
    title = (
        f"bits per byte more when an expert is {PASSIVE[way]} (*: the 95 % interval leaves out 0)"
    )
    columns = numbers("load", "mean", "95 % from", "to", *domains)
    table = Table([*names("layer", "expert"), *columns], title=title, keys=2)
    layers, num_experts, _ = worth.change_LEZ.shape
    for layer in range(layers):
        table.section()
        for expert in range(num_experts):
            at = layer, expert
            load = f"{100 * worth.load_LE[at]:.1f} %"
            means = [_change(z[at]) for z in (worth.mean_LE, worth.mean_low_LE, worth.mean_high_LE)]
            changes = zip(worth.change_LEZ[at], worth.low_LEZ[at], worth.high_LEZ[at], strict=True)
            cells = [_mark(low, high) + _change(change) for change, low, high in changes]
            table.add(str(layer), str(expert), load, *means, *cells)
    return [table]


def _change(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+z.4f}"


def _mark(low: float, high: float) -> str:
    return "*" if low > 0 or high < 0 else ""


def interference(result: Mapping[str, float]) -> list[Table | str]:
    """Returns the cosine and the norm ratio of each auxiliary loss against the language loss, one
    line a layer and part.
    """
    losses = sorted({key.rsplit("/", 1)[1].rsplit("_", 1)[0] for key in result})
    columns = [f"{name} {kind}" for name in losses for kind in ("cosine", "ratio")]
    title = "gradients of auxiliary losses against the language loss"
    table = Table([*names("layer", "part"), *numbers(*columns)], title=title, keys=2)
    places = {key.removeprefix("interference/").rsplit("/", 1)[0] for key in result}
    for place in sorted(places, key=_order):
        layer, _, part = place.partition("/")
        values = [result[f"interference/{place}/{column.replace(' ', '_')}"] for column in columns]
        table.add(layer, part, *(f"{value:.3g}" for value in values))
    return [table]


def _order(place: str) -> tuple[bool, int, int]:
    """Returns the key by which lines are sorted: layers by number, in each the parts as PARTS has
    them and then the rest; what is outside of layers comes last.
    """
    layer, _, part = place.partition("/")
    if place == "outside":
        return True, 0, 0
    return (
        False,
        int(layer.removeprefix("layer_")),
        PARTS.index(part) if part in PARTS else len(PARTS),
    )
