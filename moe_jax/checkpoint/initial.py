"""The parameters of one run as the beginning of another (train.init_from), as far as they fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax import layout
from moe_jax.checkpoint import flat as flat_lib
from moe_jax.checkpoint.array_files import load_arrays, read_manifest
from moe_jax.checkpoint.store import Checkpoints
from moe_jax.errors import UserError


class Report(NamedTuple):
    """Holds what `load_params` did, by the names of the parameters of the new run."""

    step: int
    loaded: list[str]
    # (name in the checkpoint, name here); these are in `loaded` too.
    renamed: list[tuple[str, str]]
    # (name here, reason): not in the checkpoint, or of another shape.
    left: list[tuple[str, str]]


def load_params(
    directory: Any,
    params: Any,
    *,
    stacked: bool,
    rename: Mapping[str, str],
    part: str,
    step: int | None,
) -> tuple[Any, Report]:
    """Loads from a checkpoint the parameters that match in name and shape.

    Args:
      directory: the checkpoints of the other run.
      params: the parameters of this run, or their abstract values with shardings. Those that do not
          match stay as they are given.
      stacked: layers below "repeats" are stacked over a leading axis here; how the other run had
          them is no matter.
      rename: {old prefix: new prefix} of names, such as {"layers/repeats/0/ffn":
          "layers/repeats/0/shared"}. The longest prefix that fits counts; "" as the new one leaves
          them out.
      part: the field of the saved state to read, "params", "ema" or "router_state".
      step: the checkpoint to read; None = the newest sound one.

    Returns the parameters, with the dtypes and shardings of `params`, and the Report. Raises
    UserError when there is no checkpoint, or none of its parameters matches.
    """
    # every=0: to be read, never saved to.
    run = Checkpoints(directory, every=0, keep=1, keep_best=0)
    step = run.latest() if step is None else step
    if step is None:
        raise UserError(f"train.init_from: there is no checkpoint in {run.directory}")
    path = run.path(step)
    saved = read_manifest(path)["arrays"]
    name_on_disk = _names_on_disk(saved, part, rename)
    wanted = flat_lib.flatten(params)
    matching, left = _match(wanted, saved, name_on_disk, rename, stacked)
    # Another router has no such state: it begins as the model begins it.
    if not matching and part != "router_state":
        raise UserError(
            f"train.init_from: no parameter of {path} matches one of this model. It has "
            f"{_some(name_on_disk)}; this model has {_some(wanted)}. Map old prefixes of names to "
            "new ones with train.init_rename"
        )
    loaded: dict[str, Any] = {}
    if matching:
        matched = {name: wanted[name] for name in matching}
        loaded = _load(path, matched, name_on_disk, stacked)
    # Told layer by layer, stacked or not: on disk each layer has a name of its own.
    renamed = []
    for layer_names in matching.values():
        for new in layer_names:
            old = name_on_disk[new].removeprefix(part + "/")
            if old != new:
                renamed.append((old, new))
    loaded_params = flat_lib.unflatten({**wanted, **loaded}, params)
    return loaded_params, Report(step, list(matching), renamed, left)


def refuse_idle_renames(
    directory: Any, step: int, here: Mapping[str, Any], *, stacked: bool, rename: Mapping[str, str]
) -> None:
    """Raises UserError when one of the `rename` of `load_params` has nothing to rename.

    Args:
      here: {part: tree} of this run, of all parts that are loaded.
    """
    path = Checkpoints(directory, every=0, keep=1, keep_best=0).path(step)
    saved = read_manifest(path)["arrays"]
    saved_names: list[str] = []
    model_names: set[str] = set()
    for part, tree in here.items():
        prefix = part + "/"
        saved_names += [name.removeprefix(prefix) for name in saved if name.startswith(prefix)]
        # A layer has a name of its own, whether it is stacked here or not.
        model_names.update(flat_lib.abstract_layers(flat_lib.flatten(tree), stacked))
    for old, new in rename.items():
        concerned = [name for name in saved_names if _is_below(name, old)]
        renamed = [new + name.removeprefix(old) for name in concerned]
        if not concerned:
            raise UserError(
                f"train.init_rename: ({old!r}, {new!r}) renames nothing, no parameter of {path} is "
                f"called {old!r} or {old + '/...'!r}. It has {_some(saved_names)}"
            )
        if new and not model_names.intersection(renamed):
            raise UserError(
                f"train.init_rename: ({old!r}, {new!r}) makes {renamed[0]!r} of {concerned[0]!r}, "
                f"and this model has no such parameter. It has {_some(model_names)}; "
                '"" as the new name leaves it out'
            )


def _names_on_disk(
    saved: Mapping[str, Any], part: str, rename: Mapping[str, str]
) -> dict[str, str]:
    """Returns {name here, one per layer: name on disk} of every array of a part of the state."""
    names: dict[str, str] = {}
    for name in saved:
        if not name.startswith(part + "/"):
            continue
        old = name.removeprefix(part + "/")
        if new := _renamed(old, rename):
            names[new] = name
    return names


def _renamed(old: str, rename: Mapping[str, str]) -> str:
    """Returns the name here of a parameter; "" if it is to be left out."""
    prefixes = [prefix for prefix in rename if _is_below(old, prefix)]
    if not prefixes:
        return old
    longest = max(prefixes, key=len)
    # "" as the new prefix stays "": the parameter is left out.
    return rename[longest] and rename[longest] + old.removeprefix(longest)


def _is_below(name: str, prefix: str) -> bool:
    """Returns whether a prefix names a parameter or what it is in: "a/b" is below "a", "ab" not."""
    return name == prefix or name.startswith(prefix + "/")


def _match(
    wanted: Mapping[str, Any],
    saved: Mapping[str, Any],
    name_on_disk: Mapping[str, str],
    rename: Mapping[str, str],
    stacked: bool,
) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Returns {name: its layers' names} of what can be loaded, and (name, reason) of what cannot.

    A stacked array is loaded only if all of its layers can be.
    """
    matching: dict[str, list[str]] = {}
    left: list[tuple[str, str]] = []
    for name, x in wanted.items():
        layer_names = layout.layer_names(name, x.shape, stacked)
        # As on disk: a stacked array has one array for each layer there.
        shape = list(x.shape if layer_names is None else x.shape[1:])
        # What is not stacked is its own only layer.
        layer_names = layer_names or [name]
        shape_on_disk = {
            layer: saved[name_on_disk[layer]][0] for layer in layer_names if layer in name_on_disk
        }
        missing = [layer for layer in layer_names if layer not in shape_on_disk]
        misshapen = [layer for layer, other in shape_on_disk.items() if other != shape]
        if missing:
            is_left_out = any(not new and _is_below(missing[0], old) for old, new in rename.items())
            reason = (
                "is left out by train.init_rename" if is_left_out else "is not in the checkpoint"
            )
            left.append((name, f"{missing[0]} {reason}"))
        elif misshapen:
            first = misshapen[0]
            reason = f"{first} is {shape_on_disk[first]} in the checkpoint and {shape} here"
            left.append((name, reason))
        else:
            matching[name] = layer_names
    return matching, left


def _load(
    path: Path, wanted: dict[str, Any], name_on_disk: Mapping[str, str], stacked: bool
) -> dict[str, Any]:
    """Returns the arrays of `wanted`, read from the checkpoint at `path` by their names there."""
    layers = flat_lib.abstract_layers(wanted, stacked)
    loaded = load_arrays(path, {name_on_disk[name]: x for name, x in layers.items()})
    # Back from the names on disk to those of this run.
    renamed = {name: loaded[name_on_disk[name]] for name in layers}
    return flat_lib.stack(renamed, wanted, stacked)


def _some(names: Any) -> str:
    """Returns the first three names, for a message."""
    names = list(names)
    if not names:
        return "none"
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
