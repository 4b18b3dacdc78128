"""The parameters of one run as the beginning of another (train.init_from), as far as they fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax import layout
from moe_jax.checkpoint import flat as flat_lib
from moe_jax.checkpoint.store import Checkpoints, load_arrays, read_manifest
from moe_jax.errors import UserError


class Report(NamedTuple):
    """Holds what `load_params` did, by the names of the parameters of the new run."""

    step: int
    loaded: list[str]
    renamed: list[tuple[str, str]]  # (name in the checkpoint, name here); these are in `loaded` too
    left: list[tuple[str, str]]  # (name here, reason): not in the checkpoint, or of another shape


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
          match stay as
        they are given.
      stacked: layers below "repeats" are stacked over a leading axis here; how the other run had
          them is no matter.
      rename: {old prefix: new prefix} of names, such as {"layers/repeats/0/ffn":
          "layers/repeats/0/shared"}. The
        longest prefix that fits counts; "" as the new one leaves them out.
      part: the field of the saved state to read, "params", "ema" or "router_state".
      step: the checkpoint to read; None = the newest sound one.

    Returns the parameters, with the dtypes and shardings of `params`, and the Report. Raises
    UserError when there is no checkpoint, or none of its parameters matches.
    """
    run = Checkpoints(directory, every=0, keep=1, keep_best=0)
    found = run.latest() if step is None else step
    if found is None:
        raise UserError(f"train.init_from: there is no checkpoint in {run.directory}")
    path = run.path(found)
    saved = read_manifest(path)["arrays"]
    sources = _sources(saved, part, rename)
    wanted = flat_lib.flatten(params)
    plan, left = _match(wanted, saved, sources, rename, stacked)
    if (
        not plan and part != "router_state"
    ):  # which another router does not have: it begins as the model begins it
        raise UserError(
            f"train.init_from: no parameter of {path} matches one of this model. It has "
            f"{_some(sources)}; this model "
            f"has {_some(wanted)}. Map old prefixes of names to new ones with train.init_rename"
        )
    loaded = _load(path, {name: wanted[name] for name in plan}, sources, stacked) if plan else {}
    renamed = [(sources[n].removeprefix(part + "/"), n) for names in plan.values() for n in names]
    renamed = [(old, new) for old, new in renamed if old != new]
    return flat_lib.unflatten({**wanted, **loaded}, params), Report(
        found, list(plan), renamed, left
    )


def refuse_idle_renames(
    directory: Any, step: int, here: Mapping[str, Any], *, stacked: bool, rename: Mapping[str, str]
) -> None:
    """Raises UserError when one of the `rename` of `load_params` has nothing to rename.

    Args:
      here: {part: tree} of this run, of all parts that are loaded.
    """
    path = Checkpoints(directory, every=0, keep=1, keep_best=0).path(step)
    saved = read_manifest(path)["arrays"]
    there = [n.removeprefix(part + "/") for part in here for n in saved if n.startswith(part + "/")]
    trees = [flat_lib.abstract_layers(flat_lib.flatten(tree), stacked) for tree in here.values()]
    known = {name for tree in trees for name in tree}
    for old, new in rename.items():
        found = [name for name in there if _is_below(name, old)]
        renamed = [new + name.removeprefix(old) for name in found]
        if not found:
            raise UserError(
                f"train.init_rename: ({old!r}, {new!r}) renames nothing, no parameter of {path} is "
                f"called {old!r} or {old + '/...'!r}. It has {_some(there)}"
            )
        if new and not known.intersection(renamed):
            raise UserError(
                f"train.init_rename: ({old!r}, {new!r}) makes {renamed[0]!r} of {found[0]!r}, and "
                "this "
                f'model has no such parameter. It has {_some(known)}; "" as the new name leaves it '
                "out"
            )


def _sources(saved: Mapping[str, Any], part: str, rename: Mapping[str, str]) -> dict[str, str]:
    """{name here, one per layer: name on disk} of every array of the part."""
    out = {}
    for name in saved:
        if name.startswith(part + "/"):
            old = name.removeprefix(part + "/")
            prefix = max((p for p in rename if _is_below(old, p)), key=len, default=None)
            new = (
                old
                if prefix is None
                else rename[prefix] and rename[prefix] + old.removeprefix(prefix)
            )
            if new:
                out[new] = name
    return out


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + "/")


def _match(
    wanted: Mapping[str, Any],
    saved: Mapping[str, Any],
    sources: Mapping[str, str],
    rename: Mapping[str, str],
    stacked: bool,
) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """{name: its layers' names} of what can be loaded, and (name, reason) of what cannot."""
    plan, left = {}, []
    for name, x in wanted.items():
        names = layout.layer_names(name, x.shape, stacked)
        shape = list(x.shape if names is None else x.shape[1:])
        names = names or [name]
        missing = [n for n in names if n not in sources]
        other = [n for n in names if n in sources and saved[sources[n]][0] != shape]
        if missing:
            out = any(not new and _is_below(missing[0], old) for old, new in rename.items())
            why = "is left out by train.init_rename" if out else "is not in the checkpoint"
            left.append((name, f"{missing[0]} {why}"))
        elif other:
            left.append(
                (
                    name,
                    f"{other[0]} is {saved[sources[other[0]]][0]} in the checkpoint and {shape} "
                    "here",
                )
            )
        else:
            plan[name] = names
    return plan, left


def _load(
    path: Path, wanted: dict[str, Any], sources: Mapping[str, str], stacked: bool
) -> dict[str, Any]:
    layers = flat_lib.abstract_layers(wanted, stacked)
    loaded = load_arrays(path, {sources[name]: x for name, x in layers.items()})
    return flat_lib.stack({name: loaded[sources[name]] for name in layers}, wanted, stacked)


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
