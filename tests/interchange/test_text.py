"""Greedy text and tokenizers are the same in both, imported and exported."""

import json

import hf_cases
import jax
import numpy as np
import pytest
import tiny
import tokenizers
import torch
from transformers import AutoTokenizer

from moe_jax import config, train_step
from moe_jax.data import tokenizer as tokenizer_room
from moe_jax.decoding.draw import Settings
from moe_jax.decoding.sample import make_sampler
from moe_jax.errors import UserError
from moe_jax.interchange import tokenizer_files
from moe_jax.interchange.exporting import export_model
from moe_jax.interchange.importing import import_model
from moe_jax.parallel import mesh
from moe_jax.run import open_run, write_run

TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "Été, naïve café: ¿qué?",
    "日本語 and 🙂 1234",
    " a  b\n\n\tc ",
    "",
]
# With what follows they are shorter than a row of 64 tokens, behind which we begin a new window.
PROMPTS = ["In the beginning", "Été, naïve"]
GREEDY = Settings(max_tokens=20, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=())
SHARDS = 10**9


def bpe(vocab_size=300):
    return tokenizer_room.make(f"bpe:{vocab_size}", lambda: TEXTS * 3)


def with_end_token(name="<|endoftext|>", texts=TEXTS):
    """A tokenizer as others make it, with a token of another name at the end of a text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", name],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts * 3, trainer)
    return made


def our_texts(run, prompts):
    with jax.set_mesh(run.mesh):
        sampler = make_sampler(run.config.model, run.tokenizer, run.config.data.seq_len)
        return sampler(run.judged, run.router_state, prompts, GREEDY)


def their_texts(model, tokenizer, prompts):
    """Texts of transformers' own decoding, from the same ids; theirs become text by our decoder,
    for libraries differ in what they make of half a character.
    """
    texts = []
    for prompt in prompts:
        begun = [tokenizer.boundary_id, *map(int, tokenizer.encode(prompt))]
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([begun]),
                max_new_tokens=GREEDY.max_tokens,
                do_sample=False,
                eos_token_id=tokenizer.boundary_id,
                pad_token_id=tokenizer.boundary_id,
            )[0].tolist()
        new = ids[len(begun) :]
        if tokenizer.boundary_id in new:
            new = new[: new.index(tokenizer.boundary_id)]
        decoder = tokenizer_room.Decoder(tokenizer)
        decoder.feed(begun)
        texts.append(decoder.feed(new) + decoder.finish())
    return texts


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 5}),
        pytest.param("olmoe", {"norm_topk_prob": True}, marks=pytest.mark.full),
        ("llama", {"rope_scaling": hf_cases.YARN, "head_dim": 16}),
        pytest.param("qwen3_moe", {"mlp_only_layers": [0]}, marks=pytest.mark.full),
        pytest.param("qwen2_moe", {}, marks=pytest.mark.full),
        pytest.param("olmo2", {}, marks=pytest.mark.full),
        pytest.param(
            "qwen3", hf_cases.OPTIONS["qwen3"]["window in some layers"], marks=pytest.mark.full
        ),
        ("gpt_oss", {}),
        pytest.param("deepseek_v2", {"first_k_dense_replace": 1}, marks=pytest.mark.full),
        ("deepseek_v3", {"rope_scaling": hf_cases.YARN | {"mscale_all_dim": 0.5}}),
        pytest.param(
            "dots1", {"first_k_dense_replace": 1, "norm_topk_prob": True}, marks=pytest.mark.full
        ),
    ],
)
def test_greedy_text_is_the_same(family, changes, tmp_path):
    """Decoded by our cache and by theirs, from the imported and from the exported model."""
    tokenizer = with_end_token()
    # An id without a token is never drawn by us; transformers knows no such thing by itself.
    model = hf_cases.theirs(family, changes | vocabulary(tokenizer))
    folder = hf_cases.saved(model, tmp_path / "theirs")
    tokenizer.save(str(folder / "tokenizer.json"))
    run = hf_cases.imported(folder, tmp_path / "ours")
    assert run.tokenizer.boundary_id == 1
    texts = our_texts(run, PROMPTS)
    assert texts == their_texts(model, run.tokenizer, PROMPTS)
    assert len(set(texts)) == 2 and all(len(text) > 5 for text in texts)
    (tmp_path / "back").mkdir()
    export_model(run, tmp_path / "back", shard_bytes=SHARDS)
    assert texts == their_texts(hf_cases.loaded(tmp_path / "back"), run.tokenizer, PROMPTS)


def vocabulary(tokenizer):
    return {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 1}


def made(folder, changes, tokenizer):
    """A run of random weights that was not imported, with its moving average."""
    raw = tiny.raw(
        {
            "model.param_dtype": "float32",
            "model.dtype": "float32",
            "model.vocab_size": 320,
            "data.seq_len": 64,
            "optim.ema_decay": 0.5,
            "mesh.data": 1,
        }
        | changes
    )
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        loop = raw["model"] | {"scan": False}
        model = train_step.make_model(config.build(raw | {"model": loop}, 1).model)
        params, router_state = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)

    def random(x):
        return (x + rng.normal(0, 0.1, x.shape)).astype(x.dtype)

    ema, router_state = jax.tree.map(random, (params, router_state))
    parts = {"params": params, "ema": ema, "router_state": router_state}
    write_run(folder, raw, parts, step=7)
    tokenizer.save(folder / "tokenizer")
    return open_run(folder, silent=True)


OURS = [
    ("mixtral", {"model.moe.routers.top_k.softmax": "after"}),
    ("qwen3_moe", {"model.qk_norm": True, "model.tie_embeddings": True}),
    (
        "qwen2_moe",
        {
            "model.moe.shared_experts": 2,
            "model.moe.shared_gate": True,
            "model.attention_bias": True,
            "model.prefix": ("dense",),
        },
    ),
    ("llama", {"model.period": ("dense",), "model.scan": True}),
    (
        # Its embeddings have a scale, too, and its last norm adds one.
        "gemma2",
        {
            "model.period": ("sliding_window:dense", "dense"),
            "model.repeats": 1,
            "model.attentions.sliding_window.window": 9,
            "model.norm_position": "both",
            "model.norm_plus_one": True,
            "model.activation": "geglu",
            "model.attention_cap": 2.0,
            "model.logit_cap": 0.5,
            "model.tie_embeddings": True,
            "model.embedding_scale": 3.0,
        },
    ),
    (
        "dots1",
        {
            "model.qk_norm": True,
            "model.prefix": ("dense",),
            "model.moe.router": "sigmoid",
            "model.moe.routers.sigmoid.num_groups": 2,
            "model.moe.routers.sigmoid.top_groups": 2,
            "model.moe.shared_experts": 2,
        },
    ),
]
# In the normal suite each family has one tokenizer, in turn.
TOKENIZED = [
    # Every second family in the normal suite, with one of the two tokenizers.
    pytest.param(family, changes, kind, marks=() if i % 4 == 2 * j else pytest.mark.full)
    for i, (family, changes) in enumerate(OURS)
    for j, kind in enumerate(("bytes", "bpe"))
]


@pytest.mark.parametrize(("family", "changes", "kind"), TOKENIZED)
def test_a_model_of_ours_says_the_same_in_transformers(family, changes, kind, tmp_path):
    """Its scale on embeddings goes into the weights, and its tokenizer goes along."""
    tokenizer = bpe() if kind == "bpe" else tokenizer_room.bytes_tokenizer()
    run = made(tmp_path / "ours", changes, tokenizer)
    (tmp_path / "theirs").mkdir()
    done = export_model(run, tmp_path / "theirs", shard_bytes=SHARDS)
    assert done.family == family and "the scale on embeddings" in done.notes[0]
    model = hf_cases.loaded(tmp_path / "theirs")
    id_BS = hf_cases.ids(320)
    expected = hf_cases.our_logits(run, id_BS, run.moving_average)
    assert np.abs(hf_cases.their_logits(model, id_BS) - expected).max() < 1e-5
    assert their_texts(model, tokenizer, PROMPTS) == our_texts(run, PROMPTS)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for text in TEXTS:
        ids = [tokenizer.boundary_id, *map(int, tokenizer.encode(text))]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs.eos_token_id == tokenizer.boundary_id == model.config.eos_token_id


def test_a_tokenizer_comes_back_as_it_was(tmp_path):
    model = hf_cases.theirs("llama", {"vocab_size": 300})
    folder = hf_cases.saved(model, tmp_path / "theirs")
    with_end_token("</s>").save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    run = hf_cases.imported(folder, tmp_path / "ours")
    (tmp_path / "back").mkdir()
    export_model(run, tmp_path / "back", shard_bytes=SHARDS)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("theirs", "back")]
    assert files[0] == files[1]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == run.tokenizer.encode(text).tolist()


def test_what_lies_beside_the_tensors_is_taken_from_the_model_that_a_run_began_from(tmp_path):
    tokenizer = with_end_token("</s>")
    model = hf_cases.theirs("llama", vocabulary(tokenizer) | {"max_position_embeddings": 9000})
    folder = hf_cases.saved(model, tmp_path / "theirs")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    run = hf_cases.imported(folder, tmp_path / "ours")
    assert run.config.data.seq_len == 4096
    (tmp_path / "back").mkdir()
    done = export_model(run, tmp_path / "back", like=folder, shard_bytes=SHARDS)
    assert "chat_template.jinja" in done.notes[0] and "bos_token_id" in done.notes[0]
    names = [{path.name for path in at.iterdir()} for at in (folder, tmp_path / "back")]
    assert names[0] == names[1]
    for name in names[0] - {"config.json"}:
        assert (folder / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    configs = [hf_cases.loaded(at).config.to_dict() for at in (folder, tmp_path / "back")]
    for values in configs:
        del values["_name_or_path"]
    assert configs[0] == configs[1]
    with_end_token("</s>", PROMPTS).save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError) as error:
        export_model(run, tmp_path / "back", like=folder, shard_bytes=SHARDS)
    assert str(error.value) == (
        f"--like {folder} has another tokenizer than {tmp_path / 'ours' / 'tokenizer'}: name the "
        "model that the run began from, or leave the flag out"
    )


@pytest.mark.parametrize(
    ("about", "settings", "boundary"),
    [
        ({"eos_token": "<unk>"}, {}, 0),
        ({"eos_token": {"content": "<unk>"}}, {}, 0),
        ({}, {"eos_token_id": 0}, 0),
        ({}, {"eos_token_id": [0, 1]}, 0),
        # An ordinary token, which may stand inside of a text.
        ({}, {"eos_token_id": 7}, 1),
        ({}, {}, 1),
    ],
)
def test_the_boundary_is_the_end_of_a_text(about, settings, boundary, tmp_path):
    with_end_token().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    assert tokenizer_files.read(tmp_path, settings, 300).boundary_id == boundary


def test_a_tokenizer_that_ours_cannot_hold_is_told_and_left_out(tmp_path):
    model = hf_cases.theirs("llama")
    folder = hf_cases.saved(model, tmp_path / "theirs")
    done = import_model(folder, tmp_path / "without")
    assert "no tokenizer was taken" in done.notes[0] and "cannot be read" in done.notes[0]
    with_end_token().save(str(folder / "tokenizer.json"))
    done = import_model(folder, tmp_path / "more")
    assert "has 290 ids, and the model 40 (vocab_size)" in done.notes[0]
    run = open_run(tmp_path / "more", silent=True)
    with pytest.raises(UserError, match="holds no complete tokenizer"):
        _ = run.tokenizer
    (tmp_path / "back").mkdir()
    done = export_model(run, tmp_path / "back", shard_bytes=SHARDS)
    assert done.notes[0].startswith("no tokenizer was written: ")
    assert hf_cases.loaded(tmp_path / "back").config.eos_token_id is None
