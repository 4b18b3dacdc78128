"""What a run begins from: data at another place, another run's parameters, and options that do
nothing.
"""

import jax.numpy as jnp
import pytest
import tiny

from moe_jax import meaning
from moe_jax.begin import renames, resumed
from moe_jax.checkpoint import Checkpoints, refuse_idle_renames
from moe_jax.config import idle
from moe_jax.data import examples, tokenizer
from moe_jax.errors import UserError

TWO = {"data.sources": (("old/a", 1.0), ("old/b", 3.0))}


@pytest.fixture
def saves(tmp_path):
    """Checkpoints of a run at step 4 that read two prepared directories."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", every=1, keep=1, keep_best=0)
    metadata = {"config": tiny.raw(TWO), "data": "f" * 64}
    checkpoints.save(4, {"x": jnp.zeros(1)}, metadata=metadata, score=None, stacked=False)
    yield checkpoints
    checkpoints.close()


def go_on(saves, changes, data="f" * 64):
    cfg, raw = tiny.build(changes=changes), tiny.raw(changes)
    return resumed(cfg, saves, saves.latest(), {"config": raw, "data": data})


def test_the_same_data_at_another_place_are_told(saves):
    notes = go_on(saves, {"data.sources": (("new [1]/a", 1.0), ("old/b", 3.0))})
    assert "data.sources: old/a is at new [1]/a now, the same data" in notes
    assert not any("old/b" in note for note in notes)
    assert not any("data.sources:" in note for note in go_on(saves, TWO))


@pytest.mark.parametrize(
    ("sources", "data", "message"),
    [
        ((("new/a", 1.0), ("old/b", 3.0)), "e" * 64, "data.sources was .*old/a.*, is .*new/a"),
        ((("old/a", 1.0), ("old/b", 3.0)), "e" * 64, "the data changed since step 4"),
        ((("new/a", 2.0), ("old/b", 3.0)), "f" * 64, "data.sources was .*1.0.*, is .*2.0"),
        ((("old/b", 3.0), ("old/a", 1.0)), "f" * 64, "data.sources was .*old/a.*, is .*old/b"),
        ((("old/a", 1.0),), "f" * 64, "data.sources was"),
    ],
)
def test_other_data_are_refused_and_so_are_other_weights(saves, sources, data, message):
    with pytest.raises(UserError, match=message):
        go_on(saves, {"data.sources": sources}, data)


def test_a_folder_of_a_task_at_another_place_is_told(tmp_path):
    changes = {"task": "vision", "model.kind": "encoder", "model.kinds.encoder.inputs": "vectors"}
    saves = Checkpoints(tmp_path / "checkpoints", every=1, keep=1, keep_best=0)
    metadata = {"config": tiny.raw(changes | {"data.folder": "here"}), "data": "f"}
    saves.save(4, {"x": jnp.zeros(1)}, metadata=metadata, score=None, stacked=False)
    notes = go_on(saves, changes | {"data.folder": "there"}, "f")
    assert "data.folder was here, is there: the same data" in notes
    saves.close()


def test_a_model_without_a_run_is_no_start(tmp_path):
    saves = Checkpoints(tmp_path / "checkpoints", every=1, keep=1, keep_best=0)
    saves.save(4, {"x": jnp.zeros(1)}, metadata={"config": tiny.raw()}, score=None, stacked=False)
    with pytest.raises(UserError, match=r"holds a model and no training run.*train.init_from="):
        go_on(saves, {})
    saves.close()


def make_tokenizer(text, size=258):
    return tokenizer.make(f"bpe:{size}", lambda: [text] * 9)


def labelled(tokens, labels=("cat", "dog")):
    """Data as far as they are saved beside a run."""
    return examples.Classes(labels, tokens, 0, {})


@pytest.mark.parametrize("loaded", [["ends/embed", "repeats/0/attention/q"], ["ends/head"]])
def test_tables_of_another_tokenizer_are_refused(tmp_path, loaded):
    ours, theirs = make_tokenizer("ab ab ab"), make_tokenizer("cd cd cd")
    assert ours.vocab_size == theirs.vocab_size
    labelled(theirs).save(tmp_path / "old")
    assert meaning.compare(tmp_path / "old", labelled(theirs), loaded) == []
    assert meaning.compare(tmp_path / "old", labelled(ours), ["repeats/0/attention/q"]) == []
    with pytest.raises(UserError) as error:
        meaning.compare(tmp_path / "old", labelled(ours), loaded)
    message = str(error.value)
    for part in (
        str(tmp_path / "old"),
        ours.fingerprint[:12],
        theirs.fingerprint[:12],
        f'("{loaded[0]}", "")',
    ):
        assert part in message
    assert "is b'cd' there and b'ab' here" in message


def test_other_classes_and_items_are_refused_and_unknown_ones_told(tmp_path):
    bytes_tokenizer = tokenizer.bytes_tokenizer()
    labelled(bytes_tokenizer, ("dog", "cat")).save(tmp_path / "old")
    with pytest.raises(
        UserError, match=r"class 0 is 'dog' there and 'cat' here.*\(\"head/w\", \"\"\)"
    ):
        meaning.compare(tmp_path / "old", labelled(bytes_tokenizer), ["ends/embed", "head/w"])
    assert meaning.compare(tmp_path / "old", labelled(bytes_tokenizer), ["ends/embed"]) == []
    (note,) = meaning.compare(tmp_path / "old", labelled(bytes_tokenizer, ("dog",)), ["head/w"])
    assert "there are 2 there and 1 here, and the first 1 mean the same" in note
    examples.Market(("a", "b"), (), (), (), {}).save(tmp_path / "old")
    with pytest.raises(UserError, match="item 1 is 'b' there and 'c' here"):
        meaning.compare(
            tmp_path / "old", examples.Market(("a", "c"), (), (), (), {}), ["ends/embed"]
        )
    (note,) = meaning.compare(tmp_path / "none", labelled(bytes_tokenizer), ["ends/embed"])
    assert "tokenizer is missing: ends/embed are taken" in note


def test_renames_of_nothing_are_refused_by_name(tmp_path):
    saves = Checkpoints(tmp_path, every=1, keep=1, keep_best=0)
    there = {
        "params": {"embed": jnp.zeros(2), "repeats": {"0": {"w": jnp.zeros(2)}}},
        "router_state": {"s": jnp.zeros(1)},
    }
    saves.save(1, there, metadata={}, score=None, stacked=False)
    saves.close()
    here = {
        "params": {"embed": jnp.zeros(2), "repeats": {"v": jnp.zeros((1, 2))}},
        "router_state": {"t": jnp.zeros(1)},
    }

    def check(**rename):
        refuse_idle_renames(tmp_path, 1, here, stacked=True, rename=rename)

    check(s="t", embed="")
    check(**{"repeats/0/w": "repeats/0/v"})
    with pytest.raises(
        UserError, match=r"\('embd', 'embed'\) renames nothing.* It has embed, repeats/0/w, s"
    ):
        check(embd="embed")
    with pytest.raises(UserError, match=r"\('', 'embed'\) renames nothing"):
        check(**{"": "embed"})
    with pytest.raises(UserError, match=r"makes 'embet' of 'embed', and this model has no such"):
        check(embed="embet")
    with pytest.raises(UserError, match="renames 'a' twice"):
        renames(
            tiny.build(
                changes={"train.init_from": "x", "train.init_rename": (("a", "b"), ("a", "c"))}
            )
        )


VISION = {"task": "vision", "model.kind": "encoder"}
DENSE = {"model.period": ("dense",)}


@pytest.mark.parametrize(
    ("changes", "start", "said"),
    [
        ({}, 0, ""),
        ({"profile": "10:12"}, 0, ""),
        (
            {"profile": "10:12"},
            12,
            "profile = 10:12 traces nothing: this run makes steps 13 to 100",
        ),
        (
            {"profile": "10:12", "train.stop_at": 10},
            0,
            "profile = 10:12 traces nothing: this run makes steps 1 to 10",
        ),
        ({"profile": "10:12"}, 100, "profile = 10:12 traces nothing: this run makes no step"),
        ({"record.steps": "5,every 20"}, 10, ""),
        ({"record.steps": "5,7"}, 10, 'record.steps = "5,7" records nothing'),
        (
            {"record.steps": "5,400"},
            0,
            "record.steps: 400 will not be recorded: this run makes steps 1 to 100",
        ),
        (
            {"record.steps": "every 50", "train.stop_at": 40},
            0,
            'record.steps = "every 50" records nothing',
        ),
        ({"record.rows": 3}, 0, "record.rows = 3 does nothing"),
        ({"train.stop_at": 100}, 0, "train.stop_at = 100 does nothing"),
        (
            {"checkpoint.keep_best": 2, "eval.every": 0},
            0,
            "checkpoint.keep_best = 2 keeps nothing more",
        ),
        (
            {"checkpoint.keep_best": 2, "eval.every": 30, "checkpoint.every": 40},
            0,
            "checkpoint.keep_best = 2 keeps",
        ),
        ({"checkpoint.keep_best": 2, "eval.every": 20, "checkpoint.every": 40}, 0, ""),
        (
            {"optim.decay_mask": "all", "optim.optimizers.adamw.weight_decay": 0.0},
            0,
            'optim.decay_mask = "all" does',
        ),
        ({"optim.decay_mask": "all"}, 0, ""),
        (DENSE | {"eval.dispatcher": "dropless"}, 0, 'eval.dispatcher = "dropless" does nothing'),
        ({"model.moe.adaptive.limit": 7.0}, 0, "model.moe.adaptive.limit = 7.0 does nothing"),
        (
            {"eval.sample_prompt": "a", "eval.sample_tokens": 0},
            0,
            "eval.sample_prompt does nothing",
        ),
        (
            VISION | {"data.sources": (("x", 1.0),)},
            0,
            'data.sources does nothing: it is for task "lm", not "vision"',
        ),
        ({"data.folder": "x"}, 0, "data.folder does nothing"),
        (
            {"data.sources": (("x", 1.0),), "data.heldout_every": 3},
            0,
            "data.heldout_every does nothing",
        ),
        ({"data.heldout_every": 3}, 0, ""),
        (
            {"data.sources": (("poems=embedded:verse", 1.0),), "data.heldout_every": 3},
            0,
            "",
        ),
    ],
)
def test_what_does_nothing_is_told(changes, start, said):
    notes = idle.notes(tiny.build(changes=changes), tiny.raw(changes), start)
    assert len(notes) == bool(said) and said in "".join(notes)
