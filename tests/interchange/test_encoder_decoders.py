"""T5 and Switch Transformers: what they write behind a source, what is dropped, and runs of ours.

test_families.py has their logits.
"""

import json

import hf_cases
import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from moe_jax.errors import UserError
from moe_jax.interchange.exporting import export_model
from moe_jax.interchange.families import FAMILIES, switch_transformers
from moe_jax.interchange.importing import import_model
from moe_jax.interchange.meaning import meaning
from moe_jax.models.functions import make_model
from moe_jax.parallel import mesh
from moe_jax.run import open_run, write_run

SHARDS = 10**9
NEW = 12


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        # Two places of 15 tokens in each expert: the encoder drops, and a target token by token
        # does not.
        ("switch_transformers", {"expert_capacity": 2}),
        pytest.param("switch_transformers", {"router_bias": True}, marks=pytest.mark.full),
        ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ],
)
def test_targets_are_the_same(family, changes, tmp_path):
    """Decoded by our cache and by theirs, from the imported and from the exported model."""
    model = hf_cases.theirs(family, changes)
    run = hf_cases.imported(hf_cases.saved(model, tmp_path / "theirs"), tmp_path / "ours")
    want = hf_cases.their_targets(model, NEW)
    # Not the same token again and again.
    assert len(set(want.ravel().tolist())) > 3
    np.testing.assert_array_equal(hf_cases.our_targets(run, NEW), want)
    (tmp_path / "back").mkdir()
    export_model(run, tmp_path / "back", like=tmp_path / "theirs", shard_bytes=SHARDS)
    again = hf_cases.loaded(tmp_path / "back")
    np.testing.assert_array_equal(hf_cases.their_targets(again, NEW), want)


def test_places_decide_what_a_model_computes(tmp_path):
    """With fewer of them logits are others, in both."""
    logits = []
    for places in (1, 64):
        model = hf_cases.theirs("switch_transformers", {"expert_capacity": places})
        folder = hf_cases.saved(model, tmp_path / f"theirs{places}")
        run = hf_cases.imported(folder, tmp_path / f"ours{places}")
        assert run.config.model.moe.dispatcher_options.places == places
        logits.append(hf_cases.our_logits(run, hf_cases.ids()))
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


def test_copies_of_the_embedding_are_passed_over(tmp_path):
    """Older versions of transformers wrote them, and a bias of cross-attention that none reads."""
    model = hf_cases.theirs("t5")
    folder = hf_cases.saved(model, tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors["shared.weight"]
    table = tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(tensors | {bias: table}, folder / "model.safetensors")
    run = hf_cases.imported(folder, tmp_path / "ours")
    logits = hf_cases.our_logits(run, hf_cases.ids())
    assert np.abs(logits - hf_cases.their_logits(model, hf_cases.ids())).max() < 1e-5


def test_a_head_that_is_not_the_embedding_is_told(tmp_path):
    """As transformers saves T5 1.1: its config says that the head is tied, and it is not."""
    model = hf_cases.theirs("t5", {"tie_word_embeddings": False})
    folder = hf_cases.saved(model, tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"][::-1].copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        import_model(folder, tmp_path / "ours")
    assert str(error.value) == (
        f"{folder / 'model.safetensors'}: lm_head.weight is not shared.weight, although "
        "config.json ties them: set tie_word_embeddings to false there"
    )
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    run = hf_cases.imported(folder, tmp_path / "ours")
    assert not run.config.model.tie_embeddings and run.config.model.head_scale == 1
    theirs = hf_cases.loaded(folder)
    logits = hf_cases.our_logits(run, hf_cases.ids())
    assert np.abs(logits - hf_cases.their_logits(theirs, hf_cases.ids())).max() < 1e-5


@pytest.mark.parametrize("step", range(5))
def test_layers_with_experts_are_those_of_transformers(step):
    """0 = none; every layer; every second, third and fourth, from the second one on."""
    want = [
        "ddddddd",
        "mmmmmmm",
        "dmdmdmd",
        "dmddmdd",
        "dmdddmd",
    ][step]
    found = switch_transformers.by_step(step, 7)
    assert "".join(kind[0] for kind in found) == want


OURS = {
    "model.kind": "encdec",
    "task": "translation",
    "model.attention": "relative_bias",
    "model.attention_scale": 1.0,
    "model.num_kv_heads": 4,
    "model.embedding_scale": 1.0,
    "model.activation": "relu",
    "model.period": ("dense", "moe"),
    "model.kinds.encdec.encoder_period": ("dense", "moe"),
    "model.kinds.encdec.encoder_repeats": 1,
    "model.tie_embeddings": True,
    "model.head_scale": 0.25,
    "model.repeats": 1,
    "model.ffn_hidden": 16,
    "model.moe.router": "switch",
    "model.param_dtype": "float32",
    "model.dtype": "float32",
}


def made(folder, changes):
    """A run of ours with random parameters, in a folder."""
    raw = tiny.raw(OURS | changes)
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        model = make_model(tiny.build(changes=OURS | changes).model)
        params, router_state = jax.jit(model.init)(jax.random.key(3))
        params = jax.tree.map(lambda x: x + 0.1, params)
        write_run(folder, raw, {"params": params, "router_state": router_state}, step=7)
    return open_run(folder, silent=True)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("switch_transformers", {}),
        pytest.param(
            "switch_transformers",
            {
                "model.moe.dispatcher": "capacity",
                "model.moe.dispatchers.capacity.places": 3,
            },
            marks=pytest.mark.full,
        ),
        (
            "t5",
            {
                "model.period": ("dense",),
                "model.kinds.encdec.encoder_period": ("dense",),
                "model.activation": "geglu",
                "model.tie_embeddings": False,
                "model.head_scale": 1.0,
            },
        ),
    ],
)
def test_a_run_of_ours_computes_the_same_in_transformers(family, changes, tmp_path):
    run = made(tmp_path / "ours", changes)
    (tmp_path / "theirs").mkdir()
    done = export_model(run, tmp_path / "theirs", shard_bytes=SHARDS)
    assert done.family == family
    model = hf_cases.loaded(tmp_path / "theirs")
    id_BS = hf_cases.ids()
    expected = hf_cases.our_logits(run, id_BS)
    assert np.abs(hf_cases.their_logits(model, id_BS) - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.attention_scale": 0.3}, "model.attention_scale = 0.3, and switch_transformers"),
        ({"model.tie_embeddings": False}, "model.tie_embeddings = False, and switch_transformers"),
        ({"model.ffn_hidden": 32}, "model.moe.expert_hidden = 16, and switch_transformers has 32"),
        (
            {"model.period": ("moe", "dense")},
            "the kinds of blocks (model.prefix, period, suffix) = moe dense, and",
        ),
        (
            {"model.moe.router": "top_k"},
            'model.moe.router = "top_k", and switch_transformers has "switch"',
        ),
    ],
)
def test_what_the_family_cannot_say_is_named(changes, message, tmp_path):
    run = made(tmp_path / "ours", changes)
    with pytest.raises(UserError) as error:
        export_model(run, tmp_path, family="switch_transformers", shard_bytes=1)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_drops_by_a_factor_is_of_training_alone():
    """A number of places is a property of the model, and so is the dispatcher that has it."""
    capacity = {"model.moe.dispatcher": "capacity", "model.moe.dispatchers.capacity.factor": 2.0}
    assert meaning(tiny.build(changes=capacity)) == meaning(tiny.build())
    places = capacity | {"model.moe.dispatchers.capacity.places": 3}
    more = set(meaning(tiny.build(changes=places))) - set(meaning(tiny.build()))
    assert more == {
        "model.moe.dispatcher",
        "model.moe.dispatchers.capacity.factor",
        "model.moe.dispatchers.capacity.places",
    }


def test_a_model_without_places_is_written_with_as_many_as_tokens(tmp_path):
    config = meaning(tiny.build(changes=OURS))
    family = FAMILIES["switch_transformers"]
    assert family.write(config)["expert_capacity"] == switch_transformers.UNBOUNDED
