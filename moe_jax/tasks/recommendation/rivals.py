"""Baselines of recommendation: the most popular items, and item-based nearest neighbours (Sarwar et
al. 2001), tuned on training users.

Shapes: U users, I items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.data.examples import Examples
from moe_jax.tasks.classification.rivals import Table
from moe_jax.tasks.recommendation.data import divided

CUT = 20  # length of the lists that are judged
BLOCK = 512  # users, or items, at once
NEIGHBOURS = (20, 100, 500, 2500)
SHRINKAGES = (0.0, 5.0, 20.0)
TUNED_ON = 10  # one training user in so many


def table(data: Examples, tune: bool = True) -> Table:
    """Recall and NDCG at 20 of held-out users; without `tune` by the first of the settings, for
    that takes most of the time.
    """
    market = data.about
    num = len(market.items)
    train = matrix(market.train, num)
    popular_I = np.asarray(train.sum(0)).reshape(-1)
    neighbours, shrinkage = tuned(market.train, num) if tune else (NEIGHBOURS[0], SHRINKAGES[0])
    similar = similarity(train, neighbours, shrinkage)

    def by_popularity(seen):
        return np.broadcast_to(popular_I, (seen.shape[0], num))

    def by_neighbours(seen):
        return (seen @ similar).toarray()

    return {
        "popularity": judged(by_popularity, market.shown, market.hidden, num),
        f"item-kNN (k {neighbours}, shrinkage {shrinkage:g})": judged(
            by_neighbours, market.shown, market.hidden, num
        ),
    }


def matrix(lists: Sequence[np.ndarray], num_items: int) -> Any:
    """Sparse [U, I] of ones."""
    from scipy.sparse import csr_array

    starts = np.concatenate([[0], np.cumsum([len(items) for items in lists])])
    ones = np.ones(starts[-1], np.float32)
    return csr_array((ones, np.concatenate(lists), starts), shape=(len(lists), num_items))


def similarity(train: Any, neighbours: int, shrinkage: float) -> Any:
    """Sparse [I, I]: of each item (column) its `neighbours` most similar others, users in common /
    (|i| |j| + shrinkage).
    """
    from scipy.sparse import csc_array, hstack

    norm_I = np.sqrt(np.asarray(train.sum(0)).reshape(-1))
    columns = []
    for start in range(0, train.shape[1], BLOCK):
        some = slice(start, min(start + BLOCK, train.shape[1]))
        common = (train.T @ train[:, some]).toarray()
        values = common / np.maximum(norm_I[:, None] * norm_I[None, some] + shrinkage, 1e-9)
        values[np.arange(some.start, some.stop), np.arange(values.shape[1])] = 0
        if neighbours < len(values):
            least = np.partition(values, -neighbours, axis=0)[-neighbours]
            values[values < least[None]] = 0
        columns.append(csc_array(values))
    return hstack(columns).tocsr()


def tuned(lists: Sequence[np.ndarray], num_items: int) -> tuple[int, float]:
    """(neighbours, shrinkage) with the best NDCG on one training user in TUNED_ON, who is left out
    of the counts.
    """
    asked = [divided(str(i), items) for i, items in enumerate(lists) if i % TUNED_ON == 0]
    train = matrix([items for i, items in enumerate(lists) if i % TUNED_ON], num_items)
    seen, wanted = zip(*asked)
    best = {}
    for shrinkage in SHRINKAGES:
        for neighbours in NEIGHBOURS:
            similar = similarity(train, neighbours, shrinkage)

            def score(some, similar=similar):
                return (some @ similar).toarray()

            best[neighbours, shrinkage] = judged(score, seen, wanted, num_items)[f"ndcg@{CUT}"]
    return max(best, key=lambda choice: best[choice])


def judged(
    score: Any, seen: Sequence[np.ndarray], wanted: Sequence[np.ndarray], num_items: int
) -> dict[str, float | str]:
    """Mean figures of users, of scores [u, I] of a function of sparse [u, I] of seen items, which
    are not recommended again.
    """
    found = []
    for start in range(0, len(seen), BLOCK):
        some = slice(start, start + BLOCK)
        shown = matrix(seen[some], num_items)
        scores = np.where(shown.toarray() > 0, -np.inf, score(shown))
        found.append(ranking(scores, wanted[some]))
    recall, ndcg = np.concatenate(found, axis=1).mean(1)
    return {f"recall@{CUT}": float(recall), f"ndcg@{CUT}": float(ndcg)}


def ranking(scores_UI: np.ndarray, wanted: Sequence[np.ndarray]) -> np.ndarray:
    """[2, U]: recall and NDCG of the CUT highest scores (Liang et al. 2018, section 4.1): hits /
    min(CUT, wanted items); binary gains.
    """
    order_UC = np.argsort(-scores_UI, axis=1, kind="stable")[:, :CUT]
    hit_UC = np.array([np.isin(order, items) for order, items in zip(order_UC, wanted)])
    gain_C = 1 / np.log2(np.arange(2, CUT + 2))
    most_U = np.array([min(CUT, len(items)) for items in wanted])
    ideal_U = np.cumsum(gain_C)[most_U - 1]
    return np.stack([hit_UC.sum(1) / most_U, (hit_UC @ gain_C[: hit_UC.shape[1]]) / ideal_U])
