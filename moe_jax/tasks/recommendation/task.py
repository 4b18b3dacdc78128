"""Recommendation from implicit feedback: which further items a user will take, given some (Liang et
al. 2018, arXiv:1802.05814).

Training predicts all items of a user from those that the model's input dropout leaves; held-out
users are strangers, of whom some items are shown and the others are to be found.

Shapes: B rows (users), L items of a row, I items in all, Z domains, C = 20 items recommended.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.examples import Baskets, Examples
from moe_jax.errors import UserError
from moe_jax.models import mmoe
from moe_jax.moe.layer import Batch
from moe_jax.schema.config import Config
from moe_jax.schema.options import NUMBER, at_least, option, typed_options
from moe_jax.tasks import contract, rivals
from moe_jax.tasks.contract import Figures, Losses, Table, Task, Trained, by_domain
from moe_jax.tasks.recommendation.data import open_recommendation
from moe_jax.tasks.recommendation.rivals import CUT


@dataclasses.dataclass(frozen=True)
class Options:
    dataset: str = option("debian_depends", 'tasks/recommendation/data.py, or "tfds:NAME"')
    min_items: int = option(5, "of a user", at_least(2))
    min_users: int = option(10, "of an item", NUMBER)


# The score of an item that the user has, which is never recommended again.
SHOWN_SCORE = -1e30


def _items(cfg: Config) -> tuple[int, ...]:
    """Returns the number of items of each task of the model."""
    return typed_options(mmoe.Options, cfg.model.kind_options).items


def open_data(cfg: Config) -> Examples:
    """Opens the baskets of the config. Raises UserError where the model has not as many items."""
    options = typed_options(Options, cfg.task_options)
    # The number of items is known only once the set is read; the model has its size before that.
    items_of_tasks = _items(cfg)
    data = open_recommendation(
        options.dataset,
        cfg.data.folder,
        seq_len=cfg.data.seq_len,
        min_items=options.min_items,
        min_users=options.min_users,
        most_items=sum(items_of_tasks),
        heldout_every=cfg.data.heldout_every,
        seed=cfg.seed,
    )
    num = len(data.about.items)
    if sum(items_of_tasks) != num or cfg.model.vocab_size < num:
        num_libraries = sum(name.startswith("lib") for name in data.about.items)
        # Every task must have an item.
        first = num_libraries if 0 < num_libraries < num else max(num // 5, 1)
        raise UserError(
            f"model.kinds.mmoe.items {items_of_tasks} and model.vocab_size "
            f"({cfg.model.vocab_size}) do not fit the {num} items of {data.spec}: "
            f"the items of all tasks must be {num}, as in ({first}, {num - first}), and "
            "model.vocab_size at least that"
        )
    return data


def scores(
    model: Callable, batch: Baskets, rng: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the logits [B, I], and the sums of the layers."""
    # To the layers a user is a sequence of one token, which is padding where no item is shown.
    segment_B1 = (batch.weight_BL > 0).any(1, keepdims=True).astype(jnp.int32)
    inputs = Batch(
        id_BS=0 * segment_B1,
        position_BS=0 * segment_B1,
        segment_BS=segment_B1,
        row_B=batch.row_B,
        feature_BL=batch.items_BL,
        feature_weight_BL=batch.weight_BL,
    )
    return model(inputs, rng, train)


def losses(model: Callable, batch: Baskets, rng: jax.Array, train: bool) -> Losses:
    """Returns the losses of the items to be found: multinomial, over all items (equation 2)."""
    logits_BI, sums = scores(model, batch, rng, train)
    log_BI = jax.nn.log_softmax(logits_BI)
    # Padding takes item 0 here, with the weight 0.
    nll_BL = -jnp.take_along_axis(log_BI, batch.targets_BL, axis=1)
    return Losses(nll_BL, batch.target_weight_BL.astype(nll_BL.dtype), logits_BI, sums)


def best(logits_BI: jax.Array, batch: Baskets) -> jax.Array:
    """Returns the items with the highest scores, without those that were shown, [B, C]."""
    # Padding gets an index that is out of range, where mode="drop" writes nothing.
    out_of_range = logits_BI.shape[1]
    shown_BL = jnp.where(batch.weight_BL > 0, batch.items_BL, out_of_range)

    def without_shown(logits_I, shown_L):
        return logits_I.at[shown_L].set(SHOWN_SCORE, mode="drop")

    _, top_BC = jax.lax.top_k(jax.vmap(without_shown)(logits_BI, shown_BL), CUT)
    return top_BC


def evaluate(forward: Losses, batch: Baskets, data: Examples) -> dict[str, Any]:
    """Returns sums per domain [Z]: nll and tokens (items to be found), recall, ndcg and users.

    Recall is hits / min(C, items to be found); NDCG has binary gains, 1 / log2(rank + 1) each
    (Liang et al. 2018, section 4.1).
    """
    dtype = forward.nll.dtype
    wanted_BL = batch.target_weight_BL > 0
    top_BC = best(forward.outputs, batch)
    # [B, C, L]: whether recommendation c is item l of those to be found.
    is_target_BCL = top_BC[:, :, None] == batch.targets_BL[:, None]
    hit_BC = (is_target_BCL & wanted_BL[:, None]).any(2).astype(dtype)
    num_wanted_B = wanted_BL.sum(1)
    rank_C = jnp.arange(CUT)
    gain_C = 1 / jnp.log2(rank_C.astype(dtype) + 2)
    # The best ranking has the wanted items on the first ranks.
    is_ideal_BC = rank_C[None] < num_wanted_B[:, None]
    ideal_B = jnp.where(is_ideal_BC, gain_C[None], 0).sum(1)
    recall_B = hit_BC.sum(1) / jnp.clip(num_wanted_B, 1, CUT)
    # Divided by one gain at least: a row that fills up a batch wants nothing.
    ndcg_B = (hit_BC * gain_C[None]).sum(1) / jnp.maximum(ideal_B, gain_C[0])
    is_user_B = num_wanted_B > 0

    def per_domain(x_B):
        return by_domain(x_B.astype(dtype), is_user_B, batch.domain_B, len(data.domains))

    return {
        "nll": per_domain(jnp.where(wanted_BL, forward.nll, 0).sum(1)),
        "tokens": per_domain(num_wanted_B),
        "recall": per_domain(recall_B),
        "ndcg": per_domain(ndcg_B),
        "users": per_domain(is_user_B),
    }


def summary(total: Mapping[str, Any], data: Examples) -> dict[str, float]:
    """Returns "loss" (nats per item to be found), "recall@20", "ndcg@20" and
    "domain/NAME/ndcg@20", which are means over users.
    """
    num_users = max(total["users"].sum(), 1)
    result = {
        "loss": total["nll"].sum() / max(total["tokens"].sum(), 1),
        f"recall@{CUT}": total["recall"].sum() / num_users,
        f"ndcg@{CUT}": total["ndcg"].sum() / num_users,
    }
    for name, ndcg, number in zip(data.domains, total["ndcg"], total["users"], strict=True):
        # A short evaluation may have had no user of a domain.
        if number:
            result[f"domain/{name}/ndcg@{CUT}"] = ndcg / number
    return result


def headline(figures: Figures) -> str:
    recall, ndcg = figures[f"recall@{CUT}"], figures[f"ndcg@{CUT}"]
    return f"held out recall@{CUT} {recall:.4f}, NDCG@{CUT} {ndcg:.4f}, loss {figures['loss']:.4f}"


def finish(cfg: Config, trained: Trained, data: Examples, workdir: Path) -> dict[str, Any]:
    """Writes predictions.jsonl: of each held-out user the items shown, those to be found, and the
    20 recommended, best first.
    """

    def recommend(model, batch):
        logits_BI, _ = scores(model, batch, jax.random.key(0), False)
        return best(logits_BI, batch)

    index_R, top_RC = contract.of_heldout(cfg, trained, data, recommend)
    market = data.about

    def names(items):
        return [market.items[i] for i in items]

    def rows() -> Iterator[dict[str, Any]]:
        for i, top in zip(index_R, top_RC, strict=True):
            yield {
                "user": market.users["heldout"][i],
                "shown": names(market.shown[i]),
                "wanted": names(market.hidden[i]),
                # The head may be wider than the number of items.
                "recommended": names(item for item in top if item < len(market.items)),
            }

    contract.write_predictions(workdir, rows())
    return {}


def comparison(cfg: Config, data: Examples, figures: Figures) -> Table:
    """Returns the scores of the baselines and, below them, of the model."""
    rows = {**rivals.baseline_figures(data, tune=not cfg.smoke), "model": figures}
    columns = (f"recall@{CUT}", f"ndcg@{CUT}")
    return {name: {column: row[column] for column in columns} for name, row in rows.items()}


def random(cfg: Config, step: int) -> Baskets:
    """Returns random baskets, half of them not full."""
    rng = np.random.default_rng([cfg.seed, step])
    num, length = cfg.train.batch_size, cfg.data.seq_len
    size_B1 = rng.integers(1, length + 1, (num, 1))
    # Proofs need both kinds of rows: full ones and ones with padding.
    size_B1[::2] = length
    weight_BL = (np.arange(length)[None] < size_B1).astype(np.float32)
    item_BL = rng.integers(0, sum(_items(cfg)), (num, length))
    items_BL = (item_BL * weight_BL).astype(np.int32)
    row_B = np.arange(num, dtype=np.int32)
    return Baskets(
        items_BL=items_BL,
        weight_BL=weight_BL,
        targets_BL=items_BL,
        target_weight_BL=weight_BL,
        domain_B=0 * row_B,
        row_B=row_B,
    )


TASK = Task(
    options=Options,
    kinds=(mmoe.NAME,),
    title="held-out users (higher is better)",
    open=open_data,
    losses=losses,
    evaluate=evaluate,
    summary=summary,
    headline=headline,
    finish=finish,
    comparison=comparison,
    random=random,
)
