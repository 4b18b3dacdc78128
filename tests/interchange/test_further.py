"""Layers that predict further tokens (DeepSeek-V3, GLM-4.5) are read, computed as published, and
written back. Transformers has no class for them: a model of one layer stands for the block.
"""

import json
import shutil

import hf_cases
import jax
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file

from moe_jax import config
from moe_jax.errors import UserError
from moe_jax.interchange.exporting import export_model
from moe_jax.interchange.importing import abstract_parts, import_model
from moe_jax.models.ends import logits
from moe_jax.models.functions import make_model
from moe_jax.moe.layer import Batch
from moe_jax.parallel import batch_rows
from moe_jax.parallel import mesh as meshes
from moe_jax.run import open_run, write_run

FAMILIES = ("deepseek_v3", "glm4_moe")
# The number of the further layer.
LAYERS = 2
BEHIND = f"model.layers.{LAYERS}."


def with_further(family, folder):
    """Writes a model with one further layer, and returns (the model, the block as a model of one
    layer, the tensors that join).
    """
    model = hf_cases.theirs(family)
    block = hf_cases.theirs(family, {"num_hidden_layers": 1})
    with torch.no_grad():
        # Both begin with the same seed.
        for weight in block.state_dict().values():
            weight.add_(0.2 * torch.randn(weight.shape))
        block.lm_head.weight.copy_(model.lm_head.weight)
    rng, d = np.random.default_rng(0), hf_cases.SIZES["hidden_size"]
    shapes = {"enorm.weight": (d,), "hnorm.weight": (d,), "eh_proj.weight": (d, 2 * d)}
    joins = {name: rng.normal(0.0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    path = hf_cases.saved(model, folder) / "model.safetensors"
    tensors = load_file(path)
    # As save_pretrained names them: in memory experts may lie together.
    state = load_file(hf_cases.saved(block, folder / "block") / "model.safetensors")
    shutil.rmtree(folder / "block")
    inside = "model.layers.0."
    further = {BEHIND + n.removeprefix(inside): x for n, x in state.items() if inside in n}
    further |= {BEHIND + name: x for name, x in joins.items()}
    further[BEHIND + "shared_head.norm.weight"] = state["model.norm.weight"]
    further[BEHIND + "shared_head.head.weight"] = tensors["lm_head.weight"]
    further[BEHIND + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors | further, path, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(settings))
    return model, block, joins


def by_the_formula(model, block, joins, id_BS):
    """Logits of the token after the next one, [B, S - 1, V]: eh_proj takes the embedding first."""
    ids = torch.tensor(id_BS, dtype=torch.long)
    joins = {name: torch.tensor(x) for name, x in joins.items()}

    def norm(x, name):
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + model.config.rms_norm_eps) * joins[name]

    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        embedded = model.model.embed_tokens(ids)
        parts = norm(embedded[:, 1:], "enorm.weight"), norm(hidden[:, :-1], "hnorm.weight")
        x = torch.cat(parts, -1) @ joins["eh_proj.weight"].T
        return block(inputs_embeds=x).logits.double().numpy()


def our_further_logits(run, id_BS):
    B, S = id_BS.shape
    position_BS = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    row_B = np.arange(B, dtype=np.int32)
    local = Batch(id_BS, position_BS, np.ones_like(id_BS), row_B)

    @jax.jit
    def forward(parameters, router_state, batch):
        model = run.functions.bind(parameters, router_state)
        last, _ = model.hidden(batch, jax.random.key(0), False)
        return logits(last._replace(x_BSD=last.further[0]), cap=0.0)

    with jax.set_mesh(run.mesh):
        batch = batch_rows.put(local, row_B, B)
        return np.asarray(forward(run.parameters, run.router_state, batch), np.float64)


@pytest.mark.parametrize("family", [FAMILIES[0], pytest.param(FAMILIES[1], marks=pytest.mark.full)])
def test_a_further_layer_computes_as_published_and_comes_back(family, tmp_path):
    model, block, joins = with_further(family, tmp_path / "theirs")
    run = hf_cases.imported(tmp_path / "theirs", tmp_path / "ours", with_mtp=True)
    id_BS = hf_cases.ids()
    want = by_the_formula(model, block, joins, id_BS)
    assert np.abs(want).max() > 0.5
    have = our_further_logits(run, id_BS)[:, :-1]
    assert np.abs(have - want).max() < 1e-5
    # The next token is predicted as without.
    expected = hf_cases.their_logits(model, id_BS)
    assert np.abs(hf_cases.our_logits(run, id_BS) - expected).max() < 1e-5
    (tmp_path / "back").mkdir()
    done = export_model(run, tmp_path / "back", shard_bytes=2_000)
    assert done.family == family
    assert hf_cases.bits(tmp_path / "back") == hf_cases.bits(tmp_path / "theirs")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("theirs")
    with_further("deepseek_v3", made)
    return made


def test_they_are_passed_over_unless_asked_for(folder, tmp_path):
    done = import_model(folder, tmp_path / "out")
    assert "tensors of layers that predict further tokens were passed over" in done.notes[0]
    assert done.notes[0].endswith("(num_nextn_predict_layers): --mtp reads them")
    assert done.config.model.kind_options.mtp_depths == 0


def changed(folder, out, name, value=None):
    """A copy of a folder with another tensor, or without it."""
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value(tensors[name])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_head_of_their_own_is_refused_and_a_missing_copy_is_not(folder, tmp_path):
    name = BEHIND + "shared_head.head.weight"
    other = changed(folder, tmp_path / "other", name, lambda x: x + 1)
    with pytest.raises(UserError, match=f"{name} differs from lm_head.weight"):
        import_model(other, tmp_path / "out", with_mtp=True)
    import_model(changed(folder, tmp_path / "few", name), tmp_path / "out", with_mtp=True)


def test_what_is_missing_or_not_there_at_all_is_one_line(folder, tmp_path):
    name = BEHIND + "hnorm.weight"
    with pytest.raises(UserError, match=f"has no tensor {name}"):
        import_model(changed(folder, tmp_path / "a", name), tmp_path / "out", with_mtp=True)
    # Their config says that there is one, as that of the published model does.
    plain = hf_cases.saved(hf_cases.theirs("deepseek_v3"), tmp_path / "plain")
    with pytest.raises(UserError, match=f"has no tensor {BEHIND}enorm.weight"):
        import_model(plain, tmp_path / "out", with_mtp=True)
    settings = json.loads((plain / "config.json").read_text())
    settings["num_nextn_predict_layers"] = 0
    (plain / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"num_nextn_predict_layers = .*this model has none"):
        import_model(plain, tmp_path / "out", with_mtp=True)
    mixtral = hf_cases.saved(hf_cases.theirs("mixtral"), tmp_path / "mixtral")
    with pytest.raises(UserError, match="models of mixtral have no layers that predict further"):
        import_model(mixtral, tmp_path / "out", with_mtp=True)


def test_a_family_without_them_leaves_them_out_with_a_note(tmp_path):
    raw = tiny.raw(
        {
            "model.kinds.decoder.mtp_depths": 1,
            "model.param_dtype": "float32",
            "model.dtype": "float32",
        }
    )
    cfg = config.build(raw, 1)
    with jax.set_mesh(meshes.of_host()):
        params, router_state = jax.jit(make_model(cfg.model).init)(jax.random.key(0))
        parts = {"params": params, "router_state": router_state}
        assert set(abstract_parts(cfg)["params"]) == set(params)
        write_run(tmp_path / "ours", raw, parts, step=0)
    run = open_run(tmp_path / "ours", silent=True)
    (tmp_path / "out").mkdir()
    done = export_model(run, tmp_path / "out", shard_bytes=1_000_000)
    assert done.family == "mixtral"
    said = "the blocks that predict further tokens (model.kinds.decoder.mtp_depths) were left out"
    assert any(note.startswith(said) for note in done.notes)
    model, id_BS = hf_cases.loaded(tmp_path / "out"), hf_cases.ids()
    difference = hf_cases.their_logits(model, id_BS) - hf_cases.our_logits(run, id_BS)
    assert np.abs(difference).max() < 1e-5
