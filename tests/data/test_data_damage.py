"""Flipped bits in a prepared directory: none is silent, wherever it is, and each is one message."""

import json
import random
import shutil

import numpy as np
import pytest

from moe_jax.commands import prepare
from moe_jax.data import prepared, tokenizer
from moe_jax.data.load import open_dataset
from moe_jax.errors import UserError

FLIPS = 4  # in each file; 30 were tried when this was written


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    for name in ("one", "two"):
        lines = [json.dumps({"text": f"{name} {i} " * 9}) + "\n" for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    flags = ["--source", f"jsonl:{folder}/*.jsonl", "--tokenizer", "bpe:270", "--seq_len", "32"]
    assert prepare.main([*flags, "--out", str(folder / "out")]) == 0
    return folder / "out"


def everything(folder):
    """All that a run can read of a prepared directory."""
    data = open_dataset(
        ((str(folder), 1.0),), seq_len=32, slice_bytes=0, heldout_bytes=0, heldout_every=20, seed=0
    )
    found = [
        data.fingerprint,
        data.tokenizer.fingerprint,
        data.heldout_order()[1].tolist(),
        data.byte_scale().tolist(),
    ]
    for split in ("train", "heldout"):
        index = np.arange(data.num_rows(split))
        rows = data.fetch(split, 0 * index, index)
        found += [field.tolist() for field in rows if field is not None]
        found += [data.text(split, domain) for domain in data.domains]
    return found


def files_of(folder):
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != prepared.LOCK
    )


def flipped(data, place, bit):
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def test_no_flipped_bit_is_silent(folder):
    whole, draw = everything(folder), random.Random(0)
    for path in files_of(folder):
        data = path.read_bytes()
        used = len(data.rstrip(b"\0"))  # files of rows are filled up with zeros, which nobody reads
        told = 0
        for _ in range(FLIPS):
            path.write_bytes(flipped(data, draw.randrange(used), draw.randrange(8)))
            try:
                assert everything(folder) == whole, path
            except UserError as error:
                told += 1
                assert str(folder) in str(error) and "damaged" in str(error)
        path.write_bytes(data)
        assert told == FLIPS or ".array_record" in path.name, path


def test_the_record_is_told_to_be_damaged_wherever_its_bit_is_flipped(folder):
    path = folder / prepared.RECORD
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(flipped(data, place, place % 8))
        with pytest.raises(UserError, match=r"moe_jax_data.json is damaged \("):
            prepared.read_record(folder)
    path.write_bytes(data)


def test_the_same_preparation_again_compares_every_file(folder):
    path = next(path for path in files_of(folder) if "train.array_record" in path.name)
    data = path.read_bytes()
    path.write_bytes(flipped(data, len(data) - 1, 0))  # of no row
    everything(folder)
    record = prepared.read_record(folder)
    with pytest.raises(
        UserError,
        match=r"train.array_record.* is damaged \(it is not what was written, by its digest\): "
        r"copy",
    ):
        prepared.check_files(folder, record, small_only=False)
    path.write_bytes(data)
    prepared.check_files(folder, record, small_only=False)


def old(folder, tmp_path):
    """The same directory as it was prepared before there were digests."""
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old" / prepared.RECORD
    record = json.loads(path.read_text())
    del (
        record["digest"],
        record["digests"],
        record["files"]["tokenizer/tokenizer_kind.json"],
    )  # which had no fingerprint either
    path.write_text(json.dumps(record))
    about = tmp_path / "old" / "tokenizer" / "tokenizer_kind.json"
    about.write_text(
        json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "fingerprint"})
    )
    return tmp_path / "old"


def test_without_digests_numbers_that_are_none_are_refused(folder, tmp_path):
    folder = old(folder, tmp_path)
    everything(folder)
    path = folder / "heldout_domain.npy"
    data = path.read_bytes()
    for wrong in (data[:-1] + b"\x02", b"\x93NUMPX" + data[6:]):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"heldout_domain.npy is damaged"):
            everything(folder)
    path.write_bytes(data)
    about = folder / "tokenizer" / "tokenizer_kind.json"
    for boundary in (-1, 270):
        about.write_text(
            json.dumps({"name": "bpe:270", "kind": "huggingface", "boundary_id": boundary})
        )
        with pytest.raises(
            UserError, match=f"the boundary {boundary} is none of its ids, 0 to 269"
        ):
            everything(folder)
    tokenizer.bytes_tokenizer().save(folder / "tokenizer")
    with pytest.raises(
        UserError,
        match=r"the train rows of .* have the number 2\d\d where there are 256 \(0 to 255\)",
    ):
        everything(folder)
