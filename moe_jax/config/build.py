"""From the tree that users change to the frozen config.

A key that is missing or misspelt fails here, by its config path, before anything is compiled. The
rules between keys are in rules.py; `build` ends with them.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moe_jax.config import rules
from moe_jax.config.tree import COEFFICIENTS, Choice, at, choices
from moe_jax.errors import UserError
from moe_jax.models import MODELS
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.moe.losses import LOSSES
from moe_jax.parallel import mesh
from moe_jax.schema.blocks import DEPTH, is_depth, named_attentions
from moe_jax.schema.config import NO_RULE, Coefficients, Config, MeshConfig
from moe_jax.schema.options import freeze, refusals, refuse_other_keys

# Keys that do not change what is computed, or that a run may go on with.
RESUME_MAY_CHANGE = (
    "train.steps",
    "train.stop_at",
    "train.nonfinite_patience",
    "eval",
    "checkpoint",
    "log",
    "record",
    "mesh",
    "mesh_fallbacks",
    "mesh_slow_axis",
    "profile",
    "simulate_devices",
    "limits",
    "compile_cache",
    "chip_flags",
    "faults",
    "data.prefetch",
    "data.folder",
)

# Keys of the model that are of attention alone.
OF_ATTENTION = (
    *("attention", "attention_scale", "attention_cap", "attention_sinks"),
    *("rope_fraction", "rope_pairs", "rope_scaling", "output_bias"),
)


def build(raw: Mapping[str, Any], num_devices: int) -> Config:
    """Returns the checked, frozen config.

    Args:
      raw: a plain nested dict, as ConfigDict.to_dict() gives it.
      num_devices: what fills a -1 in the mesh.

    Raises UserError.
    """
    # Changed below; the caller's dict stays as it is.
    tree = copy.deepcopy(dict(raw))
    # The mesh, for the devices that are there.
    tree["mesh"] = _lengths(tree["mesh"], tree["mesh_fallbacks"], num_devices)
    tree["model"]["block_attentions"] = _block_attentions(tree["model"])
    for choice in choices():
        # Only the options of what is chosen travel on, frozen.
        _choose(tree, choice)
    refuse_other_keys(at(tree, COEFFICIENTS), tuple(LOSSES), f"{COEFFICIENTS}.")
    tree["model"]["moe"]["losses"] = Coefficients(tree["model"]["moe"]["losses"])

    # What is computed from other keys. A 0 stands for "as another key says".
    model, train = tree["model"], tree["train"]
    tree["optim"]["steps"] = train["steps"]
    model["head_dim"] = model["head_dim"] or _head_dim(model["d_model"], model["num_heads"])
    train["micro_batch_size"] = train["micro_batch_size"] or train["batch_size"]
    tree["eval"]["batch_size"] = tree["eval"]["batch_size"] or train["batch_size"]
    config = freeze(Config, tree, "")
    rules.enforce(config)
    return config


def _lengths(raw: Mapping[str, Any], fallbacks: Sequence[str], num_devices: int) -> mesh.Lengths:
    """Returns the lengths of the mesh for these devices: those of the config, or else the first of
    mesh_fallbacks that fits.
    """
    written = freeze(MeshConfig, raw, "mesh.")
    for message in refusals(written, "mesh."):
        raise UserError(message)
    others = [mesh.parse(text, "mesh_fallbacks") for text in fallbacks]
    # The mesh of the config goes first; its refusal stands where no fallback fits either.
    try:
        return mesh.resolve(mesh.Lengths(**dataclasses.asdict(written)), num_devices)
    except UserError:
        for lengths in others:
            if lengths.num_devices == num_devices:
                return lengths
        raise


def _choose(tree: dict[str, Any], choice: Choice) -> None:
    """Puts the frozen options of what is chosen in the place of the blocks of all."""
    # Of "model.moe.router": the block "model.moe", in which "routers" lies too.
    path, _, name = choice.path.rpartition(".")
    _, _, blocks_name = choice.blocks.rpartition(".")
    block = at(tree, path)
    chosen = block[name]
    # Taken out: only the chosen block travels on.
    blocks = block.pop(blocks_name)
    if chosen not in choice.options:
        known = ", ".join(choice.options)
        raise UserError(f'{choice.path} = "{chosen}" is not known: choose one of {known}')
    # What has no options has no block.
    options = blocks.get(chosen, {})
    block[choice.frozen] = freeze(choice.options[chosen], options, f"{choice.blocks}.{chosen}.")


def _block_attentions(model: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Returns (name, frozen options) of each attention that a block names and that is known."""
    names = [name for name in named_attentions(model) if name in ATTENTIONS]
    return tuple(
        (name, freeze(ATTENTIONS[name].options, blocks, f"model.attentions.{name}."))
        for name, blocks in ((name, model["attentions"].get(name, {})) for name in names)
    )


def _head_dim(d_model: Any, num_heads: Any) -> Any:
    """Returns d_model / num_heads; 1 of what is no such number, which is refused by its name."""
    if not (isinstance(d_model, int) and isinstance(num_heads, int)):
        return 1
    if d_model <= 0 or num_heads <= 0:
        return 1
    return max(d_model // num_heads, 1)


def allow_float64(raw: Mapping[str, Any]) -> None:
    """Turns jax_enable_x64 on for a model in float64. For the whole process."""
    model = raw.get("model", {})
    if "float64" in (model.get("dtype"), model.get("param_dtype")):
        jax.config.update("jax_enable_x64", True)


def refuse_unchosen(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises a UserError for a changed option of what is not chosen: it would do nothing."""
    _refuse_unused_depth(raw["model"], defaults["model"])
    _refuse_unused_attention(raw["model"], defaults["model"])
    _refuse_unused_pattern(raw["model"]["moe"]["sparse"], defaults["model"]["moe"]["sparse"])
    # Choices that blocks make for themselves.
    also = {"model.attention": named_attentions(raw["model"])}
    for choice in choices():
        chosen, default_blocks = at(raw, choice.path), at(defaults, choice.blocks)
        for name, values in at(raw, choice.blocks).items():
            if name == chosen or name in also.get(choice.path, ()):
                continue
            default = default_blocks.get(name, {})
            # A key that today's defaults do not have cannot be told from its default.
            changed = [key for key, value in values.items() if default.get(key, value) != value]
            if changed:
                key = changed[0]
                raise UserError(
                    f"{choice.blocks}.{name}.{key} = {values[key]} does nothing, because "
                    f'{choice.path} is "{chosen}": set {choice.path}={name}, or leave the key alone'
                )


def _refuse_unused_pattern(sparse: Mapping[str, Any], default: Mapping[str, Any]) -> None:
    """Refuses the pattern of zeros where nobody makes any."""
    changed = any(sparse[name] != default[name] for name in ("pattern", "patterns"))
    if sparse["rule"] == NO_RULE and changed:
        names = ", ".join(name for name in sparse["rules"] if name != NO_RULE)
        raise UserError(
            "model.moe.sparse.pattern and its options do nothing, because model.moe.sparse.rule is "
            f'"{NO_RULE}": set the rule to one of {names}, or leave the pattern alone'
        )


def _refuse_unused_attention(model: Mapping[str, Any], default: Mapping[str, Any]) -> None:
    """Refuses an attention in a kind of model that has none."""
    kind = model["kind"]
    # What is no kind of model is told by `build`.
    if kind not in MODELS or MODELS[kind].options(**model["kinds"][kind]).masks:
        return
    for key in OF_ATTENTION:
        if model[key] != default[key]:
            value = f'"{model[key]}"' if isinstance(model[key], str) else model[key]
            raise UserError(
                f'model.{key} = {value} does nothing, because model.kind = "{kind}" has no '
                "attention: leave the key alone"
            )


def _refuse_unused_depth(model: Mapping[str, Any], default: Mapping[str, Any]) -> None:
    """Refuses the options of depth blocks in a model that has none."""
    parts = (model["prefix"], model["period"], model["suffix"])
    if any(is_depth(kind) for part in parts for kind in part):
        return
    for key, value in model["depth"].items():
        if value != default["depth"].get(key, value):
            raise UserError(
                f"model.depth.{key} = {value} does nothing, because no block is one of depth: "
                f'write "{DEPTH}dense" or "{DEPTH}moe" in model.prefix, model.period or '
                "model.suffix, or leave the key alone"
            )
