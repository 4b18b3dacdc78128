"""The whole state of a dense run as that of a run with experts (upcycling.py says how)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.config import command_line, config_file
from moe_jax.errors import UserError
from moe_jax.interchange.contract import block_names
from moe_jax.interchange.meaning import laid_out
from moe_jax.models import mtp
from moe_jax.schema.blocks import attention_of, inner, without_attention
from moe_jax.schema.config import Config
from moe_jax.surgery import upcycling
from moe_jax.surgery.configs import tree_of
from moe_jax.surgery.layers import Layers
from moe_jax.surgery.snapshot import (
    OF_MODEL,
    Arrays,
    Snapshot,
    finished,
    fresh,
    names_of_model,
    owner,
)
from moe_jax.surgery.upcycling import Change, Shares

WIDTH = "model.moe.expert_hidden"
# Keys of the model that change with its experts.
MAY_CHANGE = ("model.moe.", "model.remat", "model.scan", "model.allow_leak")
# What decides how a run that is under way goes on.
OF_THE_RUN = ("data.", "task", "optim.", "seed")


class Asked(NamedTuple):
    """Holds what a user asks for."""

    # Words of the command line that change keys of the config.
    words: Sequence[str]
    # Every n-th dense block gets experts.
    every: int
    # One of ROUTER_STARTS, or "normal:STD".
    router_start: str
    change: Change
    # Factor on the moments of the dense networks; 0 = experts begin without.
    moments: float
    # Without the state of training: a run that others begin from.
    restart: bool


class Made(NamedTuple):
    """Holds what was made."""

    snapshot: Snapshot
    # Parameters and router state before they were rounded, by their names on disk.
    exact: Arrays
    share: Shares
    # The numbers of the blocks that got experts.
    blocks: list[int]
    # Why the function is not kept; () = it is, up to rounding.
    reasons: tuple[str, ...]


def upcycled(old: Snapshot, asked: Asked) -> Made:
    """Returns a dense run with experts. Raises UserError for what is not possible."""
    before = old.config
    numbers = convertible(before, asked.every)
    raw = new_raw(old, numbers, asked)
    after = dataclasses.replace(old, raw=raw).config
    share = upcycling.shares(before.model.ffn_hidden, after.model.moe)
    if share.shards == 0 and (asked.change.noise or asked.change.drop):
        raise UserError(
            "--noise and --drop change the copies, and there are none: the shared experts get all "
            f"{before.model.ffn_hidden} hidden units"
        )
    begin = fresh(after)
    layers = Layers(after, old.arrays, begin, share, asked.router_start, asked.change)
    blocks = dict(zip(*(block_names(one.model.stacks[""]) for one in (before, after)), strict=True))
    with_experts = {was: now for i, (was, now) in enumerate(blocks.items()) if i in numbers}
    made, exact = dict(begin), {}
    for name, x in kept(old.arrays, begin, blocks, with_experts).items():
        made[name] = exact[name] = x
    for was, now in with_experts.items():
        for name, x in layers.made(was, now, asked.moments).items():
            made[name], exact[name] = x.astype(begin[name].dtype), x
    exact = {name: x for name, x in {**begin, **exact}.items() if _is_of_model(name)}
    made = finished(after, made)
    metadata, step = dict(old.metadata), old.step
    if asked.restart or not old.trains_on:
        made = {name: x for name, x in made.items() if _is_of_model(name) or _is_average(name)}
        metadata, step = {}, 0
    reasons = tuple(_reasons(layers.reason, asked, after))
    return Made(Snapshot(raw, made, step, metadata), exact, share, numbers, reasons)


def convertible(cfg: Config, every: int) -> list[int]:
    """Returns the numbers of the dense blocks that get experts. Raises UserError for none."""
    if depths := mtp.num_depths(cfg.model):
        raise UserError(
            f"model.kinds.decoder.mtp_depths = {depths}: upcycling knows no blocks that predict "
            "further tokens: train the dense run without them, and set the key in the new one"
        )
    if list(cfg.model.stacks) != [""]:
        raise UserError(
            f'model.kind = "{cfg.model.kind}" has several stacks of blocks, and upcycling knows '
            "models of one"
        )
    dense = [i for i, kind in enumerate(cfg.model.blocks) if inner(kind) == "dense"]
    chosen = dense[every - 1 :: every]
    if not chosen:
        raise UserError(
            f"the run has {len(dense)} dense blocks ({' '.join(cfg.model.blocks)}), and --every "
            f"{every} chooses none of them"
        )
    if cfg.model.num_moe_layers:
        raise UserError(
            "the run has experts already, and those of all layers have one shape: `convert "
            "surgery` changes them"
        )
    return chosen


def new_raw(old: Snapshot, numbers: Sequence[int], asked: Asked) -> dict[str, Any]:
    """Returns the config of the new run. Raises UserError for a key that may not change."""
    tree = tree_of(old.raw)
    model = old.config.model
    attentions = [attention_of(kind) or model.attention for kind in model.blocks]
    kinds = [without_attention(kind) for kind in model.blocks]
    for number in numbers:
        kinds[number] = kinds[number].replace("dense", "moe")
    tree.update_from_flattened_dict(laid_out(tuple(kinds), tuple(attentions)))
    changes = command_line.changed(tree, asked.words)
    if WIDTH not in changes:
        moe = tree.model.moe
        moe.expert_hidden = max(tree.model.ffn_hidden - moe.shared_experts * moe.shared_hidden, 1)
    for key in changes:
        if key.startswith("model.") and not key.startswith(MAY_CHANGE):
            raise UserError(
                f"{key} is of the model that is there: upcycling changes model.moe alone"
            )
        if old.trains_on and not asked.restart and key.startswith(OF_THE_RUN):
            raise UserError(
                f"{key} cannot change in a run that goes on: leave it as it is, or add --restart, "
                "which begins a new run from the parameters"
            )
    if width := tree.model.moe.latent_dim:
        raise UserError(
            f"model.moe.latent_dim = {width}: experts of another width than the model's are no "
            "copies of a dense network: leave the key at 0"
        )
    return config_file.values(tree)


def kept(
    old: Arrays, begin: Arrays, blocks: Mapping[str, str], with_experts: Mapping[str, str]
) -> Arrays:
    """Returns the arrays that the new run takes as they are, by their new names.

    Args:
      old, begin: of the dense run, and of a fresh new one.
      blocks: {name of a block in the dense run: its name in the new one}.
      with_experts: those of them that get experts.
    """
    known = names_of_model(begin)
    found = {}
    for name, x in begin.items():
        inner = owner(name, known)
        of_block = [(was, now) for was, now in blocks.items() if inner.startswith(now)]
        before = inner
        if of_block:
            was, now = of_block[0]
            rest = inner.removeprefix(now)
            if was in with_experts and rest.startswith(("dense/", "moe/")):
                continue
            before = was + rest
        source = name.replace(inner, before) if inner else name
        if source in old and old[source].shape == x.shape:
            found[name] = old[source]
    return found


def _is_of_model(name: str) -> bool:
    return name.partition("/")[0] in OF_MODEL


def _is_average(name: str) -> bool:
    return name.startswith("ema/")


def _reasons(reason: str, asked: Asked, after: Config) -> list[str]:
    """Returns why the function is not kept, a sentence each."""
    reasons = [f'router "{after.model.moe.router}": {reason}'] if reason else []
    if asked.change.noise:
        reasons.append(f"--noise {asked.change.noise:g} moves the copies")
    if asked.change.drop:
        reasons.append(f"--drop {asked.change.drop:g} draws units of each expert anew")
    return reasons
