"""A user's config made small enough to be proven in minutes, by stated rules that keep whatever
decides how it is parallelised.

Kept as they are: the attention, the router and its options, the dispatcher and its options, the
losses, group_rows, shared experts, prefix, period and suffix, scan, remat, activation, biases,
norms, tying, dropout, the optimizer and its options. What changes is listed, with a reason.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moe_jax import config
from moe_jax.errors import UserError
from moe_jax.models import MODELS
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.moe.losses import LOSSES
from moe_jax.parallel.mesh import ONE, Lengths
from moe_jax.schema.blocks import named_attentions
from moe_jax.schema.config import NO_RULE

# What is simulated; every factorisation of it is a mesh.
DEVICES = 8
MICRO_BATCHES = 4
SEQ_LEN = 16


class Rule(NamedTuple):
    """One key that shrinking changed."""

    key: str
    yours: Any
    shrunk: Any
    why: str


def shrink(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Rule]]:
    """Returns the small config, and the rules that were applied.

    `raw` is the nested dict of a config. Raises UserError when it is a bad one.
    """
    # As one device: what is wrong with the config itself is said here, of the keys as they were.
    yours = {**copy.deepcopy(dict(raw)), "mesh": ONE.written()}
    config.build(yours, 1)
    small, rules = copy.deepcopy(yours), []
    # Devices of this machine's CPU: a proof needs no accelerator.
    small["simulate_devices"] = DEVICES
    for key, value, why in _rules(yours):
        old = get(small, key)
        if old != value:
            put(small, key, value)
            rules.append(Rule(key, old, value, why))
    return _with_experts(small, rules)


def _rules(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yields (key, value, why) of every key that may shrink."""
    model, train = raw["model"], raw["train"]
    # Grouped queries stay grouped, and single ones single.
    ratio = min(model["num_heads"] // model["num_kv_heads"], 2)
    yield "model.d_model", 16, "small; divisible by data x expert"
    yield "model.num_kv_heads", DEVICES, "divisible by every model axis"
    yield "model.num_heads", DEVICES * ratio, "queries per key head kept, at most 2"
    yield "model.head_dim", 2, "small"
    yield "model.ffn_hidden", 32, "small; divisible by the model axis"
    yield "model.moe.expert_hidden", 16, "small; divisible by the model axis"
    latent_dim = DEVICES if model["moe"]["latent_dim"] else 0
    yield "model.moe.latent_dim", latent_dim, "small; divisible by the data axis"
    yield "model.vocab_size", 64, "small; divisible by the model axis"
    # Two periods, so that something repeats; on a pipeline each chunk of a stage has two.
    chunks = train["pipeline_chunks"]
    yield (
        "model.repeats",
        min(model["repeats"], 2 * chunks),
        "every further period repeats the second",
    )
    yield "model.param_dtype", "float64", "equality is provable: no rounding tie flips a routing"
    yield "model.dtype", "float64", "likewise"
    yield "model.ffn_numbers", "full", "likewise; tests/moe/test_narrow.py has bounds of the others"
    yield "optim.master_copy", False, "parameters in float64 need none"
    yield "data.seq_len", SEQ_LEN, "small"
    # A group never spans a device.
    rows = DEVICES * model["moe"]["group_rows"]
    # 0 = the whole batch at once.
    num_micro = train["batch_size"] // (train["micro_batch_size"] or train["batch_size"])
    num_micro = min(num_micro, MICRO_BATCHES)
    yield "train.micro_batch_size", rows if num_micro > 1 else 0, f"{DEVICES} devices x group_rows"
    # At least two, so that accumulation can be checked even where the config has none.
    times = max(num_micro, 2)
    yield "train.batch_size", rows * times, f"{times} x {DEVICES} devices x group_rows"
    yield "eval.batch_size", 0, "as many as in training"
    yield "train.init_from", "", "begins at random"
    warmup = min(raw["optim"]["warmup_steps"], 1)
    yield "optim.warmup_steps", warmup, "the first steps move the parameters"
    # A component says itself how small its options may be.
    yield from _rules_of_components(model)


def _rules_of_components(model: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yields (key, value, why) of the options of what was chosen."""
    kind, moe, zeros = model["kind"], model["moe"], model["moe"]["sparse"]
    for name, value in MODELS[kind].small(model["kinds"][kind], SEQ_LEN):
        yield f"model.kinds.{kind}.{name}", value, "small"
    for attention in dict.fromkeys((model["attention"], *named_attentions(model))):
        for name, value in ATTENTIONS[attention].small(model["attentions"][attention], SEQ_LEN):
            yield f"model.attentions.{attention}.{name}", value, "small, as rows and heads are"
    ordering = moe["orderings"][moe["ordering"]]
    if "tile" in ordering:
        key = f"model.moe.orderings.{moe['ordering']}.tile"
        why = "about an even load of a short row: some are dropped, most are served"
        yield key, min(ordering["tile"], 4), why
    rule, rule_key = zeros["rules"][zeros["rule"]], f"model.moe.sparse.rules.{zeros['rule']}"
    if "every" in rule:
        yield f"{rule_key}.every", 2, "masks change within the steps that are compared"
    if "begin" in rule:
        yield f"{rule_key}.begin", 0.0, "likewise"
    if zeros["rule"] != NO_RULE and "block" in zeros["patterns"][zeros["pattern"]]:
        key = f"model.moe.sparse.patterns.{zeros['pattern']}.block"
        yield key, 4, "several blocks in a small matrix"


def _with_experts(small: dict[str, Any], rules: list[Rule]) -> tuple[dict[str, Any], list[Rule]]:
    """Returns the config with as few experts as keep their number modulo the expert axis, leave a
    choice to the router, and suit its options.
    """
    key, moe = "model.moe.num_experts", small["model"]["moe"]
    number, k = moe["num_experts"], moe["routers"][moe["router"]].get("k", 1)
    # Any other number stays: its remainder decides how experts are split.
    # A multiple of DEVICES is a multiple of the length of every axis.
    if number % DEVICES == 0:
        # The first number that the router's options allow is the smallest.
        for fewer in range(DEVICES, number, DEVICES):
            put(small, key, fewer)
            if fewer >= 2 * k and accepted(small):
                why = "the smallest multiple of 8, at least 2 k, that the router's options allow"
                return small, [*rules, Rule(key, number, fewer, why)]
        put(small, key, number)
    # What shrinking broke is a mistake of these rules: it ends here, with its message.
    config.build(small, 1)
    return small, rules


def accepted(raw: Mapping[str, Any]) -> bool:
    """Returns whether the rules of the config accept one device."""
    return not refusal(raw, ONE)


def refusal(raw: Mapping[str, Any], lengths: Lengths) -> str:
    """Returns why the rules of the config refuse a mesh; "" when they do not."""
    try:
        config.build({**copy.deepcopy(dict(raw)), "mesh": lengths.written()}, lengths.num_devices)
    except UserError as e:
        return str(e)
    return ""


def get(raw: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        raw = raw[part]
    return raw


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        raw = raw[part]
    raw[last] = value


def changed(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy with some keys ("model.scan") set."""
    new = copy.deepcopy(dict(raw))
    for key, value in changes.items():
        put(new, key, value)
    return new


def plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the reference that every layout must equal: one large batch, a loop over the layers,
    nothing rematerialised.
    """
    return changed(raw, {key: off for _, key, off, _ in _layouts(raw)})


def layout(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the config with accumulation, scan and remat all on, and their names.

    It keeps its own where it has them, and leaves out what it cannot have.
    """
    new, names = dict(raw), []
    for name, key, off, on in _layouts(raw):
        trial = changed(new, {key: on}) if get(raw, key) == off else new
        if accepted(trial):
            new = trial
            names.append(name)
    return new, names


def _layouts(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Yields (name, key, its value when off, and on) of what may not change a model."""
    moe = raw["model"]["moe"]
    # A loss of micro-batches is by its definition a function of their size.
    if not any(moe["losses"][name] for name, loss in LOSSES.items() if loss.of_micro_batches):
        yield "accumulate", "train.micro_batch_size", 0, DEVICES * moe["group_rows"]
    yield "scan", "model.scan", False, True
    yield "remat", "model.remat", "none", "full"
