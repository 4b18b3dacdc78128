"""Pairs of sentences: the Bible in English and Spanish, Debian's descriptions in English and
German, French, Italian; WMT of TFDS.

One pair in `heldout_every` is held out, by a hash of the words of its source; of the Bible whole
chapters are, because neighbouring verses repeat each other; of a TFDS set its own test or
validation part is. A training pair whose source is also held out is left out, so equal sources are
never on both sides. One tokenizer serves both languages.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moe_jax.data import examples
from moe_jax.data.examples import Examples, Fields, Pairs, Ragged
from moe_jax.data.records import folder as files
from moe_jax.data.records import tfds_examples, vocabulary
from moe_jax.data.records.split import key_of_text, split_examples
from moe_jax.data.tokenizer.contract import Tokenizer
from moe_jax.errors import UserError

KIND = "translation"


class Pair(NamedTuple):
    source: str
    target: str
    domain: str
    split: str  # "train", "heldout", or "": by the key
    key: bytes  # what is held out together


class Parallel(NamedTuple):
    """A set: the names of its languages and how its pairs are read."""

    source: str
    target: str
    read: Callable[[str], Iterator[Pair]]


def read_bible(folder: str) -> Iterator[Pair]:
    """Verses of the King James Bible and the Reina-Valera of 1909; the domain is the testament."""
    domain = "old"
    for verse, english, spanish in files.read_tsv(
        files.find(folder, KIND, "bible_kjv_rv1909_en_es.tsv.gz", "bible_en_es"), 3, header=False
    ):
        domain = "new" if verse.startswith("Matthew ") else domain
        yield Pair(english, spanish, domain, "", verse.rpartition(":")[0].encode())


def _debian(language: str) -> Callable[[str], Iterator[Pair]]:
    def read(folder: str) -> Iterator[Pair]:
        path = files.find(folder, KIND, f"ddtp_en_{language}.tsv.gz", f"debian_en_{language}")
        return (
            Pair(source, target, "debian", "", key_of_text(source))
            for source, target in files.read_tsv(path, 2, header=False)
        )

    return read


DATASETS = {
    "bible_en_es": Parallel("en", "es", read_bible),
    **{f"debian_en_{to}": Parallel("en", to, _debian(to)) for to in ("de", "fr", "it")},
}


def _tfds(spec: str) -> Parallel:
    """A set of pairs of TFDS, `tfds:wmt16_translate/de-en#en-de`: after the # source and target
    (default: as the set names them).
    """
    from moe_jax.data.tfds_import import tfds

    stored = tfds_examples.open_stored(spec)
    features = stored.features
    there = sorted(key for key in features if isinstance(features[key], tfds.features.Text))
    wanted = stored.field.split("-") if stored.field else there
    if len(wanted) != 2 or not set(wanted) <= set(there):
        asked = f"#{stored.field}" if stored.field else "no languages"
        raise UserError(
            f"dataset {stored.name} has texts in {', '.join(there)}; {asked} named: give "
            "#SOURCE-TARGET"
        )
    source, target = wanted

    def read(folder: str) -> Iterator[Pair]:
        for record in stored.both(""):
            yield Pair(record.text(source), record.text(target), stored.name, record.split, b"")

    return Parallel(source, target, read)


def open_translation(
    name: str,
    folder: str,
    *,
    seq_len: int,
    vocab_size: int,
    prefix: bool,
    heldout_every: int,
    seed: int,
) -> Examples:
    """Opens a key of DATASETS, or tfds:NAME, as rows `examples.SourceTarget`, or with `prefix`
    `examples.PrefixTarget`.

    The tokenizer is a BPE of `vocab_size` ids, trained on both sides of the training part. Training
    pairs of which a side (or, with `prefix`, the whole) is longer than seq_len are left out;
    held-out ones are cut. `about` is `examples.Pairs`. `seed` decides nothing.
    """
    if name.startswith(tfds_examples.PREFIX):
        source, target, read = _tfds(name)
    elif name in DATASETS:
        source, target, read = DATASETS[name]
    else:
        raise files.unknown(KIND, name, [*DATASETS, "tfds:NAME"])
    parts = split(read(folder), heldout_every)
    for part, pairs in parts.items():
        if not pairs:
            raise UserError(f"{name} has no {part} pair: lower heldout_every ({heldout_every})")
    # A sample of every n-th text would be of one language for an even n, so a pair is one text
    # here.
    tokens = vocabulary.make(
        f"bpe:{vocab_size}", [f"{pair.source}\n{pair.target}" for pair in parts["train"]]
    )
    return _rows(name, parts, seq_len, tokens, source, target, prefix)


def split(found: Iterator[Pair], heldout_every: int) -> dict[str, list[Pair]]:
    """Returns the pairs of both splits, without training pairs whose source is held out as well."""
    parts = split_examples(found, heldout_every)
    held_out = {key_of_text(pair.source) for pair in parts["heldout"]}
    train = [pair for pair in parts["train"] if key_of_text(pair.source) not in held_out]
    return {**parts, "train": train}


def _rows(
    name: str,
    parts: dict[str, list[Pair]],
    seq_len: int,
    tokens: Tokenizer,
    source: str,
    target: str,
    prefix: bool,
) -> Examples:
    domains = tuple(dict.fromkeys(pair.domain for part in parts.values() for pair in part))
    layout = _one_row if prefix else _two_rows
    encoded = {split: _encode(pairs, tokens) for split, pairs in parts.items()}
    fits = [_fits(len(a), len(b), seq_len, prefix) for a, b in encoded["train"]]
    if not any(fits):
        raise UserError(
            f"{name}: no training pair fits into data.seq_len = {seq_len} tokens: raise it"
        )
    raw = {s: ([p.source for p in pairs], [p.target for p in pairs]) for s, pairs in parts.items()}
    parts = {**parts, "train": [pair for pair, fit in zip(parts["train"], fits) if fit]}
    encoded["train"] = [pair for pair, fit in zip(encoded["train"], fits) if fit]
    rows = {split: layout(pairs, seq_len, tokens) for split, pairs in encoded.items()}
    domain = {
        split: np.array([domains.index(p.domain) for p in pairs], np.int32)
        for split, pairs in parts.items()
    }

    def fetch(split: str, index_B: np.ndarray) -> Fields:
        fields = _prefix_fields if prefix else _pair_fields
        return fields(rows[split], domain[split][index_B], index_B, seq_len)

    arrays = [array for split in parts for part in rows[split] for array in part] + list(
        domain.values()
    )
    left = len(fits) - sum(fits)
    cut = sum(not _fits(len(a), len(b), seq_len, prefix) for a, b in encoded["heldout"])
    notes = (
        (
            left,
            f"{left} of {len(fits)} training pairs do not fit into {seq_len} tokens and are left "
            "out",
        ),
        (cut, f"{cut} of {len(parts['heldout'])} held-out pairs are cut"),
    )
    return Examples(
        spec=name,
        batch_type=examples.PrefixTarget if prefix else examples.SourceTarget,
        seq_len=seq_len,
        domains=domains,
        rows={split: len(pairs) for split, pairs in parts.items()},
        fetch=fetch,
        heldout_domain_R=domain["heldout"],
        fingerprint=examples.fingerprint(
            [name, seq_len, prefix, domains, tokens.fingerprint], arrays
        ),
        about=Pairs(tokens, source, target, raw),
        notes=tuple(note for number, note in notes if number),
    )


Ids = list[tuple[np.ndarray, np.ndarray]]  # of each pair, source and target, without boundaries


def _encode(pairs: list[Pair], tokens: Tokenizer) -> Ids:
    sources, targets = (
        tokens.encode_many(texts) for texts in zip(*((pair.source, pair.target) for pair in pairs))
    )
    return [(a.astype(tokens.dtype), b.astype(tokens.dtype)) for a, b in zip(sources, targets)]


def _fits(source: int, target: int, seq_len: int, prefix: bool) -> bool:
    return source + target + 2 <= seq_len if prefix else max(source, target) + 1 <= seq_len


def _two_rows(pairs: Ids, seq_len: int, tokens: Tokenizer) -> tuple[Ragged, Ragged]:
    """Sources with a boundary behind, targets with one on each side."""
    end = np.array([tokens.boundary_id], tokens.dtype)
    sources = [np.concatenate([source[: seq_len - 1], end]) for source, _ in pairs]
    targets = [np.concatenate([end, target[: seq_len - 1], end]) for _, target in pairs]
    return examples.ragged(sources), examples.ragged(targets)


def _one_row(pairs: Ids, seq_len: int, tokens: Tokenizer) -> tuple[Ragged, Ragged]:
    """(prefixes' lengths, boundary source boundary target boundary); a source that is cut leaves
    half of the row.
    """
    end = np.array([tokens.boundary_id], tokens.dtype)
    joined, lengths = [], []
    for source, target in pairs:
        source = source if len(source) + len(target) + 2 <= seq_len else source[: seq_len // 2 - 1]
        lengths.append(np.array([len(source) + 2], np.int32))
        joined.append(np.concatenate([end, source, end, target[: seq_len - 2 - len(source)], end]))
    return examples.ragged(lengths), examples.ragged(joined)


def _pair_fields(
    rows: tuple[Ragged, Ragged], domain_B: np.ndarray, index_B: np.ndarray, seq_len: int
) -> Fields:
    source_BS, seen_BS = examples.padded(rows[0], index_B, seq_len)
    source = {
        "source_BS": source_BS.astype(np.int32),
        "source_segment_BS": seen_BS.astype(np.int32),
    }
    return {**source, **_predictions(rows[1], domain_B, index_B, seq_len)}


def _prefix_fields(
    rows: tuple[Ragged, Ragged], domain_B: np.ndarray, index_B: np.ndarray, seq_len: int
) -> Fields:
    fields = _predictions(rows[1], domain_B, index_B, seq_len)
    place_S, length_B = np.arange(seq_len), rows[0].flat[index_B]
    weighs_BS = (fields["segment_BS"] > 0) & (place_S[None] >= length_B[:, None] - 1)
    prefix_BS = (place_S[None] < length_B[:, None]).astype(np.int32)
    return {**fields, "weight_BS": weighs_BS.astype(np.float32), "prefix_BS": prefix_BS}


def _predictions(
    sequences: Ragged, domain_B: np.ndarray, index_B: np.ndarray, seq_len: int
) -> Fields:
    """Inputs and, one place on, targets of sequences that begin and end with the boundary."""
    values, there = examples.padded(sequences, index_B, seq_len + 1)
    there_BS = there[:, 1:]  # a place is there if what it predicts is
    return {
        "tokens_BS": np.where(there_BS, values[:, :-1], 0).astype(np.int32),
        "targets_BS": values[:, 1:].astype(np.int32),
        **examples.one_segment(there_BS),
        "domain_BS": np.where(there_BS, domain_B[:, None], 0),
    }
