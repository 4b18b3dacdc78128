"""Files as they come: packed in any way, in any encoding that says so, broken or no text at all;
the same rules for every kind.
"""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_jax.data import sources
from moe_jax.errors import UserError

TEXT = "Él dijo:\n¿qué?\n" * 50


def zstandard(data):
    return pa.compress(data, codec="zstd", asbytes=True)


PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard,
    "txt": bytes,
}


def read(spec):
    return [document.text for document in sources.read(str(spec))]


def text_of(path, data):
    path.write_bytes(data)
    return "".join(read(f"text:{path}"))


@pytest.mark.parametrize("ending", PACK)
def test_what_is_packed_is_told_by_the_first_bytes_and_not_by_the_name(tmp_path, ending):
    packed = PACK[ending](TEXT.encode())
    for name in (f"a.{ending}", f"b.{ending.upper()}", "c", "d.text"):
        assert text_of(tmp_path / name, packed) == TEXT


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_several_packed_parts_are_one_file(tmp_path, ending):
    parts = [PACK[ending](part.encode()) for part in (TEXT, "", "end\n")]
    assert text_of(tmp_path / f"a.{ending}", b"".join(parts)) == TEXT + "end\n"


def test_frames_and_zeros_that_are_to_be_skipped_are_skipped(tmp_path):
    skipped = b"\x57\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    assert (
        text_of(tmp_path / "a.zst", skipped + zstandard(b"one\n") + skipped + zstandard(b"two\n"))
        == "one\ntwo\n"
    )
    for ending in ("gz", "xz", "bz2"):
        pack = PACK[ending]
        assert (
            text_of(tmp_path / f"a.{ending}", pack(b"one\n") + bytes(512) + pack(b"two\n"))
            == "one\ntwo\n"
        )


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_a_truncated_file_is_told_so_and_what_follows_a_packed_part_is_not_lost(tmp_path, ending):
    whole = PACK[ending](bytes(range(1, 128)) * 3000 + "".join(map(chr, range(256, 9999))).encode())
    for data in (whole[: len(whole) // 2], whole + whole[: len(whole) // 2]):
        with pytest.raises(
            UserError, match=rf"a.{ending} cannot be read, it is truncated .*: copy it again"
        ):
            text_of(tmp_path / f"a.{ending}", data)
    with pytest.raises(UserError, match=rf"a.{ending} cannot be read, it may be damaged"):
        text_of(tmp_path / f"a.{ending}", whole + b"behind")


def frame(window):
    """A zstandard frame of the word "text" that asks for a window of 2^window bytes."""
    block = b"\x21\0\0text"  # the last one, stored as it is, of 4 bytes
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window - 10) << 3]) + block


def test_a_long_window_of_zstandard_is_no_damage(tmp_path):
    assert text_of(tmp_path / "a.zst", frame(27)) == "text"
    with pytest.raises(
        UserError,
        match=r"cannot be read: .* window of more than 128 MB .*`zstd -d --long=31 .*a.zst`",
    ):
        text_of(tmp_path / "a.zst", frame(31))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be-mark"])
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_an_encoding_with_its_mark_is_read(tmp_path, encoding, kind):
    content = TEXT if kind == "text" else json.dumps({"text": TEXT}, ensure_ascii=False)
    data = (
        ("\ufeff" + content).encode("utf-16-be")
        if encoding.endswith("mark")
        else content.encode(encoding)
    )
    (tmp_path / "a.gz").write_bytes(gzip.compress(data))
    assert "".join(read(f"{kind}:{tmp_path}/a.gz")) == TEXT


NO_TEXT = {
    "plain English".encode(
        "utf-16-le"
    ): "is not UTF-8 but UTF-16LE without a mark.*`iconv -f UTF-16LE -t UTF-8`",
    "plain English".encode("utf-16-be"): "is not UTF-8 but UTF-16BE without a mark",
    "plain English".encode("utf-32-le"): "is not UTF-8 but UTF-32LE without a mark",
    b"one\0 NUL": r"is not UTF-8 but no text, or text in another encoding \(byte 3 is NUL\)",
    b"one\n" * 999 + b"two\0": r"has a NUL character after '.*two', which no text has",
    b"\xff\xfea\0b": "is no valid UTF-16.*though its mark says so .*it may be damaged",
    "señor".encode(
        "latin1"
    ): r"is not UTF-8 \(byte 0xf1 after 'se'\): convert it from what it is written in",
    b"\xf1": r"is not UTF-8 \(byte 0xf1 at its beginning\)",
    b"PK\x03\x04\x14\0\0\0": "is no text but a zip archive: unpack it",
    b"PAR1\x15\x04": "is no text but a Parquet file: name it as parquet:GLOB",
    b"%PDF-1.7\n": "is no text but a PDF",
    b"x" * 257 + b"ustar\0": "is no text but a tar archive",
    # Without the time of packing, or two workers of pytest-xdist have tests of different names.
    gzip.compress(
        gzip.compress(b"text", mtime=0), mtime=0
    ): r"is no text but packed by gzip \(twice, if it is a file\): unpack it",
    gzip.compress(b"PK\x03\x04\x14\0\0\0", mtime=0): "is no text but a zip archive",
}


@pytest.mark.parametrize("data", NO_TEXT)
def test_a_file_that_is_no_text_is_told_what_it_is(tmp_path, data):
    for kind in ("text", "jsonl"):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(
            UserError,
            match=NO_TEXT[data] if kind == "text" else "is no text|is not|is no valid|NUL",
        ):
            read(f"{kind}:{tmp_path}/a")


def test_a_name_that_promises_a_packed_file_is_not_believed(tmp_path):
    for name in ("a.gz", "a.XZ", "a.zst", "a.bz2"):
        for data, found in ((b"plain", "begins with b'plai'"), (b"", "is empty")):
            with pytest.raises(UserError, match=f"by its name it is packed by .*, but it {found}"):
                text_of(tmp_path / name, data)


def tfds_of(folder, monkeypatch, texts):
    """A data set of these texts (bytes or str) on disk, and its spec."""
    from tfds_cases import stored

    from moe_jax.data.tfds_import import tfds

    stored(
        folder,
        "TinyLines",
        {"text": tfds.features.Text()},
        {"train": [{"text": text} for text in texts]},
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return "tfds:tiny_lines"


def test_a_record_means_the_same_in_every_kind_of_file(tmp_path, monkeypatch):
    texts = ["one\r\ntwo\rthree\n", "", "end"]
    (tmp_path / "a.jsonl").write_bytes(
        "\r\n".join(json.dumps({"text": text}) for text in [*texts, None]).encode()
    )
    pq.write_table(pa.table({"text": [*texts, None]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_bytes(texts[0].encode())
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(texts[2].encode())
    files = [f"jsonl:{tmp_path}/a.jsonl", f"parquet:{tmp_path}/a.parquet", f"text:{tmp_path}/*.txt"]
    for spec in [*files, tfds_of(tmp_path / "tfds", monkeypatch, texts)]:
        assert read(spec) == ["one\ntwo\nthree\n", "end"], spec


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (b"a\xff", r"is not UTF-8 \(byte 0xff after 'a'\)"),
        (b"a\0b", "has a NUL character after 'a'"),
    ],
)
def test_a_wrong_record_is_refused_in_every_kind_of_file(tmp_path, monkeypatch, wrong, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + wrong.replace(b"\0", b"\\u0000") + b'"}\n')
    strings = pa.array([b"right", wrong], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    dataset = tfds_of(tmp_path / "tfds", monkeypatch, [b"right", wrong])
    with pytest.raises(UserError, match=message.replace("'a'", "'.*a'")):
        read(f"jsonl:{tmp_path}/a.jsonl")
    for spec in (f"parquet:{tmp_path}/a.parquet", dataset):
        with pytest.raises(UserError, match=message):
            read(spec)


def test_a_field_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"n": {"text": "in"}, "text": "a \\"text\\" in it"}\n{"text": "a", "text": "b"}\n'
    )
    with pytest.raises(UserError, match=r"a.jsonl, line 2 has field 'text' more than once"):
        read(f"jsonl:{tmp_path}/a.jsonl")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has column 'text' more than once"):
        read(f"parquet:{tmp_path}/a.parquet")


def test_a_file_name_that_is_no_utf8_is_a_domain_all_the_same(tmp_path):
    (tmp_path / "caf\udce9.txt").write_text("text")
    assert [document.domain for document in sources.read(f"text:{tmp_path}/*")] == ["caf\ufffd"]
