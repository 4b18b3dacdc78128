"""The same jobs in Hugging Face transformers (extra [hf]): Llama for a dense model, Mixtral for one
whose blocks all have experts.

Shapes are ours, weights are random ones of its own. A model of ours that these two cannot express
has no rival.
"""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_jax import config
from moe_jax.bench.contract import Job, Prepared
from moe_jax.bench.ours import PRODUCT, WARM, read
from moe_jax.errors import UserError
from moe_jax.models import decoder
from moe_jax.models.attentions import grouped_query
from moe_jax.models.rope_scalings import unscaled
from moe_jax.moe.activations import swiglu
from moe_jax.moe.routing import top_k
from moe_jax.optim.optimizers import adamw
from moe_jax.plan import flops
from moe_jax.schema.config import ModelConfig

# How transformers may compute the experts of Mixtral on a CPU. Which is the fastest depends on the
# number of experts and of tokens.
TRAINING_EXPERTS = ("grouped_mm", "eager")
# This one copies the experts of every token: of a training batch it would take tens of gigabytes.
DECODING_EXPERTS = (*TRAINING_EXPERTS, "batched_mm")
# What the products of ours and theirs may be computed in.
DTYPES = ("float32", "bfloat16")
# How much of our parameters theirs may differ by: the norms of one more or less.
TOLERANCE = 1e-3


def why_none(cfg: config.Config) -> str:
    """Returns why a model has no rival; "" where it has one."""
    model = cfg.model
    if model.dtype not in DTYPES or model.param_dtype != "float32":
        return f"it is timed with parameters in float32 and products in {' or '.join(DTYPES)}"
    kinds = set(model.blocks)
    if not isinstance(model.kind_options, decoder.Options) or len(kinds) > 1:
        return "it is no decoder whose blocks are all alike"
    if len(model.stacks) > 1:
        return "Llama and Mixtral predict the next token alone"
    if not kinds <= {"dense", "moe"}:
        return "its blocks are not those of Llama or Mixtral"
    if not isinstance(model.attention_options, grouped_query.Options):
        return "Llama and Mixtral have grouped-query attention"
    changed = (model.attention_scale, model.attention_cap, model.attention_sinks)
    if any(changed) or model.rope_fraction != 1 or model.rope_pairs != "halves":
        return "Llama and Mixtral have scores and rotary embeddings without options"
    if model.logit_cap or model.norm_plus_one:
        return "Llama and Mixtral have no cap on logits, and scales of norms without a one"
    is_swiglu = isinstance(model.activation_options, swiglu.Options)
    if not is_swiglu or model.attention_bias or model.qk_norm or model.dropout:
        return "Llama and Mixtral have SwiGLU, no biases, no norms of queries, no dropout"
    is_scaled = not isinstance(model.rope_scaling_options, unscaled.Options)
    if model.norm_position != "before" or model.output_bias or is_scaled:
        return "Llama and Mixtral have norms before, no output bias, and plain rotary embeddings"
    if kinds == {"dense"}:
        return ""
    router = model.moe.router_options
    if not isinstance(router, top_k.Options) or not router.renormalize or router.bias:
        return "Mixtral's router is a softmax whose chosen weights sum to 1"
    if model.moe.shared_experts or model.moe.expert_bias or model.moe.latent_dim:
        return "Mixtral has no shared experts, no latent ones and no biases of experts"
    return ""


def implementations(cfg: config.Config, kind: str) -> tuple[str, ...]:
    """Returns the ways to compute the experts, of which the fastest is the rival."""
    if not cfg.model.num_moe_layers:
        return ("eager",)
    return TRAINING_EXPERTS if kind == "rival_train" else DECODING_EXPERTS


def settings(cfg: ModelConfig, seq_len: int) -> dict[str, Any]:
    """Returns the config of transformers with the shapes of ours."""
    settings = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": len(cfg.blocks),
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rms_norm_eps": cfg.norm_epsilon,
        # None of its tokens ends a text.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not cfg.num_moe_layers:
        return {**settings, "intermediate_size": cfg.ffn_hidden}
    return {
        **settings,
        "intermediate_size": cfg.moe.expert_hidden,
        "num_local_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.router_options.k,
        # Its balance loss is a part of the step, as ours is.
        "output_router_logits": True,
    }


def shapes(cfg: config.Config) -> str:
    """Returns what tells models of transformers apart: equal for variants with the same one."""
    return json.dumps([cfg.model.dtype, settings(cfg.model, cfg.data.seq_len)])


def make_model(cfg: ModelConfig, seq_len: int, experts: str) -> Any:
    """Returns the model of transformers with the shapes of ours."""
    import torch
    import transformers

    kind = transformers.MixtralConfig if cfg.num_moe_layers else transformers.LlamaConfig
    theirs = kind(**settings(cfg, seq_len))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        theirs, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )
    ours = flops.parameters(cfg).total
    number = sum(weight.numel() for weight in model.parameters())
    # Another number of parameters would be another model, and no rival.
    if abs(number - ours) > TOLERANCE * ours:
        raise UserError(f"transformers has {number} parameters where we have {ours}")
    return model


def products_in(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which torch computes products in a dtype, of parameters in float32,
    as ours do.
    """
    import torch

    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=getattr(torch, dtype))


def _read(job: Job) -> config.Config:
    """Returns the config of a job, with as many threads of torch as jax has cores."""
    import torch

    # This process computes nothing with jax.
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(_cores())
    return read(job)


def _cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def train(job: Job) -> Prepared:
    """Prepares one step of AdamW with clipping on random tokens. Option: experts."""
    import torch

    cfg = _read(job)
    model = make_model(cfg.model, cfg.data.seq_len, job.options["experts"])
    options = cfg.optim.options
    if not isinstance(options, adamw.Options):
        raise UserError("the rival is trained by AdamW: --config.optim.optimizer=adamw")
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cfg.optim.learning_rate,
        betas=(options.b1, options.b2),
        weight_decay=options.weight_decay,
    )
    shape = (cfg.train.batch_size, cfg.data.seq_len)
    # The same ids are inputs and targets; transformers shifts them by itself.
    ids = torch.from_numpy(np.random.default_rng(cfg.seed).integers(1, cfg.model.vocab_size, shape))
    losses: list[float] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        # No cache of keys: it is for decoding.
        with products_in(cfg.model.dtype):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if cfg.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
        optimizer.step()
        losses.append(float(loss))

    for _ in range(WARM):
        step()
    facts = {
        "loss": losses[0],
        "tokens": ids.numel(),
        "total": sum(weight.numel() for weight in model.parameters()),
    }
    return Prepared(facts, step)


def decode(job: Job) -> Prepared:
    """Prepares the greedy continuation of random prompts. Options: of `ours.decode`, experts."""
    import torch

    cfg = _read(job)
    num_rows, prompt, new = (job.options[name] for name in ("batch", "prompt", "new"))
    model = make_model(cfg.model, prompt + new, job.options["experts"]).eval()
    model.config.output_router_logits = False
    shape = (num_rows, prompt)
    ids = torch.from_numpy(np.random.default_rng(cfg.seed).integers(1, cfg.model.vocab_size, shape))
    mask = torch.ones_like(ids)

    def run() -> None:
        with torch.inference_mode(), products_in(cfg.model.dtype):
            texts = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        # Every row has drawn all its tokens, as ours do.
        assert texts.shape == (num_rows, prompt + new)

    run()
    return Prepared({"tokens": num_rows * new}, run)


def product(job: Job) -> Prepared:
    """Prepares the product of two square matrices by torch. Option: dtype."""
    import torch

    torch.set_num_threads(_cores())
    x = torch.randn(PRODUCT, PRODUCT).to(getattr(torch, job.options["dtype"]))

    def run() -> None:
        torch.matmul(x, x)

    for _ in range(WARM):
        run()
    return Prepared({"flops": 2 * PRODUCT**3}, run)


PREPARE: dict[str, Callable[[Job], Prepared]] = {
    "rival_train": train,
    "rival_decode": decode,
    "rival_product": product,
}
