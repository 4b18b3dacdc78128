"""Opening data and drawing batches: nothing lost or leaked, the same for any number of processes
and any resume.
"""

import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from moe_jax.data import corpora
from moe_jax.data.batches import Batches, eval_batches, prefetch
from moe_jax.data.load import open_dataset
from moe_jax.data.pack import Rows
from moe_jax.data.part import in_memory
from moe_jax.errors import UserError
from moe_jax.tasks.lm.rivals import compression_bits_per_byte, compression_table

OPTIONS = {"seq_len": 64, "slice_bytes": 30_000, "heldout_bytes": 0, "heldout_every": 20, "seed": 0}


def open_embedded(spec="embedded:verse,novel", **options):
    return open_dataset(((spec, 1.0),), **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def dataset():
    return open_embedded()


def all_rows(dataset, split):
    (part,) = dataset.parts
    index = np.arange(getattr(part, split).num_rows)
    return dataset.fetch(split, np.zeros_like(index), index)


def texts(rows, boundary):
    """The documents that the targets of rows spell, in any order."""
    targets = rows.targets_RS[rows.segment_RS > 0]
    parts = np.split(targets, np.flatnonzero(targets == boundary) + 1)
    return sorted(bytes(part.astype(np.uint8)) for part in parts[:-1])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_byte_of_a_split_is_predicted_exactly_once(split):
    dataset = open_embedded("embedded:verse", slice_bytes=0)
    rows = all_rows(dataset, split)
    documents = texts(rows, 255)
    number = dataset.documents(split)["verse"]
    assert (
        len(documents) == number
        and sum(map(len, documents)) == dataset.text_bytes(split)["verse"] + number
    )
    numbers = {"train": lambda i: i % 20, "heldout": lambda i: not i % 20}[split]
    expected = [d.text.encode() for i, d in enumerate(corpora.documents("verse"), 1) if numbers(i)]
    assert documents == sorted(text + b"\xff" for text in expected)
    assert dataset.text(split, "verse") == b"".join(expected)


def test_no_heldout_text_is_in_the_training_rows(dataset):
    train = b"\n".join(texts(all_rows(dataset, "train"), 255))
    for domain in dataset.domains:
        for start in range(0, 2000, 100):
            phrase = dataset.text("heldout", domain)[start : start + 100]
            assert len(phrase) == 100 and phrase not in train


def test_a_slice_is_whole_documents_and_leaves_the_heldout_rows_alone(dataset):
    whole = open_embedded(slice_bytes=0)
    np.testing.assert_array_equal(
        all_rows(whole, "heldout").tokens_RS, all_rows(dataset, "heldout").tokens_RS
    )
    assert all(15_000 < size <= 30_000 for size in dataset.text_bytes("train").values())
    assert set(texts(all_rows(dataset, "train"), 255)) < set(texts(all_rows(whole, "train"), 255))
    tiny = open_embedded(slice_bytes=1)
    assert tiny.documents("train") == {"verse": 1, "novel": 1}
    other = open_embedded(seed=1)
    assert texts(all_rows(other, "train"), 255) == texts(all_rows(dataset, "train"), 255)
    assert len({each.fingerprint for each in (dataset, whole, tiny, other)}) == 4
    assert open_embedded().fingerprint == dataset.fingerprint


def test_a_batch_is_int32_and_says_what_it_is(dataset):
    batch = Batches(dataset, "train", 0, 8).rows(3, range(8))
    assert all(field.dtype == np.int32 for field in jax.tree.leaves(batch))
    assert batch.tokens_BS.shape == batch.domain_BS.shape == (
        8,
        64,
    ) and batch.row_B.tolist() == list(range(8))
    new = np.diff(batch.segment_BS, axis=1) != 0
    np.testing.assert_array_equal(batch.position_BS[:, 1:][new], 0)
    assert (np.diff(batch.position_BS, axis=1)[~new & (batch.segment_BS[:, 1:] > 0)] == 1).all()
    assert set(np.unique(batch.domain_BS)) <= {0, 1}


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("strided", [False, True])
def test_the_global_batch_is_the_same_for_every_number_of_processes(dataset, processes, strided):
    whole = Batches(dataset, "train", 7, 8)
    size = 8 // processes
    shares = [
        range(p, 8, processes) if strided else range(p * size, (p + 1) * size)
        for p in range(processes)
    ]
    for step in (0, 5, 1000):
        parts = [Batches(dataset, "train", 7, 8).rows(step, share) for share in shares]
        order = np.argsort(np.concatenate([part.row_B for part in parts]))

        def joined(*fields, order=order):
            return np.concatenate(fields)[order]

        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(joined, *parts), whole.rows(step, range(8))
        )


def numbered(num_rows, seq_len=4):
    """A dataset whose row i holds the token i."""
    dataset = open_embedded("embedded:verse", seq_len=seq_len, slice_bytes=1)
    (part,) = dataset.parts
    rows = np.repeat(np.arange(num_rows, dtype=np.uint16)[:, None], seq_len, axis=1)
    train = in_memory(Rows(rows, rows, rows, rows * 0))
    return dataset._replace(parts=(part._replace(train=train),))


def stream(batches, steps, batch_size=4):
    return np.concatenate([batches.rows(step, range(batch_size)).tokens_BS[:, 0] for step in steps])


def test_every_epoch_sees_every_row_once_in_another_order():
    batches = Batches(numbered(40), "train", 0, 4)
    epochs = stream(batches, range(50)).reshape(5, 40)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(40), (5, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert [batches.epoch(step) for step in (0, 5, 10, 25)] == [0.0, 0.5, 1.0, 2.5]
    assert (stream(Batches(numbered(40), "train", 1, 4), range(10)) != epochs[0]).any()


def test_a_batch_does_not_depend_on_what_was_asked_before():
    batches = Batches(numbered(37), "train", 3, 4)
    backwards = [stream(batches, [step]) for step in reversed(range(30))][::-1]
    np.testing.assert_array_equal(
        np.concatenate(backwards), stream(Batches(numbered(37), "train", 3, 4), range(30))
    )


def read_ahead(depth, start, stop, take):
    """The steps whose rows were read, and the batches taken, when reading ahead is closed after
    `take` of them.
    """
    batches = Batches(numbered(40), "train", 0, 4)
    read, rows = [], batches.rows
    batches.rows = lambda step, share: read.append(step) or rows(step, share)
    iterator = prefetch(batches, start, stop, range(4), depth)
    taken = [next(iterator).tokens_BS[:, 0] for _ in range(take)]
    iterator.close()
    return read, np.concatenate(taken)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_reading_ahead_gives_the_same_batches_and_reads_nothing_before_the_start(depth):
    read, taken = read_ahead(depth, 17, 100, take=5)
    np.testing.assert_array_equal(
        taken, stream(Batches(numbered(40), "train", 0, 4), range(17, 22))
    )
    assert sorted(read) == list(range(17, 17 + len(read))) and 5 <= len(read) <= 5 + depth
    read, taken = read_ahead(depth, 3, 6, take=3)
    assert sorted(read) == [3, 4, 5] and len(taken) == 12


def test_closing_ends_the_threads():
    read_ahead(3, 0, 1000, take=2)
    for _ in range(100):
        left = [thread for thread in threading.enumerate() if "grain" in thread.name]
        if not left:
            return
        time.sleep(0.05)
    raise AssertionError(f"threads are left: {left}")


def test_what_goes_wrong_in_a_thread_is_told():
    batches = Batches(numbered(40), "train", 0, 4)

    def fail(step, rows):
        raise UserError(f"no step {step}")

    batches.rows = fail
    with pytest.raises(UserError, match="no step 2"):
        next(prefetch(batches, 2, 9, range(4), 2))


@pytest.mark.parametrize("ending", ["iterator.close()", "del iterator", "pass"])
def test_the_interpreter_exits_without_a_word(ending):
    code = f"""
from moe_jax.data.batches import Batches, prefetch
from moe_jax.data.load import open_dataset
options = dict(seq_len=64, slice_bytes=20000, heldout_bytes=0, heldout_every=20, seed=0)
dataset = open_dataset((("embedded:verse", 1.0),), **options)
iterator = prefetch(Batches(dataset, "train", 0, 4), 0, 10**6, range(4), 4)
next(iterator)
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_mixture_keeps_its_proportions_and_its_domains():
    specs = (("embedded:verse", 3.0), ("embedded:verse,novel", 1.0))
    mixed = open_dataset(specs, **OPTIONS)
    assert mixed.domains == ("verse", "novel") and mixed.weights == (0.75, 0.25)
    seen = []

    def recorded(number, part):
        def fetch(index):
            return seen.extend((number, i) for i in index) or part.train.fetch(index)

        return part._replace(train=part.train._replace(fetch=fetch))

    mixed = mixed._replace(
        parts=tuple(recorded(number, part) for number, part in enumerate(mixed.parts))
    )
    batches = Batches(mixed, "train", 0, 8)
    domains = np.concatenate([batches.rows(step, range(8)).domain_BS[:, 0] for step in range(100)])
    assert abs(sum(number == 0 for number, _ in seen) - 600) <= 2 and len(seen) == 800
    assert 0.05 < domains.mean() < 0.2  # novel is half of a quarter
    first = mixed.parts[0].train.num_rows
    rows = [index for number, index in seen if number == 0]
    assert sorted(rows[:first]) == list(range(first)), (
        "each part is gone through once before it comes again"
    )
    assert batches.epoch(100) == pytest.approx(600 / first)
    assert mixed.text_bytes("train")["verse"] == 2 * mixed.parts[0].text_bytes["train"]["verse"]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_evaluation_takes_every_heldout_row_once_evenly_over_domains(dataset, batch_size):
    batches = list(eval_batches(dataset, batch_size))
    tokens = np.concatenate([batch.tokens_BS for batch in batches])
    segments = np.concatenate([batch.segment_BS for batch in batches])
    rows = all_rows(dataset, "heldout")
    num_rows = len(rows.tokens_RS)
    assert len(tokens) == -(-num_rows // batch_size) * batch_size
    np.testing.assert_array_equal(
        np.sort(tokens[:num_rows], axis=0), np.sort(rows.tokens_RS, axis=0)
    )
    assert not tokens[num_rows:].any() and not segments[num_rows:].any()
    assert not np.concatenate([batch.targets_BS for batch in batches])[num_rows:].any()
    domain = np.concatenate([batch.domain_BS[:, 0] for batch in batches])
    assert np.bincount(domain[:100]).tolist() == [50, 50]


def test_evaluation_is_the_same_for_any_number_of_processes_and_batches(dataset):
    whole = list(eval_batches(dataset, 8, 3))
    shares = [list(eval_batches(dataset, 8, 3, rows=range(p, 8, 2))) for p in range(2)]
    assert len(whole) == 3 and sum(1 for _ in eval_batches(dataset, 8, 10**9)) == -(
        -dataset.num_rows("heldout") // 8
    )
    for number, batch in enumerate(whole):
        np.testing.assert_array_equal(batch.tokens_BS[1::2], shares[1][number].tokens_BS)
        np.testing.assert_array_equal(batch.row_B[::2], shares[0][number].row_B)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((("embedded:opera", 1.0),), "source embedded has no domain 'opera'"),
        (
            (("nowhere", 1.0),),
            "data.sources: 'nowhere' is neither a prepared directory nor embedded",
        ),
        (
            (("text:*.txt", 1.0),),
            "'text:.*' must be prepared first: `python -m moe_jax prepare --source 'text:",
        ),
        ((("embedded:verse", 0.0),), "the weight 0.0 of embedded:verse must be above 0"),
        ((("embedded:verse", float("nan")),), "the weight nan of embedded:verse must be above 0"),
        (
            (("embedded:verse", "1"),),
            r"must be pairs of a source and its weight, as in .* it has \('embedded:verse', '1'\)",
        ),
        (("embedded:verse", 1.0), "it has 'embedded:verse' in it"),
        (("ab",), "it has 'ab' in it"),
        ((("embedded", 1.0, 2),), r"it has \('embedded', 1.0, 2\) in it"),
        (((1.0, "embedded"),), "it has .1.0, 'embedded'. in it"),
        ((), r"data.sources must be pairs .*; it is \(\)"),
        ("embedded", "data.sources must be pairs .*; it is 'embedded'"),
        (None, "data.sources must be pairs .*; it is None"),
    ],
)
def test_a_wrong_source_is_one_message(specs, message):
    with pytest.raises(UserError, match=message):
        open_dataset(specs, **OPTIONS)


def test_too_few_rows_and_too_few_documents_are_one_message(dataset):
    with pytest.raises(
        UserError,
        match=r"embedded:verse,novel: \d+ train rows of 64 tokens are too few for one batch of "
        r"9999",
    ):
        Batches(dataset, "train", 0, 9999)
    with pytest.raises(
        UserError, match="heldout_every is 200, but domain verse has only 192 documents"
    ):
        open_embedded(heldout_every=200)


def test_compressors_use_what_they_have_seen():
    random = np.random.default_rng(0)
    noise, other = random.bytes(20_000), random.bytes(20_000)
    known, new = compression_bits_per_byte(noise, noise), compression_bits_per_byte(noise, other)
    assert (
        known["gzip"] < 0.2 and known["xz"] < 0.2
    )  # 20,000 bytes are within gzip's window of 32 kB
    assert new["gzip"] == pytest.approx(8, rel=0.01) and new["xz"] == pytest.approx(8, rel=0.01)
    far = compression_bits_per_byte(noise + other * 3, noise)
    assert far["gzip"] > 7.9 and far["xz"] < 0.2  # but 80,000 are not


def test_the_table_of_baselines_has_every_domain(dataset):
    table = compression_table(dataset, 20_000)
    assert set(table) == {"verse", "novel"}
    for domain, bits in table.items():
        parts = [dataset.text(split, domain)[:20_000] for split in ("train", "heldout")]
        assert bits == compression_bits_per_byte(*parts) and 2 < bits["xz"] < bits["gzip"] + 0.2 < 6
