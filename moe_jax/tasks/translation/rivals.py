"""The baseline of translation: the target of the training pair whose source is nearest, by cosine
of TF-IDF of words and pairs of words.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.data.examples import Examples
from moe_jax.tasks.classification.rivals import Table

BLOCK = 256  # held-out sentences compared at once


def table(data: Examples) -> Table:
    """sacreBLEU and chrF of the nearest neighbour, and of giving the source back untranslated, on
    all held-out pairs.
    """
    raw = data.about.raw
    sources, targets = raw["heldout"]
    found = nearest(raw["train"][0], sources)
    return {
        "source copied": scores(sources, targets),
        "nearest neighbour (TF-IDF)": scores([raw["train"][1][i] for i in found], targets),
    }


def nearest(sources: Sequence[str], asked: Sequence[str]) -> np.ndarray:
    """The index in `sources` of the most similar one, for each of `asked`."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    tfidf: Any = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    known, wanted = tfidf.fit_transform(sources), tfidf.transform(asked)
    blocks = [wanted[i : i + BLOCK] @ known.T for i in range(0, wanted.shape[0], BLOCK)]
    return np.concatenate([np.asarray(block.argmax(axis=1)).reshape(-1) for block in blocks])


def scores(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """BLEU and chrF by sacrebleu, one reference each, with the signature of the BLEU."""
    import sacrebleu

    bleu = sacrebleu.BLEU()
    score = bleu.corpus_score(list(outputs), [list(references)]).score
    chrf = sacrebleu.CHRF().corpus_score(list(outputs), [list(references)]).score
    return {"bleu": float(score), "chrf": float(chrf), "signature": str(bleu.get_signature())}
