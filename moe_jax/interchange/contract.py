"""What a family of models is: how its config and its tensors are those of a model of ours."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from moe_jax.errors import UserError
from moe_jax.interchange.entries import Entry, Ours
from moe_jax.interchange.meaning import (
    BLOCKS,
    ENCODER,
    ENCODER_BLOCKS,
    LAYER_ATTENTIONS,
    laid_out,
    shortest,
)
from moe_jax.interchange.rows import Row
from moe_jax.interchange.settings import HARMLESS, Settings
from moe_jax.interchange.tensors import Folder
from moe_jax.schema.blocks import Stack, without_attention


class Encoder(NamedTuple):
    """The encoder of a family of encoder-decoders, whose blocks all have the attention of the
    decoder's.
    """

    # The parts of a block, by its kind.
    blocks: dict[str, tuple[Row, ...]]
    # What the names of a layer's tensors begin with; {} is its number.
    layer: str
    # What the keys of its blocks begin with in our config.
    keys: str = "model.kinds.encdec.encoder_"


class Family(NamedTuple):
    """Holds all that there is to know of a family; `FAMILY` of its file."""

    # `model_type` and the one of `architectures` that is a language model.
    model_type: str
    architecture: str
    # Its config, both ways. What they read has the kinds of the blocks as meaning.BLOCKS, and where
    # not all have grouped-query attention, their attentions as meaning.LAYER_ATTENTIONS.
    entries: tuple[Entry, ...]
    # What lies outside of the blocks.
    ends: tuple[Row, ...]
    # The parts of a block, by its kind.
    blocks: dict[str, tuple[Row, ...]]
    # What the names of a layer's tensors begin with; {} is its number.
    layer: str = "model.layers.{}."
    # What names of tensors end with that are no parameters, and are not read.
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    # Puts tensors that are packed together, in a quantised checkpoint, into the folder as they are
    # after unpacking; None = none are read.
    quantized: Callable[[Folder], None] | None = None
    # What names of arrays of ours end with that theirs have not, because they are zeros.
    zeros: tuple[str, ...] = ()
    # The key that says how many layers there are behind those of the model, which are read where
    # that is asked for (further.py); "" = there are none.
    further_layers: str = ""
    # Of such a layer, below its name: what is no part of its block, and what is an array of the
    # model once more.
    joins: tuple[Row, ...] = ()
    copies: tuple[Row, ...] = ()
    # What names of tensors end with that are in float32 at least, whatever the others are.
    wide: tuple[str, ...] = ()
    # What is before the blocks of a decoder; None = it is a decoder alone. Its config then has
    # meaning.ENCODER_BLOCKS, too.
    encoder: Encoder | None = None

    def read(self, settings: Settings) -> dict[str, Any]:
        """Returns the keys of ours, by their paths, that the settings say.

        Raises UserError for an option that we do not have.
        """
        named = settings.get("architectures", [self.architecture])
        if named != [self.architecture]:
            raise settings.refusal(
                "architectures", f"moe_jax reads {self.architecture} alone of {self.model_type}"
            )
        ours: dict[str, Any] = {}
        for entry in self.entries:
            ours |= entry.read(settings)
        if self.further_layers:
            settings.get(self.further_layers)
        settings.refuse_unread(self.model_type, HARMLESS)
        if self.encoder:
            of_encoder = shortest(ours.pop(ENCODER_BLOCKS))._asdict()
            ours |= {self.encoder.keys + part: value for part, value in of_encoder.items()}
        kinds = ours.pop(BLOCKS)
        attentions = ours.pop(LAYER_ATTENTIONS, ("grouped_query",) * len(kinds))
        return ours | laid_out(kinds, attentions)

    def write(self, config: Ours) -> dict[str, Any]:
        """Returns the settings of a model of ours, as far as the family can say it."""
        theirs: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
        }
        for entry in self.entries:
            theirs |= entry.write(config)
        if self.further_layers:
            theirs[self.further_layers] = 0
        return theirs

    def is_further(self, name: str, num_layers: int) -> bool:
        """Returns whether a tensor is of a layer behind those of the model."""
        before, after = self.layer.split("{}")
        number = name.removeprefix(before).partition(after)[0]
        named = bool(self.further_layers) and name.startswith(before) and number.isdecimal()
        return named and int(number) >= num_layers

    def rows(self, stacks: Mapping[str, Stack]) -> Iterator[tuple[str, str, Row]]:
        """Yields (what the name of ours begins with, what that of theirs does, row) of every
        parameter that a model of these stacks may have.
        """
        for row in self.ends:
            yield "", "", row
        # Layers that predict further tokens are counted on behind those of the model.
        num_own = 0
        for name, stack in stacks.items():
            is_encoder = name == ENCODER
            part, first = (self.encoder, 0) if is_encoder else (self, num_own)
            num_own += 0 if is_encoder else len(stack.blocks)
            names = [f"{name}/{block}" if name else block for block in block_names(stack)]
            for number, (below, kind) in enumerate(zip(names, stack.blocks, strict=True), first):
                inside = without_attention(kind)
                if part is None or inside not in part.blocks:
                    raise UserError(f'{self.model_type} has no block of kind "{kind}"')
                for row in part.blocks[inside]:
                    yield below, part.layer.format(number), row


def block_names(stack: Stack) -> list[str]:
    """Returns what the names of each block's parameters begin with, in the order of the blocks."""
    names = [f"prefix/{i}/" for i in range(len(stack.prefix))]
    for repeat in range(stack.repeats):
        names += [f"repeats/{repeat}/blocks/{i}/" for i in range(len(stack.period))]
    return names + [f"suffix/{i}/" for i in range(len(stack.suffix))]
