"""Pairs of sentences: the Bible in English and Spanish, Debian's descriptions in English and
German, French, Italian; WMT of TFDS.

One pair in `heldout_every` is held out, by a hash of the words of its source; of the Bible whole
chapters are, because neighbouring verses repeat each other; of a TFDS set its own test or
validation part is. A training pair whose source is also held out is left out, so equal sources are
never on both sides. One tokenizer serves both languages.
"""

import itertools
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
    """A pair of sentences as it is read, with all that decides on which side it is."""

    source: str
    target: str
    domain: str
    # "train", "heldout", or "": by the key.
    split: str
    # Pairs of one key are held out together.
    key: bytes


class Parallel(NamedTuple):
    """A set: the names of its languages and how its pairs are read."""

    source: str
    target: str
    read: Callable[[str], Iterator[Pair]]


def read_bible(folder: str) -> Iterator[Pair]:
    """Yields the verses of the King James Bible and of the Reina-Valera of 1909.

    The domain is the testament, the key the chapter: "Genesis 1:2" -> "Genesis 1".
    """
    path = files.find(folder, KIND, "bible_kjv_rv1909_en_es.tsv.gz", "bible_en_es")
    domain = "old"
    for verse, english, spanish in files.read_tsv(path, 3, header=False):
        # The books are in their order, and Matthew is the first of the New Testament.
        if verse.startswith("Matthew "):
            domain = "new"
        chapter = verse.rpartition(":")[0]
        yield Pair(english, spanish, domain, "", chapter.encode())


def _debian(language: str) -> Callable[[str], Iterator[Pair]]:
    """Returns what reads Debian's descriptions in English and another language."""

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
    """Returns a set of pairs of TFDS, such as `tfds:wmt16_translate/de-en#en-de`.

    After the # stand source and target. Without them these are the two text features of the set, in
    the order of their names.
    """
    from moe_jax.data.tfds_import import tfds

    stored = tfds_examples.open_stored(spec)
    features = stored.features
    languages = sorted(key for key in features if isinstance(features[key], tfds.features.Text))
    wanted = stored.field.split("-") if stored.field else languages
    if len(wanted) != 2 or not set(wanted) <= set(languages):
        asked = f"#{stored.field}" if stored.field else "no languages"
        raise UserError(
            f"dataset {stored.name} has texts in {', '.join(languages)}; {asked} named: give "
            "#SOURCE-TARGET"
        )
    source, target = wanted

    def read(folder: str) -> Iterator[Pair]:
        del folder
        for record in stored.both(""):
            # A set of TFDS says which pairs are held out, so no key is needed.
            yield Pair(record.text(source), record.text(target), stored.name, record.split, b"")

    return Parallel(source, target, read)


def open_parallel(name: str) -> Parallel:
    """Returns the set that a key of DATASETS, or tfds:NAME, stands for."""
    if name.startswith(tfds_examples.PREFIX):
        return _tfds(name)
    if name not in DATASETS:
        raise files.unknown(KIND, name, [*DATASETS, "tfds:NAME"])
    return DATASETS[name]


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
    del seed
    parallel = open_parallel(name)
    parts = split(parallel.read(folder), heldout_every)
    for part, pairs in parts.items():
        if not pairs:
            raise UserError(f"{name} has no {part} pair: lower heldout_every ({heldout_every})")
    # A sample of every n-th text would be of one language for an even n, so a pair is one text
    # here.
    texts = [f"{pair.source}\n{pair.target}" for pair in parts["train"]]
    tokens = vocabulary.make(f"bpe:{vocab_size}", texts)
    about = Pairs(tokens, parallel.source, parallel.target, _raw(parts))
    return _examples(name, parts, about, seq_len, prefix)


def split(pairs: Iterator[Pair], heldout_every: int) -> dict[str, list[Pair]]:
    """Returns the pairs of both splits, without training pairs whose source is held out as well."""
    parts = split_examples(pairs, heldout_every)
    # A chapter is held out as a whole, and so a verse of it may come again in another one.
    held_out = {key_of_text(pair.source) for pair in parts["heldout"]}
    train = [pair for pair in parts["train"] if key_of_text(pair.source) not in held_out]
    return {**parts, "train": train}


def _raw(parts: dict[str, list[Pair]]) -> dict[str, tuple[list[str], list[str]]]:
    """Returns {split: (sources, targets)}, whole."""
    raw: dict[str, tuple[list[str], list[str]]] = {}
    for part, pairs in parts.items():
        sources = [pair.source for pair in pairs]
        targets = [pair.target for pair in pairs]
        raw[part] = sources, targets
    return raw


def _examples(
    name: str, parts: dict[str, list[Pair]], about: Pairs, seq_len: int, prefix: bool
) -> Examples:
    """Returns the rows of the pairs that fit: two sequences of each, or with `prefix` one."""
    tokens: Tokenizer = about.tokenizer
    domains = tuple(dict.fromkeys(pair.domain for part in parts.values() for pair in part))
    encoded = {part: _encode(pairs, tokens) for part, pairs in parts.items()}
    fits = {part: [_fits(pair, seq_len, prefix) for pair in encoded[part]] for part in parts}
    if not any(fits["train"]):
        raise UserError(
            f"{name}: no training pair fits into data.seq_len = {seq_len} tokens: raise it"
        )
    parts = {**parts, "train": list(itertools.compress(parts["train"], fits["train"]))}
    encoded["train"] = list(itertools.compress(encoded["train"], fits["train"]))
    layout = _one_row if prefix else _two_rows
    rows = {part: layout(pairs, seq_len, tokens) for part, pairs in encoded.items()}
    domain = {
        part: np.array([domains.index(pair.domain) for pair in pairs], np.int32)
        for part, pairs in parts.items()
    }

    def fetch(part: str, index_B: np.ndarray) -> Fields:
        fields = _prefix_fields if prefix else _pair_fields
        return fields(rows[part], domain[part][index_B], index_B, seq_len)

    # The order is part of the fingerprint, which old runs are compared by.
    arrays = [array for part in parts for sequences in rows[part] for array in sequences]
    arrays += domain.values()
    arguments = [name, seq_len, prefix, domains, tokens.fingerprint]
    return Examples(
        spec=name,
        batch_type=examples.PrefixTarget if prefix else examples.SourceTarget,
        seq_len=seq_len,
        domains=domains,
        rows={part: len(pairs) for part, pairs in parts.items()},
        fetch=fetch,
        heldout_domain_R=domain["heldout"],
        fingerprint=examples.fingerprint(arguments, arrays),
        about=about,
        notes=_notes(fits, seq_len),
    )


def _notes(fits: dict[str, list[bool]], seq_len: int) -> tuple[str, ...]:
    """Returns the notes for the log: how many training pairs are left out, how many others cut."""
    num_left_out = fits["train"].count(False)
    num_cut = fits["heldout"].count(False)
    notes = []
    if num_left_out:
        notes.append(
            f"{num_left_out} of {len(fits['train'])} training pairs do not fit into {seq_len} "
            "tokens and are left out"
        )
    if num_cut:
        notes.append(f"{num_cut} of {len(fits['heldout'])} held-out pairs are cut")
    return tuple(notes)


# Ids of source and target, without boundaries.
IdPair = tuple[np.ndarray, np.ndarray]


def _encode(pairs: list[Pair], tokens: Tokenizer) -> list[IdPair]:
    sources = tokens.encode_many([pair.source for pair in pairs])
    targets = tokens.encode_many([pair.target for pair in pairs])
    return [
        (source.astype(tokens.dtype), target.astype(tokens.dtype))
        for source, target in zip(sources, targets)
    ]


def _fits(pair: IdPair, seq_len: int, prefix: bool) -> bool:
    """Returns whether a pair and its boundaries go into a row, or into a row for each side.

    A prefix row predicts the last of its three boundaries, so it holds two; of two rows each holds
    one.
    """
    source, target = map(len, pair)
    return source + target + 2 <= seq_len if prefix else max(source, target) + 1 <= seq_len


def _two_rows(pairs: list[IdPair], seq_len: int, tokens: Tokenizer) -> tuple[Ragged, Ragged]:
    """Returns sources with a boundary behind, and targets with one on each side.

    A target is one longer than its row, because inputs and targets are shifted by one.
    """
    end = np.array([tokens.boundary_id], tokens.dtype)
    # Beside a boundary.
    room = seq_len - 1
    sources, targets = [], []
    for source, target in pairs:
        sources.append(np.concatenate([source[:room], end]))
        targets.append(np.concatenate([end, target[:room], end]))
    return examples.ragged(sources), examples.ragged(targets)


def _one_row(pairs: list[IdPair], seq_len: int, tokens: Tokenizer) -> tuple[Ragged, Ragged]:
    """Returns the prefixes' lengths, and boundary, source, boundary, target, boundary as one.

    Of a pair that is too long the source is cut first, to half of the row, then the target to what
    is left.
    """
    end = np.array([tokens.boundary_id], tokens.dtype)
    joined, lengths = [], []
    for source, target in pairs:
        if not _fits((source, target), seq_len, prefix=True):
            source = source[: seq_len // 2 - 1]
        # The prefix has the two boundaries around the source.
        prefix_length = len(source) + 2
        room = seq_len - prefix_length
        lengths.append(np.array([prefix_length], np.int32))
        joined.append(np.concatenate([end, source, end, target[:room], end]))
    return examples.ragged(lengths), examples.ragged(joined)


def _pair_fields(
    rows: tuple[Ragged, Ragged], domain_B: np.ndarray, index_B: np.ndarray, seq_len: int
) -> Fields:
    """Returns the fields of `examples.SourceTarget`; `rows` are those of `_two_rows`."""
    sources, targets = rows
    source_BS, valid_BS = examples.padded(sources, index_B, seq_len)
    return {
        "source_BS": source_BS.astype(np.int32),
        "source_segment_BS": valid_BS.astype(np.int32),
        **_predictions(targets, domain_B, index_B, seq_len),
    }


def _prefix_fields(
    rows: tuple[Ragged, Ragged], domain_B: np.ndarray, index_B: np.ndarray, seq_len: int
) -> Fields:
    """Returns the fields of `examples.PrefixTarget`; `rows` are those of `_one_row`."""
    lengths, sequences = rows
    fields = _predictions(sequences, domain_B, index_B, seq_len)
    # Each of `lengths` is a sequence of one number, so `flat` has one of each pair.
    length_B1 = lengths.flat[index_B][:, None]
    index_1S = np.arange(seq_len)[None]
    # The last token of the prefix predicts the first of the target.
    counts_BS = (fields["segment_BS"] > 0) & (index_1S >= length_B1 - 1)
    prefix_BS = (index_1S < length_B1).astype(np.int32)
    return {**fields, "weight_BS": counts_BS.astype(np.float32), "prefix_BS": prefix_BS}


def _predictions(
    sequences: Ragged, domain_B: np.ndarray, index_B: np.ndarray, seq_len: int
) -> Fields:
    """Returns inputs and, one place on, targets of sequences that begin and end with a boundary."""
    # One place more than a row: inputs are all but the last, targets all but the first.
    values, valid = examples.padded(sequences, index_B, seq_len + 1)
    # A place is valid if what it predicts is.
    valid_BS = valid[:, 1:]
    return {
        "tokens_BS": np.where(valid_BS, values[:, :-1], 0).astype(np.int32),
        "targets_BS": values[:, 1:].astype(np.int32),
        **examples.one_segment(valid_BS),
        "domain_BS": np.where(valid_BS, domain_B[:, None], 0),
    }
