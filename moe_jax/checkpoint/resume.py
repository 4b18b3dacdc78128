"""May a run go on with this config, and what does an older config mean today?"""

import json
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError

# In place of a value in a message. No value is this word, because values are JSON.
_ABSENT = "absent"


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
    changes = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if was != now and not _within(key, may_change):
            changes.append(f"{key} was {was}, is {now}")
    if changes:
        raise UserError(
            f"this run was started with another config: {'; '.join(changes)}. Set these keys back, "
            "or take a new workdir (with train.init_from to begin with the parameters of this "
            "one); --allow_change=KEY goes on with another value"
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
        # A key may stand for a block: "optim" allows all that is below it.
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
    # Lists, as they are in a saved config: a tuple would differ from them.
    old_sources = [list(pair) for pair in old["data"]["sources"]]
    new_sources = [list(pair) for pair in new["data"]["sources"]]
    # Number, order and weights as before: only places can differ, and today's are taken.
    old_weights = [weight for _, weight in old_sources]
    new_weights = [weight for _, weight in new_sources]
    if old_weights == new_weights:
        for (old_path, _), (new_path, _) in zip(old_sources, new_sources, strict=True):
            if old_path != new_path:
                notes.append(f"data.sources: {old_path} is at {new_path} now, the same data")
        old = {**old, "data": {**old["data"], "sources": new_sources}}
    # The oldest runs have neither key: language modelling was the only task.
    # Files of the other tasks are in one folder.
    old_folder, new_folder = (config["data"].get("folder") for config in (old, new))
    if new.get("task", "lm") != "lm" and old_folder != new_folder:
        notes.append(f"data.folder was {old_folder}, is {new_folder}: the same data")
    return old, notes


def fill(
    saved: Mapping[str, Any], defaults: Mapping[str, Any], may_change: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the saved config of a run with the keys of today, and notes on those added since.

    Keys that were added since have their defaults. Options of a router, dispatcher, optimizer or
    schedule that the run did not choose go untold: they do nothing.

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
        """Returns `new` with the values of `old`; `prefix` is the dotted path of both.

        `chosen`: in a block of the options of several components, the one that the run takes.
        """
        # What an older version knew and today's does not.
        gone.extend(f"{prefix}{key} = {json.dumps(old[key])}" for key in old.keys() - new.keys())
        merged: dict[str, Any] = {}
        for key, value in new.items():
            if key not in old:
                merged[key] = value
                quiet = _within(prefix + key, may_change)
                if not quiet and (chosen is None or key == chosen):
                    notes.append(
                        f"{prefix}{key} is new since this run: taken as its default "
                        f"{json.dumps(value)}"
                    )
            elif isinstance(value, Mapping) and isinstance(old[key], Mapping):
                # Of "routers" the choice is the key "router" beside it.
                choice = old.get(key.removesuffix("s"))
                of_block = choice if isinstance(choice, str) else None
                merged[key] = merge(old[key], value, f"{prefix}{key}.", of_block)
            else:
                merged[key] = old[key]
        return merged

    filled = merge(saved, defaults, "", None)
    gone = sorted(key for key in gone if not _within(key.partition(" ")[0], may_change))
    if gone:
        raise UserError(
            f"this run was saved with keys that moe_jax has no more: {'; '.join(gone)}. Use the "
            "version that started the run, or a new workdir (with train.init_from to begin with "
            "the parameters of this one)"
        )
    return filled, notes


def _within(key: str, prefixes: tuple[str, ...]) -> bool:
    """Returns whether a key is one of the prefixes, or below one."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns {"model.d_model": "128"}: values as JSON, which is how the old ones were stored."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        # An empty block is a value: else it would be lost.
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.dumps(value)
    return flat
