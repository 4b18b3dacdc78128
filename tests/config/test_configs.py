"""Every config of configs/ and its variants builds and has a resource card; the quickstart keeps
what its docstring promises.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import card_cases
import jax
import meshes
import numpy as np
import pytest
import tiny
from rich.console import Console

from moe_jax import config, train_step
from moe_jax.config import config_file, idle
from moe_jax.plan import abstract, card, card_tables, compiling
from moe_jax.report.metrics import read_rows
from moe_jax.tasks.lm import task as lm

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
VARIANTS = {
    "article": ("bytes", "wordnet", "vader"),
    "bench": ("dense", "e8", "e8_capacity", "e64", "e64_capacity"),
    "classification": ("wordnet", "debian", "vader", "banking77", "imdb"),
    "translation": ("encdec", "debian", "prefix", "wmt"),
    "vision": ("digits", "fashion_mnist"),
}
ALL = [name for name in FILES if name not in VARIANTS] + [
    f"{name}:{v}" for name, some in VARIANTS.items() for v in some
]
# To trace: more than 2 s. The variants of translation below differ in their data alone.
SLOW = (
    "deepseek_v3_shape",
    "mixtral_8x7b",
    "olmoe_1b7b",
    "debug",
    "quickstart",
    "bench:dense",
    "bench:e8",
    "bench:e8_capacity",
    "bench:e64",
    "bench:e64_capacity",
    "translation:encdec",
    "translation:debian",
    "vision:fashion_mnist",
)
FULL = [pytest.param(name, marks=[pytest.mark.full] if name in SLOW else []) for name in ALL]


def built(name):
    """The checked config of configs/NAME.py, or NAME:VARIANT, on one device or on those that it
    simulates.
    """
    stem, colon, variant = name.partition(":")
    raw = config_file.read(Path(f"{ROOT}/configs/{stem}.py{colon}{variant}"))
    return config.build(raw, raw["simulate_devices"] or 1)


@pytest.mark.parametrize("name", ALL)
def test_a_config_sets_nothing_that_does_nothing(name):
    stem, colon, variant = name.partition(":")
    path = Path(f"{ROOT}/configs/{stem}.py{colon}{variant}")
    assert idle.notes(built(name), config_file.read(path), start=0) == []


def traced(cfg, rounds):
    """The compiled train step of the card, traced and not compiled: every shape fits, and no
    seconds pass.
    """
    model = train_step.make_model(cfg.model)
    state = compiling.abstract_state(cfg, model)
    step = train_step.make_step(cfg, model, train_step.make_tx(cfg, state.params))
    jax.eval_shape(step, state, abstract.batch_of(cfg))
    return card_cases.compiled()


def shown(cfg):
    """The rendered card of a config."""
    console = Console(width=80, record=True, file=open(os.devnull, "w"))
    with console.file, jax.set_mesh(meshes.make(cfg.mesh.data, cfg.mesh.expert, cfg.mesh.model)):
        console.print(card_tables.render(card.card(cfg)))
    return console.export_text()


def test_every_config_builds_and_the_first_variant_is_the_default():
    found = {name: built(name) for name in ALL}
    for name, variants in VARIANTS.items():
        assert built(name) == found[f"{name}:{variants[0]}"]


def test_variants_are_those_of_the_docstrings():
    for name, variants in VARIANTS.items():
        said = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
        assert all(re.search(rf"\b{variant}\b", said) for variant in variants)


@pytest.mark.parametrize("name", FULL)
def test_a_config_has_a_card(name, monkeypatch):
    monkeypatch.setattr(card, "_compiled", traced)
    assert "parameters" in shown(built(name))


@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
def test_a_config_compiles(name):
    assert "compiled step: peak" in shown(built(name))


@pytest.mark.parametrize("length", range(1, 9))
def test_random_rows_of_any_length(length):
    cfg = tiny.build(changes={"data.seq_len": length})
    batch = lm.random(cfg, 0)
    assert (
        batch.tokens_BS.shape == (cfg.train.batch_size, length)
        and (batch.segment_BS[1::2] > 0).all()
    )
    assert (
        batch.segment_BS[:, 0].all()
        and (batch.position_BS >= 0).all()
        and np.unique(batch.segment_BS).max() <= 2
    )


PLAIN = (
    "PJRT_NPROC",
    "XLA_FLAGS",
    "JAX_PLATFORMS",
)  # with JAX_COMPILATION_CACHE_DIR and its like: a user has none of them set


@pytest.mark.full
@pytest.mark.alone
def test_the_quickstart_keeps_its_promises(tmp_path):
    """Bits per byte below gzip's in every domain, and time: two cores that do nothing else."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in PLAIN and not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    command = [
        sys.executable,
        "-m",
        "moe_jax.main",
        "--config",
        "configs/quickstart.py",
        "--workdir",
        str(tmp_path / "run"),
    ]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    *rows, (last, mean) = json.loads((tmp_path / "run" / "summary.json").read_text())[
        "rows"
    ].items()
    assert last == "mean" and len(rows) == 6 and mean["model"] <= 2.75, mean
    for domain, row in rows:
        assert row["model"] < row["gzip -9"], (domain, row)
    waits = [
        row["perf/input_wait"]
        for row in read_rows(tmp_path / "run" / "metrics.jsonl")
        if "perf/input_wait" in row
    ]
    assert len(waits) >= 38 and statistics.median(waits) < 0.02, waits
    first = float(re.search(r"first step done ([\d.]+) s after the start", done.stdout)[1])
    assert first < 30 and seconds < 240, (first, seconds)
