"""Which sparse weights make no sense, each with the reason and the way out."""

from collections.abc import Iterator

from moe_jax.schema.config import ModelConfig, SparseConfig

AT = "model.moe.sparse"
# (rule, pattern): why they do not go together.
ODD = {
    (
        "threshold",
        "n_m",
    ): "exactly n of every m are kept, whatever their magnitude: set the rule to static",
    (
        "set",
        "n_m",
    ): "a fraction of n weights is none of them or half of them: set the rule to static or "
    "magnitude",
    (
        "rigl",
        "n_m",
    ): "a fraction of n weights is none of them or half of them: set the rule to static or "
    "magnitude",
    (
        "set",
        "units",
    ): "a unit that is all zero has no gradient, so one that came would stay zero: set the rule to "
    "magnitude",
    (
        "rigl",
        "units",
    ): "a unit that is all zero has no gradient to be chosen by: set the rule to magnitude",
    (
        "group_lasso",
        "unstructured",
    ): "the penalty is that of whole hidden units: set the pattern to units",
    ("group_lasso", "n_m"): "the penalty is that of whole hidden units: set the pattern to units",
    (
        "group_lasso",
        "blocks",
    ): "the penalty is that of whole hidden units: set the pattern to units",
}


def refusals(c: ModelConfig) -> Iterator[str]:
    """What is wrong with model.moe.sparse, one message each; nothing when no rule is chosen."""
    s = c.moe.sparse
    if s.rule == "none":
        return
    if (s.rule, s.pattern) in ODD:
        yield f'{AT}.rule = "{s.rule}" and {AT}.pattern = "{s.pattern}" do not go together: {ODD[s.rule, s.pattern]}'
    if s.rule == "static" and s.pattern == "n_m" and s.rule_options["threshold"]:
        yield f"{AT}.rules.static.threshold = {s.rule_options['threshold']} would not leave n of every m: set it to 0"
    yield from _rule(s)
    yield from _pattern(s)
    for size, what in _tiles(s):
        for path, width in (
            ("model.d_model", c.d_model),
            ("model.moe.expert_hidden", c.moe.expert_hidden),
        ):
            if width % size:
                yield f"{path} ({width}) must be divisible by {AT}.patterns.{s.pattern}.{what} ({size})"


def _rule(s: SparseConfig) -> Iterator[str]:
    at, o = f"{AT}.rules.{s.rule}", s.rule_options
    if "begin" in o and o["begin"] > o["end"]:
        yield f"{at}.begin ({o['begin']}) must not exceed {at}.end ({o['end']})"


def _pattern(s: SparseConfig) -> Iterator[str]:
    at, o = f"{AT}.patterns.{s.pattern}", s.pattern_options
    if s.pattern == "n_m" and o["n"] > o["m"]:
        yield f"{at}.n ({o['n']}) must lie between 1 and {at}.m ({o['m']})"


def _tiles(s: SparseConfig) -> Iterator[tuple[int, str]]:
    """(the widths must be a multiple of this, the option's name)"""
    name = {"n_m": "m", "blocks": "block"}.get(s.pattern)
    if name:
        yield s.pattern_options[name], name
