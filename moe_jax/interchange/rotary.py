"""The rotary frequencies of a config of Hugging Face, and their scalings, both ways.

Transformers 5 writes `rope_parameters`, which has the base too; before there were `rope_theta` and
`rope_scaling`, and a type was called "type". Both are read. The older ones are written, which both
versions read.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.interchange.entries import Entry, Ours
from moe_jax.interchange.settings import Settings

SCALINGS = "model.rope_scalings"
# Where transformers keeps them, since version 5 and before.
PLACES = ("rope_parameters", "rope_scaling")


class RopeType(NamedTuple):
    """A scaling under both names."""

    theirs: str
    ours: str
    # (option of ours, key of theirs, what theirs is where it is not there; None = it must be).
    options: tuple[tuple[str, str, Any], ...] = ()
    # What else theirs may say: (settings of the scaling, all settings) -> options of ours.
    more: Callable[[Settings, Settings], dict[str, Any]] | None = None
    # Options of ours that are not written where they are this.
    unset: tuple[tuple[str, Any], ...] = ()


def original_length(scaling: Settings, settings: Settings) -> dict[str, Any]:
    """Returns the length of the rows before the scaling: that of the model, unless it is told."""
    told = "original_max_position_embeddings"
    length = settings.get(told) or scaling.get(told) or settings.need("max_position_embeddings")
    return {"original_length": length}


def yarn(scaling: Settings, settings: Settings) -> dict[str, Any]:
    """Returns the options of YaRN, of which the magnitude may be told as a quotient (DeepSeek-V2,
    arXiv:2405.04434).
    """
    options = original_length(scaling, settings)
    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    factor, magnitude = scaling.get("factor", 1.0), scaling.get("attention_factor")
    if magnitude is None and above and below and factor > 1:
        # What scores are multiplied with for the frequencies, over what they are for all of them.
        magnitude = (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
    return options | {"magnitude": float(magnitude or 0.0)}


FACTOR = ("factor", "factor", None)
ORIGINAL = ("original_length", "original_max_position_embeddings", 0)
ROPE_TYPES = (
    RopeType("default", "none"),
    RopeType("linear", "linear", (FACTOR,)),
    RopeType(
        "llama3",
        "llama3",
        (
            FACTOR,
            ("low_freq_factor", "low_freq_factor", None),
            ("high_freq_factor", "high_freq_factor", None),
            ORIGINAL,
        ),
        original_length,
    ),
    RopeType(
        "yarn",
        "yarn",
        (
            FACTOR,
            ORIGINAL,
            ("beta_fast", "beta_fast", 32.0),
            ("beta_slow", "beta_slow", 1.0),
            ("magnitude", "attention_factor", 0.0),
            ("truncate", "truncate", True),
        ),
        yarn,
        unset=(("magnitude", 0.0),),
    ),
)


def rope(
    theta: float, untold: Mapping[str, Any] | None = None, fraction: float | None = None
) -> Entry:
    """Returns the entry of the rotary frequencies; `theta` and `untold`: the base and the scaling
    where none is told; `fraction`: the part of a head that is turned, where it is not told, in a
    family that may turn a part.
    """
    part = "partial_rotary_factor"

    def read(settings: Settings) -> dict[str, Any]:
        turned: dict[str, Any] = {}
        if fraction is not None:
            turned["model.rope_fraction"] = settings.get(part, fraction)
        base = settings.get("rope_theta", theta)
        places = [name for name in PLACES if settings.get(name)]
        if not places:
            # null says that there is none.
            told = any(settings.has(name) for name in PLACES)
            if told or not untold:
                return turned | {"model.rope_theta": base}
            settings = settings.with_values(rope_parameters=untold)
            places = ["rope_parameters"]
        scaling = settings.inner(places[0])
        base = scaling.get("rope_theta", base)
        name = scaling.get("rope_type") or scaling.get("type") or "default"
        # Read in any case: older files have both keys.
        scaling.get("type")
        kind = next((one for one in ROPE_TYPES if one.theirs == name), None)
        if kind is None:
            known = ", ".join(one.theirs for one in ROPE_TYPES)
            raise settings.refusal(places[0], f'moe_jax has no scaling "{name}"; it has {known}')
        if fraction is not None:
            turned["model.rope_fraction"] = scaling.get(part, turned["model.rope_fraction"])
        elif scaling.get(part, 1.0) != 1.0:
            raise scaling.refusal(part, "models of this family turn whole heads alone")
        options = {}
        for ours, theirs, default in kind.options:
            value = scaling.need(theirs) if default is None else scaling.get(theirs, default)
            # JSON may have written a whole number.
            options[ours] = float(value) if isinstance(default, float | None) else value
        if kind.more:
            options |= kind.more(scaling, settings)
        scaling.refuse_unread(f'rope_type "{name}" in')
        path = f"{SCALINGS}.{kind.ours}"
        scaled = {f"{path}.{option}": value for option, value in options.items()}
        return {**turned, "model.rope_theta": base, "model.rope_scaling": kind.ours, **scaled}

    def write(config: Ours) -> dict[str, Any]:
        written = {"rope_theta": config["model.rope_theta"]}
        if fraction is not None:
            written[part] = config["model.rope_fraction"]
        chosen = config["model.rope_scaling"]
        kind = next((one for one in ROPE_TYPES if one.ours == chosen), None)
        if kind is None or not kind.options:
            # Where nothing is told they take another one.
            none = {"rope_type": "default"} if untold else None
            return written | {"rope_scaling": none}
        scaling = {"rope_type": kind.theirs}
        for ours, theirs, _ in kind.options:
            value = config[f"{SCALINGS}.{kind.ours}.{ours}"]
            # A magnitude of 0 stands for "as the paper has it": the key is left out.
            if (ours, value) not in kind.unset:
                scaling[theirs] = value
        return written | {"rope_scaling": scaling}

    return Entry(read, write)


def scaled_length(settings: dict[str, Any]) -> int:
    """Returns the length of rows that written settings are scaled to; 0 where they are not."""
    scaling = settings.get("rope_scaling") or {}
    original = scaling.get("original_max_position_embeddings", 0)
    return math.ceil(original * scaling.get("factor", 1.0))
