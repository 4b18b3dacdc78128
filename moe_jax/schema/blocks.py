"""The kinds of blocks of a model, and the stacks in which they run."""

from typing import NamedTuple

# What the kind of a block begins with that only some tokens go through, as in "depth:moe".
DEPTH = "depth:"
BLOCKS = ("dense", "moe", DEPTH + "dense", DEPTH + "moe")


class Stack(NamedTuple):
    """The kinds of blocks that run one after another: prefix, `repeats` times period, suffix."""

    prefix: tuple[str, ...]
    period: tuple[str, ...]
    repeats: int
    suffix: tuple[str, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The kind of every block, in the order in which they run."""
        return self.prefix + self.period * self.repeats + self.suffix


class KindOptions:
    """Holds what the Options of a kind of model say of its blocks; each kind says what differs."""

    @property
    def masks(self) -> tuple[str, ...]:
        """The masks of the self-attention of its stacks (models/attentions); () = it has none."""
        return ("causal",)

    @property
    def embeds(self) -> bool:
        """True where the model looks up rows of a vocabulary."""
        return True

    def stacks(self, own: Stack) -> dict[str, Stack]:
        """Returns the stacks of the model, from that of model.prefix, period, repeats and suffix.

        The order is that in which they run, the keys are those of the model's parameters.
        """
        return {"": own}
