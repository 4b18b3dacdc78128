"""Layers of Hugging Face's models that predict further tokens, as modules of ours (models/mtp.py).

They lie behind the layers of the model, `num_nextn_predict_layers` of them:

    model.layers.61.enorm.weight ...           what joins a token and a hidden state: Family.joins
    model.layers.61.self_attn.q_a_proj ...     the block, as of any other layer
    model.layers.61.embed_tokens.weight ...    the embedding and the head once more: Family.copies

No class of transformers reads them. What serves these models (vLLM, SGLang) does.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.interchange.contract import Family
from moe_jax.interchange.rows import Piece, Row, pieces
from moe_jax.interchange.settings import Settings
from moe_jax.interchange.tensors import Folder
from moe_jax.models import mtp
from moe_jax.schema.config import ModelConfig

# Of ours: how many there are.
DEPTHS = "model.kinds.decoder.mtp_depths"


def depths(settings: Settings, family: Family) -> dict[str, Any]:
    """Returns the keys of ours for the further layers that a config names.

    Raises UserError where there are none that we read.
    """
    if not family.joins:
        raise UserError(
            f"--mtp: models of {family.model_type} have no layers that predict further tokens: "
            "leave the flag out"
        )
    number = settings.get(family.further_layers, 0)
    if not number:
        raise settings.refusal(
            family.further_layers,
            "--mtp reads the layers that predict further tokens, and this model has none: leave "
            "the flag out",
        )
    return {DEPTHS: number}


def planned(
    family: Family, cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Piece]]:
    """Returns the tensors of theirs that each array of ours is made of, by its name, of what joins
    tokens and hidden states.
    """
    plan = {}
    for k, layer in enumerate(layers(family, cfg)):
        for row in family.joins:
            name = f"{mtp.NAME}/joins/{k}/{row.ours}"
            plan[name] = list(pieces(row, shapes[name], layer))
    return plan


def copies(
    family: Family, cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[Row, Piece]]:
    """Yields the tensors that have an array of ours once more, with its row; of a head that is the
    embedding there is none.
    """
    for layer in layers(family, cfg):
        for row in family.copies:
            if row.ours in shapes:
                for piece in pieces(row, shapes[row.ours], layer):
                    yield row, piece


def layers(family: Family, cfg: ModelConfig) -> list[str]:
    """Returns what the names of the tensors of each further layer begin with."""
    num_before = len(cfg.stacks[""].blocks)
    return [family.layer.format(num_before + k) for k in range(mtp.num_depths(cfg))]


def refuse_others(family: Family, made: Iterable[tuple[Row, Piece]], folder: Folder) -> None:
    """Raises UserError for a copy that is another embedding or head than the model's: ours has but
    one for all tokens that are predicted. A copy may be missing.
    """
    of_model = {row.ours: row.theirs for row in family.ends}
    for row, piece in made:
        if piece.name not in folder.names():
            continue
        if not np.array_equal(folder.read(piece.name), folder.read(of_model[row.ours])):
            raise UserError(
                f"{folder.where(piece.name)}: {piece.name} differs from {of_model[row.ours]}, and "
                "moe_jax has one embedding and one head for all tokens: leave --mtp out"
            )


def without(
    cfg: ModelConfig, parts: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, dict[str, Any]]]:
    """Returns a model that predicts the next token alone, and its parts."""
    kept = {}
    for part, tree in parts.items():
        kept[part] = {name: below for name, below in tree.items() if name != mtp.NAME}
    return mtp.without(cfg), kept
