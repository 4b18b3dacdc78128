"""What a model can learn: one file and one line each. The contract is in contract.py."""

from moe_jax.tasks import classification, lm, recommendation, speech, translation, vision
from moe_jax.tasks.contract import Task

TASKS: dict[str, Task] = {
    "lm": lm.TASK,
    "classification": classification.TASK,
    "translation": translation.TASK,
    "translation_prefix": translation.PREFIX_TASK,
    "vision": vision.TASK,
    "recommendation": recommendation.TASK,
    "speech": speech.TASK,
}
