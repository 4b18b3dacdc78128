"""A run of ours as a model of Hugging Face: `python -m moe_jax convert export`.

The family is the first that can say all that decides what the model computes: its config is
written, read again, and must mean the same.

Most families have no scale on embeddings, and ours have one unless they were imported. What a scale
is more than that of the family, s, goes into the weights: embed times s, and where the head is the
embedding the last norm by s, since (scale / s) (s E)^T = scale E^T.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import config
from moe_jax.checkpoint import flat
from moe_jax.config import config_file
from moe_jax.config.tree import at
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.interchange import further, rotary, tensors, tokenizer_files
from moe_jax.interchange import settings as their_settings
from moe_jax.interchange.contract import Family
from moe_jax.interchange.families import FAMILIES
from moe_jax.interchange.importing import as_raw, family_of, planned, shapes_of
from moe_jax.interchange.meaning import (
    BLOCKS,
    ENCODER,
    ENCODER_BLOCKS,
    LAYER_ATTENTIONS,
    meaning,
)
from moe_jax.interchange.rows import Piece
from moe_jax.interchange.settings import Settings
from moe_jax.models import mtp
from moe_jax.models.decodable import why_not_cached, why_not_decoded
from moe_jax.models.ends import embedding_scale
from moe_jax.moe.routing import ROUTERS
from moe_jax.run import Run
from moe_jax.schema.config import ModelConfig

SCALE, ROUTER, KIND = "model.embedding_scale", "model.moe.router", "model.kind"
# How messages call what is no key.
WORDS = {
    BLOCKS: "the kinds of blocks (model.prefix, period, suffix)",
    ENCODER_BLOCKS: "the kinds of blocks of the encoder (model.kinds.encdec.encoder_period)",
    LAYER_ATTENTIONS: "the attentions of the blocks (model.attention)",
}
# Names of dtypes in `config.json`, which transformers loads the tensors in.
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Exported:
    """Holds what was exported."""

    family: str
    num_tensors: int
    num_bytes: int
    # What the user should know.
    notes: tuple[str, ...]


def export_model(
    run: Run,
    out: Path,
    *,
    family: str = "",
    dtype: str = "",
    like: Path | None = None,
    raw: bool = False,
    shard_bytes: int,
) -> Exported:
    """Writes a run as `save_pretrained` would write it, into the folder `out`, which is there.

    Args:
      family: one of FAMILIES; "" = the first that fits.
      dtype: of the tensors; "" = that of the parameters.
      like: the folder of the model that the run began from, whose tokenizer and other files are
        taken; None = they are made of the run.
      raw: the parameters themselves, not their moving average.
      shard_bytes: of a shard, at most.

    Raises UserError for a model that no family can express.
    """
    chosen, theirs = fitting(run, family or (family_like(like) if like else ""))
    dtype = dtype or run.config.model.param_dtype
    theirs |= {"dtype": dtype, "torch_dtype": dtype}
    if chosen.joins:
        theirs[chosen.further_layers] = mtp.num_depths(run.config.model)
    if like:
        notes = others_like(run, like, out, theirs)
    else:
        notes = others(run, out, theirs, begins_targets=chosen.encoder is not None)
    write_json(out / "config.json", theirs)
    # What evaluation uses: the moving average where the run kept one.
    params = run.parameters if raw else run.judged
    model, parts = run.config.model, {"params": params, "router_state": run.router_state}
    if mtp.num_depths(model) and not chosen.joins:
        model, parts = further.without(model, parts)
        notes.append(
            f"the blocks that predict further tokens ({further.DEPTHS}) were left out: "
            f"{chosen.model_type} has none"
        )
    plan = planned(chosen, model, parts)
    for row, piece in further.copies(chosen, model, shapes_of(parts)):
        plan[row.ours].append(piece)
    arrays = {name: x for tree in parts.values() for name, x in flat.flatten(tree).items()}
    # Before anything is written.
    refuse_lost(chosen, arrays)
    scale = embedding_scale(model) / their_scale(chosen, theirs)
    if scale != 1:
        arrays |= folded(arrays, scale, model)
        notes.append(
            f"the scale on embeddings ({SCALE}: {scale:g}) went into the embedding"
            f"{' and the last norm' if model.tie_embeddings else ''}"
        )
    rounded: list[str] = []
    # A generator: one shard of tensors is in memory at a time.
    made = tensors_of(plan, arrays, dtype, chosen.wide, rounded)
    num_bytes = tensors.write(out, made, shard_bytes)
    if rounded:
        notes.append(
            f"{len(rounded)} tensors were rounded to {dtype} ({rounded[0]} the first): --dtype "
            "keeps all digits"
        )
    num_tensors = sum(len(made_of) for made_of in plan.values())
    return Exported(chosen.model_type, num_tensors, num_bytes, tuple(notes))


def others(run: Run, out: Path, theirs: dict[str, Any], begins_targets: bool) -> list[str]:
    """Writes the tokenizer of a run and how its texts are decoded, puts what they say into the
    config, and returns notes.

    `begins_targets`: what is decoded begins with the boundary, behind no prompt.
    """
    # Not the ids that transformers takes where nothing is said.
    theirs |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    # A scaling of the rotary embedding may promise longer rows than the run was trained on.
    theirs["max_position_embeddings"] = max(run.config.data.seq_len, rotary.scaled_length(theirs))
    notes = []
    generation: dict[str, Any] = {}
    try:
        tokenizer = run.tokenizer
        tokenizer_files.write(out, tokenizer, theirs["max_position_embeddings"])
        ends = ends_of(tokenizer, begins_targets)
        theirs |= ends
        generation = ends | never_drawn(tokenizer, run.config.model.vocab_size)
    except UserError as error:
        notes.append(f"no tokenizer was written: {error}")
    write_json(out / "generation_config.json", generation)
    return notes


def others_like(run: Run, like: Path, out: Path, theirs: dict[str, Any]) -> list[str]:
    """Copies what lies beside the tensors of a model, puts those keys of its config that change
    nothing into the config, and returns notes.

    Raises UserError where its tokenizer is not that of the run.
    """
    before, where = their_settings.read(like)
    if (like / tokenizer_files.MODEL).is_file() and (run.workdir / "tokenizer").is_dir():
        there = tokenizer_files.read(like, before, run.config.model.vocab_size)
        if there.pieces != run.tokenizer.pieces:
            raise UserError(
                f"--like {like} has another tokenizer than {run.workdir / 'tokenizer'}: name the "
                "model that the run began from, or leave the flag out"
            )
    copied = []
    for path in sorted(like.iterdir()):
        is_text = path.suffix in (".json", ".jinja", ".txt", ".model")
        if path.is_file() and is_text and path.name not in ("config.json", tensors.INDEX):
            shutil.copyfile(path, out / path.name)
            copied.append(path.name)
    kept = [name for name in before if name in their_settings.HARMLESS and name not in theirs]
    theirs |= {name: before[name] for name in kept}
    return [f"as in {where}: {', '.join([*kept, *copied])}"]


def family_like(like: Path) -> str:
    """Returns the family of a folder's model. Raises UserError for one that we do not know."""
    return family_of(*their_settings.read(like)).model_type


def fitting(run: Run, name: str) -> tuple[Family, dict[str, Any]]:
    """Returns the family that can express a run, and its config.

    Raises UserError, which names what does not fit, where there is none.
    """
    if reason := why_not_exported(run.config.model):
        raise UserError(f"{run.workdir} cannot be exported: {reason}")
    config_here = meaning(run.config)
    misfits: dict[str, list[str]] = {}
    for family in [FAMILIES[name]] if name else FAMILIES.values():
        theirs = family.write(config_here)
        misfits[family.model_type] = differences(family, theirs, config_here)
        if not misfits[family.model_type]:
            return family, theirs
    # The family with the fewest differences says most clearly what stands in the way.
    nearest = min(misfits, key=lambda one: len(misfits[one]))
    what = f"as {name}" if name else f"as any family of {', '.join(FAMILIES)}"
    raise UserError(f"{run.workdir} cannot be exported {what}: {misfits[nearest][0]}")


def why_not_exported(model: ModelConfig) -> str:
    """Returns why a model writes no text, behind a prompt or behind a source; "" where it does."""
    return why_not_cached(model) if ENCODER in model.stacks else why_not_decoded(model)


def differences(family: Family, theirs: dict[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Returns what a family cannot say of a model, a sentence for each key."""
    if (ENCODER_BLOCKS in here) != (family.encoder is not None):
        return [_said(family, KIND, here[KIND], None), *here]
    # Those of an encoder are compared below.
    strange = [kind for kind in dict.fromkeys(here[BLOCKS]) if kind not in family.blocks]
    if strange:
        return [_said(family, BLOCKS, tuple(strange), tuple(family.blocks)), *here]
    changes = read_again(family, theirs)
    normal = changes | router_options(changes)
    # What a family does not speak of is as in every new config.
    default = config_file.default_values()
    # What the scale on embeddings differs by is folded into the weights.
    keys = [path for path in here if path not in (*WORDS, SCALE)]
    there = {path: normal.get(path, at(default, path)) for path in keys}
    wrong = [path for path in keys if here[path] != there[path]]
    if not wrong:
        # Nothing is left to chance: the whole config, as it will be read again.
        there = meaning(config.build(as_raw(changes), 1)) | {SCALE: here[SCALE]}
        wrong = [path for path in {**here, **there} if here.get(path) != there.get(path)]
    return [_said(family, path, here.get(path), there.get(path)) for path in wrong]


def read_again(family: Family, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of ours that a config which a family wrote says."""
    # Its length decides nothing that is compared.
    return family.read(Settings({"max_position_embeddings": 1, **theirs}, "config.json"))


def their_scale(family: Family, theirs: Mapping[str, Any]) -> float:
    """Returns the factor on embeddings in the models of a family."""
    changes = read_again(family, theirs)
    # 0 stands for it.
    return changes[SCALE] or changes["model.d_model"] ** 0.5


def router_options(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of the router that keys of ours choose, in the form that meaning.py has
    them in; {} where they choose none.
    """
    name = changes.get(ROUTER)
    if name is None:
        return {}
    before = f"model.moe.routers.{name}."
    told = {}
    for path, value in changes.items():
        if path.startswith(before):
            told[path.removeprefix(before)] = value
    # What the family does not speak of has its default.
    options = dataclasses.replace(ROUTERS[name].options(), **told)
    normal = dataclasses.asdict(ROUTERS[name].normal_form(options))
    return {before + option: value for option, value in normal.items()}


def refuse_lost(family: Family, arrays: Mapping[str, Any]) -> None:
    """Raises UserError for an array that a family takes to be zeros, and that is not."""
    for name, array in arrays.items():
        if family.zeros and name.endswith(family.zeros) and np.any(np.asarray(array)):
            raise UserError(
                f"{name} is not zero, and {family.model_type} has no tensor for it: export as "
                "another family, or train with a bias that does not move (bias_rate = 0)"
            )


def _said(family: Family, path: str, ours: Any, its: Any) -> str:
    """Returns how a family differs from a model in one key."""
    name = WORDS.get(path, path)
    if its is None:
        return f"{name} = {_short(ours)}, which no config of {family.model_type} can say"
    return f"{name} = {_short(ours)}, and {family.model_type} has {_short(its)}"


def _short(value: Any) -> str:
    """Returns a value as it is written in a config."""
    if isinstance(value, tuple):
        return " ".join(dict.fromkeys(map(str, value)))
    return f'"{value}"' if isinstance(value, str) else str(value)


def folded(params: Mapping[str, Any], scale: float, model: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the parameters, by their names, that do without this factor on embeddings."""
    # Every norm before the head. That of an encoder (encoder/ends/norm_scale) is not before it.
    norms = ["ends/norm_scale", *(name for name in params if name.endswith("/out_norm_scale"))]

    def times(array: Any, factor: float, plus: float = 0.0) -> np.ndarray:
        # Rounded once.
        product = (np.asarray(array).astype(np.float64) + plus) * factor - plus
        return product.astype(array.dtype)

    changed = {"ends/embed": times(params["ends/embed"], scale)}
    if model.tie_embeddings:
        plus = float(model.norm_plus_one)
        changed |= {name: times(params[name], 1 / scale, plus) for name in norms}
    return changed


def ends_of(tokenizer: Tokenizer, begins_targets: bool) -> dict[str, int]:
    """Returns the tokens that begin and end a text: our boundary is both.

    `begins_targets`: it begins what is decoded behind a source, too, and follows its end.
    """
    names = ["bos_token_id", "eos_token_id"]
    if begins_targets:
        names += ["decoder_start_token_id", "pad_token_id"]
    return dict.fromkeys(names, tokenizer.boundary_id)


def never_drawn(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Returns how transformers decodes as we do: ids that no token has are never drawn."""
    unknown = list(range(tokenizer.vocab_size, vocab_size))
    return {"suppress_tokens": unknown} if unknown else {}


def tensors_of(
    plan: Mapping[str, list[Piece]],
    params: Mapping[str, Any],
    dtype: str,
    wide: tuple[str, ...],
    rounded: list[str],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of theirs by name; names of those that lose digits go into `rounded`.

    `wide`: what names end with that keep the dtype of ours, at least float32.
    """
    for name, made_of in plan.items():
        value = np.asarray(params[name])
        for piece in made_of:
            exact = piece.to_theirs(value)
            its = exact.dtype if piece.name.endswith(wide) else dtype
            tensor = np.array(exact, its, order="C")
            if tensor.dtype != exact.dtype and (tensor.astype(exact.dtype) != exact).any():
                rounded.append(piece.name)
            yield piece.name, tensor


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
