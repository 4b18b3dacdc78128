"""What we do not have, and what is missing or damaged, is one line that names the key, the tensor
or the file.
"""

import json
import shutil
import weakref

import hf_cases
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from moe_jax.__main__ import main as entry
from moe_jax.errors import UserError
from moe_jax.interchange.exporting import differences, export_model
from moe_jax.interchange.families import FAMILIES
from moe_jax.interchange.importing import import_model
from moe_jax.interchange.meaning import BLOCKS, laid_out, meaning
from moe_jax.interchange.rows import Row, pieces
from moe_jax.interchange.settings import Settings
from moe_jax.interchange.tensors import INDEX, Folder, write
from moe_jax.run import open_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family: a saved model, in shards."""
    made = {}
    for family in ("mixtral", "llama"):
        folder = tmp_path_factory.mktemp(family) / "model"
        made[family] = hf_cases.saved(hf_cases.theirs(family), folder, max_shard_size="8KB")
    return made


@pytest.fixture
def mixtral(folders, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(folders["mixtral"], tmp_path / "model")


def refused(folder, out):
    with pytest.raises(UserError) as error:
        import_model(folder, out)
    said = str(error.value)
    assert "\n" not in said
    return said


def change(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= values
    path.write_text(json.dumps(config))


# Their config.

LAYERS = ["full_attention", "sliding_attention"]
OTHER_ROPES = ("dynamic", "longrope", "proportional")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias = true: moe_jax has no biases of the feed-forward"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act = "gelu": moe_jax has no other activation'),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0: moe_jax has no clipping of queries, keys"),
        (
            "llama",
            {"quantization_config": {"bits": 4}},
            'quantization_config = {"bits": 4}: moe_jax knows no such option of llama models',
        ),
        ("llama", {"logit_scale": 2.0}, "logit_scale = 2.0: moe_jax knows no such option of llama"),
        *(
            (
                "llama",
                {"rope_scaling": {"type": name, "factor": 2.0}},
                f'rope_scaling = {{"type": "{name}", "factor": 2.0}}: moe_jax has no scaling '
                f'"{name}"; it has default, linear, llama3, yarn',
            )
            for name in OTHER_ROPES
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor = 0.5: models of this family turn whole heads",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "ramp": 1}},
            'rope_scaling.ramp = 1: moe_jax knows no such option of rope_type "linear" in models',
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear"}},
            "the key rope_scaling.factor is missing",
        ),
        ("llama", {"rope_scaling": 3}, "rope_scaling = 3: it must be an object"),
        (
            "qwen2",
            {"use_mrope": True},
            "use_mrope = true: moe_jax has no rotary embedding of im",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "chunked_attention"]},
            'layer_types = ["full_attention", "chunked_attention"]: it must have "full_attention" '
            'or "sliding_attention" for each of num_hidden_layers = 2',
        ),
        ("qwen2_moe", {"layer_types": LAYERS[:1]}, "for each of num_hidden_layers = 2"),
        (
            "gemma",
            {"hidden_act": "silu"},
            'hidden_act = "silu": moe_jax has no other activation of GEGLU\'s gate',
        ),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention = true: moe_jax has no Gemma that sees later tokens",
        ),
        (
            "gemma2",
            {"query_pre_attn_scalar": 0},
            "query_pre_attn_scalar = 0: it must be a whole number above 0",
        ),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping = 50.0: moe_jax has no cap on the scores of Gemma 3",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            'rope_parameters.sliding_attention.rope_type = "linear": moe_jax has no scaling of',
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_theta": 1e4}},
            "the key rope_parameters.full_attention is missing",
        ),
        (
            "llama",
            {"architectures": ["LlamaForSequenceClassification"]},
            'architectures = ["LlamaForSequenceClassification"]: moe_jax reads LlamaForCausalLM',
        ),
        ("llama", {"hidden_size": None}, "the key hidden_size is missing: take the config.json"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0: it must be a whole number"),
        ("llama", {"num_attention_heads": "4"}, 'num_attention_heads = "4": it must be a whole'),
        (
            "switch_transformers",
            {"router_dtype": "bfloat16"},
            'router_dtype = "bfloat16": moe_jax has no router in another precision than float32',
        ),
        (
            "switch_transformers",
            {"dense_act_fn": "gelu"},
            'dense_act_fn = "gelu": moe_jax reads relu and gelu_new',
        ),
        (
            "switch_transformers",
            {"tie_word_embeddings": False},
            "tie_word_embeddings = false: transformers then has other embeddings in the encoder",
        ),
        ("switch_transformers", {"expert_capacity": 0}, "expert_capacity = 0: it must be a whole"),
        ("switch_transformers", {"depth": 3}, "depth = 3: moe_jax knows no such option of switch"),
        (
            "t5",
            {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"},
            'feed_forward_proj = "gated-gelu": moe_jax reads relu, gelu_new, gated-gelu and gated',
        ),
    ],
)
def test_an_option_that_we_do_not_have_is_refused_by_its_name(family, changes, message):
    theirs = hf_cases.sizes(family) | changes
    with pytest.raises(UserError) as error:
        FAMILIES[family].read(Settings(theirs, "DIR/config.json"))
    said = str(error.value)
    assert said.startswith("DIR/config.json: ") and message in said and "\n" not in said


def test_a_family_that_we_do_not_know_is_refused(mixtral, tmp_path):
    change(mixtral, model_type="mixtral2")
    assert refused(mixtral, tmp_path / "out") == (
        f'{mixtral}/config.json: model_type = "mixtral2" is no family that moe_jax reads (the '
        f"nearest name is mixtral): it reads {', '.join(FAMILIES)}"
    )


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_none_is_refused(text, tmp_path):
    assert "cannot be read (No such file" in refused(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "config.json").write_text(text)
    assert "is no JSON" in refused(tmp_path, tmp_path / "out")


def test_what_breaks_our_own_rules_is_refused_by_them(mixtral, tmp_path):
    change(mixtral, num_key_value_heads=3)
    said = refused(mixtral, tmp_path / "out")
    assert said == "model.num_heads (4) must be divisible by model.num_kv_heads (3)"


# Their tensors.

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def of(folder, name):
    """The shard of a tensor."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def rewrite(folder, name, tensors):
    """Changes the tensors of the shard that has `name`; None takes one away, in the index too."""
    path, index = of(folder, name), json.loads((folder / INDEX).read_text())
    kept = {**load_file(path), **tensors}
    for one, value in tensors.items():
        if value is None:
            del kept[one], index["weight_map"][one]
        else:
            index["weight_map"][one] = path.name
    save_file(kept, path)
    (folder / INDEX).write_text(json.dumps(index))
    return path


def test_a_missing_shard(mixtral, tmp_path):
    path = of(mixtral, EXPERT)
    path.unlink()
    said = refused(mixtral, tmp_path / "out")
    assert said == f"{path} is missing, although {INDEX} names it: copy it too"


def test_a_damaged_shard(mixtral, tmp_path):
    path = of(mixtral, EXPERT)
    path.write_bytes(path.read_bytes()[:-7])
    said = refused(mixtral, tmp_path / "out")
    assert said.startswith(f"{path} is damaged (") and said.endswith("): copy it again")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index(text, mixtral, tmp_path):
    (mixtral / INDEX).write_text(text)
    said = refused(mixtral, tmp_path / "out")
    assert said.startswith(f"{mixtral / INDEX} is damaged (")


def test_an_index_that_is_not_of_these_shards(mixtral, tmp_path):
    path = of(mixtral, EXPERT)
    tensors = load_file(path)
    del tensors[EXPERT]
    save_file(tensors, path)
    said = refused(mixtral, tmp_path / "out")
    assert said == f"{path} has no tensor {EXPERT}, although {INDEX} says so: copy both again"


def test_a_missing_tensor(mixtral, tmp_path):
    rewrite(mixtral, EXPERT, {EXPERT: None})
    said = refused(mixtral, tmp_path / "out")
    assert said.startswith(
        f"{mixtral} has no tensor {EXPERT}, which its config.json asks for (it has "
    )


def test_a_tensor_too_many(mixtral, tmp_path):
    name = EXPERT.replace("experts.2", "experts.4")
    path = rewrite(mixtral, EXPERT, {name: np.zeros((20, 24), np.float32)})
    said = refused(mixtral, tmp_path / "out")
    assert (
        said == f"{path}: {name} has no place in a mixtral model of this config.json: what is it?"
    )


def test_a_tensor_of_another_shape(mixtral, tmp_path):
    path = rewrite(mixtral, EXPERT, {EXPERT: np.zeros((21, 24), np.float32)})
    said = refused(mixtral, tmp_path / "out")
    assert said == (f"{path}: {EXPERT} has the shape [21, 24], and config.json asks for [20, 24]")


def test_a_tensor_of_integers(mixtral, tmp_path):
    path = rewrite(mixtral, EXPERT, {EXPERT: np.zeros((20, 24), np.int8)})
    said = refused(mixtral, tmp_path / "out")
    assert said == (
        f"{path}: {EXPERT} is I8, and moe_jax reads F64, F32, BF16, F16: save the model in one of "
        "them, without quantization"
    )


def test_no_safetensors(folders, tmp_path):
    shutil.copy(folders["llama"] / "config.json", tmp_path)
    said = refused(tmp_path, tmp_path / "out")
    assert said == (
        f"{tmp_path}/model.safetensors is missing: name a folder as save_pretrained writes it"
    )
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    said = refused(tmp_path, tmp_path / "out")
    assert said == (
        f"{tmp_path}/model.safetensors is missing, and pytorch_model.bin may hold any code: save "
        "the model as safetensors first"
    )


def test_buffers_and_a_second_copy_of_a_tied_head_are_passed_over(tmp_path):
    model = hf_cases.theirs("llama", {"tie_word_embeddings": True})
    folder = hf_cases.saved(model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    run = hf_cases.imported(folder, tmp_path / "out")
    logits = hf_cases.our_logits(run, hf_cases.ids())
    assert np.abs(logits - hf_cases.their_logits(model, hf_cases.ids())).max() < 1e-5


def test_one_tensor_is_in_memory_at_a_time(mixtral, tmp_path, monkeypatch):
    """The last one is gone when the next one is read; all are read, each once."""
    read, before, names = Folder.read, [], []

    def one(folder, name):
        assert all(tensor() is None for tensor in before[-1:]), name
        tensor = read(folder, name)
        before.append(weakref.ref(tensor))
        names.append(name)
        return tensor

    monkeypatch.setattr(Folder, "read", one)
    import_model(mixtral, tmp_path / "out")
    index = json.loads((mixtral / INDEX).read_text())["weight_map"]
    assert sorted(names) == sorted(index)


def test_a_shard_is_written_when_it_is_full(tmp_path):
    """Shards of 100 bytes from tensors of 40: two each, and the one before is let go."""
    made = []

    def some():
        for i in range(5):
            assert sum(tensor() is not None for tensor in made) <= 2
            tensor = np.full(10, i, np.float32)
            made.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor

    assert write(tmp_path, some(), 100) == 200
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"] == {f"t{i}": files[i // 2] for i in range(5)}
    with Folder(tmp_path) as folder:
        assert folder.names() == set(index["weight_map"])
        assert (folder.read("t3") == 3).all()
    # As any file of the user.
    assert (tmp_path / files[0]).stat().st_mode == (tmp_path / INDEX).stat().st_mode


# The command.


def command(capsys, *words):
    code = entry(["convert", *map(str, words)])
    return code, *capsys.readouterr()


def test_the_command_goes_both_ways_and_leaves_nothing_behind(folders, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    code, said, _ = command(capsys, "import", "--from", folders["mixtral"], "--out", out)
    assert code == 0
    first, note, last = said.splitlines()
    assert first == "mixtral: 41 tensors, 17,208 parameters in float32, 2 blocks"
    assert note.startswith("no tokenizer was taken")
    assert last == f"written: {out} (train on: --config {out / 'config.py'})"
    words = ("--workdir", out, "--to", back, "--shard_mb", 1, "--dtype", "bfloat16")
    code, said, _ = command(capsys, "export", *words)
    assert code == 0 and said.startswith("mixtral: 41 tensors, 34,416 bytes\n")
    assert "tensors were rounded to bfloat16" in said
    assert str(hf_cases.loaded(back).dtype) == "torch.bfloat16"
    code, _, errors = command(capsys, "export", "--workdir", out, "--to", back)
    assert code == 64 and errors == f"error: --to {back} is not empty: name a new directory\n"
    code, _, errors = command(capsys, "import", "--from", folders["llama"], "--out", out)
    assert code == 64 and errors == f"error: --out {out} is not empty: name a new directory\n"
    code, _, errors = command(capsys, "import", "--from", tmp_path, "--out", tmp_path / "no")
    assert code == 64 and errors.count("\n") == 1 and not (tmp_path / "no").exists()
    words = ("--workdir", out, "--to", tmp_path / "no", "--family", "llama")
    code, _, errors = command(capsys, "export", *words)
    assert code == 64 and not (tmp_path / "no").exists()
    assert errors == (
        f"error: {out} cannot be exported as llama: the kinds of blocks (model.prefix, period, "
        "suffix) = moe, and llama has dense\n"
    )
    for words in (("--raw",), ("--shard_mb", 0)):
        code, _, errors = command(
            capsys, "export", "--workdir", out, "--to", tmp_path / "no", *words
        )
        assert code == 64 and errors.startswith(f"error: {words[0]}")
    words = ("--from", folders["llama"], "--out", tmp_path / "no", "--seq_len", 0)
    code, _, errors = command(capsys, "import", *words)
    assert code == 64 and errors == "error: --seq_len 0 must be at least 1\n"


def test_a_bfloat16_model_stays_one_and_comes_back_bit_for_bit(tmp_path):
    import torch

    model = hf_cases.theirs("mixtral", dtype=torch.bfloat16)
    folder = hf_cases.saved(model, tmp_path / "theirs")
    run = hf_cases.imported(folder, tmp_path / "ours")
    assert run.config.model.param_dtype == run.config.model.dtype == "bfloat16"
    text = (tmp_path / "ours" / "config.py").read_text()
    assert "c.model.param_dtype = 'float32'" in text and "c.model.dtype = 'bfloat16'" in text
    (tmp_path / "back").mkdir()
    done = export_model(run, tmp_path / "back", shard_bytes=10**9)
    assert not any("rounded" in note for note in done.notes)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        assert tensor.dtype == files[1][name].dtype and tensor.tobytes() == files[1][name].tobytes()


def test_what_a_family_keeps_wide_stays_so(tmp_path):
    """transformers keeps the router of dots.llm1 in float32, whatever the rest is."""
    import torch
    from transformers import AutoModelForCausalLM

    first = hf_cases.saved(hf_cases.theirs("dots1"), tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(first, dtype=torch.bfloat16)
    folder = hf_cases.saved(model, tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    wide = {name for name, tensor in tensors.items() if tensor.dtype == np.float32}
    assert wide == {name for name in tensors if ".gate." in name} and len(wide) == 4
    run = hf_cases.imported(folder, tmp_path / "ours")
    assert run.config.model.param_dtype == "bfloat16"
    (tmp_path / "back").mkdir()
    done = export_model(run, tmp_path / "back", shard_bytes=10**9)
    assert not any("rounded" in note for note in done.notes)
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == back[name].dtype and tensor.tobytes() == back[name].tobytes()


def test_a_half_precision_model_is_widened_and_comes_back_as_it_was(tmp_path):
    import torch

    model = hf_cases.theirs("llama", dtype=torch.float16)
    folder = hf_cases.saved(model, tmp_path / "theirs")
    run = hf_cases.imported(folder, tmp_path / "ours")
    assert run.config.model.param_dtype == "float32"
    (tmp_path / "back").mkdir()
    export_model(run, tmp_path / "back", dtype="float16", shard_bytes=10**9)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back")]
    for name, tensor in files[0].items():
        assert tensor.dtype == np.float16 and tensor.tobytes() == files[1][name].tobytes()


# What no family can say.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.moe.router": "sigmoid"}, 'mixtral: model.moe.router = "sigmoid", and mixtral'),
        ({"model.activation": "gelu"}, 'model.activation = "gelu", and mixtral has "swiglu"'),
        (
            {"model.moe.shared_experts": 1},
            "model.moe.shared_gate = False, and qwen2_moe has True",
        ),
        (
            {"model.qk_norm": True, "model.moe.routers.top_k.scale": 2.0},
            "model.moe.routers.top_k.scale = 2.0, and qwen3_moe has 1.0",
        ),
        (
            {"model.attention_bias": True},
            "model.attention_bias = True, and mixtral has False",
        ),
        ({"model.norm_position": "after"}, 'model.norm_position = "after", and mixtral has'),
        ({"model.moe.latent_dim": 8}, "mixtral: model.moe.latent_dim = 8, and mixtral has 0"),
        (
            {"model.period": ("dense",), "model.activation": "gelu"},
            'llama: model.activation = "gelu", and llama has "swiglu"',
        ),
        (
            {"model.head_dim": 6, "model.qk_norm": True, "model.qk_norm_over": "width"},
            "model.head_dim = 6, and olmoe has 4",
        ),
    ],
)
def test_what_no_family_can_say_is_named(changes, message):
    here = meaning(tiny.build(changes=changes)) | {"model.embedding_scale": 1.0}
    found = {
        name: differences(family, family.write(here), here) for name, family in FAMILIES.items()
    }
    nearest = min(found, key=lambda name: len(found[name]))
    assert message in f"{nearest}: {found[nearest][0]}"


def test_a_model_that_writes_no_text_is_not_exported(tmp_path):
    raw = tiny.raw({"model.kind": "encoder", "task": "classification"})
    (tmp_path / "config.json").write_text(json.dumps(raw))

    class Run:
        workdir = tmp_path
        config = tiny.build(changes={"model.kind": "encoder", "task": "classification"})

    with pytest.raises(UserError) as error:
        export_model(Run, tmp_path, shard_bytes=1)
    assert str(error.value) == (
        f'{tmp_path} cannot be exported: model.kind = "encoder" continues no text'
    )


# Parts.


@pytest.mark.parametrize(
    ("kinds", "parts"),
    [
        ("m", ("", "m", 1)),
        ("mmm", ("", "m", 3)),
        ("dmmm", ("d", "m", 3)),
        ("dmdm", ("", "dm", 2)),
        ("ddmdmdm", ("d", "dm", 3)),
        ("dmm", ("d", "m", 2)),
        ("mddm", ("", "mddm", 1)),
    ],
)
def test_blocks_are_laid_out_in_few_words(kinds, parts):
    made = laid_out(tuple(kinds), ("grouped_query",) * len(kinds))
    assert made == {
        "model.attention": "grouped_query",
        "model.prefix": tuple(parts[0]),
        "model.period": tuple(parts[1]),
        "model.repeats": parts[2],
        "model.suffix": (),
    }


def test_the_attention_of_most_blocks_is_that_of_the_model():
    made = laid_out(("dense", "moe", "moe", "moe"), ("far", "near", "far", "near"))
    assert made["model.attention"] == "far"
    assert (made["model.prefix"], made["model.period"]) == (
        (),
        ("dense", "near:moe", "moe", "near:moe"),
    )
    made = laid_out(("moe",) * 6, ("near", "near", "far") * 2)
    assert made["model.attention"] == "near" and made["model.repeats"] == 2
    assert made["model.period"] == ("moe", "moe", "far:moe")


def test_a_row_takes_tensors_apart_and_puts_them_together():
    """Three experts of width 2 over 4, gate and up apart, and all in one tensor."""
    ours = np.arange(3 * 4 * 2 * 2).reshape(3, 4, 2, 2)
    apart = Row("x", "EDPF", "e.{E}.{P}", "F D", {"P": ("gate", "up")})
    found = {piece.name: piece.to_theirs(ours) for piece in pieces(apart, ours.shape, "layer.")}
    assert list(found)[:3] == ["layer.e.0.gate", "layer.e.0.up", "layer.e.1.gate"]
    np.testing.assert_array_equal(found["layer.e.2.up"], ours[2, :, 1].T)
    (whole,) = pieces(Row("x", "EDPF", "w", "E PF D"), ours.shape, "")
    theirs = whole.to_theirs(ours)
    assert theirs.shape == whole.shape == (3, 4, 4)
    np.testing.assert_array_equal(theirs[1, 3], ours[1, :, 1, 1])
    np.testing.assert_array_equal(whole.to_ours(theirs), ours)
    (vector,) = pieces(Row("x", "D", "w", "1 D"), (4,), "")
    assert vector.shape == (1, 4) and vector.to_theirs(np.arange(4)).shape == (1, 4)


def test_the_meaning_of_a_config_leaves_out_what_trains_and_what_rounds():
    base = meaning(tiny.build())
    same = {
        "model.scan": True,
        "model.remat": "full",
        "model.dropout": 0.1,
        "model.moe.dispatcher": "capacity",
        "model.moe.losses.balance": 0.5,
        "model.moe.sparse.rule": "static",
    }
    assert meaning(tiny.build(changes=same)) == base
    assert base[BLOCKS] == ("moe", "moe") and "model.ffn_hidden" not in base
    other = meaning(tiny.build(changes={"model.moe.routers.top_k.softmax": "after"}))
    assert other == base
    sigmoid = {"model.moe.router": "sigmoid"}
    at = "model.moe.routers.sigmoid"
    base = meaning(tiny.build(changes=sigmoid))
    open_groups = {f"{at}.num_groups": 2, f"{at}.top_groups": 2, f"{at}.group_score": "max"}
    assert meaning(tiny.build(changes=sigmoid | open_groups | {f"{at}.bias_rate": 0.5})) == base
    assert meaning(tiny.build(changes=sigmoid | open_groups | {f"{at}.top_groups": 1})) != base


def test_a_config_file_of_an_import_trains_on(folders, tmp_path):
    from moe_jax import config
    from moe_jax.config import config_file

    import_model(folders["mixtral"], tmp_path / "out", seq_len=32)
    raw = config_file.read(tmp_path / "out" / "config.py")
    assert raw["train"]["init_from"] == str(tmp_path / "out")
    cfg = config.build(raw, 1)
    assert cfg.data.seq_len == 32
    run = open_run(tmp_path / "out", silent=True)
    assert cfg.model == run.config.model
