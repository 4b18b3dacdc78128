"""What the config refuses of the options of a kind of model.

Each message names the keys, the values and the way out.
"""

from collections.abc import Iterator

from moe_jax.models.article import ACTIVATIONS, AGGREGATES
from moe_jax.schema.config import DEPTH, Config

CHOICES = {
    ("encoder", "inputs"): ("tokens", "vectors"),
    ("encoder", "pool"): ("sum", "mean", "max", "first"),
    ("encoder", "attention"): ("full", "causal"),
    ("article", "aggregate"): AGGREGATES,
    ("article", "activation"): tuple(ACTIVATIONS),
}
BLOCKS = ("dense", "moe", DEPTH + "dense", DEPTH + "moe")


def refusals(c: Config) -> Iterator[str]:
    kind, options = c.model.kind, c.model.kind_options

    def at(name):
        return f"model.kinds.{kind}.{name}"

    for (owner, name), allowed in CHOICES.items():
        if owner == kind and options[name] not in allowed:
            yield f'{at(name)} = "{options[name]}" is not known: choose one of {", ".join(allowed)}'
    yield from {"encoder": _encoder, "encdec": _encdec, "mmoe": _mmoe, "article": _article}.get(
        kind, _nothing
    )(c)


def _nothing(c: Config) -> Iterator[str]:
    del c
    yield from ()


def _encoder(c: Config) -> Iterator[str]:
    num = c.model.kind_options["learned_positions"]
    if 0 < num < c.data.seq_len:
        yield f"model.kinds.encoder.learned_positions ({num}) must be at least data.seq_len ({c.data.seq_len}), or 0"


def _encdec(c: Config) -> Iterator[str]:
    m = c.model
    for part in ("prefix", "period", "suffix"):
        for block in m.kind_options[f"encoder_{part}"]:
            if block not in BLOCKS:
                yield (
                    f'model.kinds.encdec.encoder_{part} = "{block}" is not known: choose one of '
                    f"{', '.join(BLOCKS)}"
                )
    own = m.prefix + m.period * m.repeats + m.suffix
    if not own or len(own) == len(m.blocks):
        yield (
            "an encoder-decoder needs a block in both: model.prefix, model.period x model.repeats "
            "and model.suffix are its decoder's, "
            "model.kinds.encdec.encoder_* its encoder's"
        )


def _mmoe(c: Config) -> Iterator[str]:
    m, items = c.model, c.model.kind_options["items"]
    if not items:
        yield "model.kinds.mmoe.items = () must give every task its number of items: there is no task"
    if m.moe.router == "multi_gate" and m.moe.router_options["num_gates"] != len(items):
        yield (
            f"model.moe.routers.multi_gate.num_gates ({m.moe.router_options['num_gates']}) must be "
            "the number of tasks: "
            f"model.kinds.mmoe.items {items} are {len(items)}"
        )


def _article(c: Config) -> Iterator[str]:
    o = c.model.kind_options
    if o["num_experts"] % c.mesh.expert:
        yield f"model.kinds.article.num_experts ({o['num_experts']}) must be divisible by mesh.expert ({c.mesh.expert})"
    if o["num_classes"] and o["window"] < c.data.seq_len:
        yield (
            f"model.kinds.article.window ({o['window']}) must be at least data.seq_len "
            f"({c.data.seq_len}): the window of a class is the row"
        )
