"""What a model can learn: one file and one line each. The contract is in contract.py."""

from moe_jax.tasks.classification import task as classification
from moe_jax.tasks.contract import Task
from moe_jax.tasks.lm import task as lm
from moe_jax.tasks.recommendation import task as recommendation
from moe_jax.tasks.speech import task as speech
from moe_jax.tasks.translation import task as translation
from moe_jax.tasks.vision import task as vision

TASKS: dict[str, Task] = {
    "lm": lm.TASK,
    "classification": classification.TASK,
    "translation": translation.TASK,
    "translation_prefix": translation.PREFIX_TASK,
    "vision": vision.TASK,
    "recommendation": recommendation.TASK,
    "speech": speech.TASK,
}
