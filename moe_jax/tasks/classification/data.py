"""Texts with a label: sentiment, word senses, sections of packages, intents; and any such set of
TFDS.

Held out is the test part of a set that has one (banking77, TFDS), else one text in `heldout_every`
by a hash of its words, so equal texts are never on both sides; of a Debian package by its longest
sentence, which the packages of one source share.
"""

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data import examples
from moe_jax.data.examples import Classes, Examples, Fields
from moe_jax.data.records import folder as files
from moe_jax.data.records import labels as numbers
from moe_jax.data.records import tfds_examples, vocabulary
from moe_jax.data.records.split import is_heldout, key_of_text, longest_sentence, split_examples
from moe_jax.data.sources.characters import open_text, plain, readable
from moe_jax.data.tokenizer.contract import Tokenizer
from moe_jax.errors import UserError

KIND = "classification"


class Text(NamedTuple):
    text: str
    label: str  # "" = it has none: the text is left out, and counted
    domain: str  # "" = the label
    split: str  # "train", "heldout", or "": by the key
    key: bytes


def _by_key(text: str, label: str, domain: str = "") -> Text:
    return Text(text, label, domain, "", key_of_text(text))


def _vader(folder: str) -> Iterator[list[str]]:
    name = "vader_sentiment_4domains.tsv.gz"
    return files.read_tsv(files.find(folder, KIND, name, "vader"), 3, header=True)


def read_vader(folder: str) -> Iterator[Text]:
    """Sentiment of sentences in four domains (Hutto & Gilbert 2014): positive or negative, those
    rated within +-0.5 left out.
    """
    for domain, cell, text in _vader(folder):
        valence = _valence(cell)
        if valence is None:
            yield _by_key(text, "", domain)
        elif abs(valence) >= 0.5:
            yield _by_key(text, "positive" if valence > 0 else "negative", domain)


def _valence(cell: str) -> float | None:
    """The rating in a cell, None for an empty one; UserError for what is no number."""
    if not cell:
        return None
    try:
        valence = float(cell)
    except ValueError:
        valence = math.nan
    if not math.isfinite(valence):
        raise UserError(f"vader: the valence {cell!r} is no number: mend or drop its line")
    return valence


def read_vader_domain(folder: str) -> Iterator[Text]:
    """The same sentences, all of them; the label is where they come from."""
    return (_by_key(text, domain) for domain, _, text in _vader(folder))


def read_wordnet(folder: str) -> Iterator[Text]:
    """WordNet's glosses; the label is the lexicographer's file (supersense, 45 of them)."""
    path = files.find(folder, KIND, "wordnet30_supersense.tsv.gz", "wordnet")
    return (_by_key(gloss, sense) for sense, _, gloss in files.read_tsv(path, 3, header=True))


def read_debian(folder: str) -> Iterator[Text]:
    """Descriptions of Debian packages; the label is the section, of the 20 with most packages."""
    path = files.find(folder, KIND, "debian12_descriptions_by_section.tsv.gz", "debian")
    rows = list(files.read_tsv(path, 3, header=True))
    top = {section for section, _ in Counter(row[0] for row in rows).most_common(20)}
    for section, _, text in rows:
        if section in top:
            yield Text(text, section, "", "", key_of_text(longest_sentence(text)))


def read_banking77(folder: str) -> Iterator[Text]:
    """Questions to a bank, 77 intents (Casanueva et al. 2020), with their own test part; a training
    text that is in it is left out.
    """
    tested: set[bytes] = set()
    for split, name in (("heldout", "banking77_test.csv.gz"), ("train", "banking77_train.csv.gz")):
        path = str(files.find(folder, KIND, name, "banking77"))
        for text, category in _csv(path, ("text", "category")):
            found = Text(text.strip(), category.strip(), "", split, key_of_text(text))
            if split == "heldout":
                tested.add(found.key)
            if split == "heldout" or found.key not in tested:
                yield found


def _csv(path: str, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The named columns of a table with commas, "" where a row ends before; UserError for a table
    that lacks them or is damaged.
    """
    with readable(path), open_text(path) as file:
        reader = csv.DictReader(file)
        try:
            there = reader.fieldnames or ()
            if not set(columns) <= set(there):
                raise UserError(
                    f"{path} must have the columns {', '.join(columns)}; its first line has "
                    f"{', '.join(there)}"
                )
            for row in reader:
                yield tuple(
                    plain(row[column], f"{path}, line {reader.line_num}") for column in columns
                )
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num} is no line of a table with commas: {error}"
            ) from None


def read_tfds(spec: str) -> Iterator[Text]:
    """A set with a text and a label, such as tfds:imdb_reviews or tfds:glue/sst2#sentence."""
    from moe_jax.data.sources.tfds_datasets import text_field
    from moe_jax.data.tfds_import import tfds

    stored = tfds_examples.open_stored(spec)
    text = text_field(stored.features, stored.name, stored.field)
    label = stored.only(tfds.features.ClassLabel, "class labels")
    names = stored.features[label].names
    for record in stored.both(label):
        found = record.text(text)
        number = numbers.checked(record.fields[label], len(names), record.where)
        yield Text(
            found,
            "" if number == numbers.NONE else names[number],
            "",
            record.split,
            key_of_text(found),
        )


DATASETS: dict[str, Callable[[str], Iterator[Text]]] = {
    "vader": read_vader,
    "vader_domain": read_vader_domain,
    "wordnet": read_wordnet,
    "debian": read_debian,
    "banking77": read_banking77,
}


def open_classification(
    name: str,
    folder: str,
    *,
    seq_len: int,
    tokens: str,
    heldout_every: int,
    seed: int,
    select: bool = False,
) -> Examples:
    """Opens a key of DATASETS, or tfds:NAME, as rows `examples.LabelledTokens`; `about` is
    `examples.Classes`.

    `tokens` is a tokenizer ("bytes", "bpe:N", trained on the training texts alone). A text of more
    than seq_len - 1 tokens is cut. `select` is for choosing settings: the held-out texts are left
    out, and one training text in `heldout_every` takes their place. Without it `heldout_every` is
    not for sets with a test part. `seed` decides nothing here: the same rows for every run.
    """
    if not name.startswith(tfds_examples.PREFIX) and name not in DATASETS:
        raise files.unknown(KIND, name, [*DATASETS, "tfds:NAME"])
    found = read_tfds(name) if name.startswith(tfds_examples.PREFIX) else DATASETS[name](folder)
    parts, notes = labelled(split_examples(found, heldout_every))
    if select:
        parts = selection(parts["train"], heldout_every)
        chosen, every = len(parts["heldout"]), sum(map(len, parts.values()))
        notes = (
            *notes,
            f"select: {chosen} of {every} training texts are held out, the test part is left out",
        )
    for part, texts in parts.items():
        if not texts:
            raise UserError(
                f"{name} has no {part} text with a label: lower heldout_every ({heldout_every})"
            )
    rows = tokenized(
        name, parts, seq_len, vocabulary.make(tokens, [text.text for text in parts["train"]])
    )
    return rows._replace(notes=(*notes, *rows.notes))


def labelled(parts: dict[str, list[Text]]) -> tuple[dict[str, list[Text]], tuple[str, ...]]:
    """The texts that have a label, and how many have none, for the log."""
    kept = {part: [text for text in texts if text.label] for part, texts in parts.items()}
    total, left = (sum(map(len, some.values())) for some in (parts, kept))
    return kept, numbers.left_out(total - left, total, "texts")


def selection(train: list[Text], every: int) -> dict[str, list[Text]]:
    """The training texts alone, as two splits: one in `every` is held out, by a hash that no test
    part is chosen by.
    """
    parts: dict[str, list[Text]] = {"train": [], "heldout": []}
    for text in train:
        chosen = is_heldout(b"selection " + text.key, every)
        parts["heldout" if chosen else "train"].append(text)
    return parts


def tokenized(name: str, parts: dict[str, list[Text]], seq_len: int, tokens: Tokenizer) -> Examples:
    """Rows of the texts of both splits."""
    every = [text for part in parts.values() for text in part]
    labels = tuple(sorted({text.label for text in every}))
    domains = (
        tuple(dict.fromkeys(map(_domain, every))) if any(text.domain for text in every) else labels
    )
    number = {
        split: [
            _numbers([text.label for text in part], labels),
            _numbers(list(map(_domain, part)), domains),
        ]
        for split, part in parts.items()
    }
    rows = {split: _encode([text.text for text in part], tokens) for split, part in parts.items()}

    def fetch(split: str, index_B: np.ndarray) -> Fields:
        tokens_BS, there_BS = examples.padded(rows[split], index_B, seq_len)
        label_N, domain_N = number[split]
        fields = {"tokens_BS": tokens_BS.astype(np.int32), **examples.one_segment(there_BS)}
        return {**fields, **examples.labelled(label_N[index_B], domain_N[index_B])}

    arrays = [array for split in parts for array in (*rows[split], *number[split])]
    raw = {split: ([text.text for text in part], number[split][0]) for split, part in parts.items()}
    cut = int((np.diff(rows["train"].starts) > seq_len).sum())
    return Examples(
        spec=name,
        batch_type=examples.LabelledTokens,
        seq_len=seq_len,
        domains=domains,
        rows={split: len(part) for split, part in parts.items()},
        fetch=fetch,
        heldout_domain_R=number["heldout"][1],
        fingerprint=examples.fingerprint(
            [name, seq_len, labels, domains, tokens.fingerprint], arrays
        ),
        about=Classes(labels, tokens, 0, raw),
        notes=(f"{cut} of {len(parts['train'])} training texts are cut to {seq_len} tokens",)
        if cut
        else (),
    )


def _domain(text: Text) -> str:
    return text.domain or text.label


def _numbers(found: Sequence[str], names: Sequence[str]) -> np.ndarray:
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[name] for name in found], np.int32)


def _encode(texts: Sequence[str], tokens: Tokenizer) -> examples.Ragged:
    boundary = np.array([tokens.boundary_id], tokens.dtype)
    ids = tokens.encode_many(texts)
    return examples.ragged([np.concatenate([boundary, some.astype(tokens.dtype)]) for some in ids])
