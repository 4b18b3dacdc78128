"""Baselines of images and recordings: the most frequent label, multinomial logistic regression, the
nearest neighbours.

Shapes: N training examples, M held-out ones, F features.
"""

import warnings

import numpy as np

from moe_jax.data.examples import Examples
from moe_jax.tasks.classification.rivals import BaselineFigures, figures, majority

NEIGHBOURS = 5
# Of the logistic regression.
MOST_ITERATIONS = 200
# Iterations times examples: a large set has seen enough after fewer.
STEPS = 2_000_000


def baseline_figures(data: Examples) -> BaselineFigures:
    """Returns accuracy and macro-averaged F1 of each baseline on the held-out part.

    They learn from whole pixels or pooled frames, of unchanged examples alone.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    values_NF, label_N = data.about.raw["train"]
    heldout_MF, heldout_label_M = data.about.raw["heldout"]
    # Pixels go from 0 to 255 and frames are standardised: both are brought below 1.
    scale = max(1.0, float(np.abs(values_NF).max()))
    values_NF = values_NF.astype(np.float32) / scale
    heldout_MF = heldout_MF.astype(np.float32) / scale
    iterations = min(MOST_ITERATIONS, max(20, STEPS // len(label_N)))
    logistic = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=iterations))
    methods = {
        "logistic regression": logistic,
        f"{NEIGHBOURS} nearest neighbours": KNeighborsClassifier(NEIGHBOURS),
    }
    result = {"majority": figures(majority(label_N, len(heldout_label_M)), heldout_label_M)}
    # The iterations are bounded on purpose, so that they may end before the optimum is no news.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name, method in methods.items():
            predicted_M = method.fit(values_NF, label_N).predict(heldout_MF)
            result[name] = figures(np.asarray(predicted_M), heldout_label_M)
    return result
