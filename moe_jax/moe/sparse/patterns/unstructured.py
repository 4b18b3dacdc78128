"""Single entries, anywhere in an expert's matrix."""

import dataclasses

from moe_jax.moe.sparse.patterns.contract import Groups, Matrices, Pattern, by_density, one_row
from moe_jax.schema.options import PART, option


@dataclasses.dataclass(frozen=True)
class Options:
    density: float = option(
        0.25, "fraction of each expert's weights, of each matrix, that are not zero", PART
    )


def pool(experts: Matrices, options: Options) -> Groups:
    """Returns every entry as a group of its own."""
    del options
    return dict(experts)


def spread(groups: Groups, experts: Matrices, options: Options) -> Matrices:
    """Returns the groups: each is an entry."""
    del experts, options
    return groups


PATTERN = Pattern(Options, pool, spread, one_row, by_density)
