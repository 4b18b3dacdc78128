"""May a run go on with this config, and what does an older config mean today?"""

import json
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError


def compare_configs(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: tuple[str, ...]
) -> None:
    """Raises UserError when a resumed run's config differs from the saved one, naming every key
    with both values.

    Args:
      old, new: nested dicts, as given to `Checkpoints.save` and as they are now; tuples and lists
      are the same.
      may_change: keys that may differ, by prefix: "eval" allows "eval.every", and not "evaluate".
    """
    before, after = _flat(old), _flat(new)
    keys = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]
    keys = [key for key in keys if not _within(key, may_change)]
    if keys:
        changes = "; ".join(
            f"{k} was {before.get(k, _ABSENT)}, is {after.get(k, _ABSENT)}" for k in keys
        )
        raise UserError(
            f"this run was started with another config: {changes}. Set these keys back, or take a "
            "new workdir (with "
            "train.init_from to begin with the parameters of this one); --allow_change=KEY goes on "
            "with another value"
        )


def allowed_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], allowed: tuple[str, ...]
) -> list[str]:
    """Returns a note for each key of `allowed` (by prefix) that differs from the saved config.

    Raises UserError for one that is no key.
    """
    before, after = _flat(old), _flat(new)
    keys = sorted(before.keys() | after.keys())
    notes = []
    for prefix in allowed:
        named = [key for key in keys if _within(key, (prefix,))]
        changed = [k for k in named if before.get(k, _ABSENT) != after.get(k, _ABSENT)]
        if not named:
            raise UserError(f"--allow_change={prefix}: the config has no such key")
        if not changed:
            # No mistake: a cluster starts a run again by the same command.
            notes.append(f"--allow_change={prefix}: nothing of it differs from what was saved")
        notes += [
            f"{key} was {before.get(key, _ABSENT)}, is {after.get(key, _ABSENT)} from here on "
            "(--allow_change)"
            for key in changed
        ]
    return notes


def same_data(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[Mapping[str, Any], list[str]]:
    """Returns the saved config with the places of today's data, and a note for each that is
    another.

    For data whose fingerprint is that of the saved run, so that only its place can differ. The
    number, order and weights of the sources are left as they were, to be compared.
    """
    notes = []
    before, now = (
        [list(pair) for pair in old["data"]["sources"]],
        [list(pair) for pair in new["data"]["sources"]],
    )
    if [weight for _, weight in before] == [weight for _, weight in now]:
        places = zip((place for place, _ in before), (place for place, _ in now), strict=True)
        notes = [f"data.sources: {b} is at {n} now, the same data" for b, n in places if b != n]
        old = {**old, "data": {**old["data"], "sources": now}}
    folders = [config["data"].get("folder") for config in (old, new)]
    if new.get("task", "lm") != "lm" and folders[0] != folders[1]:
        notes.append(f"data.folder was {folders[0]}, is {folders[1]}: the same data")
    return old, notes


def fill(
    saved: Mapping[str, Any], defaults: Mapping[str, Any], may_change: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """The saved config of a run with the keys of today, and what to tell of those that were added
    since: they have their defaults.

    Options of a router, dispatcher, optimizer or schedule that the run did not choose go untold:
    they do nothing.

    Args:
      defaults: of today (configs/base.py).
      may_change: keys, by prefix, that are left out without a word if today has them no more. Any
          other is a UserError that names all.
    """
    notes: list[str] = []
    gone: list[str] = []

    def merge(
        old: Mapping[str, Any], new: Mapping[str, Any], prefix: str, chosen: str | None
    ) -> dict[str, Any]:
        gone.extend(f"{prefix}{key} = {json.dumps(old[key])}" for key in old.keys() - new.keys())
        out: dict[str, Any] = {}
        for key, value in new.items():
            if key not in old:
                out[key] = value
                quiet = _within(prefix + key, may_change)
                if not quiet and (chosen is None or key == chosen):
                    notes.append(
                        f"{prefix}{key} is new since this run: taken as its default "
                        f"{json.dumps(value)}"
                    )
            elif isinstance(value, Mapping) and isinstance(old[key], Mapping):
                choice = old.get(key.removesuffix("s"))  # "router" of "routers"
                out[key] = merge(
                    old[key], value, f"{prefix}{key}.", choice if isinstance(choice, str) else None
                )
            else:
                out[key] = old[key]
        return out

    filled = merge(saved, defaults, "", None)
    gone = sorted(key for key in gone if not _within(key.partition(" ")[0], may_change))
    if gone:
        raise UserError(
            f"this run was saved with keys that moe_jax has no more: {'; '.join(gone)}. Use the "
            "version that started the run, or "
            "a new workdir (with train.init_from to begin with the parameters of this one)"
        )
    return filled, notes


def _within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == p or key.startswith(p + ".") for p in prefixes)


_ABSENT = "absent"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"model.d_model": "128"}: values as JSON, which is how the old ones were stored."""
    out: dict[str, str] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and len(value) > 0
        out.update(_flat(value, f"{prefix}{key}.") if nested else {prefix + key: json.dumps(value)})
    return out
