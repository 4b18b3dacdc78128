"""Baselines of text classification: the most frequent label, and a linear SVM on TF-IDF of words
and pairs of words.

Shapes: N training texts, M held-out texts.
"""

from collections.abc import Sequence

import numpy as np

from moe_jax.data.examples import Examples

# Baseline -> figure -> number.
BaselineFigures = dict[str, dict[str, float | str]]


def baseline_figures(data: Examples) -> BaselineFigures:
    """Returns accuracy and macro-averaged F1 of each baseline on the held-out part."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    texts, label_N = data.about.raw["train"]
    heldout_texts, heldout_label_M = data.about.raw["heldout"]
    tfidf = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    machine = LinearSVC(random_state=0)
    machine.fit(tfidf.fit_transform(texts), label_N)
    predicted_M = machine.predict(tfidf.transform(heldout_texts))
    return {
        "majority": figures(majority(label_N, len(heldout_texts)), heldout_label_M),
        "TF-IDF + linear SVM": figures(predicted_M, heldout_label_M),
    }


def majority(label_N: np.ndarray, number: int) -> np.ndarray:
    """Returns the most frequent label of the training part, `number` times."""
    return np.full(number, np.bincount(label_N).argmax())


def figures(predicted_M: Sequence[int] | np.ndarray, label_M: np.ndarray) -> dict[str, float | str]:
    """Returns the accuracy, and the mean of F1 over the classes."""
    from sklearn.metrics import f1_score

    predicted = np.asarray(predicted_M)
    accuracy = (predicted == label_M).mean()
    macro_f1 = f1_score(label_M, predicted, average="macro", zero_division=0)
    return {"accuracy": float(accuracy), "macro_f1": float(macro_f1)}
