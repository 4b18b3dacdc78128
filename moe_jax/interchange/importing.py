"""A model of Hugging Face as a run of ours: `python -m moe_jax convert import`.

Tensors are read one at a time, each into its place in a parameter. Parameters that they have not,
and tensors that no parameter takes, are refused before the first one is read.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import config
from moe_jax.checkpoint import flat
from moe_jax.config import config_file
from moe_jax.config.tree import defaults
from moe_jax.errors import UserError
from moe_jax.interchange import further, tensors, tokenizer_files
from moe_jax.interchange import settings as their_settings
from moe_jax.interchange.contract import Family
from moe_jax.interchange.families import FAMILIES
from moe_jax.interchange.rows import Piece, pieces
from moe_jax.interchange.settings import Settings
from moe_jax.interchange.shards import Shards
from moe_jax.models.block import moe_config
from moe_jax.models.functions import make_model
from moe_jax.moe.settings import adaptive_state
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel.mesh import Lengths
from moe_jax.run import write_run
from moe_jax.schema.config import Config, ModelConfig

# data.seq_len of a model that takes longer rows, unless --seq_len says more.
LONGEST_ROW = 4096


@dataclasses.dataclass(frozen=True)
class Imported:
    """Holds what was imported."""

    family: str
    config: Config
    num_tensors: int
    num_parameters: int
    # What the user should know.
    notes: tuple[str, ...]


class Loaded(NamedTuple):
    """A model of theirs on the devices of a mesh."""

    # "params" and "router_state": trees of arrays with single layers.
    parts: dict[str, Any]
    config: Config
    # Keys of ours that its config changed.
    changes: dict[str, Any]
    family: Family
    num_tensors: int
    notes: tuple[str, ...]


def import_model(
    source: Path,
    out: Path,
    seq_len: int | None = None,
    lengths: Lengths | None = None,
    with_mtp: bool = False,
) -> Imported:
    """Writes the model of a folder, as save_pretrained leaves it, as a run into `out`.

    Args:
      seq_len: data.seq_len; None = what the model was made for, at most LONGEST_ROW.
      lengths: of the mesh on whose devices it is put together, and of the run's config; None = the
        memory of the host.
      with_mtp: take the layers that predict further tokens, too.

    Raises UserError for what we do not have, and for what is missing or damaged.
    """
    mesh = meshes.make(lengths) if lengths else meshes.of_host()
    with jax.set_mesh(mesh):
        loaded = load(source, seq_len, lengths, with_mtp)
        write_run(out, as_raw(loaded.changes), loaded.parts, step=0)
        num_parameters = sum(x.size for x in jax.tree.leaves(loaded.parts["params"]))
    notes = list(loaded.notes)
    cfg = loaded.config
    try:
        theirs, _ = their_settings.read(source)
        tokenizer_files.read(source, theirs, cfg.model.vocab_size).save(out / "tokenizer")
    except UserError as error:
        notes.append(
            f"no tokenizer was taken ({error}): `generate` needs one in {out / 'tokenizer'}"
        )
    (out / "config.py").write_text(as_file(loaded.changes, out), encoding="utf-8")
    name = loaded.family.model_type
    return Imported(name, cfg, loaded.num_tensors, num_parameters, tuple(notes))


def load(
    source: Path,
    seq_len: int | None = None,
    lengths: Lengths | None = None,
    with_mtp: bool = False,
) -> Loaded:
    """Returns the model of a folder on the devices of the current mesh, whose lengths are given
    unless it is one device.

    Each device gets its own part of a parameter, tensor by tensor; `import_model` has the rest.
    """
    theirs, where = their_settings.read(source)
    family = family_of(theirs, where)
    changes = family.read(Settings(theirs, where))
    told = Settings(theirs, where)
    if with_mtp:
        changes |= further.depths(told, family)
    # T5 has no positions that end, and says for how long rows it was made.
    longest = told.number("max_position_embeddings", told.number("n_positions", LONGEST_ROW))
    changes["data.seq_len"] = seq_len or min(longest, LONGEST_ROW)
    if lengths:
        changes |= {f"mesh.{axis}": length for axis, length in lengths.written().items()}
        rows, devices = defaults().train.batch_size, lengths.batch_devices
        # Rows are split over the devices, so there must be a multiple of them.
        changes["train.batch_size"] = -(-rows // devices) * devices
    num_devices = lengths.num_devices if lengths else 1
    with tensors.Folder(source) as folder:
        if family.quantized:
            family.quantized(folder)
        # Their shapes are the same in every dtype.
        cfg = config.build(as_raw(changes), num_devices)
        plan = planned(family, cfg.model, abstract_parts(cfg))
        changes["model.param_dtype"] = changes["model.dtype"] = widest(folder, family)
        raw = as_raw(changes)
        config.allow_float64(raw)
        cfg = config.build(raw, num_devices)
        abstract = abstract_parts(cfg)
        copies = list(further.copies(family, cfg.model, shapes_of(abstract)))
        # Before the first tensor is read, which may take long.
        refuse_misfits(plan, folder, family, cfg.model, {piece.name for _, piece in copies})
        if cfg.model.tie_embeddings:
            refuse_other_head(folder, family)
        further.refuse_others(family, copies, folder)
        notes = noted(folder, family, cfg, longest)
        parts = assembled(plan, folder, abstract)
    num_tensors = sum(len(made_of) for made_of in plan.values())
    return Loaded(parts, cfg, changes, family, num_tensors, notes)


def noted(folder: tensors.Folder, family: Family, cfg: Config, longest: int) -> tuple[str, ...]:
    """Returns what the user should know of a model."""
    notes = []
    num_layers = len(cfg.model.blocks)
    if behind := [name for name in folder.names() if family.is_further(name, num_layers)]:
        notes.append(
            f"{len(behind)} tensors of layers that predict further tokens were passed over "
            f"({family.further_layers}): --mtp reads them"
        )
    if longest > cfg.data.seq_len:
        notes.append(
            f"data.seq_len = {cfg.data.seq_len}, of the {longest} tokens that the model takes "
            "(max_position_embeddings): --seq_len sets another"
        )
    return tuple(notes)


def family_of(theirs: Mapping[str, Any], where: str) -> Family:
    """Returns the family that a config names. Raises UserError for one that we do not know."""
    name = theirs.get("model_type")
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(str(name), FAMILIES, 1)
    hint = f" (the nearest name is {near[0]})" if near else ""
    raise UserError(
        f'{where}: model_type = "{name}" is no family that moe_jax reads{hint}: it reads '
        f"{', '.join(FAMILIES)}"
    )


def as_raw(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the whole config, a nested dict of JSON values, with these keys changed."""
    tree = defaults()
    tree.update_from_flattened_dict(dict(changes))
    return config_file.values(tree)


def widest(folder: tensors.Folder, family: Family) -> str:
    """Returns the dtype that holds every tensor of a folder but those that are always wide; float16
    is held by float32.
    """
    found = {folder.dtype(name) for name in folder.names() if not name.endswith(family.wide)}
    if found == {"bfloat16"}:
        return "bfloat16"
    return "float64" if "float64" in found else "float32"


def abstract_parts(cfg: Config) -> dict[str, Any]:
    """Returns the shapes and dtypes of the parts of a checkpoint: parameters and router state."""
    params, router_state = jax.eval_shape(make_model(cfg.model).init, jax.random.key(0))
    return {"params": params, "router_state": router_state}


def planned(family: Family, cfg: ModelConfig, parts: Mapping[str, Any]) -> dict[str, list[Piece]]:
    """Returns the tensors of theirs that each array of ours is made of, by its name below its part;
    no parameter has the name of a state.
    """
    ours = shapes_of(parts)
    plan = further.planned(family, cfg, ours)
    for below, layer, row in family.rows(cfg.stacks):
        name = below + row.ours
        # A family has rows of parameters that only some of its models have.
        if name in ours and row.fits(ours[name]):
            plan[name] = list(pieces(row, ours[name], layer))
    for name in ours:
        # A state that training alone moves, and arrays that begin as zeros, have no tensor.
        of_training = name.rpartition("/")[2] in adaptive_state(moe_config(cfg))
        if name not in plan and not of_training and not name.endswith(family.zeros):
            # The refusals of keys come first: a family that lacks a row lacks a refusal too.
            raise UserError(f"{family.model_type} has no tensor for the parameter {name}")
    return plan


def shapes_of(parts: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array of a checkpoint's parts, by its name below its part."""
    return {name: x.shape for tree in parts.values() for name, x in flat.flatten(tree).items()}


def refuse_misfits(
    plan: Mapping[str, list[Piece]],
    folder: tensors.Folder,
    family: Family,
    cfg: ModelConfig,
    known: set[str],
) -> None:
    """Raises UserError for a tensor that is missing, of another shape, or more than there should
    be; `known` are others that may be there.
    """
    names = folder.names()
    # 1. What a parameter asks for must be there, in its shape.
    wanted: set[str] = set()
    for piece in (piece for made_of in plan.values() for piece in made_of):
        wanted.add(piece.name)
        if piece.name not in names:
            raise UserError(
                f"{folder.folder} has no tensor {piece.name}, which its config.json asks for "
                f"(it has {len(names)} tensors)"
            )
        shape = folder.shape(piece.name)
        if shape != piece.shape:
            raise UserError(
                f"{folder.where(piece.name)}: {piece.name} has the shape {list(shape)}, and "
                f"config.json asks for {list(piece.shape)}"
            )
    # 2. What is there must be asked for: a tensor that is left out would change the model.
    for name in sorted(names - wanted - known):
        # A head that is the embedding may be there a second time.
        tied = cfg.tie_embeddings and name == head_of(family)
        is_further = family.is_further(name, len(cfg.blocks))
        if not (tied or is_further or name.endswith(family.buffers)):
            raise UserError(
                f"{folder.where(name)}: {name} has no place in a {family.model_type} model of "
                "this config.json: what is it?"
            )


def refuse_other_head(folder: tensors.Folder, family: Family) -> None:
    """Raises UserError for a head that should be the embedding, and is another matrix."""
    head, embedding = head_of(family), end_of(family, "ends/embed")
    if head not in folder.names():
        return
    if not np.array_equal(folder.read(head), folder.read(embedding)):
        raise UserError(
            f"{folder.where(head)}: {head} is not {embedding}, although config.json ties them: set "
            "tie_word_embeddings to false there"
        )


def head_of(family: Family) -> str:
    """Returns the name of the head's tensor."""
    return end_of(family, "ends/head")


def end_of(family: Family, ours: str) -> str:
    """Returns the name of a tensor of theirs outside of the blocks."""
    return next(row.theirs for row in family.ends if row.ours == ours)


def assembled(
    plan: Mapping[str, list[Piece]], folder: tensors.Folder, parts: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns parameters and router state, on the devices of the mesh; one tensor is read at a
    time, and none that no device of this process has a part of.
    """

    def array(name: str, like: Any) -> jax.Array:
        shards = Shards(like)
        # Of zeros there is no tensor.
        for piece in plan.get(name, ()):
            # Another process reads what only its devices have.
            if shards.wants(piece.index):
                shards.put(piece.index, piece.to_ours(folder.read(piece.name)))
        return shards.whole()

    made = {}
    for part, tree in parts.items():
        arrays = {name: array(name, like) for name, like in flat.flatten(tree).items()}
        made[part] = flat.unflatten(arrays, tree)
    return made


def as_file(changes: Mapping[str, Any], out: Path) -> str:
    """Returns the text of a config file that trains on from the imported run."""
    values = dict(changes)
    notes = [
        "# Rows for data.sources are made with the model's own tokenizer:",
        f"# python -m moe_jax prepare --source FILES --tokenizer file:{out}/tokenizer/"
        "tokenizer.json --out DATA",
    ]
    if values["model.param_dtype"] == "bfloat16":
        notes.append("# Small updates of weights in bfloat16 would be rounded away.")
        values["model.param_dtype"] = "float32"
    values["train.init_from"] = str(out)
    lines = [
        f'"""Trains on from {out}, which `python -m moe_jax convert import` wrote."""',
        "",
        "from moe_jax.config import defaults",
        "",
        "",
        "def get_config():",
        "    c = defaults()",
        *(f"    {note}" for note in notes),
        *(f"    c.{path} = {value!r}" for path, value in sorted(values.items())),
        "    return c",
    ]
    return "\n".join(lines) + "\n"
