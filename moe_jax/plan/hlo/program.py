"""All that is read of a compiled program."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_jax.plan.hlo import collectives, memory_traffic, products, scopes, text
from moe_jax.plan.hlo.collectives import Collective
from moe_jax.plan.hlo.products import Products


class Program(NamedTuple):
    """Holds what one device does in one run."""

    products: Products
    # FLOPs where every branch is the dearest: the worst load.
    most_flops: int
    collectives: tuple[Collective, ...]
    # Bytes read from and written to its memory, by scope as in `products`.
    memory_traffic: Counter[str]
    # Scopes of loops whose length depends on the data: their bodies count once.
    unknown_loops: tuple[str, ...]


class Rounds(NamedTuple):
    """Holds how often the loop of the experts' kernel runs, which depends on the load."""

    balanced: int
    # All rows of the buffer are filled.
    most: int


def read(
    compiled_text: str,
    lengths: Mapping[str, int],
    rounds: Rounds | None = None,
    domains: Sequence[int] = (),
) -> Program:
    """Returns what a program does, from its text and the lengths of the mesh.

    `rounds`: None = nobody knows. `domains`: the slice or host of each device (`collectives.find`).
    """
    module = text.read(compiled_text)
    scope_of = scopes.finder(scopes.instructions_of(module))

    def runs_of(dearest: bool) -> text.Runs:
        def trips(loop: text.Instruction) -> int | None:
            if rounds is None or products.part_of(scope_of(loop.name)) != products.EXPERTS:
                return None
            return rounds.most if dearest else rounds.balanced

        return text.count_runs(module, dearest, trips)

    runs = runs_of(False)
    worst = products.count(module, runs_of(True), scope_of)
    return Program(
        products=products.count(module, runs, scope_of),
        most_flops=worst.flops.total(),
        collectives=tuple(collectives.find(module, runs, lengths, domains)),
        memory_traffic=memory_traffic.count(module, runs, scope_of),
        unknown_loops=runs.unknown_loops,
    )
