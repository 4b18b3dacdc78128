"""Machine translation: an encoder-decoder, or a decoder that has the source as the prefix of its
row; greedy decoding, sacreBLEU.

Shapes: B rows, S places, N places of a translation, V vocabulary, R held-out rows, Z domains.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import extras
from moe_jax.data.batches import eval_batches
from moe_jax.data.examples import Examples, PrefixTarget, SourceTarget
from moe_jax.decoding.sample import Settings, dials
from moe_jax.decoding.translate import make_translator
from moe_jax.errors import UserError
from moe_jax.models import decoder, encdec
from moe_jax.moe.layer import Batch
from moe_jax.parallel.batch_rows import local_rows, put
from moe_jax.runtime import stopping
from moe_jax.schema.config import Config
from moe_jax.schema.options import NUMBER, option, typed_options
from moe_jax.tasks import contract, rivals
from moe_jax.tasks.contract import Figures, Losses, Table, Task, Trained, by_domain
from moe_jax.tasks.next_token import greedy, token_losses
from moe_jax.tasks.translation.data import open_translation
from moe_jax.tasks.translation.rivals import scores


@dataclasses.dataclass(frozen=True)
class Options:
    dataset: str = option("bible_en_es", 'tasks/translation/data.py, or "tfds:NAME"')
    vocab_size: int = option(
        8192, "of the tokenizer, trained on both sides of the training pairs", NUMBER
    )


# Temperature 0 takes the likeliest token; the other dials do nothing then.
GREEDY = dials(Settings(0, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=()))


def open_data(cfg: Config, prefix: bool) -> Examples:
    """Opens the pairs of the config. Raises UserError where the embedding is too small for their
    ids.
    """
    extras.require(f"task = {cfg.task!r}", "sacrebleu", "sklearn")
    options = typed_options(Options, cfg.task_options)
    data = open_translation(
        options.dataset,
        cfg.data.folder,
        seq_len=cfg.data.seq_len,
        vocab_size=options.vocab_size,
        prefix=prefix,
        heldout_every=cfg.data.heldout_every,
        seed=cfg.seed,
    )
    if data.about.tokenizer.vocab_size > cfg.model.vocab_size:
        raise UserError(
            f"model.vocab_size ({cfg.model.vocab_size}) is smaller than the vocabulary of "
            f"{data.spec} ({data.about.tokenizer.vocab_size}): raise it"
        )
    return data


def model_batch(batch: SourceTarget | PrefixTarget) -> Batch:
    """Returns what the model reads: the target, with the source or the mask of the prefix."""
    target = Batch(batch.tokens_BS, batch.position_BS, batch.segment_BS, batch.row_B)
    if isinstance(batch, SourceTarget):
        return target._replace(source_rows=source_batch(batch))
    return target._replace(prefix_BS=batch.prefix_BS)


def source_batch(batch: SourceTarget) -> Batch:
    """Returns the sources as the encoder reads them; their positions are made here."""
    index_S = jnp.arange(batch.source_BS.shape[1])
    # Counted from the row's begin: a source row is one sentence.
    position_BS = jnp.where(batch.source_segment_BS > 0, index_S[None], 0)
    return Batch(batch.source_BS, position_BS, batch.source_segment_BS, batch.row_B)


def weight(batch: SourceTarget | PrefixTarget) -> jax.Array:
    """Returns which predictions count, [B, S]."""
    return batch.weight_BS if isinstance(batch, PrefixTarget) else batch.segment_BS > 0


def losses(model: Callable, batch: Any, rng: jax.Array, train: bool) -> Losses:
    """Returns the losses of the target's tokens."""
    return token_losses(model, model_batch(batch), batch.targets_BS, weight(batch), rng, train)


def evaluate(forward: Losses, batch: Any, data: Examples) -> dict[str, Any]:
    """Returns sums per domain [Z] over the target's tokens: nll, tokens, correct."""
    predicted_BS = greedy(forward.outputs)
    counts_BS = forward.weight > 0
    dtype = forward.nll.dtype

    def per_domain(x_BS):
        return by_domain(x_BS.astype(dtype), counts_BS, batch.domain_BS, len(data.domains))

    return {
        "nll": per_domain(forward.nll),
        "tokens": per_domain(counts_BS),
        "correct": per_domain(predicted_BS == batch.targets_BS),
    }


def summary(total: Mapping[str, Any], data: Examples) -> dict[str, float]:
    """Returns "loss" (nats per token of the target), "accuracy" and "domain/NAME/loss".

    The accuracy is that of the next token when the true ones before it are given.
    """
    tokens = max(total["tokens"].sum(), 1)
    result = {"loss": total["nll"].sum() / tokens, "accuracy": total["correct"].sum() / tokens}
    for name, nll, number in zip(data.domains, total["nll"], total["tokens"], strict=True):
        # A short evaluation may have had no row of a domain.
        if number:
            result[f"domain/{name}/loss"] = nll / number
    return result


def headline(figures: Figures) -> str:
    return (
        f"held out loss {figures['loss']:.4f}, accuracy of the next token {figures['accuracy']:.4f}"
    )


def texts(token_BS: np.ndarray, data: Examples) -> list[str]:
    """Returns the text before the first boundary of each row."""
    tokenizer = data.about.tokenizer
    decoded = []
    for row in token_BS:
        ends = np.flatnonzero(row == tokenizer.boundary_id)
        # A row without a boundary was cut off at the most tokens that are drawn.
        decoded.append(tokenizer.decode(row[: ends[0]] if len(ends) else row))
    return decoded


def finish(cfg: Config, trained: Trained, data: Examples, workdir: Path) -> dict[str, Any]:
    """Translates all held-out sources greedily, writes predictions.jsonl, scores by sacreBLEU."""
    tokenizer, size = data.about.tokenizer, cfg.eval.batch_size
    translator = make_translator(
        cfg.model, cfg.data.seq_len, tokenizer.boundary_id, tokenizer.vocab_size
    )
    rows = local_rows(size)
    token_batches = []
    for batch in eval_batches(data, size, None, rows):
        stopping.check()
        # The source alone: the true target must not be seen.
        prompts = prompt_batch(put(batch, rows, size))
        token_BN = translator(trained.params, trained.router_state, prompts, GREEDY)
        token_batches.append(np.asarray(token_BN))
    _, index_R = data.heldout_order()
    # Rows that fill up the last batch come behind all others.
    translations = texts(np.concatenate(token_batches)[: len(index_R)], data)
    # Whole texts, also of pairs that were cut to fit into a row.
    sources, references = ([side[i] for i in index_R] for side in data.about.raw["heldout"])
    columns = {
        "index": [int(i) for i in index_R],
        "source": sources,
        "reference": references,
        "translation": translations,
    }
    # A line for each pair, in the order of the held-out rows.
    lines = (dict(zip(columns, row)) for row in zip(*columns.values(), strict=True))
    contract.write_predictions(workdir, lines)
    return scores(translations, references)


def prompt_batch(batch: SourceTarget | PrefixTarget) -> Batch:
    """Returns what is translated: the source, or the prefix of the row without its target."""
    if isinstance(batch, SourceTarget):
        return source_batch(batch)
    # Padding is no prefix, whatever a row that fills up the batch says.
    prefix_BS = batch.prefix_BS * batch.segment_BS
    return Batch(
        batch.tokens_BS * prefix_BS,
        batch.position_BS * prefix_BS,
        prefix_BS,
        batch.row_B,
        prefix_BS=prefix_BS,
    )


def comparison(cfg: Config, data: Examples, figures: Figures) -> Table:
    """Returns the scores of the baselines and, below them, of the model."""
    del cfg
    rows = {**rivals.baseline_figures(data), "model": figures}
    return {
        name: {"BLEU": row["bleu"], "chrF": row["chrf"], "signature": row["signature"]}
        for name, row in rows.items()
    }


def random(cfg: Config, step: int) -> SourceTarget:
    """Returns random pairs, every other row with up to half of either side padding."""
    rng = np.random.default_rng([cfg.seed, step])
    num, length = cfg.train.batch_size, cfg.data.seq_len
    index_1S = np.arange(length, dtype=np.int32)[None]

    def random_side() -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens, segment), both [B, S]."""
        size_B1 = rng.integers(length // 2 + 1, length + 1, (num, 1))
        # Every other row has no padding.
        size_B1[::2] = length
        segment_BS = (index_1S < size_B1).astype(np.int32)
        tokens_BS = rng.integers(1, cfg.model.vocab_size, (num, length)).astype(np.int32)
        return tokens_BS * segment_BS, segment_BS

    source_BS, source_segment_BS = random_side()
    tokens_BS, segment_BS = random_side()
    # Targets that follow from nothing: a proof needs gradients, not sense.
    targets_BS = rng.integers(0, cfg.model.vocab_size, (num, length)).astype(np.int32)
    return SourceTarget(
        source_BS=source_BS,
        source_segment_BS=source_segment_BS,
        tokens_BS=tokens_BS,
        targets_BS=targets_BS * segment_BS,
        segment_BS=segment_BS,
        position_BS=segment_BS * index_1S,
        domain_BS=0 * segment_BS,
        row_B=np.arange(num, dtype=np.int32),
    )


def random_prefix(cfg: Config, step: int) -> PrefixTarget:
    """Returns random rows whose first third or so is prefix."""
    pairs = random(cfg, step)
    length = cfg.data.seq_len
    index_1S = np.arange(length, dtype=np.int32)[None]
    # Exclusive, so a row of four tokens has a prefix of two.
    longest = max(length // 2, 3)
    rng = np.random.default_rng([cfg.seed, step, 1])
    size_B1 = rng.integers(2, longest, (len(pairs.row_B), 1))
    valid_BS = pairs.segment_BS > 0
    return PrefixTarget(
        tokens_BS=pairs.tokens_BS,
        targets_BS=pairs.targets_BS,
        segment_BS=pairs.segment_BS,
        position_BS=pairs.position_BS,
        domain_BS=pairs.domain_BS,
        # The last token of the prefix predicts the first of the target.
        weight_BS=((index_1S >= size_B1 - 1) & valid_BS).astype(np.float32),
        prefix_BS=((index_1S < size_B1) & valid_BS).astype(np.int32),
        row_B=pairs.row_B,
    )


def make(prefix: bool, random: Callable[..., Any], kind: str) -> Task:
    """Returns the task of pairs of sentences for a kind of model."""

    def open_pairs(cfg: Config) -> Examples:
        return open_data(cfg, prefix)

    return Task(
        options=Options,
        kinds=(kind,),
        title="held-out translations (higher is better)",
        open=open_pairs,
        losses=losses,
        evaluate=evaluate,
        summary=summary,
        headline=headline,
        finish=finish,
        comparison=comparison,
        random=random,
        hidden=("future",),
    )


TASK = make(False, random, encdec.NAME)
PREFIX_TASK = make(True, random_prefix, decoder.NAME)
