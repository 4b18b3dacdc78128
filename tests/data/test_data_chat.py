"""Conversations: what a template writes, where an answer lies, and that it alone is learned."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.commands import prepare
from moe_jax.data import pack, sources
from moe_jax.data.batches import Batches, eval_batches
from moe_jax.data.chat_template import compiled
from moe_jax.data.documents import Conversation, Document
from moe_jax.data.load import open_dataset
from moe_jax.data.sources import chat
from moe_jax.data.tokenizer import bytes_tokenizer
from moe_jax.errors import UserError
from moe_jax.tasks.lm import task as lm

BYTES = bytes_tokenizer()
TALK = [("system", "S"), ("user", "Hi"), ("assistant", "Yo"), ("user", "?"), ("assistant", "!")]
MESSAGES = [{"role": role, "content": content} for role, content in TALK]


def chatml():
    return compiled(chat.CHATML, "ChatML")


def learned(document):
    pairs = zip(document.pieces, document.learned, strict=True)
    return [piece for piece, is_learned in pairs if is_learned]


def test_answers_are_found_in_what_the_template_writes():
    document = chat.document(MESSAGES, chatml(), "talk", "here")
    assert document.text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi")
    assert "".join(document.pieces) == document.text
    assert learned(document) == ["Yo<|im_end|>\n", "!<|im_end|>\n"]
    # The prompt ends as it does when the model is asked.
    assert document.pieces[0].endswith("<|im_start|>assistant\n")


def test_a_template_is_filled_in_as_transformers_does():
    template = "{% for m in messages %}\n  {{ m['role'] | upper }}: {{ m | tojson }}\n{% endfor %}"
    said = compiled(template, "T")([{"role": "user", "content": "é"}], "here", ask=False)
    assert said == '  USER: {"role": "user", "content": "é"}\n'
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs, _ = transformers.render_jinja_template([MESSAGES], chat_template=chat.CHATML)
    assert theirs[0] == chatml()(MESSAGES, "here", ask=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system') }}", "says: no system"),
        ("{% if %}", "is none"),
        ("{{ messages[-1]['content'] }}", "does not write message 3 behind those before it"),
    ],
)
def test_templates_that_do_not_go_are_one_line(template, message):
    with pytest.raises(UserError, match=message):
        chat.document(MESSAGES, compiled(template, "T"), "talk", "here")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[", "is not JSON"),
        ('{"text": "a"}', 'has no list "messages"'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
    ],
)
def test_lines_that_are_no_conversation(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        list(sources.read(f"chat:{tmp_path}/a.jsonl"))


def test_quiet_targets_by_hand():
    talk = Conversation("abcd", "talk", (1, 3), (False, True, False))
    text = Document("xy", "text")
    encoded = pack.encode([talk, text], BYTES, ["talk", "text"])
    rows = pack.pack(encoded, 8, BYTES)
    # a b c d and the boundary behind them; x y and theirs.
    assert rows.quiet_RS.tolist() == [[1, 0, 0, 1, 1, 0, 0, 0]]
    ends = Conversation("abcd", "talk", (3,), (False, True))
    (alone,) = pack.encode([ends], BYTES, ["talk"])
    assert alone.quiet.tolist() == [True, True, True, False, False]
    assert pack.pack(pack.encode([text], BYTES, ["text"]), 8, BYTES).quiet_RS is None
    with pytest.raises(UserError, match="puts a space before each piece"):
        pack.encode([talk], BYTES._replace(prefix_space=True), ["talk"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    lines = [json.dumps({"prompt": f"What is {i}?", "response": f"It is {i}."}) for i in range(40)]
    (folder / "talk.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--source", f"chat:{folder}/talk.jsonl", "--tokenizer", "bytes", "--seq_len", "64"]
    assert prepare.main([*flags, "--heldout_every", "4", "--out", str(folder / "data")]) == 0
    return folder / "data"


def opened(folder):
    return open_dataset(
        [(str(folder), 1.0)],
        seq_len=64,
        slice_bytes=0,
        heldout_bytes=0,
        heldout_every=4,
        seed=0,
    )


def said(batch):
    """The learned targets of a batch, as text; the boundary is a bar."""
    keeps = (batch.segment_BS > 0) & (batch.quiet_BS == 0)
    ids = np.asarray(batch.targets_BS)[keeps]
    return "".join("|" if i == BYTES.boundary_id else chr(i) for i in ids)


def test_a_prepared_directory_keeps_what_is_learned(prepared):
    dataset = opened(prepared)
    text = said(Batches(dataset, "train", 0, 8).rows(0, range(8)))
    assert "It is" in text and "What" not in text and "<|im_start|>" not in text
    assert re.search(r"It is \d+\.<\|im_end\|>\n\|", text)
    held = next(eval_batches(dataset, 4))
    assert held.quiet_BS.any() and "What" not in said(held)


def test_the_loss_is_of_answers_alone(prepared):
    batch = next(eval_batches(opened(prepared), 4))
    batch = type(batch)(*(jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in batch))
    logits = jnp.zeros((*batch.tokens_BS.shape, BYTES.vocab_size))
    losses = lm.losses(lambda *of: (logits, {}), batch, None, False)
    keeps = (batch.segment_BS > 0) & (batch.quiet_BS == 0)
    np.testing.assert_array_equal(losses.weight, keeps)
    whole = lm.losses(lambda *of: (logits, {}), batch._replace(quiet_BS=()), None, False)
    np.testing.assert_array_equal(whole.weight, batch.segment_BS > 0)


def test_data_sets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra [eval] is not installed")
    records = datasets.Dataset.from_list([{"text": f"a{i}", "n": i} for i in range(3)])
    records.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"test": records}).save_to_disk(str(tmp_path / "split"))
    (tmp_path / "files").mkdir()
    records.to_json(str(tmp_path / "files" / "a.jsonl"))
    for spec, domain in ((f"{tmp_path}/saved", "saved"), (f"{tmp_path}/split:test", "split")):
        assert list(sources.read(f"hf:{spec}")) == [Document(f"a{i}", domain) for i in range(3)]
    # Streamed, as one of the Hub is.
    assert [text for text, _ in sources.read(f"hf:{tmp_path}/files")] == ["a0", "a1", "a2"]
    with pytest.raises(UserError, match="record 0 has no text in field 'n'"):
        list(sources.read(f"hf:{tmp_path}/saved#n"))
    with pytest.raises(UserError, match=r"data set .*/none, split train cannot be read"):
        list(sources.read(f"hf:{tmp_path}/none"))
