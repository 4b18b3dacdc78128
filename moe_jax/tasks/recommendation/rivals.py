"""Baselines of recommendation: the most popular items, and item-based nearest neighbours (Sarwar et
al. 2001), tuned on training users.

Shapes: U users, I items, C items recommended.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.data.examples import Examples
from moe_jax.tasks.classification.rivals import BaselineFigures
from moe_jax.tasks.recommendation.data import divided

# Length of the lists that are judged.
CUT = 20
# Users, or items, at once: their scores for all items are dense.
BLOCK = 512
# The settings that are tried, each with each.
NEIGHBOURS = (20, 100, 500, 2500)
SHRINKAGES = (0.0, 5.0, 20.0)
# One training user in so many.
TUNED_ON = 10


def baseline_figures(data: Examples, tune: bool = True) -> BaselineFigures:
    """Returns recall and NDCG at 20 of each baseline, over held-out users.

    Without `tune` the first of the settings is taken, for tuning takes most of the time.
    """
    market = data.about
    num = len(market.items)
    train = matrix(market.train, num)
    popular_I = np.asarray(train.sum(0)).reshape(-1)
    neighbours, shrinkage = tuned(market.train, num) if tune else (NEIGHBOURS[0], SHRINKAGES[0])
    similar = similarity(train, neighbours, shrinkage)

    def by_popularity(shown):
        return np.broadcast_to(popular_I, (shown.shape[0], num))

    def by_neighbours(shown):
        return (shown @ similar).toarray()

    knn_name = f"item-kNN (k {neighbours}, shrinkage {shrinkage:g})"
    return {
        "popularity": judged(by_popularity, market.shown, market.hidden, num),
        knn_name: judged(by_neighbours, market.shown, market.hidden, num),
    }


def matrix(lists: Sequence[np.ndarray], num_items: int) -> Any:
    """Returns the users' items as a sparse matrix [U, I] of ones."""
    from scipy.sparse import csr_array

    # CSR: the items of user u are those from starts[u] to starts[u + 1].
    starts = np.concatenate([[0], np.cumsum([len(items) for items in lists])])
    ones = np.ones(starts[-1], np.float32)
    return csr_array((ones, np.concatenate(lists), starts), shape=(len(lists), num_items))


def similarity(train: Any, neighbours: int, shrinkage: float) -> Any:
    """Returns sparse [I, I]: in each column an item's `neighbours` most similar others.

    The similarity is users in common / (|i| |j| + shrinkage), where |i| is the root of the number
    of users of i: without shrinkage it is the cosine.
    """
    from scipy.sparse import csc_array, hstack

    users_of_item_I = np.asarray(train.sum(0)).reshape(-1)
    norm_I = np.sqrt(users_of_item_I)
    num_items = train.shape[1]
    columns = []
    for start in range(0, num_items, BLOCK):
        block = slice(start, min(start + BLOCK, num_items))
        common = (train.T @ train[:, block]).toarray()
        norms = norm_I[:, None] * norm_I[None, block] + shrinkage
        # An item without training users has norm 0, and no users in common with any other.
        values = common / np.maximum(norms, 1e-9)
        # An item is no neighbour of its own.
        item_of_column = np.arange(block.start, block.stop)
        values[item_of_column, np.arange(len(item_of_column))] = 0
        # The smallest of the `neighbours` largest of each column; ties with it stay.
        if neighbours < len(values):
            smallest_kept = np.partition(values, -neighbours, axis=0)[-neighbours]
            values[values < smallest_kept[None]] = 0
        columns.append(csc_array(values))
    return hstack(columns).tocsr()


def tuned(lists: Sequence[np.ndarray], num_items: int) -> tuple[int, float]:
    """Returns (neighbours, shrinkage) with the best NDCG on one training user in TUNED_ON.

    These users are left out of the counts, as held-out users are.
    """
    tuned_on = [divided(str(i), items) for i, items in enumerate(lists) if i % TUNED_ON == 0]
    train = matrix([items for i, items in enumerate(lists) if i % TUNED_ON], num_items)
    shown, wanted = zip(*tuned_on)
    ndcg: dict[tuple[int, float], Any] = {}
    for shrinkage in SHRINKAGES:
        for neighbours in NEIGHBOURS:
            similar = similarity(train, neighbours, shrinkage)

            # The default binds the matrix of this turn of the loop.
            def score(users, similar=similar):
                return (users @ similar).toarray()

            figures = judged(score, shown, wanted, num_items)
            ndcg[neighbours, shrinkage] = figures[f"ndcg@{CUT}"]
    return max(ndcg, key=lambda setting: ndcg[setting])


def judged(
    score: Any, shown: Sequence[np.ndarray], wanted: Sequence[np.ndarray], num_items: int
) -> dict[str, float | str]:
    """Returns the mean recall and NDCG of users.

    `score`: of items shown to u users, sparse [u, I], the scores [u, I]. Items that are shown are
    not recommended again.
    """
    figures = []
    for start in range(0, len(shown), BLOCK):
        block = slice(start, start + BLOCK)
        shown_UI = matrix(shown[block], num_items)
        # What a user has is never recommended again.
        scores_UI = np.where(shown_UI.toarray() > 0, -np.inf, score(shown_UI))
        figures.append(ranking(scores_UI, wanted[block]))
    recall, ndcg = np.concatenate(figures, axis=1).mean(1)
    return {f"recall@{CUT}": float(recall), f"ndcg@{CUT}": float(ndcg)}


def ranking(scores_UI: np.ndarray, wanted: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the recall and NDCG of the CUT highest scores of each user, [2, U].

    Recall is hits / min(CUT, wanted items); NDCG has binary gains (Liang et al. 2018, section 4.1).
    """
    # Stable, so that equal scores are ranked by the number of the item on every machine.
    order_UC = np.argsort(-scores_UI, axis=1, kind="stable")[:, :CUT]
    hits = [np.isin(order_C, items) for order_C, items in zip(order_UC, wanted)]
    hit_UC = np.array(hits)
    # Ranks count from 1, so the first gain is 1 / log2(2) = 1.
    gain_C = 1 / np.log2(np.arange(2, CUT + 2))
    most_hits_U = np.array([min(CUT, len(items)) for items in wanted])
    # The best ranking has the wanted items on the first ranks.
    gains_so_far_C = np.cumsum(gain_C)
    ideal_U = gains_so_far_C[most_hits_U - 1]
    recall_U = hit_UC.sum(1) / most_hits_U
    # A set of less than CUT items has shorter rankings.
    ndcg_U = (hit_UC @ gain_C[: hit_UC.shape[1]]) / ideal_U
    return np.stack([recall_U, ndcg_U])
