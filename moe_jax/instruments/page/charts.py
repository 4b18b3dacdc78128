"""The charts of the page, as specifications of Vega-Lite with their rows in a compact form.

A grid of numbers travels as its shape and a flat list; the page makes rows of it. `grid` says what
its dimensions are called.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DIGITS = 3
HEATMAP_WIDTH, HEIGHT = 420, 240
# Numbers that would touch each other are left out.
AXIS = {"labelOverlap": "greedy", "labelSeparation": 5}
Chart = dict[str, Any]


def grid(names: Sequence[str], values: Any, labels: Mapping[str, Sequence[Any]] | None = None):
    """Returns a table of one row for each number of an array [len(names) dimensions].

    `labels` gives what the places of a dimension are called, where that is not their number.
    """
    array = np.asarray(values, float)
    # JSON has no NaN; few digits keep the page small.
    flat = [None if np.isnan(x) else float(f"{x:.{DIGITS}g}") for x in array.ravel()]
    return {
        "names": list(names),
        "shape": list(array.shape),
        "labels": {name: list(of) for name, of in (labels or {}).items()},
        "values": flat,
    }


def columns(**of: Sequence[Any]) -> dict[str, Any]:
    """Returns a table by its columns, which are all of one length."""
    return {"columns": {name: list(values) for name, values in of.items()}}


def chart(title: str, about: str, table: dict[str, Any], spec: dict[str, Any]) -> Chart:
    """Returns a chart as page.js reads it: a title, a sentence below it, the rows, the drawing."""
    return {"title": title, "about": about, "table": table, "spec": spec}


def lines(
    title: str, about: str, table: dict[str, Any], y: str, colour: str, width: int = 420
) -> Chart:
    """Returns lines over steps; a click on the legend shows one of them alone."""
    spec = {
        "width": width,
        "height": 180,
        "params": [
            {"name": "chosen", "select": {"type": "point", "fields": [colour]}, "bind": "legend"}
        ],
        "mark": {"type": "line", "point": {"size": 12}, "tooltip": True, "clip": True},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step"},
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": y,
                "scale": {"zero": False},
            },
            "color": {"field": colour, "type": "nominal", "title": colour},
            # What was not chosen stays there, faintly.
            "opacity": {"condition": {"param": "chosen", "value": 1}, "value": 0.12},
        },
    }
    return chart(title, about, table, spec)


def heatmap(
    title: str,
    about: str,
    table: dict[str, Any],
    x: str,
    y: str,
    scale: Mapping[str, Any],
    value: str,
    slider: tuple[str, Sequence[Any]] | None = None,
    height: int = HEIGHT,
) -> Chart:
    """Returns a heat map; `slider` is a dimension of which one place is shown at a time."""
    spec: dict[str, Any] = {
        "width": HEATMAP_WIDTH,
        "height": height,
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {
            "x": {"field": x, "type": "ordinal", "axis": {**AXIS, "labelAngle": 0}},
            "y": {"field": y, "type": "ordinal", "axis": AXIS},
            "color": {
                "field": "value",
                "type": "quantitative",
                "title": value,
                "scale": dict(scale),
            },
        },
    }
    if slider and len(slider[1]) > 1:
        name, places = slider
        # A list to choose from, which shows the last place at first.
        bind = {"input": "select", "options": list(places), "name": f"{name} "}
        spec["params"] = [{"name": "shown", "value": places[-1], "bind": bind}]
        spec["transform"] = [{"filter": f"datum['{name}'] == shown"}]
    return chart(title, about, table, spec)


# White is the even load; half of it is as blue as twice of it is red.
LOAD_SCALE = {
    "type": "symlog",
    "constant": 0.5,
    "scheme": "redblue",
    "reverse": True,
    "domainMid": 1,
    "domain": [0, 3],
    "clamp": True,
}
SHARE_SCALE = {"scheme": "viridis", "domainMin": 0}
CHANGE_SCALE = {"scheme": "redblue", "reverse": True, "domainMid": 0}


def load(steps: Sequence[int], load_TLE: Any) -> Chart:
    return heatmap(
        "Load of every expert, layer by layer",
        "Assignments of the held-out rows over the mean of the layer, at each checkpoint. "
        "1 is even, 0 a dead expert.",
        grid(("step", "layer", "expert"), load_TLE, {"step": steps}),
        "expert",
        "layer",
        LOAD_SCALE,
        "load / mean",
        ("step", list(steps)),
    )


def load_over_steps(rows: Sequence[tuple[int, int, float]]) -> Chart:
    steps, layers, values = zip(*rows, strict=True)
    return heatmap(
        "Largest load over the steps of training",
        "The load of the fullest expert of a layer over the mean, in the training batches.",
        columns(step=steps, layer=layers, value=values),
        "step",
        "layer",
        {"scheme": "inferno", "domainMin": 1},
        "largest / mean",
        height=140,
    )


def saturation(steps: Sequence[int], share_TL: Any) -> Chart:
    table = grid(("step", "layer"), share_TL, {"step": steps})
    return lines(
        "Saturation: how much of the last routing was there before",
        "Share of the last checkpoint's assignments that an earlier checkpoint makes, too, on the "
        "same tokens (OLMoE, arXiv:2409.02060, section 5.1).",
        table,
        "share of assignments",
        "layer",
    )


def bars_over_chance(
    title: str,
    note: str,
    label: str,
    names: Sequence[str],
    values_NL: Any,
    chance_NL: Any,
    value: str,
    legend: str,
) -> Chart:
    """Returns bars of each layer, one for each name, with a tick at what chance gives.

    `label` and `legend`: what a name is, in the table and beside the colours; `value`: what is on
    the axis.
    """
    values, chance = np.asarray(values_NL), np.asarray(chance_NL)
    # A row of the table for each name and layer.
    of_name, layer = np.indices(values.shape)
    table = columns(
        **{label: [names[i] for i in of_name.ravel()]},
        layer=layer.ravel().tolist(),
        value=values.ravel().round(4).tolist(),
        chance=chance.ravel().round(4).tolist(),
    )
    spec = {
        "width": HEATMAP_WIDTH,
        "height": 180,
        "encoding": {
            "x": {"field": "layer", "type": "ordinal", "axis": {"labelAngle": 0}},
            # The bars of one layer stand side by side.
            "xOffset": {"field": label},
        },
        "layer": [
            {
                "mark": {"type": "bar", "tooltip": True},
                "encoding": {
                    "y": {"field": "value", "type": "quantitative", "title": value},
                    "color": {"field": label, "type": "nominal", "title": legend},
                },
            },
            {
                "mark": {"type": "tick", "color": "black", "thickness": 2, "tooltip": True},
                "encoding": {"y": {"field": "chance", "type": "quantitative"}},
            },
        ],
    }
    return chart(title, note, table, spec)


def information(names: Sequence[str], bits_NL: Any, chance_NL: Any) -> Chart:
    return bars_over_chance(
        "What the first choice tells about a token",
        "Mutual information with its id, its domain and its place in the document (in eighths of "
        "the longest). The black tick is what shuffled labels give.",
        "label",
        names,
        bits_NL,
        chance_NL,
        "bits",
        "the expert tells",
    )


def coactivation(share_LEE: Any) -> Chart:
    layers = list(range(len(share_LEE)))
    return heatmap(
        "Co-activation",
        "Share of the tokens of one expert that go to the other, too (OLMoE, arXiv:2409.02060, "
        "section 5.2).",
        grid(("layer", "expert", "other"), share_LEE),
        "other",
        "expert",
        SHARE_SCALE,
        "share",
        ("layer", layers),
        height=HEATMAP_WIDTH * 3 // 4,
    )


def transitions(share_LEE: Any) -> Chart:
    layers = list(range(len(share_LEE)))
    return heatmap(
        "From layer to layer",
        "Of the tokens whose first choice is an expert of a layer, the share that has an expert of "
        "the next layer.",
        grid(("layer", "expert", "next"), share_LEE),
        "next",
        "expert",
        SHARE_SCALE,
        "share",
        ("layer", layers),
        height=HEATMAP_WIDTH * 3 // 4,
    )


def drops(share_LE: Any) -> Chart:
    return heatmap(
        "Dropped assignments",
        "Share of the held-out assignments of an expert that found no place.",
        grid(("layer", "expert"), share_LE),
        "expert",
        "layer",
        {"scheme": "reds", "domainMin": 0},
        "share",
    )


def knockout(domains: Sequence[str], change_LEZ: Any, way: str) -> Chart:
    change = np.array(change_LEZ, float)
    return heatmap(
        f"Knock-out: an expert is {'removed' if way == 'removed' else 'routed around'}",
        "Bits per byte more without the expert, by domain (python -m moe_jax probe --what "
        "knockout).",
        grid(("layer", "expert", "domain"), change, {"domain": domains}),
        "expert",
        "domain",
        CHANGE_SCALE,
        "bits per byte",
        ("layer", list(range(len(change)))),
        height=160,
    )


def overlap(first: str, other: str, overlap_LEE: Any, partner_LE: Any) -> Chart:
    table = grid(("layer", "expert", "matched"), overlap_LEE)
    # The number that a matched expert has in its own run: page.js shows it.
    table["partner"] = np.asarray(partner_LE).tolist()
    return heatmap(
        f"Experts of {first} and {other}, matched",
        "Tokens whose first choice is both experts over tokens of either. The experts of the other "
        "run stand in the order that puts the most tokens on the diagonal.",
        table,
        "matched",
        "expert",
        SHARE_SCALE,
        "overlap",
        ("layer", list(range(len(overlap_LEE)))),
        height=HEATMAP_WIDTH * 3 // 4,
    )


def agreement(names: Sequence[str], agreement_ML: Any, chance_ML: Any) -> Chart:
    return bars_over_chance(
        "First choices that agree after matching",
        "The black tick is what shuffled tokens give, matched in the same way.",
        "pair",
        names,
        agreement_ML,
        chance_ML,
        "share of tokens",
        "pair",
    )
