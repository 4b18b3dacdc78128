"""Latent attention: its cache, what it costs, and what it refuses. tests/interchange compares it
with transformers.
"""

import math

import jax
import meshes
import numpy as np
import pytest
import tiny
from block_options import OPTIONS

from moe_jax.errors import UserError
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.functions import make_model
from moe_jax.models.stack import empty_caches
from moe_jax.plan import flops

DEEPSEEK = OPTIONS["DeepSeek-V3"]
AT = "model.attentions.latent"


def test_a_cache_holds_the_latent_and_one_key_of_all_heads(float64):
    cfg = tiny.build(changes=DEEPSEEK).model
    with jax.set_mesh(meshes.make(1, 1, 1)):
        caches = jax.eval_shape(lambda: empty_caches(cfg, 2, 7))
    assert len(caches) == 3
    own = cfg.attention_options
    for cache in caches:
        assert cache.latent_BMR.shape == (2, 7, own.kv_lora_rank)
        assert cache.key_BMT.shape == (2, 7, own.qk_rope_head_dim)


def test_decoding_makes_no_keys_of_heads(float64):
    """The products of one token have the width of the latent, not that of all heads' keys."""
    cfg = tiny.build(changes=DEEPSEEK).model
    kind = ATTENTIONS[cfg.attention]
    assert kind.widths(cfg) == (6, 3)
    with jax.set_mesh(meshes.make(1, 1, 1)):
        model = make_model(cfg)
        params, state = jax.eval_shape(model.init, jax.random.key(0))
        x = meshes.put(np.zeros((2, 1, 16)), "batch")
        place = meshes.put(np.zeros((2, 1), np.int32), "batch")

        def of_token(params, state, x, place):
            weights = model.bind(params, state).prefix[0].attention.weights
            return kind.caching.inputs(weights, x, place, cfg)

        q, new = jax.eval_shape(of_token, params, state, x, place)
        k, v = jax.eval_shape(kind.caching.keys_and_values, new)
    assert q.shape == (2, 1, 4, 6) and k.shape == (2, 1, 6, 1) and v.shape == (2, 1, 1, 4)


@pytest.mark.parametrize(
    ("rank", "axes"), [(8, ("data", "expert")), (6, "data"), (5, None), (4, ("data", "expert"))]
)
def test_the_second_matrix_is_split_by_as_many_axes_as_divide_its_rank(float64, rank, axes):
    """In DeepSeek-V3 these matrices have 3 B parameters: nobody holds all of them."""
    changes = DEEPSEEK | {f"{AT}.q_lora_rank": rank, f"{AT}.kv_lora_rank": rank}
    cfg = tiny.build((2, 2, 2), changes).model
    with jax.set_mesh(meshes.make(2, 2, 2)):
        params, _ = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    weights = params["prefix"][0]["attention"]["weights"]
    for name in ("q_b", "kv_b"):
        assert tuple(weights[name].sharding.spec) == (axes, "model", None)


def test_flops_of_latent_attention():
    """8 tokens see 36 keys; 4 heads of width 6 = 4 + 2 for scores and 3 for values, 3 blocks."""
    cfg = tiny.build(changes=DEEPSEEK).model
    counted = flops.forward_per_token(cfg, 8)
    assert counted.attention_scores == 3 * 2 * 4 * (6 + 3) * 36 // 8
    # W_QA, W_QB, W_KVA, W_KVB and W_O.
    matrices = 16 * 5 + 5 * 4 * 6 + 16 * (4 + 2) + 4 * 4 * (4 + 3) + 4 * 3 * 16
    assert counted.attention_projections == 3 * 2 * matrices


def test_scores_are_sharpened_by_mscale():
    yarn = {"model.rope_scaling": "yarn", "model.rope_scalings.yarn.factor": 4.0}
    plain, sharper = (
        tiny.build(changes=DEEPSEEK | yarn | {f"{AT}.mscale": mscale}).model
        for mscale in (0.0, 0.7)
    )
    scale = ATTENTIONS["latent"].scale
    assert scale(plain) == 6**-0.5
    assert scale(sharper) == pytest.approx(6**-0.5 * (0.07 * math.log(4) + 1) ** 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{AT}.qk_rope_head_dim": 3}, f"{AT}.qk_rope_head_dim (3) must be even"),
        ({f"{AT}.mscale": 1.0}, f"{AT}.mscale = 1.0 does nothing, because model.rope_scaling"),
        ({"model.num_kv_heads": 2}, "model.num_kv_heads (2) must be model.num_heads (4) with"),
        ({"model.head_dim": 8}, "model.head_dim (8) does nothing, because model.attention"),
        ({"model.qk_norm": True}, "model.qk_norm = True does nothing, because model.attention"),
        ({"model.rope_fraction": 0.5}, "model.rope_fraction = 0.5 does nothing"),
        ({f"{AT}.kv_lora_rank": 0}, f"{AT}.kv_lora_rank = 0 must be at least 1"),
    ],
)
def test_what_means_nothing_is_refused(changes, said):
    with pytest.raises(UserError) as error:
        tiny.build(changes=DEEPSEEK | changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_ordinary_heads_beside_latent_ones_have_their_own_options(float64):
    mixed = {"model.prefix": ("grouped_query:dense",), "model.num_kv_heads": 2, "model.head_dim": 8}
    cfg = tiny.build(changes=DEEPSEEK | mixed).model
    assert cfg.attentions == ("grouped_query", "latent", "latent")
    counted = flops.parameters(cfg)
    with jax.set_mesh(meshes.make(1, 1, 1)):
        params, _ = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    assert counted.total == sum(x.size for x in jax.tree.leaves(params))
    assert np.prod(params["prefix"][0]["attention"]["weights"]["k"].shape) == 16 * 2 * 8
