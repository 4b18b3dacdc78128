"""Labelled texts and pairs of sentences: rows as the tasks expect them, nothing leaked between the
splits, clear messages.
"""

import csv
import io

import numpy as np
import pytest
from task_files import all_train, packed

from moe_jax.data import examples
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data.batches import Batches, eval_batches
from moe_jax.data.records import split
from moe_jax.errors import UserError
from moe_jax.tasks import rivals
from moe_jax.tasks.classification import data as classification
from moe_jax.tasks.translation import data as translation

GOOD, BAD = ("superb", "lovely", "brilliant"), ("awful", "dreadful", "boring")


@pytest.fixture
def vader(tmp_path):
    lines = ["domain\tvalence\ttext"]
    for i in range(240):
        word, sign = (GOOD, 1) if i % 2 else (BAD, -1)
        lines.append(
            f"{('movie', 'tweets')[i % 3 > 0]}\t{sign * (0.4 + i % 5)}\tA {word[i % 3]} film, the "
            f"{i // 2}th of them."
        )
    packed(
        tmp_path / "classification" / "vader_sentiment_4domains.tsv.gz", [*lines, lines[1].upper()]
    )
    return tmp_path


def open_vader(folder, name="vader", **options):
    options = {
        "seq_len": 24,
        "tokens": "bytes",
        "heldout_every": 5,
        "select": False,
        "seed": 0,
        **options,
    }
    return classification.open_classification(name, str(folder), **options)


def test_a_text_begins_with_the_boundary_and_is_cut(vader):
    data = open_vader(vader)
    assert data.about.labels == ("negative", "positive") and set(data.domains) == {
        "movie",
        "tweets",
    }
    rows = all_train(data)
    assert type(rows) is examples.LabelledTokens
    text, label = data.about.raw["train"][0][7], data.about.raw["train"][1][7]
    assert (
        bytes(rows.tokens_BS[7, 1:].astype(np.uint8)) == text.encode()[:23]
        and rows.tokens_BS[7, 0] == 255
    )
    assert rows.label_B[7] == label == (text.split()[1] in GOOD)
    short = all_train(open_vader(vader, seq_len=64))
    size = len(text) + 1
    np.testing.assert_array_equal(short.segment_BS[7], [1] * size + [0] * (64 - size))
    np.testing.assert_array_equal(short.position_BS[7], [*range(size)] + [0] * (64 - size))
    assert (
        not short.tokens_BS[7, size:].any()
        and rows.weight_B.dtype == np.float32
        and rows.tokens_BS.dtype == np.int32
    )
    assert data.notes == (
        f"{data.rows['train']} of {data.rows['train']} training texts are cut to 24 tokens",
    )


def test_weak_sentiment_is_left_out_and_equal_texts_are_on_one_side(vader):
    data = open_vader(vader)
    kept = [len(texts) for texts, _ in data.about.raw.values()]
    assert sum(kept) == 240 - 48, "every fifth has a valence of +-0.4, and so has the repeated one"
    whole = open_vader(vader, "vader_domain")
    keys = {
        part: {split.key_of_text(text) for text in texts}
        for part, (texts, _) in whole.about.raw.items()
    }
    assert not keys["train"] & keys["heldout"] and sum(map(len, keys.values())) == 240
    assert sum(len(texts) for texts, _ in whole.about.raw.values()) == 241
    assert 24 < len(keys["heldout"]) < 72


def test_a_bpe_learns_from_the_training_texts_alone(vader):
    data = open_vader(vader, tokens="bpe:300")
    again = tokenizer_lib.make("bpe:300", lambda: data.about.raw["train"][0])
    assert data.about.tokenizer.fingerprint == again.fingerprint
    assert data.fingerprint != open_vader(vader, tokens="bpe:301").fingerprint
    assert data.fingerprint == open_vader(vader, tokens="bpe:300", seed=1).fingerprint
    row = all_train(data).tokens_BS[0]
    assert data.about.raw["train"][0][0].startswith(data.about.tokenizer.decode(row[row != 0]))


def test_batches_and_evaluation_take_any_data(vader):
    data = open_vader(vader)
    batches = Batches(data, "train", 0, 8)
    rows = data.rows["train"]
    seen = np.concatenate([batches.rows(step, range(8)).tokens_BS for step in range(rows // 8)])
    assert len(np.unique(seen, axis=0)) > 0.7 * len(seen) and batches.epoch(rows) == 8.0
    held = list(eval_batches(data, 16))
    weight = np.concatenate([batch.weight_B for batch in held])
    assert (
        weight.sum() == data.rows["heldout"]
        and len(weight) % 16 == 0
        and not weight[data.rows["heldout"] :].any()
    )
    assert (
        not held[-1].segment_BS[held[-1].weight_B == 0].any()
        and not held[-1].label_B[held[-1].weight_B == 0].any()
    )
    assert len(set(held[0].domain_B[:2])) == 2, "one of each domain in turn"
    with pytest.raises(
        UserError, match=r"vader: \d+ train rows of 24 tokens are too few for one batch of 999"
    ):
        Batches(data, "train", 0, 999)


def test_what_reading_outputs_needs_is_saved(vader, tmp_path):
    data = open_vader(vader, tokens="bpe:280")
    data.save(tmp_path / "run")
    assert (
        tokenizer_lib.load(tmp_path / "run" / "tokenizer").fingerprint
        == data.about.tokenizer.fingerprint
    )
    assert (tmp_path / "run" / "labels.json").read_text() == '["negative", "positive"]\n'


def test_the_svm_beats_the_majority(vader):
    table = rivals.baseline_figures(open_vader(vader))
    assert table["TF-IDF + linear SVM"] == {"accuracy": 1.0, "macro_f1": 1.0}
    assert 0.3 < table["majority"]["accuracy"] < 0.7


def test_packages_of_one_source_are_on_one_side(tmp_path):
    shared = [
        f"It computes {word} of a graph in parallel on many machines."
        for word in "abcdefghijklmnopqrstuvwxyz"
    ]
    lines = [
        f"{('libs', 'doc')[n]}\t{i}{n}\tShort {i} {n}. {text} End."
        for i, text in enumerate(shared)
        for n in (0, 1)
    ]
    packed(
        tmp_path / "debian12_descriptions_by_section.tsv.gz",
        ["section\tpackage\tdescription", *lines],
    )
    data = open_vader(tmp_path, "debian", heldout_every=3)
    sentences = {
        part: {split.longest_sentence(text) for text in texts}
        for part, (texts, _) in data.about.raw.items()
    }
    assert not sentences["train"] & sentences["heldout"] and all(
        rows % 2 == 0 for rows in data.rows.values()
    )


def banking77(folder, train, test):
    for name, texts in (("train", train), ("test", test)):
        text = io.StringIO()
        csv.writer(text).writerows(
            [("text", "category"), *((line, f"intent{i % 5}") for i, line in enumerate(texts))]
        )
        packed(folder / f"banking77_{name}.csv.gz", text.getvalue().splitlines())


def test_a_set_with_a_test_part_keeps_it_and_training_loses_what_is_in_it(tmp_path):
    banking77(
        tmp_path, ["Where is my card?", "my PIN", "top up, please"], ["where is my card", "my pins"]
    )
    data = open_vader(tmp_path, "banking77")
    assert data.about.raw["train"][0] == ["my PIN", "top up, please"]
    assert (
        data.about.raw["heldout"][0] == ["where is my card", "my pins"]
        and data.domains == data.about.labels
    )


def test_settings_are_chosen_on_training_texts_alone(tmp_path):
    train = [f"question number {i}" for i in range(400)]
    test = [f"question of the test {i}" for i in range(20)]
    banking77(tmp_path, [*train, test[0]], test)
    data = open_vader(tmp_path, "banking77", select=True, heldout_every=4)
    chosen = {part: set(texts) for part, (texts, _) in data.about.raw.items()}
    held = len(chosen["heldout"])
    assert (
        data.notes[0]
        == f"select: {held} of 400 training texts are held out, the test part is left out"
    )
    assert chosen["train"] | chosen["heldout"] == set(train), "no text of the test part is used"
    assert not chosen["train"] & chosen["heldout"] and 70 < len(chosen["heldout"]) < 130
    assert open_vader(tmp_path, "banking77", heldout_every=4).about.raw["heldout"][0] == test


def test_of_a_set_without_a_test_part_what_is_held_out_by_hash_stays_unused(vader):
    tested = open_vader(vader, "vader_domain").about.raw
    chosen = open_vader(vader, "vader_domain", select=True).about.raw
    assert sorted(chosen["train"][0] + chosen["heldout"][0]) == sorted(tested["train"][0])
    assert 20 < len(chosen["heldout"][0]) < 70 and not set(chosen["train"][0]) & set(
        chosen["heldout"][0]
    )


VERSES = [
    (
        f"{book} {c}:{v}",
        f"word{c} of number{v}" + " and on" * (2 * v),
        f"palabra{c} número{v}" + " y así" * (2 * v),
    )
    for book in ("Genesis", "Matthew")
    for c in range(20)
    for v in range(4)
]


def open_pairs(folder, **options):
    options = {
        "seq_len": 40,
        "vocab_size": 300,
        "prefix": False,
        "heldout_every": 4,
        "seed": 0,
        **options,
    }
    return translation.open_translation("bible_en_es", str(folder), **options)


@pytest.fixture
def bible(tmp_path):
    packed(
        tmp_path / "translation" / "bible_kjv_rv1909_en_es.tsv.gz",
        ["\t".join(verse) for verse in VERSES],
    )
    return tmp_path


def test_pairs_have_boundaries_where_they_belong(bible):
    data = open_pairs(bible)
    rows, tokens = all_train(data), data.about.tokenizer
    for row, source, target in zip(range(9), *data.about.raw["train"]):
        ends = rows.segment_BS[row].sum()
        read = rows.source_BS[row][rows.source_segment_BS[row] > 0]
        assert read[-1] == tokens.boundary_id and tokens.decode(read) == source
        assert rows.tokens_BS[row, 0] == rows.targets_BS[row, ends - 1] == tokens.boundary_id
        np.testing.assert_array_equal(rows.tokens_BS[row, 1:ends], rows.targets_BS[row, : ends - 1])
        assert tokens.decode(rows.targets_BS[row, :ends]) == target
        assert not rows.tokens_BS[row, ends:].any() and not rows.targets_BS[row, ends:].any()
    assert data.domains == ("old", "new") and set(rows.domain_BS[:, 0]) == {0, 1}


def test_a_prefix_row_predicts_the_target_alone(bible):
    data = open_pairs(bible, prefix=True, seq_len=80)
    rows, tokens = all_train(data), data.about.tokenizer
    for row, source, target in zip(range(9), *data.about.raw["train"]):
        prefix = rows.tokens_BS[row][rows.prefix_BS[row] > 0]
        assert prefix[0] == prefix[-1] == tokens.boundary_id and tokens.decode(prefix) == source
        predicted = rows.targets_BS[row][rows.weight_BS[row] > 0]
        assert predicted[-1] == tokens.boundary_id and tokens.decode(predicted) == target
        assert (
            rows.weight_BS[row][len(prefix) - 1] == 1
            and rows.weight_BS[row][: len(prefix) - 1].sum() == 0
        )


@pytest.mark.parametrize("prefix", [False, True])
def test_long_pairs_are_left_out_of_training_and_cut_when_held_out(bible, prefix):
    whole = open_pairs(bible, prefix=prefix, seq_len=80)
    sizes = np.sort(np.concatenate([all_train(whole).segment_BS.sum(1)]))
    short = open_pairs(bible, prefix=prefix, seq_len=int(sizes[len(sizes) // 2]))
    left = whole.rows["train"] - short.rows["train"]
    assert 0 < left < whole.rows["train"] and short.rows["heldout"] == whole.rows["heldout"]
    assert short.notes[0].startswith(f"{left} of {whole.rows['train']} training pairs do not fit")
    for batch in eval_batches(short, 8):
        size_B = batch.segment_BS.sum(1)
        ends = batch.targets_BS[np.arange(8), np.maximum(size_B - 1, 0)]
        assert (ends[size_B > 0] == short.about.tokenizer.boundary_id).all()
    assert len(short.about.raw["train"][0]) == whole.rows["train"], "the baseline may use all"


def test_whole_chapters_are_held_out_and_no_source_is_on_both_sides(bible):
    data = open_pairs(bible)
    sources = {part: set(pairs[0]) for part, pairs in data.about.raw.items()}
    assert not sources["train"] & sources["heldout"]
    assert all(
        len([s for s in sources["heldout"] if s.startswith(f"word{c} ")]) in (0, 4)
        for c in range(20)
    )
    assert len(data.about.raw["train"][0]) + len(data.about.raw["heldout"][0]) < len(VERSES), (
        "the other testament's twins are gone"
    )


def test_the_nearest_neighbour_is_scored_by_sacrebleu(bible):
    table = rivals.baseline_figures(open_pairs(bible))
    assert table["nearest neighbour (TF-IDF)"]["bleu"] > table["source copied"]["bleu"]
    assert "tok:13a" in table["source copied"]["signature"]
    assert list(rivals.translation.nearest(["aa bb", "cc dd ee"], ["xx dd ee", "bb"])) == [1, 0]


@pytest.mark.parametrize(
    ("opening", "message"),
    [
        (
            open_vader,
            r"data.folder = '.*' has neither vader_sentiment_4domains.tsv.gz nor "
            r"classification/vader.*moe_jax data vader --from",
        ),
        (
            lambda f: open_vader(f, "wordnet"),
            "neither wordnet30_supersense.tsv.gz nor .*moe_jax data wordnet --from",
        ),
        (
            lambda f: open_vader(f, "sst"),
            "no data set 'sst': choose one of vader, .*, banking77, tfds:NAME",
        ),
        (
            open_pairs,
            "neither bible_kjv_rv1909_en_es.tsv.gz nor translation/.*moe_jax data bible_en_es "
            "--from",
        ),
    ],
)
def test_what_is_missing_says_where_it_is(tmp_path, opening, message):
    with pytest.raises(UserError, match=message):
        opening(tmp_path)


def test_a_damaged_line_is_named(vader):
    packed(
        vader / "classification" / "vader_sentiment_4domains.tsv.gz",
        ["domain\tvalence\ttext", "movie\t2.0"],
    )
    with pytest.raises(
        UserError, match=r"vader_sentiment_4domains.tsv.gz, line 2 has 2 columns instead of 3"
    ):
        open_vader(vader)
