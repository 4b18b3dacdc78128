"""A compiled step that nobody compiled, for tests of what a card makes of it."""

from collections import Counter

from moe_jax.plan import card
from moe_jax.plan.hlo import program

# It does nothing, but for some memory that it reads.
EMPTY = program.read("HloModule m\n\nENTRY %main () -> f32[] {\n}\n", {})
NOTHING = EMPTY._replace(memory_traffic=Counter({"moe/experts/dot_general": 10**9}))


def compiled(argument=4, output=3, alias=2, temporary=1):
    """What the compiler would say, in bytes, after no time."""
    return card.Compiled(
        argument, output, alias, temporary, lower_seconds=0.0, seconds=0.0, program=NOTHING
    )
