"""Machine translation: an encoder-decoder, or a decoder that has the source as the prefix of its
row; greedy decoding, sacreBLEU.

Shapes: B rows, S places, V vocabulary, Z domains.
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
from moe_jax.tasks.contract import Losses, Task, Trained, by_domain
from moe_jax.tasks.lm import task as lm
from moe_jax.tasks.translation.data import open_translation
from moe_jax.tasks.translation.rivals import scores


@dataclasses.dataclass(frozen=True)
class Options:
    dataset: str = option("bible_en_es", 'tasks/translation/data.py, or "tfds:NAME"')
    vocab_size: int = option(
        8192, "of the tokenizer, trained on both sides of the training pairs", NUMBER
    )


GREEDY = dials(Settings(0, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=()))


def open_data(cfg: Config, prefix: bool) -> Examples:
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
            f"{data.spec} "
            f"({data.about.tokenizer.vocab_size}): raise it"
        )
    return data


def seen(batch: SourceTarget | PrefixTarget) -> Batch:
    """Returns what the model reads: beside the target its source, or which places of the row are
    prefix.
    """
    target = Batch(batch.tokens_BS, batch.position_BS, batch.segment_BS, batch.row_B)
    if isinstance(batch, SourceTarget):
        return target._replace(source_rows=source(batch))
    return target._replace(prefix_BS=batch.prefix_BS)


def source(batch: SourceTarget) -> Batch:
    place_BS = jnp.where(batch.source_segment_BS > 0, jnp.arange(batch.source_BS.shape[1])[None], 0)
    return Batch(batch.source_BS, place_BS, batch.source_segment_BS, batch.row_B)


def weight(batch: SourceTarget | PrefixTarget) -> jax.Array:
    """[B, S]: which predictions count."""
    return batch.weight_BS if isinstance(batch, PrefixTarget) else batch.segment_BS > 0


def losses(model: Callable, batch: Any, rng: jax.Array, train: bool) -> Losses:
    logits_BSV, sums = model(seen(batch), rng, train)
    nll_BS = lm.negative_log_likelihood(logits_BSV, batch.targets_BS)
    return Losses(nll_BS, weight(batch).astype(nll_BS.dtype), logits_BSV, sums)


def evaluate(found: Losses, batch: Any, data: Examples) -> dict[str, Any]:
    """Sums per domain [Z] over the target's tokens: nll, tokens, correct."""
    best_BS, valid_BS = jnp.argmax(found.outputs, -1), found.weight > 0

    def add(x_BS):
        return by_domain(x_BS.astype(found.nll.dtype), valid_BS, batch.domain_BS, len(data.domains))

    return {
        "nll": add(found.nll),
        "tokens": add(valid_BS),
        "correct": add(best_BS == batch.targets_BS),
    }


def summary(total: Mapping[str, Any], data: Examples) -> dict[str, float]:
    """ "loss" (nats per token of the target), "accuracy" (of the next token, the true ones before
    it given), "domain/NAME/loss".
    """
    tokens = max(total["tokens"].sum(), 1)
    result = {"loss": total["nll"].sum() / tokens, "accuracy": total["correct"].sum() / tokens}
    for name, nll, number in zip(data.domains, total["nll"], total["tokens"], strict=True):
        if number:
            result[f"domain/{name}/loss"] = nll / number
    return result


def headline(figures: Mapping[str, Any]) -> str:
    return (
        f"held out loss {figures['loss']:.4f}, accuracy of the next token {figures['accuracy']:.4f}"
    )


def texts(token_BS: np.ndarray, data: Examples) -> list[str]:
    """The text before the first boundary of each row."""
    boundary = data.about.tokenizer.boundary_id
    ends = [np.flatnonzero(row == boundary) for row in token_BS]
    return [
        data.about.tokenizer.decode(row[: end[0]] if len(end) else row)
        for row, end in zip(token_BS, ends)
    ]


def finish(cfg: Config, trained: Trained, data: Examples, workdir: Path) -> dict[str, Any]:
    """Translates all held-out sources greedily, writes predictions.jsonl, scores by sacreBLEU."""
    tokens, size = data.about.tokenizer, cfg.eval.batch_size
    translator = make_translator(cfg.model, cfg.data.seq_len, tokens.boundary_id, tokens.vocab_size)
    rows, found = local_rows(size), []
    for batch in eval_batches(data, size, None, rows):
        stopping.check()
        prompt = prompted(put(batch, rows, size))
        found.append(np.asarray(translator(trained.params, trained.router_state, prompt, GREEDY)))
    index_R = data.heldout_order()[1]
    outputs = texts(np.concatenate(found)[: len(index_R)], data)
    sources, references = ([part[i] for i in index_R] for part in data.about.raw["heldout"])
    keys = ("index", "source", "reference", "translation")
    rows_of = (map(int, index_R), sources, references, outputs)
    contract.write_predictions(
        workdir, (dict(zip(keys, row)) for row in zip(*rows_of, strict=True))
    )
    return scores(outputs, references)


def prompted(batch: SourceTarget | PrefixTarget) -> Batch:
    """Returns what is translated: the source, or the prefix of the row."""
    if isinstance(batch, SourceTarget):
        return source(batch)
    prefix_BS = batch.prefix_BS * batch.segment_BS
    return Batch(
        batch.tokens_BS * prefix_BS,
        batch.position_BS * prefix_BS,
        prefix_BS,
        batch.row_B,
        prefix_BS=prefix_BS,
    )


def table(cfg: Config, data: Examples, figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    del cfg
    rows = rivals.table(data) | {
        "model": {name: figures[name] for name in ("bleu", "chrf", "signature")}
    }
    return {
        name: {"BLEU": row["bleu"], "chrF": row["chrf"], "signature": row["signature"]}
        for name, row in rows.items()
    }


def random(cfg: Config, step: int) -> SourceTarget:
    """Random pairs, every other row with up to half of either side padding."""
    rng = np.random.default_rng([cfg.seed, step])
    num, length = cfg.train.batch_size, cfg.data.seq_len
    place = np.arange(length, dtype=np.int32)[None]

    def side() -> tuple[np.ndarray, np.ndarray]:
        size = rng.integers(length // 2 + 1, length + 1, (num, 1))
        size[::2] = length
        segment = (place < size).astype(np.int32)
        return rng.integers(1, cfg.model.vocab_size, (num, length)).astype(
            np.int32
        ) * segment, segment

    (source_BS, source_segment_BS), (tokens_BS, segment_BS) = side(), side()
    targets_BS = rng.integers(0, cfg.model.vocab_size, (num, length)).astype(np.int32) * segment_BS
    row_B = np.arange(num, dtype=np.int32)
    told = (segment_BS, segment_BS * place, 0 * segment_BS, row_B)
    return SourceTarget(source_BS, source_segment_BS, tokens_BS, targets_BS, *told)


def random_prefix(cfg: Config, step: int) -> PrefixTarget:
    """Random rows whose first third or so is prefix."""
    row = random(cfg, step)
    length = cfg.data.seq_len
    place = np.arange(length, dtype=np.int32)[None]
    longest = max(length // 2, 3)  # exclusive: a row of four tokens has a prefix of two
    size = np.random.default_rng([cfg.seed, step, 1]).integers(2, longest, (len(row.row_B), 1))
    prefix_BS = ((place < size) & (row.segment_BS > 0)).astype(np.int32)
    weight_BS = ((place >= size - 1) & (row.segment_BS > 0)).astype(np.float32)
    told = (row.segment_BS, row.position_BS, row.domain_BS, weight_BS, prefix_BS, row.row_B)
    return PrefixTarget(row.tokens_BS, row.targets_BS, *told)


def make(prefix: bool, random: Callable[..., Any], kind: str) -> Task:
    """Returns the task of pairs of sentences for a kind of model."""
    return Task(
        options=Options,
        kinds=(kind,),
        title="held-out translations (higher is better)",
        open=lambda cfg: open_data(cfg, prefix),
        losses=losses,
        evaluate=evaluate,
        summary=summary,
        headline=headline,
        finish=finish,
        table=table,
        random=random,
        hidden=("future",),
    )


TASK = make(False, random, encdec.NAME)
PREFIX_TASK = make(True, random_prefix, decoder.NAME)
