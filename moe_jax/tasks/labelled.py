"""What tasks with one label for each row share: text classification, vision, speech.

Shapes: B rows, S places, P width of a vector, C classes, Z domains, R held-out rows.
"""

from collections.abc import Callable, Iterator, Mapping
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
from moe_jax.tasks.contract import Figures, Losses, Table, Task, Trained, by_domain


def logits(
    model: Callable, batch: Any, rng: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the logits [B, C] of a batch of tokens or of vectors, and the sums of the layers."""
    if isinstance(batch, LabelledTokens):
        inputs = Batch(batch.tokens_BS, batch.position_BS, batch.segment_BS, batch.row_B)
    else:
        # The model takes the vectors in place of ids, which must be there all the same.
        zero_BS = jnp.zeros_like(batch.segment_BS)
        inputs = Batch(zero_BS, batch.position_BS, batch.segment_BS, batch.row_B)
        inputs = inputs._replace(vectors_BSP=batch.values_BSP)
    return model(inputs, rng, train)


def losses(model: Callable, batch: Any, rng: jax.Array, train: bool) -> Losses:
    """Returns the losses of the rows, one prediction each."""
    logits_BC, sums = logits(model, batch, rng, train)
    log_BC = jax.nn.log_softmax(logits_BC)
    # A sum over a mask, which needs no gather along classes that may be split.
    is_label_BC = jnp.arange(logits_BC.shape[1])[None] == batch.label_B[:, None]
    nll_B = -jnp.where(is_label_BC, log_BC, 0).sum(1)
    return Losses(nll_B, batch.weight_B.astype(nll_B.dtype), logits_BC, sums)


def evaluate(forward: Losses, batch: Any, data: Examples) -> dict[str, Any]:
    """Returns sums: of each domain [Z] nll, tokens (rows) and correct; of each class [C] its rows,
    how often it was predicted, and how often rightly (hits).

    Rows of weight 0, which fill up a batch, count nowhere.
    """
    predicted_B = jnp.argmax(forward.outputs, -1)
    # Weights are 1 or 0 here: 0 is a row that only fills up the batch.
    valid_B = forward.weight > 0
    correct_B = predicted_B == batch.label_B
    dtype = forward.nll.dtype
    num_classes = forward.outputs.shape[1]

    def per_domain(x_B):
        return by_domain(x_B.astype(dtype), valid_B, batch.domain_B, len(data.domains))

    def per_class(x_B, class_B):
        return by_domain(x_B.astype(dtype), valid_B, class_B, num_classes)

    return {
        "nll": per_domain(forward.nll),
        "tokens": per_domain(valid_B),
        "correct": per_domain(correct_B),
        "class_rows": per_class(valid_B, batch.label_B),
        "class_predicted": per_class(valid_B, predicted_B),
        "class_hits": per_class(correct_B, batch.label_B),
    }


def summary(total: Mapping[str, Any], data: Examples) -> dict[str, float]:
    """Returns "loss" (nats per row), "accuracy", "macro_f1" and "domain/NAME/accuracy".

    Macro F1 is the mean of F1 over the classes that occur or are predicted.
    """
    num_rows = max(total["tokens"].sum(), 1)
    # F1 = 2 hits / (rows of the class + rows predicted as it)
    rows_or_predicted = total["class_rows"] + total["class_predicted"]
    # A class that neither occurs nor is predicted has no F1, and is left out of the mean.
    f1 = 2 * total["class_hits"] / np.maximum(rows_or_predicted, 1)
    result = {
        "loss": total["nll"].sum() / num_rows,
        "accuracy": total["correct"].sum() / num_rows,
        "macro_f1": f1[rows_or_predicted > 0].mean(),
    }
    for name, correct, number in zip(data.domains, total["correct"], total["tokens"], strict=True):
        # A short evaluation may have had no row of a domain.
        if number:
            result[f"domain/{name}/accuracy"] = correct / number
    return result


def headline(figures: Figures) -> str:
    return (
        f"held out accuracy {figures['accuracy']:.4f}, macro F1 {figures['macro_f1']:.4f}, "
        f"loss {figures['loss']:.4f}"
    )


def finish(cfg: Config, trained: Trained, data: Examples, workdir: Path) -> dict[str, Any]:
    """Writes predictions.jsonl: of each held-out row its index, its text where it has one, label,
    prediction and its probability.
    """

    def predict(model: Callable, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits_BC, _ = logits(model, batch, jax.random.key(0), False)
        probability_BC = jax.nn.softmax(logits_BC)
        return jnp.argmax(probability_BC, -1), probability_BC.max(-1)

    index_R, (predicted_R, probability_R) = contract.of_heldout(cfg, trained, data, predict)
    labels = data.about.labels
    # Texts, or vectors; and their labels.
    raw, label_N = data.about.raw["heldout"]

    def rows() -> Iterator[dict[str, Any]]:
        for i, predicted, probability in zip(index_R, predicted_R, probability_R, strict=True):
            row = {
                "index": int(i),
                "label": labels[label_N[i]],
                "predicted": labels[predicted],
                "probability": round(float(probability), 6),
            }
            # Of vectors there is nothing to read.
            if data.about.tokenizer:
                row["text"] = raw[i]
            yield row

    contract.write_predictions(workdir, rows())
    return {}


def comparison(cfg: Config, data: Examples, figures: Figures) -> Table:
    """Returns the scores of the baselines and, below them, of the model."""
    del cfg
    rows = {**rivals.baseline_figures(data), "model": figures}
    return {
        name: {"accuracy": row["accuracy"], "macro F1": row["macro_f1"]}
        for name, row in rows.items()
    }


def fitting(cfg: Config, data: Examples) -> Examples:
    """Returns the data. Raises UserError where the model does not fit them."""
    options: Any = cfg.model.kind_options
    about = data.about
    needs: dict[str, Any] = {"num_classes": len(about.labels)}
    # Only some kinds of models read vectors too.
    if hasattr(options, "inputs"):
        if about.tokenizer is None:
            needs |= {"inputs": "vectors", "input_dim": about.width}
        else:
            needs |= {"inputs": "tokens"}
    for key, value in needs.items():
        if getattr(options, key) != value:
            raise UserError(
                f"model.kinds.{cfg.model.kind}.{key} = {getattr(options, key)!r}, but {data.spec} "
                f"needs {value!r}: set it"
            )
    if about.tokenizer is not None and about.tokenizer.vocab_size > cfg.model.vocab_size:
        raise UserError(
            f"model.vocab_size ({cfg.model.vocab_size}) is smaller than the vocabulary of "
            f"{data.spec} ({about.tokenizer.vocab_size}): raise it"
        )
    return data


def random(cfg: Config, step: int) -> LabelledTokens | LabelledVectors:
    """Returns rows of random tokens or vectors with random labels.

    Every other row has up to half a row of padding.
    """
    rng = np.random.default_rng([cfg.seed, step])
    options: Any = cfg.model.kind_options
    num, length = cfg.train.batch_size, cfg.data.seq_len
    # From more than half a row to all of it.
    size_B = rng.integers(length // 2 + 1, length + 1, num)
    # Proofs need both kinds of rows: full ones and ones with padding.
    size_B[::2] = length
    segment_BS = (np.arange(length)[None] < size_B[:, None]).astype(np.int32)
    position_BS = segment_BS * np.arange(length, dtype=np.int32)[None]
    label_B = rng.integers(0, options.num_classes, num).astype(np.int32)
    fields = {
        "segment_BS": segment_BS,
        "position_BS": position_BS,
        "domain_B": 0 * label_B,
        "label_B": label_B,
        "weight_B": np.ones(num, np.float32),
        "row_B": np.arange(num, dtype=np.int32),
    }
    if not options.embeds:
        values_BSP = rng.normal(size=(num, length, options.input_dim)).astype(np.float32)
        return LabelledVectors(values_BSP=values_BSP * segment_BS[:, :, None], **fields)
    tokens_BS = rng.integers(1, cfg.model.vocab_size, (num, length)).astype(np.int32)
    return LabelledTokens(tokens_BS=tokens_BS * segment_BS, **fields)


def make(
    options: type, open_data: Callable[[Config], Examples], title: str, kinds: tuple[str, ...]
) -> Task:
    """Returns the task of a kind of data."""

    def open_fitting(cfg: Config) -> Examples:
        return fitting(cfg, open_data(cfg))

    return Task(
        options=options,
        kinds=kinds,
        title=title,
        open=open_fitting,
        losses=losses,
        evaluate=evaluate,
        summary=summary,
        headline=headline,
        finish=finish,
        comparison=comparison,
        random=random,
    )
