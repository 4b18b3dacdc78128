"""Baselines of text classification: the most frequent label, and a linear SVM on TF-IDF of words
and pairs of words.
"""

from collections.abc import Sequence

import numpy as np

from moe_jax.data.examples import Examples

Table = dict[str, dict[str, float | str]]


def table(data: Examples) -> Table:
    """Accuracy and macro-averaged F1 on the held-out part; seconds of fitting are not counted."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    (texts, label_N), (held_texts, held_label_M) = (
        data.about.raw["train"],
        data.about.raw["heldout"],
    )
    tfidf = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    machine = LinearSVC(random_state=0).fit(tfidf.fit_transform(texts), label_N)
    guessed_M = machine.predict(tfidf.transform(held_texts))
    return {
        "majority": figures(majority(label_N, len(held_texts)), held_label_M),
        "TF-IDF + linear SVM": figures(guessed_M, held_label_M),
    }


def majority(label_N: np.ndarray, number: int) -> np.ndarray:
    """The most frequent label of the training part, `number` times."""
    return np.full(number, np.bincount(label_N).argmax())


def figures(guessed_M: Sequence[int] | np.ndarray, label_M: np.ndarray) -> dict[str, float | str]:
    """Accuracy, and the mean over classes of F1."""
    from sklearn.metrics import f1_score

    guessed = np.asarray(guessed_M)
    macro = f1_score(label_M, guessed, average="macro", zero_division=0)
    return {"accuracy": float((guessed == label_M).mean()), "macro_f1": float(macro)}
