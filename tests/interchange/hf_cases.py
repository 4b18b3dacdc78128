"""Tiny models of every family of transformers, with random weights: an oracle that shares no code
with ours.
"""

import contextlib
import io

import jax
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moe_jax.decoding.draw import Settings
from moe_jax.decoding.sample import dials
from moe_jax.decoding.translate import make_translator
from moe_jax.interchange.importing import import_model
from moe_jax.models.decodable import for_decoding
from moe_jax.models.functions import make_model
from moe_jax.models.stack import empty_caches
from moe_jax.moe.layer import Batch
from moe_jax.parallel import batch_rows
from moe_jax.run import open_run

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# Of encoder-decoders, whose target rows begin with START, which is padding too.
START = 0
SEQ2SEQ_SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 20,
    "num_heads": 4,
    # transformers makes the decoder's cache for the layers of the encoder.
    "num_layers": 4,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "decoder_start_token_id": START,
    "pad_token_id": START,
    "eos_token_id": START,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, told": YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.5},
    "yarn, in parts": YARN | {"truncate": False, "mscale": 1.0, "mscale_all_dim": 0.5},
}
# By family: what its tests change of SIZES, each for itself.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SPARSE = EXPERTS | {"moe_intermediate_size": 12}
MLA = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "q_lora_rank": 10,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "num_key_value_heads": 4,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5}
CONFIGS = {
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "first_k_dense_replace": 0,
        "head_dim": 8,
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA | {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS,
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": SPARSE | {"head_dim": 8},
    "qwen2_moe": SPARSE | {"shared_expert_intermediate_size": 28},
    "olmo2": {},
    "flex_olmo": EXPERTS,
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "sliding_window": None,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "head_dim": 8,
    },
    "gemma": {"head_dim": 8},
    "gemma2": GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "gemma3_text": GEMMA | {"sliding_window_pattern": 2},
}
SEQ2SEQ = {
    "t5": {},
    "switch_transformers": {
        "num_experts": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 1,
    },
}
EVERY_SEQ2SEQ = {
    "plain": {},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    "many buckets, as many layers": {
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "num_decoder_layers": None,
    },
}
EVERY = {
    "plain": {},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "epsilon and base": {"rms_norm_eps": 1e-2, "rope_theta": 500.0},
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5}
LAYERS = ["sliding_attention", "full_attention"] * 2
OPTIONS = {
    "glm4_moe": {
        "norms, biases, dense layers": {
            "use_qk_norm": True,
            "attention_bias": True,
            "first_k_dense_replace": 1,
        },
        "a quarter turns, yarn": {"rope_scaling": YARN | {"partial_rotary_factor": 0.25}},
        "whole heads": {"partial_rotary_factor": 1.0},
    },
    "mixtral": {
        "window": {"sliding_window": 5},
        "head width": {"head_dim": 10},
        "three experts": {"num_experts_per_tok": 3},
    },
    "olmoe": {
        "renormalised": {"norm_topk_prob": True},
        "biases": {"attention_bias": True},
    },
    "llama": {
        "head width": {"head_dim": 10},
        "biases": {"attention_bias": True},
        **{name: {"rope_scaling": value, "head_dim": 16} for name, value in SCALINGS.items()},
    },
    "mistral": {"head width": {"head_dim": 10}},
    "qwen2": {
        "window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        "window in the last layers": WINDOWED | {"max_window_layers": 1, "num_hidden_layers": 3},
        "linear": {"rope_scaling": SCALINGS["linear"]},
    },
    "qwen3": {
        "biases": {"attention_bias": True},
        "window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        "window in some layers": WINDOWED | {"layer_types": LAYERS, "num_hidden_layers": 4},
        "yarn": {"rope_scaling": YARN},
    },
    "qwen3_moe": {
        "renormalised": {"norm_topk_prob": True},
        "window": {"use_sliding_window": True, "sliding_window": 5},
        "dense layers": {"mlp_only_layers": [0]},
        "every third": {"decoder_sparse_step": 3, "num_hidden_layers": 7},
    },
    "qwen2_moe": {
        "renormalised": {"norm_topk_prob": True},
        "without biases": {"qkv_bias": False},
        "every second": {"decoder_sparse_step": 2},
        "window": {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention"] * 2,
        },
        "window in every other layer": WINDOWED
        | {"max_window_layers": 3, "num_hidden_layers": 5, "mlp_only_layers": [1]},
    },
    "olmo2": {"biases": {"attention_bias": True}},
    "dots1": {
        "renormalised, scaled": {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
        "groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
        "dense layers, shared experts": {"first_k_dense_replace": 1, "n_shared_experts": 2},
        "window": {"sliding_window": 5, "max_window_layers": 0},
        "window and dense layers": {
            "sliding_window": 5,
            "num_hidden_layers": 4,
            "max_window_layers": 2,
            "first_k_dense_replace": 3,
        },
        "head width": {"head_dim": 10},
    },
    "gpt_oss": {
        "three experts": {"num_experts_per_tok": 3},
        "without biases": {"attention_bias": False},
        "clamp": {"swiglu_limit": 0.3, "swiglu_alpha": 0.9},
        "windows elsewhere": {"layer_types": LAYERS[1:], "num_hidden_layers": 3},
        "no windows": {"layer_types": ["full_attention"] * 2},
        "unscaled": {"rope_scaling": {"rope_type": "default"}},
    },
    "deepseek_v2": {
        "no latent of queries": {"q_lora_rank": None},
        "scaled": {"routed_scaling_factor": 2.5, "num_experts_per_tok": 3},
        "groups": {
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
        },
        "dense layers, one shared expert": {"first_k_dense_replace": 1, "n_shared_experts": 1},
        "biases": {"attention_bias": True},
        "yarn": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    },
    "deepseek_v3": {
        "no latent of queries": {"q_lora_rank": None},
        "halves": {"rope_interleave": False},
        "gates as they are": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        "groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
        "dense layers, shared experts": {"first_k_dense_replace": 1, "n_shared_experts": 2},
        "biases": {"attention_bias": True},
        "yarn": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        "yarn, sharper": {"rope_scaling": YARN | {"mscale_all_dim": 0.5}},
    },
    "flex_olmo": {"renormalised": {"norm_topk_prob": True}, "biases": {"attention_bias": True}},
    "gemma": {
        "untied": {"tie_word_embeddings": False},
        "biases": {"attention_bias": True},
        "linear": {"rope_scaling": SCALINGS["linear"]},
    },
    "gemma2": {
        "untied": {"tie_word_embeddings": False},
        "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "scaled by the width": {"query_pre_attn_scalar": 8},
        "biases": {"attention_bias": True},
        "windows elsewhere": {"layer_types": LAYERS[1:], "num_hidden_layers": 3},
        "no windows": {"layer_types": ["full_attention"] * 2},
        "yarn": {"rope_scaling": YARN},
    },
    "gemma3_text": {
        "untied": {"tie_word_embeddings": False},
        "final cap": {"final_logit_softcapping": 2.0},
        "scaled by the width": {"query_pre_attn_scalar": 8},
        "biases": {"attention_bias": True},
        "bases": {"rope_theta": 500.0, "rope_local_base_freq": 50.0},
        "one base": {"rope_theta": 500.0, "rope_local_base_freq": 500.0},
        "linear, every third": {
            "rope_scaling": SCALINGS["linear"],
            "sliding_window_pattern": 3,
            "num_hidden_layers": 4,
        },
        "windows everywhere": {"layer_types": ["sliding_attention"] * 2},
        "no windows": {"layer_types": ["full_attention"] * 2},
    },
    "t5": {
        # More layers of these weights make differences of rounding too large to tell anything.
        "gated gelu": {
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "num_layers": 1,
            "num_decoder_layers": 1,
        },
        "unscaled head": {"tie_word_embeddings": False},
        "gated silu": {"feed_forward_proj": "gated-silu"},
        "gelu": {"feed_forward_proj": "gelu_new"},
    },
    "switch_transformers": {
        "what finds no place": {"expert_capacity": 2},
        "a bias of the router": {"router_bias": True, "expert_capacity": 3},
        "gelu": {"dense_act_fn": "gelu_new"},
        "experts everywhere": {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 3},
        "experts in the decoder alone": {"encoder_sparse_step": 0, "decoder_sparse_step": 3},
    },
}
CASES = {
    f"{family}, {name}": (family, changes)
    for family in CONFIGS
    for name, changes in (EVERY | OPTIONS[family]).items()
    # Latent attention has as many key heads as queries.
    if not (family.startswith("deepseek") and "num_key_value_heads" in changes)
} | {
    f"{family}, {name}": (family, changes)
    for family in SEQ2SEQ
    for name, changes in (EVERY_SEQ2SEQ | OPTIONS[family]).items()
}
# Of these families the normal suite has some cases, and the full one all.
QUICK = {
    "gpt_oss": ("clamp", "windows elsewhere"),
    "deepseek_v2": ("groups",),
    "deepseek_v3": ("dense layers, shared experts", "yarn, sharper"),
    "glm4_moe": ("a quarter turns, yarn",),
    "gemma": ("plain",),
    "gemma2": ("plain",),
    "gemma3_text": ("linear, every third",),
    "t5": ("gated gelu",),
    "switch_transformers": ("a bias of the router", "what finds no place"),
}


def is_quick(case):
    """Whether a case is one of the normal suite: those that QUICK names; of the other families each
    option with the first that has it, and one case of a family that is the first of none.
    """
    family, _, name = case.partition(", ")
    if family in QUICK:
        return name in QUICK[family]
    others = [one.split(", ", 1) for one in CASES if one.split(", ", 1)[0] not in QUICK]
    first_of = {}
    for owner, option in others:
        first_of.setdefault(option, owner)
    first_of_family = next(option for owner, option in others if owner == family)
    if family in first_of.values():
        return first_of[name] == family
    return name == first_of_family


def sizes(family):
    """The config of a family's plain case."""
    if family in SEQ2SEQ:
        return SEQ2SEQ_SIZES | SEQ2SEQ[family]
    return SIZES | CONFIGS[family]


def auto_model(config):
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def theirs(family, changes=None, dtype=torch.float32):
    """A model of transformers with random weights; norms and biases are random too."""
    values = sizes(family) | (changes or {})
    config = transformers.AutoConfig.for_model(family, **values)
    torch.manual_seed(0)
    model = auto_model(config).from_config(config).to(dtype)
    # Norms multiply by about 1; Gemma's add 1 to their scales.
    scale = 0.0 if family.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, scale if "norm" in name else 0.0, 0.2)
        for name, buffer in model.named_buffers():
            # The bias of a router; the frequencies of rotary embeddings are not random.
            if name.endswith("bias"):
                torch.nn.init.normal_(buffer, 0.0, 0.2)
    return model.eval()


def saved(model, folder, **kwargs):
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder, **kwargs)
    return folder


def loaded(folder):
    """What from_pretrained makes of a folder; it must take every tensor and miss none."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with contextlib.redirect_stderr(io.StringIO()):
        model, report = auto_model(config).from_pretrained(folder, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[what], (what, report[what])
    return model.eval()


def ids(vocab_size=40, shape=(2, 12)):
    return np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)


def sources(id_BS):
    """Source rows for target rows, and which of their places are tokens: the last row is short."""
    source_BT = np.random.default_rng(1).integers(1, 40, (len(id_BS), 15)).astype(np.int32)
    valid_BT = np.ones_like(source_BT)
    valid_BT[-1, 11:] = 0
    return source_BT * valid_BT, valid_BT


def their_logits(model, id_BS):
    id_BS, more = torch.tensor(id_BS, dtype=torch.long), {}
    if model.config.is_encoder_decoder:
        source_BT, valid_BT = (torch.tensor(z, dtype=torch.long) for z in sources(id_BS))
        more = {"attention_mask": valid_BT, "decoder_input_ids": id_BS}
        id_BS = source_BT
    with torch.no_grad():
        return model(id_BS, **more).logits.double().numpy()


def rows(id_BS, valid_BS):
    """A Batch on the host."""
    position_BS = np.tile(np.arange(id_BS.shape[1], dtype=np.int32), (len(id_BS), 1))
    row_B = np.arange(len(id_BS), dtype=np.int32)
    return Batch(id_BS, position_BS * valid_BS, valid_BS, row_B)


def our_logits(run, id_BS, parameters=None):
    """The logits of whole rows."""
    local = rows(id_BS, np.ones_like(id_BS))
    if "encoder" in run.config.model.stacks:
        local = local._replace(source_rows=rows(*sources(id_BS)))

    @jax.jit
    def forward(parameters, router_state, batch):
        model = run.functions.bind(parameters, router_state)
        return model(batch, jax.random.key(0), False)[0]

    with jax.set_mesh(run.mesh):
        batch = batch_rows.put(local, local.row_B, len(id_BS))
        parameters = run.parameters if parameters is None else parameters
        return np.asarray(forward(parameters, run.router_state, batch), np.float64)


def bits(folder):
    """{name: (shape, dtype, bytes)} of a folder's tensors."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return {name: (x.shape, str(x.dtype), x.tobytes()) for name, x in tensors.items()}


def their_greedy(model, id_BS, number):
    """The ids that transformers writes behind rows, whatever token ends a text; of an
    encoder-decoder those that it makes of the rows, up to START.
    """
    if model.config.is_encoder_decoder:
        return their_targets(model, number)
    with torch.no_grad():
        ids = torch.tensor(id_BS, dtype=torch.long)
        more = {"max_new_tokens": number, "do_sample": False, "eos_token_id": None}
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, pad_token_id=0, **more).numpy()


def their_targets(model, number, num_rows=2):
    """The ids [B, N] that transformers makes of source rows; behind START all are START."""
    source_BT, valid_BT = (torch.tensor(z, dtype=torch.long) for z in sources(range(num_rows)))
    with torch.no_grad():
        # Said here, because a run without a tokenizer does not say it in what it exports.
        ends = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
        id_BN = model.generate(
            source_BT,
            attention_mask=valid_BT,
            max_new_tokens=number,
            do_sample=False,
            **dict.fromkeys(ends, START),
        ).numpy()
    rest = ((0, 0), (0, number + 1 - id_BN.shape[1]))
    return np.pad(id_BN, rest, constant_values=START)[:, 1:]


def our_targets(run, number, num_rows=2):
    """The same, by our translator."""
    cfg = run.config.model
    with jax.set_mesh(run.mesh):
        local = rows(*sources(range(num_rows)))
        source = batch_rows.put(local, local.row_B, num_rows)
        translator = make_translator(cfg, number, START, cfg.vocab_size)
        greedy = dials(Settings(0, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=()))
        return np.asarray(translator(run.parameters, run.router_state, source, greedy))


def our_greedy(run, id_BS, number):
    """The same, from our cache: the rows in one piece, then token by token."""
    if "encoder" in run.config.model.stacks:
        return our_targets(run, number)
    (B, S), cfg = id_BS.shape, for_decoding(run.config.model)
    row_B = np.arange(B, dtype=np.int32)

    @jax.jit
    def step(parameters, router_state, batch, caches):
        model = make_model(cfg).bind(parameters, router_state)
        logits, caches = model.cached(batch, caches)
        return logits[:, -1].argmax(-1), caches

    with jax.set_mesh(run.mesh):
        caches, new = empty_caches(cfg, B, S + number), np.asarray(id_BS)
        written, place = id_BS, 0
        for _ in range(number):
            position_BS = np.tile(place + np.arange(new.shape[1], dtype=np.int32), (B, 1))
            local = Batch(new.astype(np.int32), position_BS, np.ones_like(position_BS), row_B)
            batch = batch_rows.put(local, row_B, B)
            next_B, caches = step(run.parameters, run.router_state, batch, caches)
            place += new.shape[1]
            new = np.asarray(next_B)[:, None]
            written = np.concatenate([written, new], 1)
        return written


def imported(folder, out, **kwargs):
    import_model(folder, out, **kwargs)
    return open_run(out, silent=True)
