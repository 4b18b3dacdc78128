"""The config of a run that is made of another: keys change, and a file trains it on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax.config import config_file
from moe_jax.config.tree import defaults


def tree_of(raw: Mapping[str, Any]) -> ConfigDict:
    """Returns the tree of keys with the values of a config that was saved."""
    tree = defaults()

    def put(values: Mapping[str, Any], node: ConfigDict) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                put(value, node[key])
            else:
                node[key] = _tuples(value)

    put(raw, tree)
    return tree


def _tuples(value: Any) -> Any:
    """Returns a value of JSON as a config has it: tuples for lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def write_file(raw: Mapping[str, Any], out: Path, *, goes_on: bool) -> None:
    """Writes OUT/config.py, by which `moe_jax.main` trains a made run on.

    `goes_on`: the run in `out` itself is resumed; else a new one begins from its parameters.
    """
    values = _changed(raw, config_file.default_values(), "")
    if goes_on:
        how = f"Goes on with {out}: name it as --workdir."
    else:
        how = f"Begins from the parameters of {out}, in another --workdir."
        values["train.init_from"] = str(out)
        values.pop("smoke", None)
        values.pop("train.init_rename", None)
    lines = [
        f'"""{how}"""',
        "",
        "from moe_jax.config import defaults",
        "",
        "",
        "def get_config():",
        "    c = defaults()",
        *(f"    c.{path} = {_tuples(value)!r}" for path, value in sorted(values.items())),
        "    return c",
    ]
    (out / "config.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _changed(raw: Mapping[str, Any], default: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns {path: value} of the keys that have not their default."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        path = prefix + key
        if isinstance(value, Mapping):
            found |= _changed(value, default[key], path + ".")
        elif value != default[key]:
            found[path] = value
    return found


def with_values(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config, a nested dict of JSON values, with keys changed by their dotted path."""
    tree = tree_of(raw)
    tree.update_from_flattened_dict(dict(changes))
    return config_file.values(tree)
