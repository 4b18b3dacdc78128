"""A language model trains where the libraries of other tasks are not installed; such a task is then
refused in one line.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import config, extras
from moe_jax.config import config_file
from moe_jax.errors import UserError
from moe_jax.tasks import TASKS

ROOT = Path(__file__).parents[1]
# jax is installed with scipy and writers of data sets with tensorflow_datasets, but neither is
# imported while a model trains.
ABSENT = (*extras.DISTRIBUTIONS, "scipy", "tensorflow_datasets", "tensorboard", "transformers")
# moe_jax.main with its arguments, in a Python where these modules are not there.
WITHOUT = f"""
import runpy, sys

sys.modules.update(dict.fromkeys({ABSENT}))
runpy.run_module("moe_jax.main", run_name="__main__", alter_sys=True)
"""
SMALL = (
    "--config.simulate_devices=0",
    "--config.mesh.expert=1",
    "--config.mesh.model=1",
    "--config.model.prefix=()",
    "--config.model.repeats=1",
    "--config.model.remat=none",
    "--config.train.steps=2",
    "--config.train.micro_batch_size=0",
    "--config.optim.warmup_steps=0",
)


@pytest.mark.full
def test_a_language_model_trains_without_the_libraries_of_tasks(tmp_path):
    flags = ["--config", "configs/debug.py", "--workdir", str(tmp_path / "run"), *SMALL]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "held-out bits per byte" in done.stdout
    assert "# after pip install tensorboard" in done.stdout
    assert (tmp_path / "run" / "routing.png").exists()


@pytest.mark.parametrize(
    ("task", "module"),
    [
        ("classification", "sklearn"),
        ("translation", "sacrebleu"),
        ("vision", "sklearn"),
        ("speech", "kaldi_native_fbank"),
    ],
)
def test_a_missing_library_is_one_line_before_the_training(task, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    cfg = config.build(config_file.read(ROOT / "configs" / f"{task}.py", (), "--change"), 1)
    message = f"task = '{task}' needs {extras.DISTRIBUTIONS[module]} (not installed)"
    with pytest.raises(UserError, match=re.escape(message)) as error:
        TASKS[task].open(cfg)
    assert "extra [tasks]" in str(error.value) and "\n" not in str(error.value)


def test_the_extra_has_every_library_that_is_asked_for():
    for module, distribution in extras.DISTRIBUTIONS.items():
        extra = extras.EXTRAS.get(module, "tasks")
        lines = (ROOT / "requirements" / f"{extra}.txt").read_text().splitlines()
        required = {re.split(r"[>=<~ ]", line)[0] for line in lines if line[:1] != "#"}
        assert distribution in required, distribution
