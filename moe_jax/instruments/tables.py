"""What the instruments print: tables of their figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_jax.instruments.interference import PARTS
from moe_jax.instruments.knockout import PASSIVE, Worth

WIDE = 180


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def _print(table: Table, notes: Mapping[str, str] | None = None) -> None:
    """A file or a pipe has no width, and gets the whole table. Below it what it does not have, and why."""
    console = Console()
    console = Console(width=console.width if console.is_terminal else WIDE)
    console.print(table)
    for name, text in (notes or {}).items():
        console.print(f"no {name}: {text}", markup=False, highlight=False)


def note(title: str, text: str) -> None:
    """In place of a table: why there is none."""
    Console().print(f"{title}: {text}", markup=False, highlight=False, soft_wrap=True)


def replay(result: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Bits per byte under each routing, and its gap to the model's own, per domain too."""
    # A domain may have slashes in its name.
    keys = [key for key in result["own"] if key.endswith("/bits_per_byte") and key.startswith("domain/")]
    domains = [key.removeprefix("domain/").removesuffix("/bits_per_byte") for key in keys]
    table = _table(title, ["routing", "mean", "gap", *(f"gap, {domain}" for domain in domains)])
    for name, row in result.items():
        if "note" in row:
            continue
        gaps = [f"{row[f'gap/domain/{domain}/bits_per_byte']:+.4f}" for domain in domains]
        table.add_row(name, f"{row['bits_per_byte']:.4f}", f"{row['gap/bits_per_byte']:+.4f}", *gaps)
    _print(table, {name: row["note"] for name, row in result.items() if "note" in row})


def precision(result: Mapping[str, Any]) -> None:
    """Flips in percent of all decisions, and quantiles of the margin, per layer."""
    num_layers = len(next(iter(result["flips"].values()), []))
    table = _table("routing decisions that flip, and margins", ["", *(f"layer {i}" for i in range(num_layers))])
    for name, share_L in result["flips"].items():
        table.add_row(f"flips, {name}", *(f"{100 * share:.3f} %" for share in share_L))
    for quantile, margin_L in result["margins"].items():
        table.add_row(f"margin, {100 * float(quantile):g} % quantile", *(f"{margin:.2g}" for margin in margin_L))
    _print(table, result["notes"])


def knockout(worth: Worth, domains: Sequence[str], way: str) -> None:
    """The change of every domain without each expert, the mean over domains that have rows, and the expert's share of all assignments."""
    title = f"bits per byte more when an expert is {PASSIVE[way]}"
    table = _table(title, ["layer", "expert", "load", "mean", *domains])
    layers, num_experts, _ = worth.change_LEZ.shape
    for layer in range(layers):
        for expert in range(num_experts):
            change_Z = worth.change_LEZ[layer, expert]
            load = f"{100 * worth.load_LE[layer, expert]:.1f} %"
            cells = ["-" if np.isnan(change) else f"{change:+.4f}" for change in (np.nanmean(change_Z), *change_Z)]
            table.add_row(str(layer), str(expert), load, *cells, end_section=expert == num_experts - 1)
    _print(table)


def interference(result: Mapping[str, float]) -> None:
    """Cosine and norm ratio of each auxiliary loss against the language loss, one line a layer and part."""
    names = sorted({key.rsplit("/", 1)[1].rsplit("_", 1)[0] for key in result})
    columns = [f"{name} {kind}" for name in names for kind in ("cosine", "ratio")]
    table = _table("gradients of auxiliary losses against the language loss", ["layer", "part", *columns])
    places = list(dict.fromkeys(key.removeprefix("interference/").rsplit("/", 1)[0] for key in result))
    order = lambda place: (
        place == "outside",
        place.split("/")[0],
        *(i for i, p in enumerate(PARTS) if place.endswith(p)),
    )
    for place in sorted(places, key=order):
        layer, _, part = place.partition("/")
        values = [result[f"interference/{place}/{column.replace(' ', '_')}"] for column in columns]
        table.add_row(layer, part, *(f"{value:.3g}" for value in values))
    _print(table)
