"""What tasks with one label for each row share: text classification, vision, speech.

Shapes: B rows, S places, P width of a vector, C classes, Z domains, R held-out rows.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.examples import Examples, LabelledTokens, LabelledVectors
from moe_jax.errors import UserError
from moe_jax.moe.layer import Batch
from moe_jax.schema.config import Config
from moe_jax.tasks import contract, rivals
from moe_jax.tasks.contract import Losses, Task, Trained, by_domain


def logits(
    model: Callable, batch: Any, rng: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """([B, C], sums) of a batch of tokens or of vectors."""
    tokens = isinstance(batch, LabelledTokens)
    id_BS = batch.tokens_BS if tokens else jnp.zeros_like(batch.segment_BS)
    seen = Batch(id_BS, batch.position_BS, batch.segment_BS, batch.row_B)
    return model(seen if tokens else seen._replace(vectors_BSP=batch.values_BSP), rng, train)


def losses(model: Callable, batch: Any, rng: jax.Array, train: bool) -> Losses:
    logits_BC, sums = logits(model, batch, rng, train)
    log_BC = jax.nn.log_softmax(logits_BC)
    hit_BC = jnp.arange(logits_BC.shape[1])[None] == batch.label_B[:, None]
    nll_B = -jnp.where(hit_BC, log_BC, 0).sum(1)
    return Losses(nll_B, batch.weight_B.astype(nll_B.dtype), logits_BC, sums)


def evaluate(found: Losses, batch: Any, data: Examples) -> dict[str, Any]:
    """Sums per domain [Z]: nll, tokens (rows), correct; per class [C]: rows, predicted, hits."""
    best_B, valid_B = jnp.argmax(found.outputs, -1), found.weight > 0
    right_B, dtype = best_B == batch.label_B, found.nll.dtype
    num = found.outputs.shape[1]

    def per_domain(x_B):
        return by_domain(x_B.astype(dtype), valid_B, batch.domain_B, len(data.domains))

    def per_class(x_B, class_B):
        return by_domain(x_B.astype(dtype), valid_B, class_B, num)

    return {
        "nll": per_domain(found.nll),
        "tokens": per_domain(valid_B),
        "correct": per_domain(right_B),
        "class_rows": per_class(valid_B, batch.label_B),
        "class_predicted": per_class(valid_B, best_B),
        "class_hits": per_class(right_B, batch.label_B),
    }


def summary(total: Mapping[str, Any], data: Examples) -> dict[str, float]:
    """ "loss" (nats per row), "accuracy", "macro_f1" (mean of F1 over the classes that occur or are
    predicted), "domain/NAME/accuracy".
    """
    rows = max(total["tokens"].sum(), 1)
    either = total["class_rows"] + total["class_predicted"]
    f1 = 2 * total["class_hits"] / np.maximum(either, 1)
    result = {
        "loss": total["nll"].sum() / rows,
        "accuracy": total["correct"].sum() / rows,
        "macro_f1": f1[either > 0].mean(),
    }
    for name, correct, number in zip(data.domains, total["correct"], total["tokens"], strict=True):
        if number:
            result[f"domain/{name}/accuracy"] = correct / number
    return result


def headline(figures: Mapping[str, Any]) -> str:
    return (
        f"held out accuracy {figures['accuracy']:.4f}, macro F1 {figures['macro_f1']:.4f}, "
        f"loss {figures['loss']:.4f}"
    )


def finish(cfg: Config, trained: Trained, data: Examples, workdir: Path) -> dict[str, Any]:
    """Writes predictions.jsonl: of each held-out row its index, its text where it has one, label,
    prediction and its probability.
    """

    def ask(model: Callable, batch: Any) -> Any:
        probability_BC = jax.nn.softmax(logits(model, batch, jax.random.key(0), False)[0])
        return jnp.argmax(probability_BC, -1), probability_BC.max(-1)

    index_R, (best_R, probability_R) = contract.of_heldout(cfg, trained, data, ask)
    labels, (raw, label_N) = data.about.labels, data.about.raw["heldout"]
    contract.write_predictions(
        workdir,
        (
            {
                "index": int(i),
                "label": labels[label_N[i]],
                "predicted": labels[best],
                "probability": round(float(p), 6),
            }
            | ({"text": raw[i]} if data.about.tokenizer else {})
            for i, best, p in zip(index_R, best_R, probability_R, strict=True)
        ),
    )
    return {}


def table(cfg: Config, data: Examples, figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The model below its rivals."""
    del cfg
    rows = {
        name: {"accuracy": row["accuracy"], "macro F1": row["macro_f1"]}
        for name, row in rivals.table(data).items()
    }
    return rows | {"model": {"accuracy": figures["accuracy"], "macro F1": figures["macro_f1"]}}


def check(cfg: Config, data: Examples) -> Examples:
    """UserError where the model does not fit the data."""
    options: Any = cfg.model.kind_options
    about = data.about
    needs = {"num_classes": len(about.labels)}
    if hasattr(options, "inputs"):
        needs |= {"inputs": "vectors" if about.tokenizer is None else "tokens"}
        needs |= {"input_dim": about.width} if about.tokenizer is None else {}
    for key, value in needs.items():
        if getattr(options, key) != value:
            raise UserError(
                f"model.kinds.{cfg.model.kind}.{key} = {getattr(options, key)!r}, but {data.spec} "
                "needs "
                f"{value!r}: set it"
            )
    if about.tokenizer is not None and about.tokenizer.vocab_size > cfg.model.vocab_size:
        raise UserError(
            f"model.vocab_size ({cfg.model.vocab_size}) is smaller than the vocabulary of "
            f"{data.spec} "
            f"({about.tokenizer.vocab_size}): raise it"
        )
    return data


def random(cfg: Config, step: int) -> LabelledTokens | LabelledVectors:
    """Rows of random tokens or vectors, every other one with up to half a row of padding, and
    random labels.
    """
    rng = np.random.default_rng([cfg.seed, step])
    options: Any = cfg.model.kind_options
    num, length = cfg.train.batch_size, cfg.data.seq_len
    size_B = rng.integers(length // 2 + 1, length + 1, num)
    size_B[::2] = length
    segment_BS = (np.arange(length)[None] < size_B[:, None]).astype(np.int32)
    position_BS = segment_BS * np.arange(length, dtype=np.int32)[None]
    label_B = rng.integers(0, options.num_classes, num).astype(np.int32)
    told = (0 * label_B, label_B, np.ones(num, np.float32), np.arange(num, dtype=np.int32))
    if not options.embeds:
        values_BSP = rng.normal(size=(num, length, options.input_dim)).astype(np.float32)
        return LabelledVectors(values_BSP * segment_BS[:, :, None], segment_BS, position_BS, *told)
    tokens_BS = rng.integers(1, cfg.model.vocab_size, (num, length)).astype(np.int32)
    return LabelledTokens(tokens_BS * segment_BS, segment_BS, position_BS, *told)


def make(
    options: type, open_data: Callable[[Config], Examples], title: str, kinds: tuple[str, ...]
) -> Task:
    """Returns the task of a kind of data."""
    return Task(
        options=options,
        kinds=kinds,
        title=title,
        open=lambda cfg: check(cfg, open_data(cfg)),
        losses=losses,
        evaluate=evaluate,
        summary=summary,
        headline=headline,
        finish=finish,
        table=table,
        random=random,
    )
