"""Tokenizers by spec: `bytes`, `bpe:VOCAB` (trained on the source), `file:PATH` (an existing one).

`make` builds the tokenizer of a spec, `load` reads what `Tokenizer.save` wrote. To add a kind,
write its function (argument of the spec, texts to train on -> Tokenizer) and add its line to
TOKENIZERS.
"""

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from moe_jax.data.tokenizer import bpe, models, utf8
from moe_jax.data.tokenizer.contract import MODEL_FILES, Decoder, Tokenizer
from moe_jax.data.tokenizer.utf8 import bytes_tokenizer
from moe_jax.errors import UserError

__all__ = ["MODEL_FILES", "TOKENIZERS", "Decoder", "Tokenizer", "bytes_tokenizer", "load", "make"]

TOKENIZERS = {"bytes": utf8.make, "bpe": bpe.make, "file": models.make}


def make(spec: str, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Returns the tokenizer of a spec; `texts` is called only by one that must be trained.

    Raises UserError for an unknown spec.
    """
    kind, _, argument = spec.partition(":")
    if kind not in TOKENIZERS:
        raise UserError(f"tokenizer {spec!r} is none of: bytes, bpe:VOCAB, file:PATH[#BOUNDARY]")
    return TOKENIZERS[kind](argument, texts)


def load(folder: pathlib.Path) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.save` wrote into `folder`.

    Raises UserError if the folder holds none or a damaged one.
    """
    try:
        about = json.loads((folder / "tokenizer_kind.json").read_text(encoding="utf-8"))
        tokenizer = bytes_tokenizer() if about["kind"] == "bytes" else _read_model(folder, about)
    # TypeError and AttributeError: a model lacks what its reader needs.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} holds no complete tokenizer: {error}") from None
    if about.get("fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"{folder} holds no complete tokenizer: it is not what was written, by its digest"
        )
    return tokenizer


def _read_model(folder: pathlib.Path, about: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer of a library, from its model file and `about`, its description."""
    kind = about["kind"]
    model = (folder / MODEL_FILES[kind]).read_bytes()
    return models.READERS[kind](about["name"], model, about["boundary_id"])
