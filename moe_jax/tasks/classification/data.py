"""Texts with a label: sentiment, word senses, sections of packages, intents; and any such set of
TFDS.

Held out is the test part of a set that has one (banking77, TFDS), else one text in `heldout_every`
by a hash of its words, so equal texts are never on both sides; of a Debian package by its longest
sentence, which the packages of one source share.
"""

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """A text as it is read, with all that decides on which side it is."""

    text: str
    # "" = it has none: the text is left out, and counted.
    label: str
    # "" = the label.
    domain: str
    # "train", "heldout", or "": by the key.
    split: str
    # Texts of one key are on one side.
    key: bytes


def _by_key(text: str, label: str, domain: str = "") -> Text:
    """Returns a text that is held out, or not, by its words."""
    return Text(text, label, domain, "", key_of_text(text))


def _vader(folder: str) -> Iterator[list[str]]:
    """Yields (domain, valence, text) of each sentence."""
    name = "vader_sentiment_4domains.tsv.gz"
    return files.read_tsv(files.find(folder, KIND, name, "vader"), 3, header=True)


def read_vader(folder: str) -> Iterator[Text]:
    """Yields sentences of four domains; the label is their sentiment (Hutto & Gilbert 2014).

    It is positive or negative. Sentences that are rated within +-0.5 are left out.
    """
    for domain, cell, text in _vader(folder):
        valence = _valence(cell)
        if valence is None:
            yield _by_key(text, "", domain)
        elif abs(valence) >= 0.5:
            yield _by_key(text, "positive" if valence > 0 else "negative", domain)


def _valence(cell: str) -> float | None:
    """Returns the rating in a cell, None for an empty one.

    Raises UserError for what is no number.
    """
    if not cell:
        return None
    try:
        valence = float(cell)
    except ValueError:
        valence = math.nan
    # float() reads "nan" and "inf" too, which are no ratings.
    if not math.isfinite(valence):
        raise UserError(f"vader: the valence {cell!r} is no number: mend or drop its line")
    return valence


def read_vader_domain(folder: str) -> Iterator[Text]:
    """Yields the same sentences, all of them; the label is where they come from."""
    return (_by_key(text, domain) for domain, _, text in _vader(folder))


def read_wordnet(folder: str) -> Iterator[Text]:
    """Yields WordNet's glosses; the label is the lexicographer's file (45 supersenses)."""
    path = files.find(folder, KIND, "wordnet30_supersense.tsv.gz", "wordnet")
    return (_by_key(gloss, sense) for sense, _, gloss in files.read_tsv(path, 3, header=True))


def read_debian(folder: str) -> Iterator[Text]:
    """Yields descriptions of Debian packages; the label is the section.

    Only the 20 sections with most packages are taken.
    """
    path = files.find(folder, KIND, "debian12_descriptions_by_section.tsv.gz", "debian")
    rows = list(files.read_tsv(path, 3, header=True))
    top = {section for section, _ in Counter(row[0] for row in rows).most_common(20)}
    for section, _, text in rows:
        if section in top:
            # Packages of one source share their longest sentence, so they are on one side.
            yield Text(text, section, "", "", key_of_text(longest_sentence(text)))


def read_banking77(folder: str) -> Iterator[Text]:
    """Yields questions to a bank; the label is one of 77 intents (Casanueva et al. 2020).

    They have their own test part. A training text that is in it is left out.
    """
    tested: set[bytes] = set()
    # The test part is read first, so that its keys are known when the training part is read.
    for split, name in (("heldout", "banking77_test.csv.gz"), ("train", "banking77_train.csv.gz")):
        path = str(files.find(folder, KIND, name, "banking77"))
        for text, category in _csv(path, ("text", "category")):
            key = key_of_text(text)
            if split == "heldout":
                tested.add(key)
            elif key in tested:
                continue
            yield Text(text.strip(), category.strip(), "", split, key)


def _csv(path: str, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yields the named columns of a table with commas, "" where a row ends before.

    Raises UserError for a table that lacks them or is damaged.
    """
    with readable(path), open_text(path) as file:
        reader = csv.DictReader(file)
        try:
            header = reader.fieldnames or ()
            if not set(columns) <= set(header):
                raise UserError(
                    f"{path} must have the columns {', '.join(columns)}; its first line has "
                    f"{', '.join(header)}"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                yield tuple(plain(row[column], where) for column in columns)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num} is no line of a table with commas: {error}"
            ) from None


def read_tfds(spec: str) -> Iterator[Text]:
    """Yields a set with a text and a label, as tfds:imdb_reviews or tfds:glue/sst2#sentence."""
    from moe_jax.data.sources.tfds_datasets import text_field
    from moe_jax.data.tfds_import import tfds

    stored = tfds_examples.open_stored(spec)
    text_name = text_field(stored.features, stored.name, stored.field)
    label_name = stored.only(tfds.features.ClassLabel, "class labels")
    classes = stored.features[label_name].names
    for record in stored.both(label_name):
        text = record.text(text_name)
        number = numbers.checked(record.fields[label_name], len(classes), record.where)
        label = "" if number == numbers.NONE else classes[number]
        yield Text(text, label, "", record.split, key_of_text(text))


DATASETS: dict[str, Callable[[str], Iterator[Text]]] = {
    "vader": read_vader,
    "vader_domain": read_vader_domain,
    "wordnet": read_wordnet,
    "debian": read_debian,
    "banking77": read_banking77,
}


def read_texts(name: str, folder: str) -> Iterator[Text]:
    """Yields the texts of a key of DATASETS, or of tfds:NAME."""
    if name.startswith(tfds_examples.PREFIX):
        return read_tfds(name)
    if name not in DATASETS:
        raise files.unknown(KIND, name, [*DATASETS, "tfds:NAME"])
    return DATASETS[name](folder)


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
    del seed
    parts, notes = labelled(split_examples(read_texts(name, folder), heldout_every))
    if select:
        # Settings are chosen without a look at the test part.
        parts = selection(parts["train"], heldout_every)
        num_heldout, num_texts = len(parts["heldout"]), sum(map(len, parts.values()))
        note = (
            f"select: {num_heldout} of {num_texts} training texts are held out, the test part is "
            "left out"
        )
        notes = (*notes, note)
    for part, texts in parts.items():
        if not texts:
            raise UserError(
                f"{name} has no {part} text with a label: lower heldout_every ({heldout_every})"
            )
    tokenizer = vocabulary.make(tokens, [text.text for text in parts["train"]])
    data = tokenized(name, parts, seq_len, tokenizer)
    return data._replace(notes=(*notes, *data.notes))


def labelled(parts: dict[str, list[Text]]) -> tuple[dict[str, list[Text]], tuple[str, ...]]:
    """Returns the texts that have a label, and a note for the log of how many have none."""
    kept: dict[str, list[Text]] = {}
    num_texts, num_left_out = 0, 0
    for part, texts in parts.items():
        kept[part] = [text for text in texts if text.label]
        num_texts += len(texts)
        num_left_out += len(texts) - len(kept[part])
    return kept, numbers.left_out(num_left_out, num_texts, "texts")


def selection(train: list[Text], every: int) -> dict[str, list[Text]]:
    """Returns the training texts alone, as two splits; one in `every` is held out."""
    parts: dict[str, list[Text]] = {"train": [], "heldout": []}
    for text in train:
        # Another hash than that of a test part, by which no training text would be chosen.
        chosen = is_heldout(b"selection " + text.key, every)
        parts["heldout" if chosen else "train"].append(text)
    return parts


def tokenized(
    name: str, parts: dict[str, list[Text]], seq_len: int, tokenizer: Tokenizer
) -> Examples:
    """Returns the rows of the texts of both splits."""
    texts = [text for part in parts.values() for text in part]
    # Sorted, so that a label has the same number whatever comes first.
    labels = tuple(sorted({text.label for text in texts}))
    has_domains = any(text.domain for text in texts)
    # Where no text names a domain, the labels are the domains.
    domains = tuple(dict.fromkeys(map(_domain, texts))) if has_domains else labels
    label = {
        split: _indices([text.label for text in part], labels) for split, part in parts.items()
    }
    domain = {split: _indices(map(_domain, part), domains) for split, part in parts.items()}
    raw_texts = {split: [text.text for text in part] for split, part in parts.items()}
    rows = {split: _encode(raw_texts[split], tokenizer) for split in parts}

    def fetch(split: str, index_B: np.ndarray) -> Fields:
        tokens_BS, valid_BS = examples.padded(rows[split], index_B, seq_len)
        return {
            "tokens_BS": tokens_BS.astype(np.int32),
            **examples.one_segment(valid_BS),
            **examples.labelled(label[split][index_B], domain[split][index_B]),
        }

    # The order is part of the fingerprint, which old runs are compared by.
    arrays = [array for split in parts for array in (*rows[split], label[split], domain[split])]
    arguments = [name, seq_len, labels, domains, tokenizer.fingerprint]
    num_cut = int((np.diff(rows["train"].starts) > seq_len).sum())
    note = f"{num_cut} of {len(parts['train'])} training texts are cut to {seq_len} tokens"
    return Examples(
        spec=name,
        batch_type=examples.LabelledTokens,
        seq_len=seq_len,
        domains=domains,
        rows={split: len(part) for split, part in parts.items()},
        fetch=fetch,
        heldout_domain_R=domain["heldout"],
        fingerprint=examples.fingerprint(arguments, arrays),
        about=Classes(
            labels=labels,
            tokenizer=tokenizer,
            width=0,
            raw={split: (raw_texts[split], label[split]) for split in parts},
        ),
        notes=(note,) if num_cut else (),
    )


def _domain(text: Text) -> str:
    return text.domain or text.label


def _indices(values: Iterable[str], names: Sequence[str]) -> np.ndarray:
    """Returns where each value stands in `names`, int32."""
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[value] for value in values], np.int32)


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> examples.Ragged:
    """Returns the ids of the texts, each with the boundary before it."""
    boundary = np.array([tokenizer.boundary_id], tokenizer.dtype)
    rows = []
    for ids in tokenizer.encode_many(texts):
        rows.append(np.concatenate([boundary, ids.astype(tokenizer.dtype)]))
    return examples.ragged(rows)
