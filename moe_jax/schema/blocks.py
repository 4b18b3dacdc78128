"""The kinds of blocks of a model, and the stacks in which they run.

A kind is "dense" or "moe". "depth:" before it says that only some tokens go through the block, and
the name of an attention before both says that the block has that one, and not model.attention:
"sliding_window:moe", "grouped_query:depth:dense". So layers that differ are a period of several
blocks, under scan too.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# What the kind of a block begins with that only some tokens go through, as in "depth:moe".
DEPTH = "depth:"
BLOCKS = ("dense", "moe", DEPTH + "dense", DEPTH + "moe")


def attention_of(kind: str) -> str:
    """Returns the attention that the kind of a block names; "" = it has that of the model."""
    first, colon, _ = kind.partition(":")
    return first if colon and first + colon != DEPTH else ""


def without_attention(kind: str) -> str:
    """Returns the kind of a block, one of BLOCKS, without the attention that it names."""
    return kind.removeprefix(attention_of(kind) + ":")


def is_depth(kind: str) -> bool:
    """Returns whether only some tokens go through a block."""
    return without_attention(kind).startswith(DEPTH)


def inner(kind: str) -> str:
    """Returns what a block is inside, "dense" or "moe"."""
    return without_attention(kind).removeprefix(DEPTH)


def named_attentions(model: Mapping[str, Any]) -> list[str]:
    """Returns the attentions that blocks name, each once; `model` is the block "model" of the tree
    of keys that users change.
    """
    options = model["kinds"].get(model["kind"], {})
    tuples = [model["prefix"], model["period"], model["suffix"], *options.values()]
    return list(dict.fromkeys(filter(None, _named_in(tuples))))


def _named_in(tuples: list[Any]) -> Iterator[str]:
    for entries in tuples:
        # What is no tuple of texts is refused by its key.
        if isinstance(entries, list | tuple):
            yield from (attention_of(kind) for kind in entries if isinstance(kind, str))


class Stack(NamedTuple):
    """The kinds of blocks that run one after another: prefix, `repeats` times period, suffix."""

    prefix: tuple[str, ...]
    period: tuple[str, ...]
    repeats: int
    suffix: tuple[str, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """Returns the kind of every block, in the order in which they run."""
        return self.prefix + self.period * self.repeats + self.suffix


class KindOptions:
    """Holds what the Options of a kind of model say of its blocks; each kind says what differs."""

    @property
    def masks(self) -> tuple[str, ...]:
        """Returns the masks of the self-attention of its stacks (models/attentions); () = it has
        none.
        """
        return ("causal",)

    @property
    def of_blocks(self) -> tuple[str, ...]:
        """The names of its keys that say which blocks there are, beside those of the model."""
        return ()

    @property
    def embeds(self) -> bool:
        """Returns True where the model looks up rows of a vocabulary."""
        return True

    def stacks(self, own: Stack) -> dict[str, Stack]:
        """Returns the stacks of the model, from that of model.prefix, period, repeats and suffix.

        The order is that in which they run, the keys are those of the model's parameters.
        """
        return {"": own}
