"""The families of models by `model_type`: one file and one line each; the contract is in
interchange/contract.py.

A model of ours is exported as the first one that can say all of it.
"""

from moe_jax.interchange.contract import Family
from moe_jax.interchange.families import (
    deepseek_v2,
    deepseek_v3,
    dots1,
    flex_olmo,
    gemma,
    gemma2,
    gemma3_text,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    switch_transformers,
    t5,
)

FAMILIES: dict[str, Family] = {
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "olmo2": olmo2.FAMILY,
    "flex_olmo": flex_olmo.FAMILY,
    "dots1": dots1.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3_text.FAMILY,
    # Before the one below, which is the same where no layer has experts.
    "t5": t5.FAMILY,
    "switch_transformers": switch_transformers.FAMILY,
}
