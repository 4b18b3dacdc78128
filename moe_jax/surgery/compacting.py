"""A run without its experts' zeros: `python -m moe_jax convert compact`.

Zero hidden units are removed, and zero blocks where that pays; the outputs stay the same
(docs/sparse_weights.md).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe_jax.errors import UserError
from moe_jax.moe import sparse
from moe_jax.moe.sparse import compact
from moe_jax.surgery.weights import Weights

FORMATS = ("auto", "dense", "blocks")


class Asked(NamedTuple):
    """Holds what a user asks for."""

    workdir: Path
    # One of FORMATS.
    format: str
    # Side of a block; 0 = that of the pattern blocks.
    block: int


def shrunk(old: Weights, asked: Asked) -> tuple[list[str], Weights]:
    """Returns what was done, a line for each, and the model without its zeros."""
    zeros = old.raw["model"]["moe"]["sparse"]
    # The moving average has experts of its own, which must fit the same widths.
    models = {name: tree for name, tree in old.parts.items() if name != "router_state"}
    layers = [layer for tree in models.values() for _, layer in sparse.experts_of(tree)]
    whole = all(set(layer) == {"w_in", "w_out"} for layer in layers)
    if zeros["stored"]["block"] or not layers or not whole:
        raise UserError(
            f"{asked.workdir} has no experts of two whole matrices (w_in and w_out), so there is "
            "nothing to compact"
        )
    block = asked.block or zeros["patterns"][zeros["pattern"]].get("block", 0)
    hidden, note = new_width(old.raw, layers, block if asked.format != "dense" else 0)
    notes = [note]
    raw = copy.deepcopy(old.raw)
    moe = raw["model"]["moe"]
    # Shared experts are one matrix: their number is its width over that of an expert.
    if not moe["shared_hidden"]:
        moe["shared_experts"] = moe["shared_experts"] * moe["expert_hidden"] // hidden
    moe["expert_hidden"], moe["sparse"]["rule"] = hidden, "none"
    # By identity, for a layer is a dict.
    narrow = {id(layer): compact.narrow(layer, hidden) for layer in layers}
    form, note = block_format(list(narrow.values()), block, asked)
    if note:
        notes.append(note)
    if form:
        moe["sparse"]["stored"] = {"block": form.block, "w_in": form.w_in, "w_out": form.w_out}

    def converted(tree: Any) -> Any:
        values = {}
        for path, layer in sparse.experts_of(tree):
            matrices = narrow[id(layer)]
            stored = compact.packed(matrices, form) if form else {"experts": matrices}
            values |= {(*path[:-1], part): value for part, value in stored.items()}
        return with_paths(tree, values)

    parts = {name: converted(tree) if name in models else tree for name, tree in old.parts.items()}
    return notes, Weights(raw, parts, old.step)


def with_paths(tree: Any, values: Mapping[tuple, Any]) -> Any:
    """Returns nested dicts with other values at some paths, new ones too."""
    # New dicts, so that the old ones stay as they are.
    tree = jax.tree.map(lambda x: x, tree)
    for path, value in values.items():
        at = tree
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
    return tree


def new_width(
    raw: Mapping[str, Any], layers: Sequence[compact.Layer], block: int
) -> tuple[int, str]:
    """Returns expert_hidden, and why it is that."""
    moe, axis = raw["model"]["moe"], max(1, raw["mesh"]["model"])
    hidden, least = moe["expert_hidden"], compact.least_hidden(layers)
    multiple = math.lcm(axis, block or 1)
    # Those of a width of their own stay as they are.
    tied = 0 if moe["shared_hidden"] else moe["shared_experts"]
    width = next(compact.widths(least, hidden, multiple, tied), hidden)
    reasons = [f"the fullest expert of all layers has {least} living units of {hidden}"]
    if axis > 1:
        reasons.append(f"a multiple of mesh.model = {axis}")
    if block:
        reasons.append(f"a multiple of the block {block}")
    if tied:
        reasons.append(f"a divisor of {tied} shared experts x {hidden}")
    return width, f"model.moe.expert_hidden {hidden} -> {width}: {', '.join(reasons)}"


def block_format(layers: list[compact.Layer], block: int, asked: Asked) -> tuple[Any, str]:
    """Returns compact.Blocks, or None for whole matrices, and what to tell."""
    if asked.format == "dense" or (asked.format == "auto" and not block):
        return None, ""
    if not block:
        raise UserError("--format blocks needs the side of a block: --block 64")
    # w_in is [E, D, P, F].
    _, d_model, _, hidden = layers[0]["w_in"].shape
    if d_model % block or hidden % block:
        raise UserError(
            f"--block {block} must divide model.d_model ({d_model}) and the experts' hidden width "
            f"({hidden})"
        )
    form = compact.blocks(layers, block)
    text = (
        f"blocks of {block} x {block}: the fullest columns have {form.w_in} and {form.w_out}, "
        f"{form.share:.0%} of the matrices"
    )
    limit = compact.pays(block)
    if asked.format == "auto" and form.share > limit:
        text += f"; blocks of this side are faster up to {limit:.0%}, so whole matrices stay"
        return None, text
    return form, f"{text}; stored so, for inference alone"
