"""Tokenizers: what goes in comes out, every byte is accounted for, and mistakes are told."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax.data import tokenizer
from moe_jax.data.tokenizer import Decoder, bytes_tokenizer
from moe_jax.errors import UserError

TEXTS = [
    "En el principio crió Dios los cielos y la tierra. ¿Qué señal? ¡Él viene!\n",
    "In the beginning God created the heaven and the earth.\n\tAnd  the spirit, 1234 <|boundary|> "
    "</s>\n",
    "emoji 🙂, 日本語, combining e\u0301, null \x00, ÿ\n",
]
CORPUS = [text * 20 for text in TEXTS]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.make("bpe:360", lambda: CORPUS)


@pytest.fixture(scope="module")
def models(tmp_path_factory, bpe):
    """Files of existing tokenizers: a SentencePiece model, and tokenizer.json files of several
    kinds.
    """
    import sentencepiece
    import tokenizers as hf

    folder = tmp_path_factory.mktemp("models")
    (folder / "corpus.txt").write_text("".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "sp"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        character_coverage=0.98,
        user_defined_symbols=["\n", "\t"],
    )
    (folder / "byte_level.json").write_bytes(bpe.model)

    vocabulary = (
        {"<unk>": 0, "<s>": 1, "</s>": 2}
        | {f"<0x{i:02X}>": 3 + i for i in range(256)}
        | {"▁": 259, "a": 260, "▁a": 261}
    )
    llama = hf.Tokenizer(
        hf.models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    llama.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
    )
    llama.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    )
    llama.add_special_tokens(["<unk>", "<s>", "</s>"])
    llama.enable_truncation(4)  # a setting of the file that must not cut documents
    llama.save(str(folder / "llama.json"))

    word = hf.Tokenizer(hf.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    word.decoder = hf.decoders.WordPiece()
    word.save(str(folder / "wordpiece.json"))
    (folder / "garbage.json").write_text("{")
    foreign = json.loads(bpe.model)
    foreign["model"]["vocab"]["日"] = len(foreign["model"]["vocab"])
    (folder / "foreign.json").write_text(json.dumps(foreign))
    (folder / "garbage.model").write_bytes(b"not a model")
    (folder / "empty.model").write_bytes(b"")
    return folder


def all_tokenizers(bpe, models):
    files = [
        tokenizer.make(f"file:{models / name}", list)
        for name in ("sp.model", "byte_level.json", "llama.json")
    ]
    return [bytes_tokenizer(), bpe, *files]


def test_every_text_comes_back_and_every_byte_is_counted(bpe, models):
    for tokens in all_tokenizers(bpe, models):
        size = tokens.token_bytes()
        assert (
            size.shape == (tokens.vocab_size,)
            and size.dtype == np.int32
            and size[tokens.boundary_id] == 0
        )
        for text, ids in zip(TEXTS, tokens.encode_many(TEXTS)):
            assert tokens.decode(ids) == text
            assert tokens.boundary_id not in ids and ids.max() < tokens.vocab_size
            assert size[ids].sum() == len(text.encode()) + tokens.prefix_space
            np.testing.assert_array_equal(tokens.encode(text), ids)


def test_bytes_are_the_bytes_of_utf8():
    tokens = bytes_tokenizer()
    assert (tokens.vocab_size, tokens.boundary_id, tokens.dtype) == (256, 255, np.uint8)
    assert tokens.encode("é\n").tolist() == [0xC3, 0xA9, 0x0A]
    assert tokens.decode([255, *b"ab", 255, *b"c", 255]) == "abc"


def test_bpe_is_shorter_than_bytes_and_the_same_every_time(bpe):
    again = tokenizer.make("bpe:360", lambda: CORPUS)
    other = tokenizer.make("bpe:360", lambda: CORPUS[:1])
    assert again.fingerprint == bpe.fingerprint != other.fingerprint
    assert bpe.vocab_size == 360 and len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


@pytest.mark.parametrize("text", ["né 🙂!", "日本"])
def test_streaming_waits_for_whole_characters(bpe, models, text):
    for tokens in all_tokenizers(bpe, models):
        decoder = Decoder(tokens)
        parts = [decoder.feed([i]) for i in tokens.encode(text)]
        assert "".join(parts) + decoder.finish() == text
        assert "\ufffd" not in "".join(parts)


def test_invalid_utf8_is_replaced_and_never_raises():
    decoder = Decoder(bytes_tokenizer())
    assert decoder.feed([0xC3]) == "" and decoder.feed([0x28]) == "\ufffd("
    assert decoder.feed([0xE2, 0x82]) == "" and decoder.finish() == "\ufffd"
    assert bytes_tokenizer().decode(range(256)).startswith("\x00\x01")


def test_the_space_before_a_document_is_taken_off_but_no_other(models):
    tokens = tokenizer.make(f"file:{models / 'llama.json'}", list)
    ids = [*tokens.encode(" a"), tokens.boundary_id, *tokens.encode("a")]
    assert tokens.prefix_space and tokens.decode(ids) == " aa"


def test_save_and_load_give_the_same_tokenizer(bpe, models, tmp_path):
    for number, tokens in enumerate(all_tokenizers(bpe, models)):
        tokens.save(tmp_path / str(number))
        loaded = tokenizer.load(tmp_path / str(number))
        assert (loaded.fingerprint, loaded.name, loaded.pieces) == (
            tokens.fingerprint,
            tokens.name,
            tokens.pieces,
        )
        assert [a.tolist() for a in loaded.encode_many(TEXTS)] == [
            a.tolist() for a in tokens.encode_many(TEXTS)
        ]


def test_another_boundary_can_be_named(models):
    chosen = tokenizer.make(f"file:{models / 'llama.json'}#<s>", list)
    assert (
        chosen.boundary_id,
        tokenizer.make(f"file:{models / 'llama.json'}", list).boundary_id,
    ) == (1, 2)


@pytest.mark.parametrize("token", [256, -1, 10**6])
def test_a_token_outside_of_the_vocabulary_is_one_message(token):
    with pytest.raises(
        UserError, match=rf"token {token} is outside the vocabulary of tokenizer bytes \(ids 0 to"
    ):
        bytes_tokenizer().decode([97, token])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("words", "tokenizer 'words' is none of: bytes, bpe:VOCAB, file:PATH"),
        ("bytes:7", "bytes takes no argument"),
        ("bpe:256", "give a vocabulary of at least 257"),
        ("bpe:many", "give a vocabulary of at least 257"),
        ("file:nowhere.json", "tokenizer file:nowhere.json cannot be read: .*No such file"),
        ("file:{}/garbage.json", "garbage.json is no tokenizer.json"),
        (
            "file:{}/foreign.json",
            "foreign.json has the token '日', which stands for no bytes: the file may be damaged",
        ),
        (
            "file:{}/garbage.model",
            "garbage.model is neither a SentencePiece model nor, by its ending, a",
        ),
        ("file:{}/empty.model", "empty.model is neither a SentencePiece model"),
        (
            "file:{}/wordpiece.json",
            "decodes by WordPiece, which loses bytes of the text: choose a byte-level one",
        ),
        (
            "file:{}/llama.json#<end>",
            r"has no special token '<end>' \(it has: <unk>, <s>, </s>\); name one",
        ),
    ],
)
def test_a_wrong_tokenizer_is_one_message(models, spec, message):
    with pytest.raises(UserError, match=message):
        tokenizer.make(spec.format(models), lambda: CORPUS)


def test_a_damaged_folder_is_one_message(tmp_path, bpe):
    with pytest.raises(UserError, match="holds no complete tokenizer"):
        tokenizer.load(tmp_path)
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_kind.json").write_text(json.dumps({"kind": "abacus"}))
    with pytest.raises(UserError, match="holds no complete tokenizer: 'abacus'"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("unit", ["ACGT", "漢字", "0123456789", "-=+", " ", "\n"])
def test_text_without_spaces_has_pieces_of_a_bounded_length(unit):
    text = unit * (40_000 // len(unit))  # as one piece, that of 40,000 characters takes minutes
    tokens = tokenizer.make("bpe:400", lambda: [text])
    assert max(len(piece.decode("utf-8", "replace")) for piece in tokens.pieces) <= 64
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text and len(ids) < len(text) / 20


def test_text_with_spaces_gives_the_tokenizer_that_it_always_gave(bpe):
    """So that what is prepared again has the same fingerprint."""
    import tokenizers

    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    options = {
        "vocab_size": 360,
        "special_tokens": ["<|boundary|>"],
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    plain.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(**options))
    assert bpe.model == plain.to_str().encode()


TRAINING = """
import random, signal, sys
from moe_jax.data import tokenizer
text = "".join(random.Random(0).choices("ACGT", k=2_000_000))
def texts():
    print("begun", flush=True)
    yield text
    if sys.argv[1] == "reading":
        while True:
            yield "more"
    print("read", flush=True)
try:
    tokenizer.make("bpe:4096", texts)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("phase", "sign"), [("reading", "begun"), ("merging", "read")])
def test_the_training_of_a_bpe_is_interrupted_at_once(phase, sign):
    child = subprocess.Popen(
        [sys.executable, "-c", TRAINING, phase], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    while sign not in child.stdout.readline():
        assert child.poll() is None
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    try:
        assert child.wait(timeout=20) == 130  # the training itself takes longer
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
