"""Packing: hand-worked rows, every token predicted exactly once, positions, the split and the
orders.
"""

import numpy as np
import pytest

from moe_jax.data import pack
from moe_jax.data.documents import Document
from moe_jax.data.survey import fingerprint, survey
from moe_jax.data.tokenizer import bytes_tokenizer
from moe_jax.errors import UserError

BYTES = bytes_tokenizer()
B = BYTES.boundary_id


def tokens(text):
    return np.frombuffer(text.encode(), np.uint8)


def test_rows_worked_by_hand():
    rows = pack.pack([(tokens("abc"), 2), (tokens("d"), 0), (tokens("efg"), 1)], 4, BYTES)
    a, b, c, d, e, f, g = b"abcdefg"
    np.testing.assert_array_equal(rows.tokens_RS, [[B, a, b, c], [B, d, B, e], [f, g, 0, 0]])
    np.testing.assert_array_equal(rows.targets_RS, [[a, b, c, B], [d, B, e, f], [g, B, 0, 0]])
    np.testing.assert_array_equal(rows.segment_RS, [[1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 0, 0]])
    np.testing.assert_array_equal(rows.domain_RS, [[2, 2, 2, 2], [0, 0, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(
        pack.positions(rows.segment_RS), [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 0, 0]]
    )
    assert {field.dtype for field in rows if field is not None} == {np.dtype(np.uint8)}


def unpacked(rows):
    """(domain, text) of each document, put together again from the targets alone."""
    documents, text = [], []
    for row in range(len(rows.tokens_RS)):
        for place in np.flatnonzero(rows.segment_RS[row]):
            if rows.tokens_RS[row, place] == B:
                assert not text
            if rows.targets_RS[row, place] == B:
                documents.append((int(rows.domain_RS[row, place]), bytes(text).decode()))
                text = []
            else:
                text.append(rows.targets_RS[row, place])
    assert not text
    return documents


@pytest.mark.parametrize("seq_len", [2, 3, 7, 64, 1000])
def test_every_token_is_predicted_exactly_once_and_in_its_document(seq_len):
    random = np.random.default_rng(seq_len)
    documents = [(f"{i:03d} " + "é" * random.integers(0, 90), i % 5) for i in range(60)]
    rows = pack.pack([(tokens(text), domain) for text, domain in documents], seq_len, BYTES)
    assert unpacked(rows) == [(domain, text) for text, domain in documents]
    total = sum(len(text.encode()) + 1 for text, _ in documents)
    assert (rows.segment_RS > 0).sum() == total and len(rows.tokens_RS) == -(-total // seq_len)
    inside = (rows.segment_RS[:, 1:] == rows.segment_RS[:, :-1]) & (rows.segment_RS[:, 1:] > 0)
    np.testing.assert_array_equal(rows.tokens_RS[:, 1:][inside], rows.targets_RS[:, :-1][inside])
    place = pack.positions(rows.segment_RS)
    assert ((place[:, 1:] == place[:, :-1] + 1) == inside)[
        rows.segment_RS[:, 1:] > 0
    ].all() and not place[:, 0].any()


def test_many_short_documents_fit_the_type_of_segments():
    shortest = [
        (tokens("ab"), 0),
        *[(tokens("a"), 0)] * 2000,
    ]  # the first moves the others, so that row ends cut them
    rows = pack.pack(shortest, 508, BYTES)
    assert rows.segment_RS.dtype == np.uint8 and rows.segment_RS.max() == 255
    rows = pack.pack(shortest, 510, BYTES)
    assert rows.segment_RS.dtype == np.uint16 and rows.segment_RS.max() == 256


def documents(**numbers):
    return [
        Document(f"{domain} {i}", domain)
        for domain, number in numbers.items()
        for i in range(number)
    ]


def test_every_nth_document_of_each_domain_is_held_out():
    held = [d.text for split, d in pack.split(documents(a=7, b=5), 3) if split == "heldout"]
    assert held == ["a 2", "a 5", "b 2"]


def test_a_domain_that_is_too_small_to_hold_out_is_named():
    with pytest.raises(
        UserError, match=r"heldout_every is 6, but domain b has only 5 documents.*at most 5"
    ):
        list(pack.split(documents(a=7, b=5), 6))
    one = (
        "domain b has only 1 document, so none is held out: "
        r"make one domain of several files by a label \(books=text:GLOB\)"
    )
    with pytest.raises(UserError, match=one):
        list(pack.split(documents(b=1), 2))


def test_shuffling_keeps_every_document_within_its_window():
    all_ = documents(a=100)
    windows = list(pack.shuffled_windows(all_, 0, window_characters=90))
    assert [d for window in windows for d in sorted(window, key=lambda d: int(d.text[2:]))] == all_
    assert len(windows) > 4 and windows == list(
        pack.shuffled_windows(iter(all_), 0, window_characters=90)
    )
    assert windows != list(pack.shuffled_windows(all_, 1, window_characters=90))


def test_heldout_rows_have_one_domain_each_and_interleave():
    all_ = [Document("x" * 30, domain) for domain in "abca" for _ in range(2)]
    blocks = list(pack.pack_heldout(all_, 10, BYTES, ("a", "b", "c")))
    assert all(
        len(set(row[seg > 0])) == 1
        for rows in blocks
        for row, seg in zip(rows.domain_RS, rows.segment_RS)
    )
    np.testing.assert_array_equal(
        pack.interleaved(np.array([0, 0, 0, 1, 2, 2])), [0, 3, 4, 1, 5, 2]
    )


def test_the_fingerprint_covers_documents_tokenizer_and_arguments():
    found = survey(pack.split(documents(a=4, b=4), 2))
    assert found.domains == ("a", "b") and found.documents == {
        "train": {"a": 2, "b": 2},
        "heldout": {"a": 2, "b": 2},
    }
    assert found.text_bytes["train"] == {"a": 6, "b": 6}
    prints = {
        fingerprint(found, BYTES, *arguments)
        for arguments in [(8, 2, 0), (9, 2, 0), (8, 3, 0), (8, 2, 1)]
    }
    others = [documents(a=4, b=4)[::-1], documents(a=4, c=4), documents(a=4, b=5)]
    prints |= {fingerprint(survey(pack.split(other, 2)), BYTES, 8, 2, 0) for other in others}
    prints |= {fingerprint(found, BYTES._replace(boundary_id=0), 8, 2, 0)}
    assert (
        len(prints) == 8
        and fingerprint(survey(pack.split(documents(a=4, b=4), 2)), BYTES, 8, 2, 0) in prints
    )


def test_too_many_domains_ask_for_a_label():
    with pytest.raises(
        UserError, match="more than 256 domains: give each source one label, as in LABEL=text:GLOB"
    ):
        survey(("train", Document("x", str(i))) for i in range(257))
