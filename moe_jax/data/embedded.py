"""Packs the embedded text in memory when a run starts.

It needs no preparation: the first step follows after a second or two.
"""

from collections.abc import Iterable

import numpy as np

from moe_jax.data import pack, sources
from moe_jax.data.documents import AnyDocument
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
    surveyed = survey(pairs)
    domains = surveyed.domains
    tokenizer = bytes_tokenizer()
    # All domains shuffled together; held out, each row is of one domain.
    train = _joined(pack.pack_train(only(pairs, "train"), seq_len, tokenizer, domains, seed))
    heldout = _joined(pack.pack_heldout(only(pairs, "heldout"), seq_len, tokenizer, domains))

    def text(split: str, domain: str) -> bytes:
        texts = [document.text for document in only(pairs, split) if document.domain == domain]
        return "".join(texts).encode("utf-8")

    return Part(
        spec=spec,
        tokenizer=tokenizer,
        seq_len=seq_len,
        domains=domains,
        train=in_memory(train),
        heldout=in_memory(heldout),
        heldout_domain_R=heldout.domain_RS[:, 0],
        documents=surveyed.documents,
        text_bytes=surveyed.text_bytes,
        # The ids of `bytes` stand for exactly the bytes of the text.
        heldout_piece_bytes=surveyed.text_bytes["heldout"],
        text=text,
        fingerprint=fingerprint(surveyed, tokenizer, seq_len, heldout_every, seed),
    )


def _slice(
    pairs: list[tuple[str, AnyDocument]], sliced: str, most_bytes: int
) -> list[tuple[str, AnyDocument]]:
    """Returns the pairs with at most `most_bytes` of each domain in the split `sliced` (0: all).

    At least one document of each domain stays. They are drawn by a fixed shuffle of the domain, not
    by the run's seed: a slice is one data set, the same for every run and whatever other domains
    are chosen. The other split stays as it is.
    """
    if not most_bytes:
        return pairs
    # By number: equal documents would be one in a set of documents.
    kept = {i for i, (split, _) in enumerate(pairs) if split != sliced}
    by_domain: dict[str, list[int]] = {}
    for i, (split, document) in enumerate(pairs):
        if split == sliced:
            by_domain.setdefault(document.domain, []).append(i)
    for indices in by_domain.values():
        shuffled = np.random.default_rng(0).permutation(np.array(indices))
        # The size of the first document, of the first two, and so on.
        ends = np.cumsum([len(pairs[i][1].text.encode("utf-8")) for i in shuffled])
        fitting = int(np.searchsorted(ends, most_bytes, side="right"))
        kept.update(shuffled[: max(1, fitting)].tolist())
    return [pair for i, pair in enumerate(pairs) if i in kept]


def _joined(blocks: Iterable[pack.Rows]) -> pack.Rows:
    """Returns all rows of the blocks as one."""
    # Embedded text is learned whole, so the last field is not there.
    fields = zip(*(block[:4] for block in blocks))
    return pack.Rows(*map(np.concatenate, fields))
