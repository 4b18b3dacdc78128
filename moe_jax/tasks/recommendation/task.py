"""Recommendation from implicit feedback: which further items a user will take, given some (Liang et
al. 2018, arXiv:1802.05814).

Training predicts all items of a user from those that the model's input dropout leaves; held-out
users are strangers, of whom some items are shown and the others are to be found.

Shapes: B rows (users), L items of a row, I items in all, Z domains, C = 20 items recommended.
"""

import dataclasses
from collections.abc import Callable, Mapping
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
from moe_jax.tasks.contract import Losses, Task, Trained, by_domain
from moe_jax.tasks.recommendation.data import open_recommendation
from moe_jax.tasks.recommendation.rivals import CUT


@dataclasses.dataclass(frozen=True)
class Options:
    dataset: str = option("debian_depends", 'tasks/recommendation/data.py, or "tfds:NAME"')
    min_items: int = option(5, "of a user", at_least(2))
    min_users: int = option(10, "of an item", NUMBER)


SEEN = -1e30  # the score of an item that the user has: never recommended again


def _items(cfg: Config) -> tuple[int, ...]:
    """Returns the number of items of each task of the model."""
    return typed_options(mmoe.Options, cfg.model.kind_options).items


def open_data(cfg: Config) -> Examples:
    options = typed_options(Options, cfg.task_options)
    of_tasks = _items(cfg)
    data = open_recommendation(
        options.dataset,
        cfg.data.folder,
        seq_len=cfg.data.seq_len,
        min_items=options.min_items,
        min_users=options.min_users,
        most_items=sum(of_tasks),
        heldout_every=cfg.data.heldout_every,
        seed=cfg.seed,
    )
    num = len(data.about.items)
    if sum(of_tasks) != num or cfg.model.vocab_size < num:
        library = sum(name.startswith("lib") for name in data.about.items)
        first = library if 0 < library < num else max(num // 5, 1)  # every task must have an item
        raise UserError(
            f"model.kinds.mmoe.items {of_tasks} and model.vocab_size ({cfg.model.vocab_size}) do "
            f"not fit the {num} items of {data.spec}: "
            f"the items of all tasks must be {num}, as in ({first}, {num - first}), and "
            "model.vocab_size at least that"
        )
    return data


def scores(
    model: Callable, batch: Baskets, rng: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """([B, I] logits, sums)."""
    any_B1 = (batch.weight_BL > 0).any(1, keepdims=True).astype(jnp.int32)
    features = {"feature_BL": batch.items_BL, "feature_weight_BL": batch.weight_BL}
    return model(Batch(0 * any_B1, 0 * any_B1, any_B1, batch.row_B, **features), rng, train)


def losses(model: Callable, batch: Baskets, rng: jax.Array, train: bool) -> Losses:
    logits_BI, sums = scores(model, batch, rng, train)
    log_BI = jax.nn.log_softmax(logits_BI)
    nll_BL = -jnp.take_along_axis(log_BI, batch.targets_BL, axis=1)
    return Losses(nll_BL, batch.target_weight_BL.astype(nll_BL.dtype), logits_BI, sums)


def best(logits_BI: jax.Array, batch: Baskets) -> jax.Array:
    """[B, C]: the items with the highest scores, without those that were shown."""
    nowhere = logits_BI.shape[1]
    seen_BL = jnp.where(batch.weight_BL > 0, batch.items_BL, nowhere)
    without = jax.vmap(lambda logits_I, seen_L: logits_I.at[seen_L].set(SEEN, mode="drop"))
    return jax.lax.top_k(without(logits_BI, seen_BL), CUT)[1]


def evaluate(found: Losses, batch: Baskets, data: Examples) -> dict[str, Any]:
    """Sums per domain [Z]: nll and tokens (items to be found), recall, ndcg and users."""
    dtype, wanted_BL = found.nll.dtype, batch.target_weight_BL > 0
    top_BC = best(found.outputs, batch)
    hit_BC = (
        ((top_BC[:, :, None] == batch.targets_BL[:, None]) & wanted_BL[:, None])
        .any(2)
        .astype(dtype)
    )
    number_B, most = wanted_BL.sum(1), jnp.arange(CUT)
    gain_C = 1 / jnp.log2(most.astype(dtype) + 2)
    ideal_B = jnp.where(most[None] < number_B[:, None], gain_C[None], 0).sum(1)
    recall_B = hit_BC.sum(1) / jnp.clip(number_B, 1, CUT)
    ndcg_B = (hit_BC * gain_C[None]).sum(1) / jnp.maximum(ideal_B, gain_C[0])
    users_B = number_B > 0

    def add(x_B):
        return by_domain(x_B.astype(dtype), users_B, batch.domain_B, len(data.domains))

    return {
        "nll": add(jnp.where(wanted_BL, found.nll, 0).sum(1)),
        "tokens": add(number_B),
        "recall": add(recall_B),
        "ndcg": add(ndcg_B),
        "users": add(users_B),
    }


def summary(total: Mapping[str, Any], data: Examples) -> dict[str, float]:
    """ "loss" (nats per item to be found), "recall@20" and "ndcg@20" (means over users),
    "domain/NAME/ndcg@20".
    """
    users = max(total["users"].sum(), 1)
    result = {
        "loss": total["nll"].sum() / max(total["tokens"].sum(), 1),
        f"recall@{CUT}": total["recall"].sum() / users,
        f"ndcg@{CUT}": total["ndcg"].sum() / users,
    }
    for name, ndcg, number in zip(data.domains, total["ndcg"], total["users"], strict=True):
        if number:
            result[f"domain/{name}/ndcg@{CUT}"] = ndcg / number
    return result


def headline(figures: Mapping[str, Any]) -> str:
    recall, ndcg = figures[f"recall@{CUT}"], figures[f"ndcg@{CUT}"]
    return f"held out recall@{CUT} {recall:.4f}, NDCG@{CUT} {ndcg:.4f}, loss {figures['loss']:.4f}"


def finish(cfg: Config, trained: Trained, data: Examples, workdir: Path) -> dict[str, Any]:
    """Writes predictions.jsonl: of each held-out user the items shown, those to be found, and the
    20 recommended, best first.
    """

    def ask(model, batch):
        return best(scores(model, batch, jax.random.key(0), False)[0], batch)

    index_R, top_RC = contract.of_heldout(cfg, trained, data, ask)
    market = data.about

    def names(items):
        return [market.items[i] for i in items]

    contract.write_predictions(
        workdir,
        (
            {
                "user": market.users["heldout"][i],
                "shown": names(market.shown[i]),
                "wanted": names(market.hidden[i]),
                "recommended": names(item for item in top if item < len(market.items)),
            }
            for i, top in zip(index_R, top_RC, strict=True)
        ),
    )
    return {}


def table(cfg: Config, data: Examples, figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    rows = rivals.table(data, tune=not cfg.smoke) | {"model": figures}
    return {
        name: {key: row[key] for key in (f"recall@{CUT}", f"ndcg@{CUT}")}
        for name, row in rows.items()
    }


def random(cfg: Config, step: int) -> Baskets:
    """Random baskets, half of them not full."""
    rng = np.random.default_rng([cfg.seed, step])
    num, length = cfg.train.batch_size, cfg.data.seq_len
    size = rng.integers(1, length + 1, (num, 1))
    size[::2] = length
    weight_BL = (np.arange(length)[None] < size).astype(np.float32)
    items_BL = (rng.integers(0, sum(_items(cfg)), (num, length)) * weight_BL).astype(np.int32)
    row_B = np.arange(num, dtype=np.int32)
    return Baskets(items_BL, weight_BL, items_BL, weight_BL, 0 * row_B, row_B)


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
    table=table,
    random=random,
)
