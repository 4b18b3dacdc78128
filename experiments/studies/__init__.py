"""The declarations: a file for each question, with `STUDY` in it.

`tiny` is the language model that most of them train, in a quarter of a minute of one core: bytes of
six kinds of text, 0.5 M tokens for 37 thousand active parameters, 14 a parameter. Arms that are
equal in two studies are one run. `small` has twice the width and 1.0 M tokens, which is less than
one epoch, too.
"""

import difflib
import importlib
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import config
from moe_jax.config import config_file
from moe_jax.errors import UserError
from moe_jax.study import expand
from moe_jax.study.contract import Study

FOLDER = Path(__file__).parent
TINY_RATE = 0.016


def small(**changes: Any) -> dict[str, Any]:
    """Returns the keys of the small model; "__" in a name stands for a dot."""
    keys = {
        "model.d_model": 64,
        "model.repeats": 2,
        "model.ffn_hidden": 128,
        "model.moe.expert_hidden": 64,
        "data.seq_len": 128,
        "data.heldout_bytes": 20_000,
        "train.batch_size": 8,
        "train.steps": 1000,
        "optim.warmup_steps": 50,
        "eval.batch_size": 16,
    }
    return keys | {name.replace("__", "."): value for name, value in changes.items()}


def tiny(**changes: Any) -> dict[str, Any]:
    """Returns the keys of the tiny model, which has half the width and half the steps of `small`.

    Its learning rate is searched from TINY_RATE on.
    """
    keys = {
        "model.d_model": 32,
        "model.ffn_hidden": 64,
        "model.moe.expert_hidden": 32,
        "train.steps": 500,
    }
    return small(**keys) | {name.replace("__", "."): value for name, value in changes.items()}


def steps_for(changes: Mapping[str, Any], like: Mapping[str, Any]) -> int:
    """Returns the steps that take the training FLOPs of `like`, which has train.steps."""
    both = [config.build(config_file.read(Path("base"), each), 1) for each in (changes, like)]
    a_step = [expand.train_flops(cfg) / cfg.train.steps for cfg in both]
    return round(both[1].train.steps * a_step[1] / a_step[0])


def all_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def named(words: Sequence[str]) -> list[str]:
    """Returns the names of the studies that were asked for; "all" stands for every one.

    Raises UserError for a name that there is not.
    """
    known = all_names()
    if list(words) == ["all"]:
        return known
    for word in words:
        if word not in known and not Path(word).is_file():
            near = difflib.get_close_matches(word, known, 1)
            more = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise UserError(f"no study is called {word!r}: {more}")
    return list(words)


def load(name: str) -> Study:
    """Returns a study by its name, or by the path of a file that declares one.

    Raises UserError for a file that declares none.
    """
    if not Path(name).is_file():
        return importlib.import_module(f"experiments.studies.{name}").STUDY
    module = runpy.run_path(name)
    if not isinstance(module.get("STUDY"), Study):
        raise UserError(f"{name} declares no study: it needs STUDY = Study(...)")
    return module["STUDY"]
