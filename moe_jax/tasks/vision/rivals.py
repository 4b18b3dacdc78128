"""Baselines of images and recordings: the most frequent label, multinomial logistic regression, the
nearest neighbours.
"""

import warnings

import numpy as np

from moe_jax.data.examples import Examples
from moe_jax.tasks.classification.rivals import Table, figures, majority

NEIGHBOURS = 5
MOST_ITERATIONS = 200  # of the logistic regression
STEPS = 2_000_000  # iterations times examples: a large set has seen enough after fewer


def table(data: Examples) -> Table:
    """Accuracy and macro-averaged F1 on the held-out part, from whole pixels or pooled frames,
    unchanged copies only.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (values_NF, label_N), (held_MF, held_label_M) = (
        data.about.raw["train"],
        data.about.raw["heldout"],
    )
    scale = max(1.0, float(np.abs(values_NF).max()))
    values_NF, held_MF = (v.astype(np.float32) / scale for v in (values_NF, held_MF))
    iterations = min(MOST_ITERATIONS, max(20, STEPS // len(label_N)))
    logistic = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=iterations))
    nearest = KNeighborsClassifier(NEIGHBOURS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        guesses = {
            n: m.fit(values_NF, label_N).predict(held_MF)
            for n, m in (("logistic", logistic), ("knn", nearest))
        }
    return {
        "majority": figures(majority(label_N, len(held_label_M)), held_label_M),
        "logistic regression": figures(np.asarray(guesses["logistic"]), held_label_M),
        f"{NEIGHBOURS} nearest neighbours": figures(np.asarray(guesses["knn"]), held_label_M),
    }
