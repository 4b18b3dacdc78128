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
from moe_jax.schema.config import Config
from moe_jax.train_step import make_model
from moe_jax.weights import Weight

NOISE = 1e-9
# capacity factor of the table of all combinations: with room to spare nothing drops and no order
# matters
TIGHT = 0.5
MODES = ("train", "eval")
SAFE, FAULT = "safe", "FAULT"  # what a verdict begins with, beside "leaks"
DRAWS = 4  # of tokens; the changed row is another one each time


class Leak(NamedTuple):
    """How far outputs moved that must not change: the largest change over the largest |logit|, and
    the share of tokens that changed.
    """

    delta: float
    share: float


class Measured(NamedTuple):
    """How far outputs move when other tokens are drawn."""

    future: Leak  # when later tokens of the sequence change
    batch: Leak  # when another sequence changes


def measure(cfg: Config, draws: int = DRAWS, seed: int = 0) -> dict[str, Measured]:
    """Returns {"train": ..., "eval": ...} of a small config (see `shrink`), measured on one device.

    It needs jax_enable_x64, or NOISE is below the rounding.
    """
    rng, found = np.random.default_rng(seed), []
    num, length = cfg.train.batch_size, cfg.data.seq_len
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        logits = _program(cfg, rng)
        for draw in range(draws):
            row, middle = draw % num, length // 2
            first = _draw(cfg, rng, one_document=True)
            other = _draw(cfg, rng, one_document=False)
            mine_BS = np.broadcast_to(np.arange(num)[:, None] == row, (num, length))
            base, rest = logits(first), np.arange(num) != row
            future = np.zeros(2), np.zeros(2)
            if has_future(cfg):
                later = logits(_where(mine_BS & (np.arange(length) >= middle), other, first))
                future = _change(base[:, row, :middle], later[:, row, :middle])
            changed = _where(mine_BS, other, first)._replace(
                **{name: _in_row(row, getattr(other, name), getattr(first, name)) for name in OTHER}
            )
            found.append((future, _change(base[:, rest], logits(changed)[:, rest])))
    values = np.array(found)  # [draw, future or batch, delta or share, mode]

    def leak(kind, mode):
        return Leak(float(values[:, kind, 0, mode].max()), float(values[:, kind, 1, mode].mean()))

    return {name: Measured(leak(0, mode), leak(1, mode)) for mode, name in enumerate(MODES)}


def has_future(cfg: Config) -> bool:
    """Returns whether a model answers at each place from what stands before it: only then can later
    tokens leak into earlier outputs.
    """
    return MODELS[cfg.model.kind].causal


def _draw(cfg: Config, rng: np.random.Generator, one_document: bool) -> Batch:
    """Draws random tokens with all that belongs to them; without `one_document`, another document
    begins in each row, and its end is padding.
    """
    num, length, moe = cfg.train.batch_size, cfg.data.seq_len, cfg.model.moe
    place_BS = np.broadcast_to(np.arange(length, dtype=np.int32), (num, length))
    cut_B1 = rng.integers(length // 2 + 1, length - 2, (num, 1)).astype(np.int32)
    again_BS = (place_BS >= cut_B1) & (not one_document)
    padding_BS = (place_BS == length - 1) & (not one_document)
    id_BS = rng.integers(0, cfg.model.vocab_size, (num, length)).astype(np.int32)
    segment_BS = np.where(padding_BS, 0, 1 + again_BS).astype(np.int32)
    recorded: Any = ()
    if ROUTERS[moe.router].replays:
        shape = (len(cfg.model.blocks), num, length, moe.num_experts)
        expert = np.argsort(rng.random(shape), -1)[..., : moe.router_options.k].astype(np.int32)
        recorded = (expert, rng.random(expert.shape))
    row_B = np.arange(num, dtype=np.int32)
    return Batch(
        id_BS=id_BS,
        position_BS=place_BS - again_BS * cut_B1,
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
        def run(mode):
            return model.bind(params, state)(batch, jax.random.key(1), mode == "train")[0]

        return [run(mode) for mode in MODES]

    # It runs a dozen times: most of the time is the compiler's, which optimising would take thrice
    # as long.
    run = jax.jit(forward, compiler_options=QUICK)

    def put(z, *names):
        return jax.device_put(z, mesh.sharding(*names))

    def logits(batch: Batch) -> np.ndarray:
        request = jax.tree.map(lambda z: put(z, None, "batch"), batch.request)
        rest = batch._replace(request=Request())
        placed = jax.tree.map(lambda z: put(z, "batch"), rest)._replace(request=request)
        return np.stack(jax.device_get(run(*weights, placed)))

    return logits


def _values(cfg: Config, abstract: Any, rng: np.random.Generator) -> Any:
    """Returns random parameters and router state, drawn in NumPy: to compile the model's own draw
    takes longer than all the rest.
    """
    moe = cfg.model.moe
    declared = (Sizes(cfg.model.d_model, moe.num_experts, cfg.model.vocab_size), moe.router_options)
    own = ROUTERS[moe.router].params(*declared) | ROUTERS[moe.router].state(*declared)

    def value(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        one = Weight(leaf.shape, (), 0.0, 1.0)  # scales of norms
        weight = own.get(
            path[-1].key,
            one if leaf.ndim < 2 else one._replace(std=leaf.shape[-2] ** -0.5, constant=0.0),
        )
        return (weight.constant + weight.std * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    here = jax.sharding.get_mesh()

    def place(z, leaf):
        return jax.device_put(z, jax.sharding.NamedSharding(here, leaf.sharding.spec))

    return jax.tree.map(place, jax.tree_util.tree_map_with_path(value, abstract), abstract)


def _change(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for each mode [2], the largest change over the largest |logit| and the share of
    tokens that changed; modes are the first dimension of the logits.
    """
    # Of a whole row, where a model gives one output for a row.
    per_token = np.abs(after - before).max(-1) / np.abs(before).max()
    per_token = np.where(per_token > NOISE, per_token, 0).reshape(2, -1)
    return per_token.max(-1), (per_token > 0).mean(-1)


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
    small["data"] = {**small["data"], "seq_len": max(32, 4 * model["moe"]["num_experts"] // group)}
    small["train"] = {**small["train"], "batch_size": max(4, 2 * group), "micro_batch_size": 0}
    small["eval"] = {**small["eval"], "batch_size": 0}
    small["mesh"], small["simulate_devices"] = mesh.ONE.written(), 0
    kind, options = model["kind"], model["kinds"][model["kind"]]
    changes = dict(MODELS[kind].small(options, small["data"]["seq_len"]))
    model["kinds"] = {**model["kinds"], kind: {**options, **changes}}
    attention, options = model["attention"], model["attentions"][model["attention"]]
    changes = dict(ATTENTIONS[attention].small(options, small["data"]["seq_len"]))
    model["attentions"] = {**model["attentions"], attention: {**options, **changes}}
    return small


def combinations(raw: Mapping[str, Any]) -> Iterator[Config]:
    """Yields every router x ordering x dispatcher that the rules allow, as small configs that are
    otherwise like `raw`; capacity and tile bind.
    """
    small = shrink(raw)
    moe = copy.deepcopy(small["model"]["moe"])
    for options in moe["dispatchers"].values():
        if "factor" in options:
            options["factor"] = TIGHT
    # Some losses need a router that has their sums, and nothing is trained here.
    moe["losses"] = dict.fromkeys(moe["losses"], 0.0)
    moe["adaptive"]["rate"] = 0.0
    for router, ordering, dispatcher in itertools.product(ROUTERS, ORDERINGS, DISPATCHERS):
        chosen = {**moe, "router": router, "ordering": ordering, "dispatcher": dispatcher}
        if "tile" in moe["orderings"][ordering]:
            chosen["orderings"] = {**moe["orderings"], ordering: {"tile": _tile(small, router)}}
        try:
            yield config.build({**small, "model": {**small["model"], "moe": chosen}}, 1)
        except UserError:  # a pair that makes no sense: its rule says why
            continue


def _tile(small: Mapping[str, Any], router: str) -> int:
    """Returns twice an even load: an expert's count is rounded to nothing or to all, whichever is
    nearer, so that rounding shows.
    """
    moe = small["model"]["moe"]
    promise = ROUTERS[router].declared(
        moe["num_experts"], ROUTERS[router].options(**moe["routers"][router])
    )
    choices = promise.average or promise.most or 1
    return max(
        2, round(2 * choices * small["data"]["seq_len"] * moe["group_rows"] / moe["num_experts"])
    )


def verdict(cfg: Config, found: Mapping[str, Measured]) -> str:
    """Returns what the label of a config and its measurement say together: "safe", "leaks ...", or
    that the label is wrong.
    """
    seen, kinds = causality.sees(cfg.model), ("future", "batch") if has_future(cfg) else ("batch",)
    measured = {kind: any(getattr(found[mode], kind).delta > 0 for mode in MODES) for kind in kinds}
    wrong = [kind for kind in kinds if measured[kind] and not getattr(seen, kind)]
    if wrong:
        return f"{FAULT}: labelled safe, but sees the {' and the '.join(wrong)}"
    labelled = [kind for kind in kinds if getattr(seen, kind)]
    quiet = [kind for kind in labelled if not measured[kind]]
    text = f"leaks the {' and the '.join(labelled)}" if labelled else SAFE
    return text + (f" (not seen here: {', '.join(quiet)})" if quiet else "")
