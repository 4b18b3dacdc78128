"""All that is read of a compiled program."""

from collections.abc import Mapping
from typing import NamedTuple

from moe_jax.plan.hlo import collectives, memory_traffic, products, text
from moe_jax.plan.hlo.collectives import Collective
from moe_jax.plan.hlo.products import Products


class Program(NamedTuple):
    """What one device does in one run."""

    products: Products
    # FLOPs where every branch is the dearest: the worst load.
    most_flops: int
    collectives: tuple[Collective, ...]
    # Bytes read from and written to its memory.
    memory_traffic: int
    # Scopes of loops whose length depends on the data: their bodies count once.
    unknown_loops: tuple[str, ...]


def read(compiled_text: str, lengths: Mapping[str, int]) -> Program:
    """Returns what a program does, from its text and the lengths of the mesh."""
    module = text.read(compiled_text)
    runs = text.count_runs(module)
    worst = products.count(module, text.count_runs(module, dearest=True))
    return Program(
        products=products.count(module, runs),
        most_flops=worst.flops.total(),
        collectives=tuple(collectives.find(module, runs, lengths)),
        memory_traffic=memory_traffic.count(module, runs),
        unknown_loops=runs.unknown_loops,
    )
