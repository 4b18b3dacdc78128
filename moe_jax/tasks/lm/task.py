"""Language modelling: next-token prediction over packed documents.

Shapes: B rows, S sequence, V vocabulary, L MoE layers, E experts, Z domains.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.batches import PackedText, eval_batches
from moe_jax.data.load import Dataset, open_dataset
from moe_jax.errors import UserError
from moe_jax.models import article, decoder
from moe_jax.moe import probe
from moe_jax.moe.layer import Batch
from moe_jax.schema.config import Config
from moe_jax.tasks import contract
from moe_jax.tasks.contract import Losses, Task, Trained, by_domain


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


# Of a domain's text that the compressors read, and that they read of it in a smoke run.
MOST_BYTES, SMOKE_BYTES = 4_000_000, 50_000


def model_batch(batch: PackedText, record: Mapping[str, Any] | None = None) -> Batch:
    """Returns what the model reads; `record`: what its MoE layers return, as Request has it."""
    request = batch.request or probe.Request()
    # Blocks come first in a model, so that each takes its own.
    request = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), request)
    return Batch(
        id_BS=batch.tokens_BS,
        position_BS=batch.position_BS,
        segment_BS=batch.segment_BS,
        row_B=batch.row_B,
        request=request._replace(record=record or ()),
    )


def negative_log_likelihood(logits_BSV: jax.Array, target_BS: jax.Array) -> jax.Array:
    """-log p(target) in nats, [B, S].

    Written so that a vocabulary split over `model` is reduced, never gathered.
    """
    place = jax.typeof(logits_BSV).sharding
    hit_BSV = (
        jax.lax.broadcasted_iota(jnp.int32, logits_BSV.shape, 2, out_sharding=place)
        == target_BS[:, :, None]
    )
    return jax.nn.logsumexp(logits_BSV, -1) - jnp.where(hit_BSV, logits_BSV, 0).sum(-1)


def losses(model: Callable, batch: PackedText, rng: jax.Array, train: bool) -> Losses:
    logits_BSV, sums = model(model_batch(batch), rng, train)
    nll_BS = negative_log_likelihood(logits_BSV, batch.targets_BS)
    return Losses(nll_BS, (batch.segment_BS > 0).astype(nll_BS.dtype), logits_BSV, sums)


def record(
    model: Callable, batch: PackedText, rng: jax.Array, train: bool, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """The routing of each token, {"expert", "gate", "dropped":

    [L, B, S, K]}, as `wanted` says: probe.ROUTING or probe.INPUTS.
    """
    return probe.split(model(model_batch(batch, wanted), rng, train)[1])[1]


def evaluate(found: Losses, batch: PackedText, data: Dataset) -> dict[str, Any]:
    """Held-out sums per domain [Z]: nll (nats), tokens, correct (greedy), text bytes predicted."""
    bytes_V = np.zeros(found.outputs.shape[-1], np.int32)
    bytes_V[: data.tokenizer.vocab_size] = data.tokenizer.token_bytes()
    best_BS = jnp.argmax(found.outputs, -1)
    # By a tokenizer that changes the text, ids stand for other bytes than were read: count those
    # that were, as gzip does.
    scale_Z = jnp.asarray(data.byte_scale() if isinstance(data, Dataset) else 1.0, found.nll.dtype)
    text_BS = (
        jnp.asarray(bytes_V)
        .at[batch.targets_BS]
        .get(out_sharding=jax.typeof(batch.targets_BS).sharding)
    )
    valid_BS, dtype = batch.segment_BS > 0, found.nll.dtype

    def add(x_BS):
        return by_domain(x_BS.astype(dtype), valid_BS, batch.domain_BS, len(data.domains))

    return {
        "nll": add(found.nll),
        "tokens": add(valid_BS),
        "correct": add(best_BS == batch.targets_BS),
        "bytes": add(text_BS) * scale_Z,
    }


def summary(total: Mapping[str, Any], data: Dataset) -> dict[str, float]:
    """ "loss" (nats per token), "accuracy", "bits_per_byte" (mean over domains), "domain/NAME/...":
    a domain without rows is left out.
    """
    tokens = max(total["tokens"].sum(), 1)
    result = {"loss": total["nll"].sum() / tokens, "accuracy": total["correct"].sum() / tokens}
    bits = total["nll"] / math.log(2) / np.maximum(total["bytes"], 1)
    seen = total["bytes"] > 0
    for i, name in enumerate(data.domains):
        if seen[i]:
            result[f"domain/{name}/bits_per_byte"] = bits[i]
            result[f"domain/{name}/loss"] = total["nll"][i] / total["tokens"][i]
    result["bits_per_byte"] = bits[seen].mean()
    return result


def headline(figures: Mapping[str, Any]) -> str:
    return f"held out {figures['bits_per_byte']:.4f} bits per byte, loss {figures['loss']:.4f}"


def open_data(cfg: Config) -> Dataset:
    """The datasets of the config; refuses a tokenizer that the embedding is too small for."""
    dataset = open_dataset(
        cfg.data.sources,
        seq_len=cfg.data.seq_len,
        slice_bytes=cfg.data.slice_bytes,
        heldout_bytes=cfg.data.heldout_bytes,
        heldout_every=cfg.data.heldout_every,
        seed=cfg.seed,
    )
    if dataset.tokenizer.vocab_size > cfg.model.vocab_size:
        raise UserError(
            f"model.vocab_size ({cfg.model.vocab_size}) is smaller than the vocabulary of the data "
            f"({dataset.tokenizer.vocab_size}, tokenizer {dataset.tokenizer.name}): raise "
            "model.vocab_size"
        )
    return dataset


def finish(cfg: Config, trained: Trained, data: Dataset, workdir: Path) -> dict[str, Any]:
    """Writes predictions.jsonl: how well each row of the last evaluation was predicted, which costs
    no second pass.

    Text that the model writes is for `python -m moe_jax generate`.
    """
    contract.write_predictions(workdir, _of_rows(trained.rows, data, cfg.eval.batch_size))
    return {}


def _of_rows(rows: Mapping[str, np.ndarray], data: Dataset, size: int) -> Iterator[dict[str, Any]]:
    bytes_V, scale_Z = data.tokenizer.token_bytes(), data.byte_scale()
    batches = eval_batches(data, size, -(-len(rows["nats"]) // size))
    # The domain of a row, and the bytes that it predicts.
    told = (
        (b.domain_BS[i, 0], bytes_V[b.targets_BS[i]][b.segment_BS[i] > 0].sum())
        for b in batches
        for i in range(size)
    )
    places = zip(*data.heldout_order(), strict=True)
    for (part, index), (domain, text), nats, tokens in zip(
        places, told, rows["nats"], rows["tokens"]
    ):
        yield {
            "part": data.parts[part].spec,
            "index": int(index),
            "domain": data.domains[domain],
            "nats": float(nats),
            "tokens": int(tokens),
            "bits_per_byte": float(nats / math.log(2) / max(text * scale_Z[domain], 1)),
        }


def table(cfg: Config, data: Dataset, figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Held-out bits per byte of each domain, beside compressors that have read the same training
    text.
    """
    from moe_jax.tasks.lm.rivals import compression_table

    rivals = compression_table(data, SMOKE_BYTES if cfg.smoke else MOST_BYTES)
    bits = {name: figures.get(f"domain/{name}/bits_per_byte") for name in data.domains}
    rows = {
        name: {"model": b, "gzip -9": rivals[name]["gzip"], "xz -9": rivals[name]["xz"]}
        for name, b in bits.items()
        if b is not None
    }
    mean = {
        key: sum(row[key] for row in rows.values()) / len(rows) for key in next(iter(rows.values()))
    }
    name = "mean"
    while name in rows:  # a domain has the name of its file, which may be any
        name += " of all"
    return {**rows, name: mean}


def random(cfg: Config, step: int) -> PackedText:
    """Two documents in each row, cut at random, and up to three places of padding at the end of
    every other row.

    Documents begin with different tokens, for two equal beginnings tie: where experts choose among
    tokens, rounding would decide.
    """
    rng = np.random.default_rng([cfg.seed, step])
    num, length = cfg.train.batch_size, cfg.data.seq_len
    tokens = rng.integers(1, cfg.model.vocab_size, (num, length + 1), dtype=np.int32)
    least = min(2, length)  # rows of less than 7 places have less to choose from
    cut = rng.integers(least, max(least + 1, length - 4), (num, 1))
    tail = rng.integers(min(1, length - 1), min(4, length), (num, 1))
    first = np.resize(rng.permutation(np.arange(1, cfg.model.vocab_size)), (num, 2))
    tokens[:, :1] = first[:, :1]
    np.put_along_axis(tokens, cut, first[:, 1:], 1)
    place = np.arange(length, dtype=np.int32)[None]
    segment = np.where(place < cut, 1, 2)
    segment[::2] = np.where(place < length - tail, segment, 0)[::2]
    position = np.where(place < cut, place, place - cut)

    def whole(z):
        return z.astype(np.int32)

    return PackedText(
        tokens_BS=tokens[:, :-1],
        targets_BS=tokens[:, 1:],
        segment_BS=whole(segment),
        position_BS=whole(position),
        domain_BS=whole(0 * segment),
        row_B=np.arange(num, dtype=np.int32),
    )


TASK = Task(
    options=Options,
    kinds=(decoder.NAME, article.NAME),
    title="held-out bits per byte (lower is better)",
    open=open_data,
    losses=losses,
    evaluate=evaluate,
    summary=summary,
    headline=headline,
    finish=finish,
    table=table,
    random=random,
    is_language=True,
    hidden=("future", "document"),
)
