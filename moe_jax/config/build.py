"""From a ConfigDict to the frozen config, and what ties the choice of a component to its options.

The dataclasses have no defaults (configs/base.py has them all), so a key that is missing or
misspelt fails here, by its config path, before anything is compiled. The rules between keys are in
rules.py; `build` ends with them.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.config import rules
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.schema.config import DEPTH, Config, Options

RESUME_MAY_CHANGE = (
    "train.steps",
    "train.stop_at",
    "train.nonfinite_patience",
    "eval",
    "checkpoint",
    "log",
    "record",
    "mesh",
    "profile",
    "simulate_devices",
    "data.prefetch",
    "data.folder",
)


def build(raw: Mapping[str, Any], num_devices: int) -> Config:
    """The checked, frozen config.

    `raw` is a plain nested dict (ConfigDict.to_dict()); `num_devices` fills -1 in the mesh.
    """
    raw = dict(raw)
    _refuse_other_keys(raw["mesh"], mesh.WRITTEN, "mesh.")
    lengths = mesh.Lengths(**{axis: int(length) for axis, length in raw["mesh"].items()})
    raw["mesh"] = mesh.resolve(lengths, num_devices)
    raw["profile"] = profile_range(raw["profile"])
    raw["optim"] = _optim(raw["optim"], raw["train"]["steps"])
    moe = _chosen(dict(raw["model"]["moe"]), "model.moe", "router", "routers", "router_options")
    moe = _chosen(moe, "model.moe", "ordering", "orderings", "ordering_options")
    moe = _chosen(moe, "model.moe", "dispatcher", "dispatchers", "dispatcher_options")
    sparse = _chosen(dict(moe["sparse"]), "model.moe.sparse", "rule", "rules", "rule_options")
    moe["sparse"] = _chosen(sparse, "model.moe.sparse", "pattern", "patterns", "pattern_options")
    raw = _chosen(raw, "", "task", "tasks", "task_options")
    model = _chosen({**raw["model"], "moe": moe}, "model", "kind", "kinds", "kind_options")
    raw["model"] = {
        **model,
        "head_dim": model["head_dim"] or _head_dim(model["d_model"], model["num_heads"]),
    }
    train = raw["train"]
    raw["train"] = {**train, "micro_batch_size": train["micro_batch_size"] or train["batch_size"]}
    raw["eval"] = {**raw["eval"], "batch_size": raw["eval"]["batch_size"] or train["batch_size"]}
    config = freeze(Config, raw, "")
    rules.check(config)
    return config


def refuse_unchosen(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """An option of a router, dispatcher, optimizer or schedule that is not chosen would do nothing:
    say so instead.
    """
    _refuse_unused_depth(raw["model"], defaults["model"])
    _refuse_unused_pattern(raw["model"]["moe"]["sparse"], defaults["model"]["moe"]["sparse"])
    for path, choice, options in (
        ("", "task", "tasks"),
        ("model", "kind", "kinds"),
        ("model.moe", "router", "routers"),
        ("model.moe", "ordering", "orderings"),
        ("model.moe", "dispatcher", "dispatchers"),
        ("model.moe.sparse", "rule", "rules"),
        ("model.moe.sparse", "pattern", "patterns"),
        ("optim", "optimizer", "optimizers"),
        ("optim", "schedule", "schedules"),
    ):
        block, default = _at(raw, path), _at(defaults, path)
        for name, values in block[options].items():
            changed = [
                k for k, v in values.items() if default[options].get(name, {}).get(k, v) != v
            ]
            if name != block[choice] and changed:
                raise UserError(
                    f"{_join(path, options)}.{name}.{changed[0]} = {values[changed[0]]} does "
                    f"nothing, because {_join(path, choice)} is "
                    f'"{block[choice]}": set {_join(path, choice)}={name}, or leave the key alone'
                )


def _refuse_unused_pattern(sparse: Mapping[str, Any], default: Mapping[str, Any]) -> None:
    """The pattern of zeros where nobody makes any."""
    changed = any(sparse[name] != default[name] for name in ("pattern", "patterns"))
    if sparse["rule"] == "none" and changed:
        raise UserError(
            "model.moe.sparse.pattern and its options do nothing, because model.moe.sparse.rule is "
            '"none": set the rule to one of '
            f"{', '.join(name for name in sparse['rules'] if name != 'none')}, or leave the "
            "pattern alone"
        )


def _refuse_unused_depth(model: Mapping[str, Any], default: Mapping[str, Any]) -> None:
    """The options of depth blocks, in a model that has none."""
    if any(
        kind.startswith(DEPTH) for part in ("prefix", "period", "suffix") for kind in model[part]
    ):
        return
    for key, value in model["depth"].items():
        if value != default["depth"].get(key, value):
            raise UserError(
                f"model.depth.{key} = {value} does nothing, because no block is one of depth: "
                "write "
                f'"{DEPTH}dense" or "{DEPTH}moe" in model.prefix, model.period or model.suffix, or '
                "leave the key alone"
            )


def profile_range(text: str) -> tuple[int, int] | None:
    """ "10:13" -> (10, 13): trace steps 10, 11 and 12."""
    if not text:
        return None
    first, colon, last = str(text).partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(
            f'profile = "{text}" is no range of steps: write FIRST:LAST, as in profile=10:13'
        )
    return int(first), int(last)


def freeze(cls: type, raw: Mapping[str, Any], path: str) -> Any:
    """A dataclass from a nested dict; every key must be there, be known and have its type."""
    fields = [field.name for field in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    _refuse_other_keys(raw, fields, path)
    return cls(**{name: _convert(hints[name], raw[name], f"{path}{name}") for name in fields})


def _refuse_other_keys(raw: Mapping[str, Any], known: Sequence[str], path: str) -> None:
    unknown = sorted(set(raw) - set(known))
    missing = sorted(set(known) - set(raw))
    if unknown or missing:
        what = (
            f"unknown key {path}{unknown[0]}"
            if unknown
            else f"the key {path}{missing[0]} is missing"
        )
        raise UserError(f"{what}: configs/base.py lists every key")


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return freeze(typing.cast(type, hint), value, path + ".")
    if hint is Options:
        return Options({key: tuple(v) if isinstance(v, list) else v for key, v in value.items()})
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(
                f"{path} = {value!r} is a {type(value).__name__}; it must be a tuple, as "
                "configs/base.py has it"
            )
        return tuple(tuple(v) if isinstance(v, list | tuple) else v for v in value)
    if origin in (typing.Union, types.UnionType):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(
            f"{path} = {value!r} is a {type(value).__name__}; it must be a {hint.__name__}"
        )
    return value


def _chosen(block: dict[str, Any], path: str, choice: str, options: str, to: str) -> dict[str, Any]:
    name = block[choice]
    if name not in block[options]:
        raise UserError(
            f'{_join(path, choice)} = "{name}" is not known: choose one of '
            f"{', '.join(block[options])}"
        )
    chosen = dict(block.pop(options)[name])
    return {**block, to: chosen}


def _head_dim(d_model: Any, num_heads: Any) -> Any:
    """d_model / num_heads; 1 of what is no such number, which is refused by its own name."""
    fits = isinstance(d_model, int) and isinstance(num_heads, int) and d_model > 0 < num_heads
    return max(d_model // num_heads, 1) if fits else 1


def _optim(block: Mapping[str, Any], steps: int) -> dict[str, Any]:
    block = _chosen(dict(block), "optim", "optimizer", "optimizers", "options")
    return {**_chosen(block, "optim", "schedule", "schedules", "schedule_options"), "steps": steps}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _at(raw: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    for key in path.split(".") if path else ():
        raw = raw[key]
    return raw
