"""The page: one HTML file with its data, its charts and the library that draws them.

It needs no network: Vega-Lite comes from the package vl-convert-python (extra [report]), and the
rest is `page.html`, `page.css` and `page.js` beside this file.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.instruments.page import charts, routing
from moe_jax.instruments.page.collect import CURVES, LAYER_CURVES, Collected
from moe_jax.instruments.page.routing import Record
from moe_jax.version import __version__

FOLDER = Path(__file__).parent
# Of each domain, tokens of the text that is shown.
TEXT_TOKENS = 400
# Choices of a token that are shown.
CHOICES = 3
# Parts of the longest document into which places fall.
PLACES = 8


def write(path: Path, runs: Sequence[Collected]) -> None:
    """Writes the page of some runs."""
    data = payload(runs)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # No part can end the element of the page that it stands in.
    parts = {
        "STYLE": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "LIBRARY": inside_script(library()),
        "DATA": text.replace("<", "\\u003c"),
        "SCRIPT": inside_script((FOLDER / "page.js").read_text(encoding="utf-8")),
    }
    # Its places are written {{STYLE}}.
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        page = page.replace(f"{{{{{name}}}}}", part)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def library() -> str:
    """Returns Vega, Vega-Lite and vega-embed as one script."""
    # Imported here: it comes with the extra [report].
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def inside_script(text: str) -> str:
    """Returns a program or JSON that cannot end the script element that it stands in.

    A program has these words in strings and regular expressions alone, where a backslash before a
    letter or a stroke changes nothing.
    """
    text = re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE)
    return text.replace("<!--", "<\\!--")


def payload(runs: Sequence[Collected]) -> dict[str, Any]:
    """Returns all that the page shows, as JSON."""
    names = unique([run.name for run in runs])
    return {
        "version": __version__,
        "runs": [of_run(run, name) for run, name in zip(runs, names, strict=True)],
        "curves": curves(runs, names),
        "matches": matches(runs, names),
    }


def unique(names: Sequence[str]) -> list[str]:
    """Returns the names, with a number behind those that occur before."""
    made: list[str] = []
    for name in names:
        # How often it was there before, as it is or with a number.
        number = sum(other == name or other.startswith(f"{name} (") for other in made)
        made.append(f"{name} ({number + 1})" if number else name)
    return made


def curves(runs: Sequence[Collected], names: Sequence[str]) -> list[charts.Chart]:
    """Returns a chart for each metric, with the curves of all runs."""
    made = []
    for metric, about in CURVES.items():
        # One table of all runs, with a line for each point.
        step, value, of_run = [], [], []
        for run, name in zip(runs, names, strict=True):
            for at, number in run.curves.get(metric, ()):
                step.append(at)
                value.append(number)
                of_run.append(name)
        if step:
            table = charts.columns(step=step, value=value, run=of_run)
            made.append(charts.lines(about, metric, table, metric, "run"))
    return made


def of_run(run: Collected, name: str) -> dict[str, Any]:
    """Returns what is shown of one run."""
    cfg = run.run.config
    facts = {
        "directory": str(run.run.workdir),
        "checkpoint": f"step {run.run.step}",
        "layers": f"{cfg.model.num_moe_layers} with experts of {len(cfg.model.blocks)}",
        "width": cfg.model.d_model,
        "seed": cfg.seed,
    }
    moe = cfg.model.moe
    if run.records:
        facts |= {
            "experts": f"{moe.num_experts} of width {moe.expert_hidden}",
            "router": moe.router,
            "dispatcher": moe.dispatcher,
            "held-out tokens": f"{len(run.records[-1].token):,}",
        }
    made = []
    # From training.
    for metric, rows in run.layer_curves.items():
        steps, layers, values = zip(*rows, strict=True)
        name_of_metric = LAYER_CURVES[metric]
        about = f"moe/layer_N/{metric} of the training batches."
        table = charts.columns(step=steps, layer=layers, value=values)
        made.append(
            charts.lines(f"By layer: {name_of_metric}", about, table, name_of_metric, "layer")
        )
    if run.layer_curves.get("load_max"):
        made.append(charts.load_over_steps(run.layer_curves["load_max"]))
    shown: dict[str, Any] = {"name": name, "facts": facts, "notes": run.notes, "charts": made}
    # From held-out rows.
    if run.records:
        shown |= of_records(run, made)
    return shown


def of_records(run: Collected, made: list[charts.Chart]) -> dict[str, Any]:
    """Adds the charts of the routing to `made`, and returns its tables and the text."""
    last = run.records[-1]
    chosen = [routing.chosen(record) for record in run.records]
    load_TLE = np.array([routing.load(z) for z in chosen])
    made.append(charts.load(run.steps, load_TLE))
    if len(run.steps) > 1:
        share_TL = [routing.saturation(z, chosen[-1]) for z in chosen]
        made.append(charts.saturation(run.steps, share_TL))
    labels = {"token": last.token, "domain": last.domain, "position": places(last.position)}
    told = [routing.information(last, label_N) for label_N in labels.values()]
    made.append(charts.information(list(labels), [z.bits for z in told], [z.chance for z in told]))
    if last.expert.shape[-1] > 1:
        made.append(charts.coactivation(routing.coactivation(chosen[-1])))
    if len(last.expert) > 1:
        made.append(charts.transitions(routing.transitions(last)))
    if last.dropped.any():
        made.append(charts.drops(routing.drops(last)))
    if run.knockout:
        found = run.knockout
        made.append(charts.knockout(found["domains"], found["change_LEZ"], found["way"]))
    return {
        "dead": routing.dead(load_TLE[-1]),
        "dropped": float(last.dropped.sum() / max((last.expert < last.num_experts).sum(), 1)),
        "typical": typical(run, last),
        "paths": routing.paths(last),
        "text": text(run, last),
        "num_experts": last.num_experts,
    }


def places(position_N: np.ndarray) -> np.ndarray:
    """Returns in which of PLACES equal parts of the longest document a token stands."""
    # The last place is the length less 1, so that no token falls behind the last part.
    return position_N * PLACES // (int(position_N.max(initial=0)) + 1)


def piece(run: Collected, token: int) -> str:
    """Returns what a token looks like: its text, or its bytes where they are no text alone."""
    assert run.dataset
    raw = run.dataset.tokenizer.pieces[token]
    # The boundary between documents has no bytes.
    if not raw:
        return "∎"
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in raw)


def typical(run: Collected, record: Record) -> list[list[list[list[Any]]]]:
    """Returns by layer and expert the typical tokens as [text, lift, count]."""

    def shown(tokens: list[tuple[int, float, int]]) -> list[list[Any]]:
        return [[piece(run, token), round(lift, 2), count] for token, lift, count in tokens]

    by_layer = routing.typical(record)
    return [[shown(of_expert) for of_expert in layer] for layer in by_layer]


def text(run: Collected, record: Record) -> list[dict[str, Any]]:
    """Returns the beginning of one held-out row of each domain, with the choices of its tokens.

    "expert" and "gate" are [L][n][choices].
    """
    assert run.dataset
    shown = []
    for number, name in enumerate(run.dataset.domains):
        rows = record.row[record.domain == number]
        # No held-out row is of that domain.
        if not len(rows):
            continue
        # The first row of the domain, as far as it is shown.
        places_n = np.flatnonzero(record.row == rows[0])[:TEXT_TOKENS]
        expert = record.expert[:, places_n, :CHOICES]
        gate = record.gate[:, places_n, :CHOICES].astype(float).round(3)
        shown.append(
            {
                "domain": name,
                "tokens": [piece(run, int(token)) for token in record.token[places_n]],
                "expert": expert.tolist(),
                "gate": gate.tolist(),
                "dropped": record.dropped[:, places_n, :CHOICES].any(-1).astype(int).tolist(),
            }
        )
    return shown


def matches(runs: Sequence[Collected], names: Sequence[str]) -> dict[str, Any] | None:
    """Returns the charts of runs whose experts can be matched: the same tokens, as many layers
    and experts.
    """
    first_run = next((run for run in runs if run.records), None)
    if first_run is None:
        return None
    # All others are matched with the first one that has a routing, at their last checkpoints.
    first, first_name = first_run.records[-1], names[list(runs).index(first_run)]
    made, notes, pairs, agreement, chance = [], [], [], [], []
    for run, name in zip(runs, names, strict=True):
        if run is first_run or not run.records:
            continue
        other = run.records[-1]
        if reason := unlike(first, other):
            notes.append(f"{first_name} and {name} are not matched: {reason}")
            continue
        found = routing.match(first, other)
        pairs.append(f"{first_name}, {name}")
        agreement.append(found.agreement)
        chance.append(found.chance)
        made.append(charts.overlap(first_name, name, found.overlap, found.partner))
    if pairs:
        # On top, because it says whether the charts below mean anything.
        made.insert(0, charts.agreement(pairs, agreement, chance))
    return {"charts": made, "notes": notes} if made or notes else None


def unlike(first: Record, other: Record) -> str:
    """Returns why the experts of two runs cannot be matched; "" where they can."""
    if first.num_experts != other.num_experts or len(first.expert) != len(other.expert):
        return "they have other numbers of layers or experts"
    if len(first.token) != len(other.token) or (first.token != other.token).any():
        return "their held-out tokens differ (another data set or eval.batch_size)"
    return ""
