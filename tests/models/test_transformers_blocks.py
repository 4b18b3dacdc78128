"""Our MoE blocks equal transformers' on random weights: oracles that do not share our misreadings.
Float32, to 1e-5 of the output.
"""

import jax
import meshes
import numpy as np
import pytest
import torch
from router_cases import compiled
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moe_jax.models.layers import FeedForward
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.experts.network import Chosen
from moe_jax.moe.layer import Batch, MoELayer
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.settings import MoE
from moe_jax.schema.config import AdaptiveConfig, StoredConfig

D, F, E, B, S = 32, 48, 8, 4, 16


def mixtral():
    return MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2
        )
    )


def olmoe(norm_topk_prob):
    sizes = {"hidden_size": D, "intermediate_size": F, "num_experts": E, "num_experts_per_tok": 3}
    return OlmoeSparseMoeBlock(OlmoeConfig(**sizes, norm_topk_prob=norm_topk_prob))


def qwen3(norm_topk_prob):
    sizes = {
        "hidden_size": D,
        "moe_intermediate_size": F,
        "num_experts": E,
        "num_experts_per_tok": 3,
    }
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, norm_topk_prob=norm_topk_prob))


def deepseek_v3(norm_topk_prob, n_group, topk_group):
    sizes = {
        "hidden_size": D,
        "moe_intermediate_size": F,
        "n_routed_experts": E,
        "num_experts_per_tok": 3,
    }
    groups = {
        "n_group": n_group,
        "topk_group": topk_group,
        "n_shared_experts": 2,
        "routed_scaling_factor": 2.5,
    }
    return DeepseekV3MoE(DeepseekV3Config(**sizes, **groups, norm_topk_prob=norm_topk_prob))


TOP_K = {"softmax": "before", "scale": 1.0}
SIGMOID = {"k": 3, "score": "sigmoid", "scale": 2.5, "bias_rate": 0.001, "group_score": "top2"}
CASES = {
    "Mixtral": (mixtral, {}, "top_k", {**TOP_K, "k": 2, "renormalize": True}),
    "Mixtral, softmax after": (
        mixtral,
        {},
        "top_k",
        {"softmax": "after", "scale": 1.0, "k": 2, "renormalize": True},
    ),
    "OLMoE": (olmoe, {"norm_topk_prob": False}, "top_k", {**TOP_K, "k": 3, "renormalize": False}),
    "OLMoE, normalised": (
        olmoe,
        {"norm_topk_prob": True},
        "top_k",
        {**TOP_K, "k": 3, "renormalize": True},
    ),
    "Qwen3-MoE": (qwen3, {"norm_topk_prob": True}, "top_k", {**TOP_K, "k": 3, "renormalize": True}),
    "Qwen3-MoE, raw": (
        qwen3,
        {"norm_topk_prob": False},
        "top_k",
        {**TOP_K, "k": 3, "renormalize": False},
    ),
    "DeepSeek-V3": (
        deepseek_v3,
        {"norm_topk_prob": True, "n_group": 4, "topk_group": 2},
        "sigmoid",
        {**SIGMOID, "renormalize": True, "num_groups": 4, "top_groups": 2},
    ),
    "DeepSeek-V3, one group, raw": (
        deepseek_v3,
        {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
        "sigmoid",
        {**SIGMOID, "renormalize": False, "num_groups": 1, "top_groups": 1},
    ),
}


def random_block(make, kwargs):
    """Their block with random weights; DeepSeek's bias large enough to change the choice."""
    torch.manual_seed(0)
    block = make(**kwargs).float()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if hasattr(block.gate, "e_score_correction_bias"):
        block.gate.e_score_correction_bias.copy_(torch.randn(E) * 0.3)
    return block.eval()


def numpy(tensor):
    return tensor.detach().numpy()


def weights(block):
    """(gate [D, E], w_in [E, D, 2, F], w_out [E, F, D]) from their gate [E, D], gate_up [E, 2 F,
    D], down [E, D, F].
    """
    w_in = numpy(block.experts.gate_up_proj).reshape(E, 2, F, D).transpose(0, 3, 1, 2)
    return numpy(block.gate.weight).T, w_in, numpy(block.experts.down_proj).transpose(0, 2, 1)


def routed(block, router, options, x):
    """The routed experts' output, [B, S, D]."""
    cfg = MoE(
        num_experts=E,
        group_rows=1,
        router=router,
        router_options=ROUTERS[router].options(**options),
        ordering="token_major",
        ordering_options=ORDERINGS["token_major"].options(),
        adaptive=AdaptiveConfig(),
        vocab_size=64,
        dispatcher="dropless",
        dispatcher_options=DISPATCHERS["dropless"].options(),
        d_model=D,
        expert_hidden=F,
        activation="swiglu",
        param_dtype="float32",
        dtype="float32",
        out_std=1.0,
        stored=StoredConfig(),
    )
    gate, w_in, w_out = weights(block)
    layer = MoELayer(jax.random.key(0), cfg)
    layer.router.gate[...] = meshes.put(gate, "embed", None)
    layer.experts.w_in[...] = meshes.put(w_in, "experts", "expert_embed", None, "hidden")
    layer.experts.w_out[...] = meshes.put(w_out, "experts", "hidden", "expert_embed")
    if router == "sigmoid":
        layer.state.bias[...] = meshes.put(numpy(block.gate.e_score_correction_bias), None)
    ids = meshes.put(np.ones((B, S), np.int32), "batch")
    batch = Batch(ids, ids, ids, meshes.put(np.arange(B, dtype=np.int32), "batch"))
    run = compiled(lambda layer, x: layer(x, batch, jax.random.key(0), False)[0])
    return run(layer, x)


def shared(block, x):
    """The shared experts' output: n experts of width F are one of width n F."""
    theirs = block.shared_experts
    w_in = np.stack([numpy(theirs.gate_proj.weight).T, numpy(theirs.up_proj.weight).T], 1)
    layer = FeedForward(jax.random.key(0), D, w_in.shape[2], Chosen("swiglu"), 1.0, "float32")
    layer.weights.w_in[...] = meshes.put(w_in, "embed", None, "hidden")
    layer.weights.w_out[...] = meshes.put(numpy(theirs.down_proj.weight).T, "hidden", "embed")
    return compiled(lambda layer, x: layer(x))(layer, x)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_block_of_transformers(case):
    make, kwargs, router, options = CASES[case]
    block = random_block(make, kwargs)
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
    want = numpy(block(torch.tensor(x)))
    with jax.set_mesh(meshes.make(2, 2, 2)):
        placed = meshes.put(x, "batch")
        got = np.asarray(routed(block, router, options, placed))
        if hasattr(block, "shared_experts"):
            got = got + np.asarray(shared(block, placed))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_every_part_of_deepseek_is_needed():
    """Bias, number of groups and scale: each of them alone changes the output."""
    make, kwargs, router, options = CASES["DeepSeek-V3"]
    block = random_block(make, kwargs)
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
    with jax.set_mesh(meshes.make(1, 1, 1)):
        placed = meshes.put(x, "batch")
        want = np.asarray(routed(block, router, options, placed))
        for change in (
            {"top_groups": 4},
            {"scale": 1.0},
            {"renormalize": False},
            {"group_score": "max"},
        ):
            got = np.asarray(routed(block, router, {**options, **change}, placed))
            assert np.abs(got - want).max() > 0.01 * np.abs(want).max(), change
        block.gate.e_score_correction_bias.zero_()
        assert (
            np.abs(np.asarray(routed(block, router, options, placed)) - want).max()
            > 0.01 * np.abs(want).max()
        )
