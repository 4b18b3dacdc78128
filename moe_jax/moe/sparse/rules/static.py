"""What is smallest in the random first values is zero for ever (the article, section 3.2)."""

import dataclasses
from collections.abc import Iterator

from moe_jax.moe.sparse.patterns.contract import Pattern
from moe_jax.moe.sparse.rules.contract import Rule, first_masks
from moe_jax.schema.options import NOT_NEGATIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    threshold: float = option(
        0.0, "those below this magnitude; 0 = as many as the pattern's density leaves", NOT_NEGATIVE
    )


def refusals(options: Options, pattern: Pattern, at: str) -> Iterator[str]:
    """Refuses a threshold for a pattern with a fixed number of entries."""
    if pattern.fixed and options.threshold:
        yield f"{at}.threshold = {options.threshold} would not leave n of every m: set it to 0"


RULE = Rule(Options, first_masks, refusals=refusals)
