"""What a run begins from: its newest checkpoint, the parameters of another run, or fresh ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from moe_jax import checkpoint, meaning, optim
from moe_jax.config import config_file, idle, smoke
from moe_jax.config.build import RESUME_MAY_CHANGE
from moe_jax.data.contract import Data
from moe_jax.errors import UserError
from moe_jax.moe import sparse
from moe_jax.parallel import device_memory
from moe_jax.plan.abstract import shard_bytes
from moe_jax.schema.config import Config
from moe_jax.train_step import State, advanced, updated


def begin(
    cfg: Config,
    saves: checkpoint.Checkpoints,
    metadata: Mapping[str, Any],
    init: Any,
    abstract: Any,
    data: Data | None = None,
    allowed: tuple[str, ...] = (),
) -> tuple[State, list[str]]:
    """Returns the state to start from and what to tell.

    The state is that of the newest checkpoint, else (train.init_from) one with the parameters of
    another run, else a fresh one. Raises UserError when the run may not go on, or begin so.

    Args:
      metadata: of the checkpoints of this run, {"config": ..., "data": fingerprint}.
      init: key -> a fresh state.
      abstract: its shapes, dtypes and shardings.
      data: compared with that of train.init_from; None = it is not.
      allowed: keys, by prefix, that may differ from the saved config (--allow_change).
    """
    device_memory.refuse_too_large(shard_bytes(abstract), jax.local_devices())
    # 1. A run that has a checkpoint goes on from it; train.init_from is for its beginning alone.
    step = saves.latest()
    if step is not None:
        notes = resumed(cfg, saves, step, metadata, allowed)
        return saves.restore(step, abstract, stacked=cfg.model.scan), notes
    state = init(jax.random.key(cfg.seed))
    notes = idle.notes(cfg, metadata.get("config", {}), start=0)
    # 2. Without one it begins afresh, or with the parameters of another run.
    if not cfg.train.init_from:
        return state, notes
    state, taken = inherited(cfg, state, data)
    return state, notes + taken


def resumed(
    cfg: Config,
    saves: checkpoint.Checkpoints,
    step: int,
    metadata: Mapping[str, Any],
    allowed: tuple[str, ...] = (),
) -> list[str]:
    """Returns what to tell of a run that goes on from `step`. Raises UserError when it may not."""
    saved, path = saves.metadata(step), saves.path(step)
    if not (isinstance(saved.get("config"), Mapping) and isinstance(saved.get("data"), str)):
        raise UserError(
            f"{path} holds a model and no training run to go on with (`convert` writes such): "
            "begin with its parameters in another --workdir, by "
            f"train.init_from={saves.directory.parent}"
        )
    # A run that was saved long ago lacks the keys that came later.
    defaults = config_file.default_values()
    old, notes = checkpoint.fill(saved["config"], defaults, RESUME_MAY_CHANGE)
    # The same data at another place is no other config.
    if saved["data"] == metadata["data"]:
        old, moved = checkpoint.same_data(old, metadata["config"])
        notes += moved
    # Before all keys are compared: a smoke run differs in many, and one sentence says why.
    smoke.refuse_other(old, metadata["config"])
    notes += checkpoint.allowed_changes(old, metadata["config"], allowed)
    checkpoint.compare_configs(old, metadata["config"], (*RESUME_MAY_CHANGE, *allowed))
    if saved["data"] != metadata["data"]:
        raise UserError(
            f"the data changed since step {step} of this run (fingerprint {saved['data'][:12]}, "
            f"now {metadata['data'][:12]}): restore it, or start another --workdir"
        )
    # train.steps may change, and then the schedule of the rate changes with it.
    before, now = old["train"]["steps"], cfg.train.steps
    if now < step:
        raise UserError(
            f"train.steps = {now} ends before the newest checkpoint of this run (step {step}): "
            f"set at least {step}, or start another --workdir"
        )
    if now != before:
        end = "so is the end of the learning rate's schedule"
        notes = [f"train.steps = {before} so far, {now} from here on: {end}", *notes]
    return notes + idle.notes(cfg, metadata["config"], start=step)


def inherited(cfg: Config, state: State, data: Data | None) -> tuple[State, list[str]]:
    """Returns a fresh state with the parameters of train.init_from, as far as they fit, and what to
    tell.
    """
    run = Path(cfg.train.init_from)
    source = run / "checkpoints"
    like = {"stacked": cfg.model.scan, "rename": renames(cfg)}
    # The master copy takes them where there is one; the parameters follow it, rounded.
    params, report = checkpoint.load_params(
        source, updated(state), part="params", step=None, **like
    )
    here = {"params": params, "router_state": state.router_state}
    # Judged of both parts together, as a rename may concern the router state alone.
    checkpoint.refuse_idle_renames(source, report.step, here, **like)
    saved = checkpoint.Checkpoints(source, every=0, keep=1, keep_best=0).metadata(report.step)
    notes = [
        *smoke.notes(saved.get("config", {}), f"train.init_from={run}"),
        *told("parameters", source, report),
    ]
    if data is not None:
        notes += meaning.compare(run, data, report.loaded)
    # Read from the same step as the parameters.
    router_state = state.router_state
    if jax.tree.leaves(router_state):
        of_routers = {"part": "router_state", "step": report.step, **like}
        router_state, report = checkpoint.load_params(source, router_state, **of_routers)
        notes += told("router state", source, report)
    # Masks and moving average begin from the values that were loaded.
    zeros = cfg.model.moe.sparse
    set_masks = jax.jit(lambda params: sparse.begin(zeros, params, stacked=cfg.model.scan))
    params, masks = set_masks(params)
    ema = None if state.ema is None else optim.begin_ema(params)
    state = advanced(cfg, state, params)
    return state._replace(router_state=router_state, ema=ema, masks=masks), notes


def renames(cfg: Config) -> dict[str, str]:
    """Returns train.init_rename as a dict. Raises UserError when a prefix is renamed twice."""
    old = [name for name, _ in cfg.train.init_rename]
    twice = [name for name in old if old.count(name) > 1]
    if twice:
        raise UserError(f"train.init_rename renames {twice[0]!r} twice: leave one of the two pairs")
    return dict(cfg.train.init_rename)


def told(what: str, source: Path, report: checkpoint.Report) -> list[str]:
    """Returns what was taken from another run and what was not, one line each."""
    return [
        f"{what} from step {report.step} of {source}: {len(report.loaded)} loaded",
        *(f"  loaded   {name}" for name in report.loaded),
        *(f"  renamed  {old} -> {new}" for old, new in report.renamed),
        *(f"  left     {name}: {reason}" for name, reason in report.left),
    ]
