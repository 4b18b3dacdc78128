"""May a run go on with this config?"""

import json
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any], may_change: tuple[str, ...]) -> None:
    """Raises UserError when a resumed run's config differs from the saved one, naming every key with both values.

    Args:
      old, new: nested dicts, as given to `Checkpoints.save` and as they are now; tuples and lists are the same.
      may_change: keys that may differ, by prefix: "eval" allows "eval.every", and not "evaluate".
    """
    before, after = _flat(old), _flat(new)
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key, _ABSENT) != after.get(key, _ABSENT)]
    keys = [key for key in keys if not any(key == p or key.startswith(p + ".") for p in may_change)]
    if keys:
        changes = "; ".join(f"{k} was {before.get(k, _ABSENT)}, is {after.get(k, _ABSENT)}" for k in keys)
        raise UserError(
            f"this run was started with another config: {changes}. Set these keys back, or take a new workdir (with "
            "train.init_from to begin with the parameters of this one)"
        )


_ABSENT = "absent"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"model.d_model": "128"}: values as JSON, which is how the old ones were stored."""
    out: dict[str, str] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and len(value) > 0
        out.update(_flat(value, f"{prefix}{key}.") if nested else {prefix + key: json.dumps(value)})
    return out
