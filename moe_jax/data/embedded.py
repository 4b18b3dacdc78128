"""The embedded text, packed in memory when a run starts: no preparation, the first step after a
second or two.
"""

from collections.abc import Iterable

import numpy as np

from moe_jax.data import pack, sources
from moe_jax.data.documents import Document
from moe_jax.data.part import Part, in_memory
from moe_jax.data.survey import fingerprint, only, survey
from moe_jax.data.tokenizer import bytes_tokenizer


def open_embedded(
    spec: str, *, seq_len: int, slice_bytes: int, heldout_bytes: int, heldout_every: int, seed: int
) -> Part:
    """Packs the source `spec` (embedded[:DOMAIN,...]) as bytes.

    `slice_bytes` bounds the training text of each domain, `heldout_bytes` its held-out text (0: all
    of it). The two are drawn apart, so that runs on training slices of different sizes are compared
    on the same held-out documents.
    """
    pairs = list(pack.split(sources.read(spec), heldout_every))
    pairs = _slice(_slice(pairs, "train", slice_bytes), "heldout", heldout_bytes)
    found = survey(pairs)
    tokenizer = bytes_tokenizer()
    train = _joined(pack.pack_train(only(pairs, "train"), seq_len, tokenizer, found.domains, seed))
    heldout = _joined(pack.pack_heldout(only(pairs, "heldout"), seq_len, tokenizer, found.domains))

    def text(split: str, domain: str) -> bytes:
        return b"".join(d.text.encode("utf-8") for d in only(pairs, split) if d.domain == domain)

    return Part(
        spec=spec,
        tokenizer=tokenizer,
        seq_len=seq_len,
        domains=found.domains,
        train=in_memory(train),
        heldout=in_memory(heldout),
        heldout_domain_R=heldout.domain_RS[:, 0],
        documents=found.documents,
        text_bytes=found.text_bytes,
        heldout_piece_bytes=found.text_bytes["heldout"],
        text=text,
        fingerprint=fingerprint(found, tokenizer, seq_len, heldout_every, seed),
    )


def _slice(
    pairs: list[tuple[str, Document]], which: str, most_bytes: int
) -> list[tuple[str, Document]]:
    """All of the other split, and of each domain as many documents of the split `which` as fit, at
    least one.

    They are drawn by a fixed shuffle of the domain, not by the run's seed: a slice is one data set,
    the same for every run and whatever other domains are chosen.
    """
    if not most_bytes:
        return pairs
    chosen = {i for i, (split, _) in enumerate(pairs) if split != which}
    for domain in {document.domain for _, document in pairs}:
        mine = [
            i
            for i, (split, document) in enumerate(pairs)
            if (split, document.domain) == (which, domain)
        ]
        mine = np.random.default_rng(0).permutation(np.array(mine))
        ends = np.cumsum([len(pairs[i][1].text.encode("utf-8")) for i in mine])
        chosen.update(mine[: max(1, int(np.searchsorted(ends, most_bytes, side="right")))].tolist())
    return [pair for i, pair in enumerate(pairs) if i in chosen]


def _joined(blocks: Iterable[pack.Rows]) -> pack.Rows:
    return pack.Rows(*(np.concatenate(fields) for fields in zip(*blocks)))
