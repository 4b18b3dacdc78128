"""Libraries that only some tasks and commands need: training a language model imports none of them.

The extras of the package install them: `tasks` (requirements/tasks.txt), `hf`
(requirements/hf.txt), `report` (requirements/report.txt) and `eval` (requirements/eval.txt).
"""

import importlib.util

from moe_jax.errors import UserError

# What Python imports -> what pip installs.
DISTRIBUTIONS = {
    "datasets": "datasets",
    "jinja2": "jinja2",
    "kaldi_native_fbank": "kaldi-native-fbank",
    "lm_eval": "lm-eval",
    "pysword": "pysword",
    "sacrebleu": "sacrebleu",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "vl_convert": "vl-convert-python",
}
# The extra that has them, where it is not "tasks".
EXTRAS = {
    "datasets": "eval",
    "jinja2": "hf",
    "lm_eval": "eval",
    "safetensors": "hf",
    "vl_convert": "report",
}


def require(purpose: str, *modules: str) -> None:
    """Raises UserError when one of `modules` (keys of DISTRIBUTIONS) is not installed.

    Call it before the work whose last step needs the library: a missing baseline must not show
    itself after the training. `purpose` begins the message, such as "task = 'speech'".
    """
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        missing = [DISTRIBUTIONS[name] for name in absent]
        extras = ",".join(sorted({EXTRAS.get(name, "tasks") for name in absent}))
        raise UserError(
            f"{purpose} needs {' and '.join(missing)} (not installed): "
            f"pip install {' '.join(missing)}, or install moe_jax with its extra [{extras}]"
        )
