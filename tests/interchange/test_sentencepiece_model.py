"""A SentencePiece model as a tokenizer.json: transformers gives the ids of SentencePiece itself."""

import json

import hf_cases
import pytest
import sentencepiece
from transformers import AutoTokenizer

from moe_jax.data import sources
from moe_jax.data.tokenizer import models
from moe_jax.errors import UserError
from moe_jax.interchange import sentencepiece_model, tokenizer_files
from moe_jax.interchange.exporting import export_model

STRANGE = [
    "Été, naïve café: ¿qué? ﬁne ½ Å",
    "日本語 and 🙂 1234",
    "  two  spaces \n\n\tand a tab  ",
    "a literal \u2581 and <0x41>",
    "null \x00, ÿ, e\u0301",
    " ",
    "",
]
KINDS = {
    "unigram": {"model_type": "unigram"},
    "unigram, bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "bpe": {"model_type": "bpe", "add_dummy_prefix": False},
    "bpe, bytes, symbols": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["\n", "\t", "LORD"],
    },
}


@pytest.fixture(scope="module")
def lines():
    """Real text: some thousand lines of a book."""
    texts = (document.text for document in sources.read("embedded:verse"))
    return [line for text in texts for line in text.splitlines() if line][:3000]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lines):
    """The bytes of a model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for number, (kind, options) in enumerate(KINDS.items()):
        prefix = folder / str(number)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines[:2000]),
            model_prefix=str(prefix),
            vocab_size=700,
            minloglevel=2,
            **options,
        )
        made[kind] = prefix.with_suffix(".model").read_bytes()
    return made


def written(folder, model):
    """(our tokenizer of a model, that of transformers from the files that we write)."""
    tokenizer = models.read_sentencepiece("file:sp.model", model, "")
    tokenizer_files.write(folder, tokenizer, 64)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids(kind, trained, lines, tmp_path):
    ours, theirs = written(tmp_path, trained[kind])
    whole = ["\n".join(lines[i : i + 20]) for i in range(2000, 3000, 20)]
    for text in [*lines, *whole, *STRANGE]:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, text
        if KINDS[kind].get("byte_fallback"):
            # U+2581 comes back as a space, from SentencePiece too.
            assert theirs.decode(ids) == ours.decode(ids) == text.replace("\u2581", " ")
    assert theirs.eos_token == "</s>" and theirs.eos_token_id == ours.boundary_id


def test_what_was_written_is_read_again(trained, tmp_path):
    """As a tokenizer.json, and from a folder that has the model alone."""
    model = trained["unigram, bytes"]
    ours, _ = written(tmp_path, model)
    again = tokenizer_files.read(tmp_path, {}, 700)
    assert again.kind == "huggingface" and again.pieces == ours.pieces
    for name in tokenizer_files.SENTENCEPIECE:
        folder = tmp_path / name.removesuffix(".model")
        folder.mkdir()
        (folder / name).write_bytes(model)
        alone = tokenizer_files.read(folder, {}, 700)
        assert alone.kind == "sentencepiece" and alone.fingerprint == ours.fingerprint
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    assert tokenizer_files.read(folder, {}, 700).boundary_id == 1


def test_a_model_of_ours_takes_its_sentencepiece_model_along(trained, tmp_path):
    """Imported from a folder without a tokenizer.json, and exported with one."""
    settings = {"vocab_size": 700, "eos_token_id": 2}
    folder = hf_cases.saved(hf_cases.theirs("llama", settings), tmp_path / "theirs")
    (folder / "tokenizer.model").write_bytes(trained["bpe, bytes, symbols"])
    run = hf_cases.imported(folder, tmp_path / "ours")
    assert run.tokenizer.kind == "sentencepiece"
    (tmp_path / "back").mkdir()
    export_model(run, tmp_path / "back", shard_bytes=10**9)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "In the beginning the LORD\ncreated 日本"
    assert theirs(text)["input_ids"] == run.tokenizer.encode(text).tolist()


def test_the_file_is_read_field_by_field(trained):
    model = sentencepiece_model.read("sp", trained["bpe, bytes, symbols"])
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained["bpe, bytes, symbols"])
    assert len(model.pieces) == processor.get_piece_size() == 700
    for id_, piece in enumerate(model.pieces):
        assert piece.text == processor.id_to_piece(id_)
        assert piece.score == processor.get_score(id_)
        assert (piece.type == sentencepiece_model.BYTE) == processor.is_byte(id_)
        assert (piece.type == sentencepiece_model.CONTROL) == processor.is_control(id_)
    assert model.type == sentencepiece_model.BPE and model.byte_fallback
    assert not model.characters and model.add_dummy_prefix and not model.remove_extra_whitespaces


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "word"}, "it is neither a unigram model nor a BPE"),
        (
            {"model_type": "unigram", "treat_whitespace_as_suffix": True},
            "its spaces are no U+2581 before words",
        ),
    ],
)
def test_what_a_tokenizer_json_cannot_say_is_one_line(options, said, lines, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[:200]),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    with pytest.raises(UserError) as error:
        written(tmp_path, (tmp_path / "sp.model").read_bytes())
    assert str(error.value) == (
        f"the tokenizer file:sp.model cannot become a tokenizer.json: {said}"
    )


@pytest.mark.parametrize("file", [b"\x0b", b"\x0a\xff", b"garbage"])
def test_what_is_no_model_is_refused(file):
    with pytest.raises(UserError, match="sp is no SentencePiece model"):
        sentencepiece_model.read("sp", file)


def test_two_cuts_of_a_text_may_be_equally_likely(trained):
    """Three dashes are one and two, or two and one: the same sum in another order."""
    pieces = tuple(
        sentencepiece_model.Piece(text, score, sentencepiece_model.NORMAL)
        for text, score in (("-", -3.1), ("--", -4.7), ("---", -7.9))
    )
    model = sentencepiece_model.read("sp", trained["unigram"])._replace(pieces=pieces)
    assert sentencepiece_model.are_tied(model, [0, 1], [1, 0])
    assert not sentencepiece_model.are_tied(model, [0, 1], [2])
    bpe = model._replace(type=sentencepiece_model.BPE)
    assert not sentencepiece_model.are_tied(bpe, [0, 1], [1, 0])
