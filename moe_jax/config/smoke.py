"""`--smoke`: a few steps of any run, to see that all of it works: data, steps, evaluation, sample,
checkpoint, rivals, summary.

The model, the mesh, the batch and the optimizer stay as they are: what is too large for the machine
fails here, too. The key `smoke` of the config says that a run is one of these, so that none of its
files is taken for those of the run itself.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from moe_jax.data import sources
from moe_jax.data.contract import Data
from moe_jax.data.examples import Examples
from moe_jax.errors import UserError
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS

STEPS = 3
SAMPLE_TOKENS = 8
# Of a set of examples, for its rivals and its predictions.
TRAIN_ROWS, HELDOUT_ROWS = 512, 32
# Of each embedded domain.
SLICE_BYTES, HELDOUT_BYTES = 20_000, 2_000


def shorten(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns a config that runs for a few steps, as nested dict, and what was changed: a line for
    each key.
    """
    # keep_empty_nodes: a choice without options has an empty block.
    new = flatten_dict(copy.deepcopy(dict(raw)), sep=".", keep_empty_nodes=True)
    changed = []
    for key, value in _changes(raw):
        if new[key] != value:
            changed.append(f"{key} {new[key]!r} -> {value!r}")
            new[key] = value
    return unflatten_dict(new | {"smoke": True}, sep="."), changed


def _changes(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields keys and their new values.

    What is off stays off; what comes every so many steps comes within the few.
    """
    train, evaluation, log, data = raw["train"], raw["eval"], raw["log"], raw["data"]
    steps = min(train["steps"], STEPS)
    yield "train.steps", steps
    yield "train.stop_at", 0
    # min(): 0 stands for "off", and stays.
    yield "eval.every", min(evaluation["every"], 2)
    yield "eval.batches", 1
    yield "eval.final_batches", 1
    yield "eval.sample_tokens", min(evaluation["sample_tokens"], SAMPLE_TOKENS)
    # One save at the end is enough to try it.
    yield "checkpoint.every", 0
    yield "log.every", 1
    yield "log.histogram_every", 1
    yield "log.interference_every", min(log["interference_every"], 1)
    # The last step: by then all is compiled.
    yield "profile", f"{steps - 1}:{steps}" if raw["profile"] else ""
    yield "record.steps", str(steps) if raw["record"]["steps"] else ""
    zeros = raw["model"]["moe"]["sparse"]
    if "every" in zeros["rules"].get(zeros["rule"], {}):
        yield f"model.moe.sparse.rules.{zeros['rule']}.every", 1
    if "copies" in raw["tasks"].get(raw["task"], {}):
        yield f"tasks.{raw['task']}.copies", 1
    packed_now = any(sources.packed_by_run(str(source[0])) for source in data["sources"])
    if TASKS[raw["task"]].is_language and packed_now:
        # Two batches of bytes: one batch must be there, of a single domain too.
        batches = 2 * train["batch_size"] * data["seq_len"]
        yield "data.slice_bytes", _at_most(data["slice_bytes"], max(SLICE_BYTES, batches))
        yield "data.heldout_bytes", _at_most(data["heldout_bytes"], HELDOUT_BYTES)


def _at_most(own: int, most: int) -> int:
    """Returns the smaller of two numbers of bytes, where 0 of the config's own means all."""
    return min(own, most) if own else most


def fewer(cfg: Config, data: Data) -> Data:
    """Returns the data of a smoke run: of a set of examples some rows alone, at least a batch.

    Packed text is read by rows anyway.
    """
    if isinstance(data, Examples):
        return data.fewer(max(TRAIN_ROWS, cfg.train.batch_size), HELDOUT_ROWS)
    return data


def notes(raw: Mapping[str, Any], workdir: Path | str) -> list[str]:
    """Returns one line for whoever reads a smoke run as if it were a trained model; none of another
    run.
    """
    if not raw.get("smoke"):
        return []
    return [f"{workdir} is a smoke run (--smoke): a few steps of training, nothing was learned"]


def refuse_other(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises UserError where a run would go on from a smoke run, or a smoke run from another
    run.
    """
    before, now = (bool(config.get("smoke")) for config in (old, new))
    if before and not now:
        raise UserError(
            "this --workdir holds a smoke run (--smoke), which trained a few steps only and is no "
            "beginning of this run: remove the directory, or take another --workdir"
        )
    if now and not before:
        raise UserError(
            "this --workdir holds a run that is no smoke run: take another --workdir for --smoke"
        )
