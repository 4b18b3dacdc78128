"""The baseline of translation: the target of the training pair whose source is nearest, by cosine
of TF-IDF of words and pairs of words.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.data.examples import Examples
from moe_jax.tasks.classification.rivals import BaselineFigures

# Held-out sentences compared at once.
BLOCK = 256


def baseline_figures(data: Examples) -> BaselineFigures:
    """Returns sacreBLEU and chrF of each baseline on all held-out pairs.

    The baselines are the nearest neighbour, and giving the source back untranslated.
    """
    known_sources, known_targets = data.about.raw["train"]
    sources, targets = data.about.raw["heldout"]
    neighbours = nearest(known_sources, sources)
    return {
        "source copied": scores(sources, targets),
        "nearest neighbour (TF-IDF)": scores([known_targets[i] for i in neighbours], targets),
    }


def nearest(sources: Sequence[str], asked: Sequence[str]) -> np.ndarray:
    """Returns the index in `sources` of the most similar one, for each of `asked`."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    tfidf: Any = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    known, wanted = tfidf.fit_transform(sources), tfidf.transform(asked)
    neighbours = []
    for start in range(0, wanted.shape[0], BLOCK):
        # TF-IDF vectors have length 1, so products are cosines.
        cosine = wanted[start : start + BLOCK] @ known.T
        neighbours.append(np.asarray(cosine.argmax(axis=1)).reshape(-1))
    return np.concatenate(neighbours)


def scores(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """Returns BLEU and chrF by sacrebleu, one reference each, with the signature of the BLEU."""
    import sacrebleu

    metric = sacrebleu.BLEU()
    bleu = metric.corpus_score(list(outputs), [list(references)])
    chrf = sacrebleu.CHRF().corpus_score(list(outputs), [list(references)])
    return {
        "bleu": float(bleu.score),
        "chrf": float(chrf.score),
        # It is known only after a score, for it says how many references there were.
        "signature": str(metric.get_signature()),
    }
