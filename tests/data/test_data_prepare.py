"""The prepare command: rows on disk equal rows in memory, a kill at any moment does no harm,
mistakes are refused.
"""

import fcntl
import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.commands import prepare
from moe_jax.data import prepared, writer
from moe_jax.data.batches import Batches, eval_batches
from moe_jax.data.load import open_dataset
from moe_jax.errors import UserError
from moe_jax.tasks.lm import task as lm

FLAGS = ["--source", "embedded:verse", "--seq_len", "128"]
ARGUMENTS = {
    "sources": ["embedded:verse"],
    "tokenizer": "bytes",
    "seq_len": 128,
    "heldout_every": 20,
    "seed": 0,
}
OPTIONS = {"seq_len": 128, "slice_bytes": 0, "heldout_bytes": 0, "heldout_every": 20, "seed": 0}


def open_one(spec, **options):
    return open_dataset(((str(spec), 1.0),), **{**OPTIONS, **options})


def all_rows(dataset, split):
    index = np.arange(dataset.num_rows(split))
    return dataset.fetch(split, np.zeros_like(index), index)


def assert_same_data(one, other):
    assert one.fingerprint == other.fingerprint
    for split in ("train", "heldout"):
        for a, b in zip(all_rows(one, split), all_rows(other, split)):
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def verse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "verse"
    assert prepare.main([*FLAGS, "--out", str(folder)]) == 0
    return folder


def test_prepared_rows_are_the_rows_packed_in_memory(verse):
    disk, memory = open_one(verse), open_one("embedded:verse")
    assert_same_data(disk, memory)
    assert disk.documents("train") == {"verse": 183} and disk.text_bytes(
        "heldout"
    ) == memory.text_bytes("heldout")
    for split in ("train", "heldout"):
        assert disk.text(split, "verse") == memory.text(split, "verse")
    batches = [Batches(dataset, "train", 5, 4).rows(900, range(4)) for dataset in (disk, memory)]
    for a, b in zip(*batches):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(next(eval_batches(disk, 16)), next(eval_batches(memory, 16))):
        np.testing.assert_array_equal(a, b)


def test_rows_are_stored_in_the_smallest_types(verse):
    record = prepared.open_prepared(verse).train.fetch(np.array([0]))
    assert [field.dtype for field in record if field is not None] == [np.uint8] * 4


def test_rows_in_many_files_are_the_same_rows(verse, tmp_path, monkeypatch):
    from moe_jax.data import tfds_builder

    monkeypatch.setattr(tfds_builder, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(tfds_builder, "ROWS_AT_ONCE", 70)
    assert prepare.main([*FLAGS, "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.rglob("*train.array_record*"))) > 20
    assert_same_data(open_one(tmp_path), open_one(verse))


def test_the_same_again_is_finished_already_and_other_arguments_are_refused(verse, capsys):
    before = {path: path.stat().st_mtime_ns for path in verse.rglob("*") if path.is_file()}
    assert prepare.main([*FLAGS, "--out", str(verse)]) == 0
    out = capsys.readouterr().out
    assert (
        "is finished already, with the same arguments" in out
        and "verse" in out
        and "731,415" in out
    )
    assert all(
        path.stat().st_mtime_ns == at for path, at in before.items() if path.name != prepared.LOCK
    )
    with pytest.raises(
        UserError, match="was prepared with seed 0, not 3: choose another directory, or delete it"
    ):
        prepare.main([*FLAGS, "--seed", "3", "--out", str(verse)])


KILLED = """
import os, pathlib, signal, sys
from moe_jax.data import writer
def track(what, items):
    for number, item in enumerate(items):
        if what == sys.argv[3] and number == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
writer.write(pathlib.Path(sys.argv[1]), eval(sys.argv[2]), track)
"""


@pytest.mark.parametrize(
    ("what", "number"),
    [("reading documents", 50), ("writing train rows", 3000), ("writing heldout rows", 20)],
)
def test_killed_at_any_moment_it_leaves_nothing_finished_and_the_same_command_finishes_it(
    verse, tmp_path, what, number
):
    command = [sys.executable, "-c", KILLED, str(tmp_path), repr(ARGUMENTS), what, str(number)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / prepared.RECORD).exists() and (tmp_path / "texts").exists()
    with pytest.raises(
        UserError,
        match="is not finished: its preparation was interrupted, run the same command again",
    ):
        open_one(tmp_path)
    assert prepare.main([*FLAGS, "--out", str(tmp_path)]) == 0
    assert_same_data(open_one(tmp_path), open_one(verse))
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*")}
        for folder in (tmp_path, verse)
    ]
    assert names[0] == names[1], "something of the killed run is left"


def test_an_interrupt_is_one_message_and_130(tmp_path, capsys, monkeypatch):
    def interrupted(items):
        yield from [item for _, item in zip(range(5), items)]
        raise KeyboardInterrupt

    write = writer.write

    def stopped(out, arguments, track):
        return write(out, arguments, lambda _, items: interrupted(items))

    monkeypatch.setattr(writer, "write", stopped)
    assert prepare.main([*FLAGS, "--out", str(tmp_path)]) == 130
    assert "is not finished; the same command finishes it" in capsys.readouterr().err
    assert not (tmp_path / prepared.RECORD).exists()


@pytest.mark.parametrize("out", ["thesis.txt", "thesis.txt/out"])
def test_a_file_in_the_place_of_the_directory_is_one_message(tmp_path, out):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(
        UserError,
        match=rf"--out .*{out} cannot be made or written to \(.*\): choose another directory",
    ):
        prepare.main([*FLAGS, "--out", str(tmp_path / out)])


def test_two_at_once_and_foreign_directories_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(
        UserError, match="mine is not empty and was not made by prepare: choose another directory"
    ):
        prepare.main([*FLAGS, "--out", str(tmp_path / "mine")])
    (tmp_path / "busy").mkdir()
    with open(tmp_path / "busy" / prepared.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="busy is in use by another process"):
            prepare.main([*FLAGS, "--out", str(tmp_path / "busy")])


def documents_of(rows, tokenizer):
    """The documents that the targets of rows spell."""
    targets = rows.targets_RS[rows.segment_RS > 0]
    ends = np.flatnonzero(targets == tokenizer.boundary_id) + 1
    return sorted(tokenizer.decode(part) for part in np.split(targets, ends)[:-1])


def test_two_sources_with_a_trained_tokenizer(tmp_path):
    laws = [
        f"Artículo {i}: la señal número {i * i} será única.\n" * (1 + i % 5) for i in range(300)
    ]
    (tmp_path / "laws.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in laws)
    )
    (tmp_path / "logs.txt").write_text("".join(f"line {i}\n\n" for i in range(9000)))
    for name in ("one", "two"):
        flags = [
            "--source",
            f"jsonl:{tmp_path}/laws.jsonl",
            "--source",
            f"notes=text:{tmp_path}/logs.txt",
        ]
        flags += [
            "--tokenizer",
            "bpe:300",
            "--seq_len",
            "32",
            "--heldout_every",
            "3",
            "--out",
            str(tmp_path / name),
        ]
        assert prepare.main(flags) == 0
    dataset = open_one(tmp_path / "one", seq_len=32)
    assert dataset.fingerprint == open_one(tmp_path / "two", seq_len=32).fingerprint
    assert dataset.domains == ("laws", "notes") and dataset.documents("heldout") == {
        "laws": 100,
        "notes": 2,
    }
    assert dataset.tokenizer.name == "bpe:300" and dataset.tokenizer.vocab_size == 300
    train, heldout = (
        documents_of(all_rows(dataset, split), dataset.tokenizer) for split in ("train", "heldout")
    )
    assert [text for text in train if text in set(laws)] == sorted(
        text for i, text in enumerate(laws, 1) if i % 3
    )
    assert set(heldout) & set(train) == set() and len(heldout) == 102
    assert (
        prepared.open_prepared(tmp_path / "one").train.fetch(np.array([0])).tokens_RS.dtype
        == np.uint16
    )


def test_parts_that_do_not_go_together_are_one_message(verse, tmp_path):
    with pytest.raises(
        UserError, match=r"verse was prepared with seq_len 128, but data.seq_len is 256: set that"
    ):
        open_one(verse, seq_len=256)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40))
    )
    flags = ["--source", f"jsonl:{tmp_path}/a.jsonl", "--tokenizer", "bpe:260", "--seq_len", "128"]
    prepare.main([*flags, "--out", str(tmp_path / "bpe")])
    differ = (
        "bpe has tokenizer bpe:260, but .*verse has bytes: "
        r"prepare all with one \(--tokenizer file:"
    )
    with pytest.raises(UserError, match=differ):
        open_dataset(((str(verse), 1.0), (str(tmp_path / "bpe"), 1.0)), **OPTIONS)
    taken = f"file:{tmp_path}/bpe/tokenizer/tokenizer.json"
    prepare.main(
        [*flags[:2], "--tokenizer", taken, "--seq_len", "128", "--out", str(tmp_path / "same")]
    )
    assert open_dataset(
        ((str(tmp_path / "bpe"), 1.0), (str(tmp_path / "same"), 1.0)), **OPTIONS
    ).domains == ("a",)


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    """Two domains prepared by a SentencePiece model that normalises and has an unknown token."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("lossy")
    (folder / "corpus.txt").write_text("to be or not to be that is the question\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "sp"),
        vocab_size=18,
        minloglevel=2,
    )
    for name, text in (("known", "to be\n\nor not  to be\n"), ("foreign", "что быть, to be\n")):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text * (1 + i % 3)}) + "\n" for i in range(20))
        )
    assert prepare.main(lossy_command(folder)) == 0
    return folder


def lossy_command(folder):
    sources = [
        "--source",
        f"jsonl:{folder}/known.jsonl",
        "--source",
        f"jsonl:{folder}/foreign.jsonl",
    ]
    rest = ["--tokenizer", f"file:{folder}/sp.model", "--seq_len", "16", "--heldout_every", "4"]
    return [*sources, *rest, "--out", str(folder / "out")]


def heldout_sums(dataset):
    """What an evaluation of a model that knows nothing adds up over all held-out rows."""
    total = {}
    for batch in eval_batches(dataset, 8):
        inputs = jax.tree.map(jnp.asarray, batch)
        logits = jnp.zeros((*batch.tokens_BS.shape, dataset.tokenizer.vocab_size))
        found = lm.losses(lambda *_, logits=logits: (logits, {}), inputs, jax.random.key(0), False)
        for name, value in lm.evaluate(found, inputs, dataset).items():
            total[name] = total.get(name, 0) + np.asarray(value, np.float64)
    return total


def test_bits_per_byte_are_per_byte_of_the_text_that_a_tokenizer_loses(lossy, capsys):
    dataset = open_one(lossy / "out", seq_len=16)
    text, pieces = dataset.text_bytes("heldout"), dataset.parts[0].heldout_piece_bytes
    assert all(
        text[domain] == len(dataset.text("heldout", domain)) for domain in ("known", "foreign")
    )
    assert pieces["known"] < text["known"] and 0 < pieces["foreign"] < 0.6 * text["foreign"]
    total = heldout_sums(dataset)
    np.testing.assert_allclose(total["bytes"], [text["known"], text["foreign"]], rtol=1e-6)
    figures = lm.summary(total, dataset)
    bits = (
        total["tokens"] * np.log2(dataset.tokenizer.vocab_size) / [text["known"], text["foreign"]]
    )
    np.testing.assert_allclose(
        [figures[f"domain/{name}/bits_per_byte"] for name in ("known", "foreign")], bits, rtol=1e-5
    )
    assert prepare.main(lossy_command(lossy)) == 0
    note = (
        f"changes the text: its ids stand for {pieces['foreign']} bytes where the held-out text of "
        f"foreign has {text['foreign']};"
    )
    assert note in capsys.readouterr().out


def test_a_directory_prepared_before_the_record_knew_is_taken_at_its_texts_bytes(
    lossy, verse, tmp_path, capsys
):
    np.testing.assert_array_equal(open_one(verse).byte_scale(), [1.0])
    prepare.main([*FLAGS, "--out", str(verse)])
    assert "note:" not in capsys.readouterr().out
    shutil.copytree(lossy / "out", tmp_path / "old")
    record = json.loads((tmp_path / "old" / prepared.RECORD).read_text())
    for key in ("heldout_piece_bytes", "digests", "digest"):
        del record[key]
    (tmp_path / "old" / prepared.RECORD).write_text(json.dumps(record))
    old = open_one(tmp_path / "old", seq_len=16)
    np.testing.assert_array_equal(old.byte_scale(), [1.0, 1.0])
    assert "was prepared before files had digests" in old.notes[0] and open_one(verse).notes == ()


def test_damage_is_one_message(tmp_path):
    prepare.main(["--source", "embedded:verse", "--seq_len", "512", "--out", str(tmp_path)])
    record = json.loads((tmp_path / prepared.RECORD).read_text())
    shard = next(path for path in tmp_path.rglob("*train.array_record*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(
        UserError,
        match=rf"has {len(whole) - 100} bytes instead of {len(whole)}: copy .* again, or prepare",
    ):
        open_one(tmp_path, seq_len=512)
    shard.unlink()
    with pytest.raises(UserError, match=r"train\.array_record.* is missing"):
        open_one(tmp_path, seq_len=512)
    for text, message in [
        ("{", "is damaged"),
        (
            json.dumps({**record, "seed": 1}),
            "is damaged .it is not what was written, by its digest",
        ),
        (json.dumps({"format": 0}), "was prepared by another version"),
    ]:
        (tmp_path / prepared.RECORD).write_text(text)
        with pytest.raises(UserError, match=message):
            open_one(tmp_path, seq_len=512)
    with pytest.raises(
        UserError, match=r"is no prepared directory \(no moe_jax_data\.json\): make one with"
    ):
        open_one(tmp_path / "rows")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "text:*.nothing"], r"source text:\*.nothing matches no file"),
        (["--source", "web"], "source 'web' is none of: embedded"),
        (
            ["--source", "embedded", "--source", "embedded"],
            "--source embedded is given twice: held-out documents",
        ),
        (
            ["--source", "embedded", "--tokenizer", "words"],
            "--tokenizer words is none of: bytes, bpe:VOCAB, file:PATH",
        ),
        (["--source", "embedded", "--seq_len", "1"], "--seq_len 1 must be at least 2"),
        (["--source", "embedded", "--heldout_every", "0"], "--heldout_every 0 must be at least 2"),
        (
            ["--source", "embedded:verse", "--heldout_every", "500"],
            "heldout_every is 500, but domain verse has only 192",
        ),
    ],
)
def test_a_wrong_flag_is_one_message(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        prepare.main([*flags, "--out", str(tmp_path / "out")])
