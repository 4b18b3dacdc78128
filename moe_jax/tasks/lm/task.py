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
from moe_jax.tasks.contract import Figures, Losses, Table, Task, Trained, by_domain
from moe_jax.tasks.next_token import greedy, token_losses


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


# Of a domain's text, that the compressors read.
MOST_BYTES = 4_000_000
# The same in a smoke run.
SMOKE_BYTES = 50_000


def model_batch(batch: PackedText, record: Mapping[str, Any] | None = None) -> Batch:
    """Returns what the model reads; `record`: what its MoE layers return, as Request has it."""
    request = batch.request or probe.Request()
    # Blocks come first in a model, so that each takes its own.
    # [B, M, ...] -> [M, B, ...].
    request = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), request)
    return Batch(
        id_BS=batch.tokens_BS,
        position_BS=batch.position_BS,
        segment_BS=batch.segment_BS,
        row_B=batch.row_B,
        request=request._replace(record=record or ()),
    )


def losses(model: Callable, batch: PackedText, rng: jax.Array, train: bool) -> Losses:
    """Returns the losses of all tokens that are learned; padding is not."""
    # Segment 0 is padding.
    learned_BS = batch.segment_BS > 0
    if not isinstance(batch.quiet_BS, tuple):
        learned_BS = learned_BS & (batch.quiet_BS == 0)
    return token_losses(model, model_batch(batch), batch.targets_BS, learned_BS, rng, train)


def record(
    model: Callable, batch: PackedText, rng: jax.Array, train: bool, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the routing of each token, {"expert", "gate", "dropped": [L, B, S, K]}.

    `wanted` says what of it: probe.ROUTING or probe.INPUTS.
    """
    _, sums = model(model_batch(batch, wanted), rng, train)
    _, recorded = probe.split(sums)
    return recorded


def evaluate(forward: Losses, batch: PackedText, data: Dataset) -> dict[str, Any]:
    """Returns held-out sums per domain [Z]: nll (nats), tokens, correct (greedy), and the bytes of
    the text that was predicted.
    """
    dtype = forward.nll.dtype
    predicted_BS = greedy(forward.outputs)
    bytes_V = jnp.asarray(np.asarray(data.tokenizer.token_bytes(), np.int32))
    targets_sharding = jax.typeof(batch.targets_BS).sharding
    # The table is whole on every device, and each looks up the ids of its own rows. The embedding
    # may have more ids than the tokenizer; those stand for no text.
    bytes_BS = bytes_V.at[batch.targets_BS].get(
        mode="fill", fill_value=0, out_sharding=targets_sharding
    )
    # By a tokenizer that changes the text, ids stand for other bytes than were read: count those
    # that were, as gzip does.
    scale_Z = jnp.asarray(data.byte_scale() if isinstance(data, Dataset) else 1.0, dtype)
    valid_BS = forward.weight > 0

    def per_domain(x_BS):
        return by_domain(x_BS.astype(dtype), valid_BS, batch.domain_BS, len(data.domains))

    return {
        "nll": per_domain(forward.nll),
        "tokens": per_domain(valid_BS),
        "correct": per_domain(predicted_BS == batch.targets_BS),
        "bytes": per_domain(bytes_BS) * scale_Z,
    }


def summary(total: Mapping[str, Any], data: Dataset) -> dict[str, float]:
    """Returns "loss" (nats per token), "accuracy", "bits_per_byte" and "domain/NAME/...".

    Bits per byte are the mean over the domains. A domain without rows is left out.
    """
    nll_Z, tokens_Z, bytes_Z = total["nll"], total["tokens"], total["bytes"]
    num_tokens = max(tokens_Z.sum(), 1)
    result = {
        "loss": nll_Z.sum() / num_tokens,
        "accuracy": total["correct"].sum() / num_tokens,
    }
    # Nats are bits times ln 2. Bytes are those of the text, so tokenizers are comparable.
    bits_Z = nll_Z / math.log(2)
    bits_per_byte_Z = bits_Z / np.maximum(bytes_Z, 1)
    has_rows_Z = bytes_Z > 0
    for i, name in enumerate(data.domains):
        if has_rows_Z[i]:
            result[f"domain/{name}/bits_per_byte"] = bits_per_byte_Z[i]
            result[f"domain/{name}/loss"] = nll_Z[i] / tokens_Z[i]
    result["bits_per_byte"] = bits_per_byte_Z[has_rows_Z].mean()
    return result


def headline(figures: Figures) -> str:
    return f"held out {figures['bits_per_byte']:.4f} bits per byte, loss {figures['loss']:.4f}"


def open_data(cfg: Config) -> Dataset:
    """Opens the datasets of the config.

    Raises UserError where the embedding has not as many ids.
    """
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
    contract.write_predictions(workdir, _row_figures(trained.rows, data, cfg.eval.batch_size))
    return {}


def _row_figures(
    rows: Mapping[str, np.ndarray], data: Dataset, size: int
) -> Iterator[dict[str, Any]]:
    """Yields what is written of each evaluated row; `rows` are those of contract.by_row."""
    scale_Z = data.byte_scale()
    # An evaluation may end before the last held-out row, and so does the shorter zip.
    columns = zip(
        zip(*data.heldout_order(), strict=True),
        _domain_and_bytes(data, size, num_rows=len(rows["nats"])),
        rows["nats"],
        rows["tokens"],
    )
    for (part, index), (domain, num_bytes), nats, tokens in columns:
        bits = nats / math.log(2)
        yield {
            "part": data.parts[part].spec,
            "index": int(index),
            "domain": data.domains[domain],
            "nats": float(nats),
            "tokens": int(tokens),
            "bits_per_byte": float(bits / max(num_bytes * scale_Z[domain], 1)),
        }


def _domain_and_bytes(data: Dataset, size: int, num_rows: int) -> Iterator[tuple[int, int]]:
    """Yields the domain of each held-out row and the bytes that its targets stand for."""
    bytes_V = data.tokenizer.token_bytes()
    num_batches = -(-num_rows // size)
    for batch in eval_batches(data, size, num_batches):
        for i in range(size):
            valid_S = batch.segment_BS[i] > 0
            if not isinstance(batch.quiet_BS, tuple):
                # Targets of a chat that the user wrote count nowhere.
                valid_S = valid_S & (batch.quiet_BS[i] == 0)
            yield batch.domain_BS[i, 0], bytes_V[batch.targets_BS[i]][valid_S].sum()


def comparison(cfg: Config, data: Dataset, figures: Figures) -> Table:
    """Returns the held-out bits per byte of each domain, of the model and of compressors.

    The compressors have read the same training text.
    """
    from moe_jax.tasks.lm.rivals import compression_table

    rivals = compression_table(data, SMOKE_BYTES if cfg.smoke else MOST_BYTES)
    rows: dict[str, dict[str, Any]] = {}
    for name in data.domains:
        bits = figures.get(f"domain/{name}/bits_per_byte")
        # A short evaluation may have had no row of a domain.
        if bits is not None:
            rows[name] = {
                "model": bits,
                "gzip -9": rivals[name]["gzip"],
                "xz -9": rivals[name]["xz"],
            }
    columns = next(iter(rows.values()))
    mean = {key: sum(row[key] for row in rows.values()) / len(rows) for key in columns}
    mean_name = "mean"
    # A domain has the name of its file, which may be any.
    while mean_name in rows:
        mean_name += " of all"
    return {**rows, mean_name: mean}


def random(cfg: Config, step: int) -> PackedText:
    """Returns two documents in each row, cut at random, and up to three places of padding at the
    end of every other row.

    Documents begin with different tokens, for two equal beginnings tie: where experts choose among
    tokens, rounding would decide.
    """
    rng = np.random.default_rng([cfg.seed, step])
    num, length = cfg.train.batch_size, cfg.data.seq_len
    # One longer than the row, because targets are one place on.
    tokens = rng.integers(1, cfg.model.vocab_size, (num, length + 1), dtype=np.int32)
    # Rows of less than 7 places have less to choose from.
    least = min(2, length)
    cut_B1 = rng.integers(least, max(least + 1, length - 4), (num, 1))
    padding_B1 = rng.integers(min(1, length - 1), min(4, length), (num, 1))
    distinct = rng.permutation(np.arange(1, cfg.model.vocab_size))
    # Repeated from the beginning where a small vocabulary has not enough.
    first_B2 = np.resize(distinct, (num, 2))
    tokens[:, :1] = first_B2[:, :1]
    np.put_along_axis(tokens, cut_B1, first_B2[:, 1:], 1)
    index_1S = np.arange(length, dtype=np.int32)[None]
    segment_BS = np.where(index_1S < cut_B1, 1, 2)
    padded_BS = np.where(index_1S < length - padding_B1, segment_BS, 0)
    segment_BS[::2] = padded_BS[::2]
    position_BS = np.where(index_1S < cut_B1, index_1S, index_1S - cut_B1)
    return PackedText(
        tokens_BS=tokens[:, :-1],
        targets_BS=tokens[:, 1:],
        segment_BS=segment_BS.astype(np.int32),
        position_BS=position_BS.astype(np.int32),
        domain_BS=np.zeros((num, length), np.int32),
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
    comparison=comparison,
    random=random,
    is_language=True,
    hidden=("future", "document"),
)
