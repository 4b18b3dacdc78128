"""Which sparse weights make no sense, each with the reason and the way out."""

from collections.abc import Iterator

from moe_jax.moe.sparse.patterns import PATTERNS
from moe_jax.moe.sparse.rules import RULES
from moe_jax.schema.config import ModelConfig

AT = "model.moe.sparse"


def refusals(cfg: ModelConfig) -> Iterator[str]:
    """Yields what is wrong with model.moe.sparse; nothing when no rule is chosen."""
    sparse = cfg.moe.sparse
    if cfg.moe.expert_bias and (sparse.stored.block or not sparse.dense):
        what = f"stored.block = {sparse.stored.block}"
        if not sparse.dense:
            what = f'rule = "{sparse.rule}"'
        yield (
            f"model.moe.expert_bias = True and {AT}.{what} do not go together: zeros are of "
            "experts that are two matrices. Set model.moe.expert_bias=False, or leave the zeros out"
        )
    if sparse.dense:
        return
    rule, pattern = RULES[sparse.rule], PATTERNS[sparse.pattern]
    if reason := rule.unfit(pattern):
        yield (
            f'{AT}.rule = "{sparse.rule}" and {AT}.pattern = "{sparse.pattern}" do not go '
            f"together: {reason}"
        )
    yield from rule.refusals(sparse.rule_options, pattern, f"{AT}.rules.{sparse.rule}")
    at = f"{AT}.patterns.{sparse.pattern}"
    yield from pattern.refusals(sparse.pattern_options, at)
    tile = pattern.tile(sparse.pattern_options)
    if tile is None:
        return
    size, name = tile
    key = "model.moe.latent_dim" if cfg.moe.latent_dim else "model.d_model"
    widths = ((key, cfg.expert_dim), ("model.moe.expert_hidden", cfg.moe.expert_hidden))
    for path, width in widths:
        if width % size:
            yield f"{path} ({width}) must be divisible by {at}.{name} ({size})"
