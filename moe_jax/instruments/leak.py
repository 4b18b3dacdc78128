"""Leaks, measured: does a later token, or another sequence of the batch, change what an earlier
token's output is?

A small random model of a config runs on random tokens. Then the tokens of one row from the middle
on are drawn anew, with their documents and padding, and the logits of its first half are compared:
a difference is a leak from the future. Then all tokens of that row are drawn anew, with the
vectors, the source or the basket that it has, and the logits of all other rows are compared: a
difference is a leak from the batch. Both in training mode (same key) and in evaluation mode. What a
config claims is in config/causality.py; here it is measured. A model that reads its whole row
before it answers (an encoder, MMoE) has no future, so of it the second comparison is made alone.

Everything is in float64. A change below NOISE of the largest logit counts as none: rows of a
grouped product change their place in memory with the routing of other tokens, and a sum in another
order rounds otherwise.

Shapes: B rows, S sequence, V vocabulary, K choices of a recording.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import config
from moe_jax.config import causality
from moe_jax.errors import UserError
from moe_jax.models import MODELS
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.layer import Batch
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.probe import Request
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Sizes
from moe_jax.parallel import mesh
from moe_jax.parallel.compiling import QUICK
from moe_jax.schema.blocks import named_attentions
from moe_jax.schema.config import Config
from moe_jax.train_step import make_model
from moe_jax.weights import Weight

NOISE = 1e-9
# The capacity factor of the table of all combinations: with room to spare nothing drops, and no
# order matters.
TIGHT = 0.5
MODES = ("train", "eval")
# What a verdict begins with, beside "leaks".
SAFE, FAULT = "safe", "FAULT"
# Of tokens; the changed row is another one each time.
DRAWS = 4


class Leak(NamedTuple):
    """Holds how far outputs moved that must not change: the largest change over the largest
    |logit|, and the share of tokens that changed.
    """

    delta: float
    share: float


class Measured(NamedTuple):
    """Holds how far outputs move when other tokens are drawn."""

    # When later tokens of the sequence change.
    future: Leak
    # When another sequence changes.
    batch: Leak


def measure(cfg: Config, draws: int = DRAWS, seed: int = 0) -> dict[str, Measured]:
    """Returns {"train": ..., "eval": ...} of a small config (see `shrink`), measured on one device.

    It needs jax_enable_x64, or NOISE is below the rounding.
    """
    rng = np.random.default_rng(seed)
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        logits = _program(cfg, rng)
        changes = [
            _changes_of_draw(cfg, logits, rng, row=draw % cfg.train.batch_size)
            for draw in range(draws)
        ]
    # [draw, future or batch, delta or share, mode]
    values = np.array(changes)

    def leak(kind, mode):
        deltas, shares = values[:, kind, 0, mode], values[:, kind, 1, mode]
        return Leak(float(deltas.max()), float(shares.mean()))

    return {name: Measured(leak(0, mode), leak(1, mode)) for mode, name in enumerate(MODES)}


def _changes_of_draw(
    cfg: Config, logits: Callable[[Batch], np.ndarray], rng: np.random.Generator, row: int
) -> tuple[Any, Any]:
    """Returns how far outputs move when later tokens of one row change, and when all of that row
    does: each as `_change` gives it.
    """
    num_rows, length = cfg.train.batch_size, cfg.data.seq_len
    middle = length // 2
    first = _draw(cfg, rng, one_document=True)
    other = _draw(cfg, rng, one_document=False)
    in_row_BS = np.broadcast_to(np.arange(num_rows)[:, None] == row, (num_rows, length))
    before = logits(first)

    future = np.zeros(2), np.zeros(2)
    # 1. Only the later tokens of one row change; its first half is compared.
    if has_future(cfg):
        later_BS = in_row_BS & (np.arange(length) >= middle)
        after = logits(_where(later_BS, other, first))
        future = _change(before[:, row, :middle], after[:, row, :middle])

    # 2. All of that row changes; all other rows are compared.
    inputs = {name: _in_row(row, getattr(other, name), getattr(first, name)) for name in OTHER}
    after = logits(_where(in_row_BS, other, first)._replace(**inputs))
    other_rows = np.arange(num_rows) != row
    return future, _change(before[:, other_rows], after[:, other_rows])


def has_future(cfg: Config) -> bool:
    """Returns whether a model answers at each place from what stands before it: only then can later
    tokens leak into earlier outputs.
    """
    return MODELS[cfg.model.kind].causal


def _draw(cfg: Config, rng: np.random.Generator, one_document: bool) -> Batch:
    """Draws random tokens with all that belongs to them; without `one_document`, another document
    begins in each row, and its end is padding.
    """
    num_rows, length, moe = cfg.train.batch_size, cfg.data.seq_len, cfg.model.moe
    index_BS = np.broadcast_to(np.arange(length, dtype=np.int32), (num_rows, length))
    # The second document begins behind the middle, up to which outputs are compared.
    cut_B1 = rng.integers(length // 2 + 1, length - 2, (num_rows, 1)).astype(np.int32)
    second_BS = (index_BS >= cut_B1) & (not one_document)
    padding_BS = (index_BS == length - 1) & (not one_document)
    id_BS = rng.integers(0, cfg.model.vocab_size, (num_rows, length)).astype(np.int32)
    segment_BS = np.where(padding_BS, 0, 1 + second_BS).astype(np.int32)
    recorded: Any = ()
    if ROUTERS[moe.router].replays:
        # The first k of a random order are k different experts.
        shape = (len(cfg.model.blocks), num_rows, length, moe.num_experts)
        order = np.argsort(rng.random(shape), -1)
        expert = order[..., : moe.router_options.k].astype(np.int32)
        recorded = (expert, rng.random(expert.shape))
    row_B = np.arange(num_rows, dtype=np.int32)
    return Batch(
        id_BS=id_BS,
        position_BS=index_BS - second_BS * cut_B1,
        segment_BS=segment_BS,
        row_B=row_B,
        request=Request(recorded),
        **_other(cfg, rng, row_B),
    )


# The fields of a Batch that hold what a kind of model reads beside tokens.
OTHER = ("vectors_BSP", "source_rows", "feature_BL", "feature_weight_BL")


def _other(cfg: Config, rng: np.random.Generator, row_B: np.ndarray) -> dict[str, Any]:
    """Returns those of `OTHER` that the model of `cfg` reads, drawn at random."""
    shape = len(row_B), cfg.data.seq_len
    kind = MODELS[cfg.model.kind]
    return kind.random_inputs(cfg.model.kind_options, cfg.model.vocab_size, shape, rng)


def _in_row(row: int, other: Any, first: Any) -> Any:
    """Returns the arrays of `other` in one row, in all other rows those of `first`."""
    return jax.tree.map(lambda a, b: np.where(_rows_like(b) == row, a, b), other, first)


def _rows_like(x: np.ndarray) -> np.ndarray:
    """Returns the number of each row [B, 1, ...], to be compared with values [B, ...]."""
    return np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1))


def _where(changed_BS: np.ndarray, other: Batch, first: Batch) -> Batch:
    """Returns the batch `first` with the tokens of `other` where `changed_BS`."""

    def pick(a, b):
        return np.where(changed_BS, a, b)

    def pick_K(a, b):
        # A recording is [M, B, S, K].
        return np.where(changed_BS[None, :, :, None], a, b)

    tokens = {
        name: pick(getattr(other, name), getattr(first, name))
        for name in ("id_BS", "position_BS", "segment_BS")
    }
    request = jax.tree.map(pick_K, other.request, first.request)
    return first._replace(**tokens, request=request)


def _program(cfg: Config, rng: np.random.Generator) -> Callable[[Batch], np.ndarray]:
    """Returns batch -> logits [2, B, S, V] of one random model, in training and evaluation mode."""
    model = make_model(cfg.model)
    weights = _values(cfg, jax.eval_shape(model.init, jax.random.key(0)), rng)

    def forward(params, state, batch):
        def logits_in(mode):
            # The same key each time: only the tokens may make a difference.
            return model.bind(params, state)(batch, jax.random.key(1), mode == "train")[0]

        return [logits_in(mode) for mode in MODES]

    # It runs a dozen times: most of the time is the compiler's, which optimising would take thrice
    # as long.
    run = jax.jit(forward, compiler_options=QUICK)

    def put(z, *names):
        return jax.device_put(z, mesh.sharding(*names))

    def logits(batch: Batch) -> np.ndarray:
        # A recording has the blocks in front of the rows, all else has the rows in front.
        request = jax.tree.map(lambda z: put(z, None, "batch"), batch.request)
        rest = batch._replace(request=Request())
        on_mesh = jax.tree.map(lambda z: put(z, "batch"), rest)._replace(request=request)
        return np.stack(jax.device_get(run(*weights, on_mesh)))

    return logits


def _values(cfg: Config, abstract: Any, rng: np.random.Generator) -> Any:
    """Returns random parameters and router state, drawn in NumPy: to compile the model's own draw
    takes longer than all the rest.
    """
    moe = cfg.model.moe
    router = ROUTERS[moe.router]
    sizes = Sizes(cfg.model.d_model, moe.num_experts, cfg.model.vocab_size)
    of_router = router.params(sizes, moe.router_options) | router.state(sizes, moe.router_options)

    def weight_of(name: str, shape: tuple[int, ...]) -> Weight:
        if name in of_router:
            return of_router[name]
        if len(shape) < 2:
            # The scales of norms are 1.
            return Weight(shape, (), 0.0, 1.0)
        # A matrix [..., D, F] keeps the variance of what it multiplies.
        return Weight(shape, (), shape[-2] ** -0.5, 0.0)

    def value(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        weight = weight_of(path[-1].key, leaf.shape)
        return (weight.constant + weight.std * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    here = jax.sharding.get_mesh()

    def put(z, leaf):
        return jax.device_put(z, jax.sharding.NamedSharding(here, leaf.sharding.spec))

    return jax.tree.map(put, jax.tree_util.tree_map_with_path(value, abstract), abstract)


def _change(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for each mode [2], the largest change over the largest |logit| and the share of
    tokens that changed; modes are the first dimension of the logits.
    """
    # A "token" is a whole row where a model gives one output for a row.
    change = np.abs(after - before).max(-1) / np.abs(before).max()
    change = np.where(change > NOISE, change, 0).reshape(len(MODES), -1)
    return change.max(-1), (change > 0).mean(-1)


def shrink(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config that is measured in seconds, from a nested dict of one: router, ordering,
    dispatcher, experts and group_rows are kept.
    """
    small = copy.deepcopy(dict(raw))
    model, group = small["model"], small["model"]["moe"]["group_rows"]
    model |= {
        "d_model": 16,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_hidden": 32,
        "vocab_size": 64,
    }
    model |= {
        "param_dtype": "float64",
        "dtype": "float64",
        "dropout": 0.0,
        "remat": "none",
        "scan": False,
    }
    model |= {"repeats": min(model["repeats"], 1), "allow_leak": True}
    model["moe"] = {**model["moe"], "expert_hidden": 8}
    model["vocab_size"] = max(64, model["moe"]["num_experts"])
    # A group has at least 4 tokens per expert, so that capacity is not all rounding.
    seq_len = max(32, 4 * model["moe"]["num_experts"] // group)
    small["data"] = {**small["data"], "seq_len": seq_len}
    small["train"] = {**small["train"], "batch_size": max(4, 2 * group), "micro_batch_size": 0}
    small["eval"] = {**small["eval"], "batch_size": 0}
    small["mesh"], small["simulate_devices"] = mesh.ONE.written(), 0
    kind = model["kind"]
    options = model["kinds"][kind]
    changes = dict(MODELS[kind].small(options, seq_len))
    model["kinds"] = {**model["kinds"], kind: {**options, **changes}}
    for attention in (model["attention"], *named_attentions(model)):
        options = model["attentions"][attention]
        changes = dict(ATTENTIONS[attention].small(options, small["data"]["seq_len"]))
        model["attentions"] = {**model["attentions"], attention: {**options, **changes}}
    return small


def combinations(raw: Mapping[str, Any]) -> Iterator[Config]:
    """Yields every router x ordering x dispatcher that the rules allow, as small configs that are
    otherwise like `raw`; capacity and tile bind.
    """
    small = shrink(raw)
    moe = copy.deepcopy(small["model"]["moe"])
    # Too few places, so that what is dropped depends on who comes first.
    for options in moe["dispatchers"].values():
        if "factor" in options:
            options["factor"] = TIGHT
        if "places" in options:
            options["places"] = 0
    # Some losses need a router that has their sums, and nothing is trained here.
    moe["losses"] = dict.fromkeys(moe["losses"], 0.0)
    moe["adaptive"]["rate"] = 0.0
    for router, ordering, dispatcher in itertools.product(ROUTERS, ORDERINGS, DISPATCHERS):
        chosen = {**moe, "router": router, "ordering": ordering, "dispatcher": dispatcher}
        if "tile" in moe["orderings"][ordering]:
            chosen["orderings"] = {**moe["orderings"], ordering: {"tile": _tile(small, router)}}
        raw = {**small, "model": {**small["model"], "moe": chosen}}
        try:
            yield config.build(raw, 1)
        except UserError:
            # The three make no sense together, and a rule of the config says why.
            continue


def _tile(small: Mapping[str, Any], router: str) -> int:
    """Returns twice an even load: an expert's count is rounded to nothing or to all, whichever is
    nearer, so that rounding shows.
    """
    moe = small["model"]["moe"]
    num_experts, group_rows = moe["num_experts"], moe["group_rows"]
    options = ROUTERS[router].options(**moe["routers"][router])
    declared = ROUTERS[router].declared(num_experts, options)
    choices = declared.average or declared.most or 1
    even_load = choices * small["data"]["seq_len"] * group_rows / num_experts
    return max(2, round(2 * even_load))


def verdict(cfg: Config, measured: Mapping[str, Measured]) -> str:
    """Returns what the label of a config and its measurement say together: "safe", "leaks ...", or
    that the label is wrong.
    """
    label = causality.sees(cfg.model)
    kinds = ("future", "batch") if has_future(cfg) else ("batch",)
    labelled = [kind for kind in kinds if getattr(label, kind)]
    leaking = [
        kind for kind in kinds if any(getattr(measured[mode], kind).delta > 0 for mode in MODES)
    ]
    wrong = [kind for kind in leaking if kind not in labelled]
    if wrong:
        return f"{FAULT}: labelled safe, but sees the {' and the '.join(wrong)}"
    quiet = [kind for kind in labelled if kind not in leaking]
    text = f"leaks the {' and the '.join(labelled)}" if labelled else SAFE
    return text + (f" (not seen here: {', '.join(quiet)})" if quiet else "")
