"""The tokenizer of a model of Hugging Face as one of ours, and back.

tokenizer.json           what both read
tokenizer.model          a SentencePiece model, which is read where there is no tokenizer.json; T5
                         calls it spiece.model
tokenizer_config.json    which class reads it in transformers, and which token ends a text

A SentencePiece model is written as a tokenizer.json (sentencepiece_model.py).
"""

import json
from pathlib import Path
from typing import Any

from moe_jax.data.tokenizer import Tokenizer, models
from moe_jax.errors import UserError
from moe_jax.interchange import sentencepiece_model

MODEL, ABOUT = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model")


def read(folder: Path, settings: dict[str, Any], vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a folder, whose boundary is the end of a text.

    Raises UserError where there is none that ours can hold.
    """
    path = folder / MODEL
    found = [folder / name for name in SENTENCEPIECE if (folder / name).is_file()]
    if found and not path.is_file():
        path = found[0]
    try:
        model = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if path.name == MODEL:
        boundary = _end_of_text(folder, settings, model)
        tokenizer = models.read_huggingface(f"file:{path}", model, boundary)
    else:
        boundary = _named_end(folder)
        tokenizer = models.read_sentencepiece(f"file:{path}", model, boundary)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} ids, and the model {vocab_size} (vocab_size)"
        )
    return tokenizer


def _end_of_text(folder: Path, settings: dict[str, Any], model: bytes) -> str | int:
    """Returns the name or the id of the token that ends a text; "" where nothing tells it."""
    if text := _named_end(folder):
        return text
    ids = settings.get("eos_token_id")
    tokens = _parsed(model).get("added_tokens") or []
    special = [token["id"] for token in tokens if token.get("special")]
    # Any other may stand inside of a text.
    found = [id_ for id_ in (ids if isinstance(ids, list) else [ids]) if id_ in special]
    return found[0] if found else ""


def _named_end(folder: Path) -> str:
    """Returns the name of the token that ends a text; "" where nothing tells it."""
    named = _json(folder / ABOUT).get("eos_token")
    # A token is its text, or an object that has it.
    text = named.get("content") if isinstance(named, dict) else named
    return text if isinstance(text, str) else ""


def _json(path: Path) -> dict[str, Any]:
    """Returns the object of a file; {} where there is none."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


def _parsed(text: bytes) -> dict[str, Any]:
    """Returns a JSON object; {} of what is none, which others refuse."""
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def write(folder: Path, tokenizer: Tokenizer, length: int) -> None:
    """Writes a tokenizer of ours for transformers; `length`: of the longest row.

    One that was made here puts the boundary before a text, as our rows begin with it. Raises
    UserError for a SentencePiece model that a tokenizer.json cannot hold.
    """
    if tokenizer.kind == "huggingface":
        model = json.loads(tokenizer.model)
    elif tokenizer.kind == "bytes":
        model = _of_bytes(tokenizer)
    else:
        model = sentencepiece_model.tokenizer_json(tokenizer.name, tokenizer.model)
    boundary = _boundary(model, tokenizer)
    text = tokenizer.model if tokenizer.kind == "huggingface" else _as_bytes(model)
    # One that came from elsewhere puts before a text what its makers put there.
    if boundary == models.BOUNDARY and not model.get("post_processor"):
        model["post_processor"] = _before_texts(boundary, tokenizer.boundary_id)
        text = _as_bytes(model)
    (folder / MODEL).write_bytes(text)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "bos_token": boundary,
        "eos_token": boundary,
        "clean_up_tokenization_spaces": False,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _as_bytes(model: dict[str, Any]) -> bytes:
    return (json.dumps(model, ensure_ascii=False, indent=2) + "\n").encode("utf-8")


def _boundary(model: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Returns the text of the boundary in a tokenizer.json."""
    for token in model.get("added_tokens", ()):
        if token["id"] == tokenizer.boundary_id:
            return token["content"]
    raise UserError(f"the tokenizer {tokenizer.name} names no token {tokenizer.boundary_id}")


def _of_bytes(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the tokenizer.json whose ids are bytes: a byte-level BPE without merges."""
    import tokenizers

    character_of = {byte: character for character, byte in models.byte_of_character().items()}
    # A byte-level BPE writes each byte as one character; ours has their numbers as ids.
    characters = {character_of[byte]: byte for byte in range(tokenizer.boundary_id)}
    of_bytes = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=characters, merges=[]))
    of_bytes.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    of_bytes.decoder = tokenizers.decoders.ByteLevel()
    of_bytes.add_special_tokens([models.BOUNDARY])
    return json.loads(of_bytes.to_str())


def _before_texts(boundary: str, id_: int) -> dict[str, Any]:
    """Returns the post-processor that puts the boundary before a text."""
    token = {"SpecialToken": {"id": boundary, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, token, second],
        "special_tokens": {boundary: {"id": boundary, "ids": [id_], "tokens": [boundary]}},
    }
