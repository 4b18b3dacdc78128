"""The config.json of a model of Hugging Face, read key by key.

A key that nobody reads might change what the model computes, so it is refused by its name.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError

# Read by no family: they change nothing that a forward pass computes.
HARMLESS = frozenset(
    (
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_from_model_config",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "max_position_embeddings",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)


class Settings:
    """The values of a config.json, which remembers what was read.

    Args:
      values: by key; null counts as a key that is not there.
      where: the name of the file in messages.
      prefix: of the keys in messages, such as "rope_scaling.".
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        self._values, self._where, self._prefix = dict(values), where, prefix
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the value of a key; `default` where it is not there or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        """Returns whether a key is there, null or not."""
        return name in self._values

    def need(self, name: str) -> Any:
        """Returns the value of a key. Raises UserError where it is not there."""
        value = self.get(name)
        if value is None:
            raise UserError(
                f"{self._where}: the key {self._prefix}{name} is missing: take the config.json "
                "that the model was published with"
            )
        return value

    def number(self, name: str, default: int | None = None) -> int:
        """Returns a whole number above 0; `default` where it is not there. Raises UserError."""
        value = self.need(name) if default is None else self.get(name, default)
        # True is an int in Python.
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(name, "it must be a whole number above 0")
        return value

    def inner(self, name: str) -> "Settings":
        """Returns the values below a key. Raises UserError where it has none."""
        value = self.need(name)
        if not isinstance(value, Mapping):
            raise self.refusal(name, "it must be an object")
        return Settings(value, self._where, f"{self._prefix}{name}.")

    def with_values(self, **values: Any) -> "Settings":
        """Returns the same with further values."""
        return Settings({**self._values, **values}, self._where, self._prefix)

    def refusal(self, name: str, why: str) -> UserError:
        """Returns the error that names a key and its value."""
        value = json.dumps(self._values.get(name))
        # A long list would hide the sentence around it.
        shown = value if len(value) <= 60 else value[:57] + "..."
        return UserError(f"{self._where}: {self._prefix}{name} = {shown}: {why}")

    def refuse_unread(self, of: str, harmless: Iterable[str] = ()) -> None:
        """Raises UserError for the first key that was not read and is not null or harmless."""
        # null means that the option is not used.
        known = self._read | set(harmless)
        for name, value in self._values.items():
            if name not in known and value is not None:
                raise self.refusal(
                    name,
                    f"moe_jax knows no such option of {of} models, and it may change what the "
                    "model computes. Remove the key if it does not",
                )


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """Returns the values of a folder's config.json, and its path for messages.

    Raises UserError where there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{folder} holds no model, because {path} cannot be read ({error.strerror}): "
            "name a folder as save_pretrained writes it"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object: copy it again")
    return values, str(path)
