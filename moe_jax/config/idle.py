"""Options that a user set and that do nothing in this run. Each is told when the run begins.

An option that has its default was not asked for, so nothing is said of it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moe_jax.config.config_file import default_values
from moe_jax.data import sources
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS

Asked = Callable[[str], bool]


def notes(cfg: Config, raw: Mapping[str, Any], start: int) -> list[str]:
    """Returns a sentence for each option that was asked for and does nothing.

    Args:
      raw: the config as a nested dict.
      start: the step from which the run goes on.
    """

    defaults = default_values()

    def asked(path: str) -> bool:
        return _at(raw, path) != _at(defaults, path)

    last = min(cfg.train.steps, cfg.train.stop_at or cfg.train.steps)
    return [*_of_steps(cfg, start, last), *_of_training(cfg, asked), *_of_data(cfg, asked)]


def _of_steps(cfg: Config, start: int, last: int) -> Iterator[str]:
    """Yields what names steps that this run does not make: it makes those after `start` up to
    `last`.
    """
    made = "this run makes no step"
    if start < last:
        made = f"this run makes steps {start + 1} to {last}"
    if cfg.train.stop_at >= cfg.train.steps:
        yield (
            f"train.stop_at = {cfg.train.stop_at} does nothing: "
            f"train.steps = {cfg.train.steps} ends before it"
        )
    # Steps count from 0 in `profile`, and from 1 where they are done.
    if cfg.profile and not range(max(cfg.profile[0], start), min(cfg.profile[1], last)):
        yield f"profile = {cfg.profile[0]}:{cfg.profile[1]} traces nothing: {made}"
    wanted = cfg.record.steps
    if wanted.text and not any(wanted(step) for step in range(start + 1, last + 1)):
        yield f'record.steps = "{wanted.text}" records nothing: {made}'
    # Where all lie beyond, the sentence above has told it.
    beyond = sorted(step for step in wanted.steps if step > last)
    if beyond and len(beyond) < len(wanted.steps) + len(wanted.every):
        yield f"record.steps: {', '.join(map(str, beyond))} will not be recorded: {made}"


def _of_training(cfg: Config, asked: Asked) -> Iterator[str]:
    if asked("record.rows") and not cfg.record.steps.text:
        yield f'record.rows = {cfg.record.rows} does nothing: record.steps is ""'
    if asked("checkpoint.keep_best") and cfg.checkpoint.keep_best and not _scored(cfg):
        yield (
            f"checkpoint.keep_best = {cfg.checkpoint.keep_best} keeps nothing more: before the end "
            f"no step is both evaluated (eval.every = {cfg.eval.every}) and saved "
            f"(checkpoint.every = {cfg.checkpoint.every})"
        )
    if asked("log.project") and not cfg.log.trackers:
        yield f'log.project = "{cfg.log.project}" does nothing: log.trackers names none'
    if asked("optim.decay_mask") and not cfg.optim.options.weight_decay:
        yield (
            f'optim.decay_mask = "{cfg.optim.decay_mask}" does nothing: '
            "nothing decays (weight_decay is 0)"
        )
    if asked("eval.dispatcher") and not cfg.model.num_moe_layers:
        yield f'eval.dispatcher = "{cfg.eval.dispatcher}" does nothing: the model has no MoE layer'
    adaptive = cfg.model.moe.adaptive
    for key in ("target_drop", "limit"):
        if asked(f"model.moe.adaptive.{key}") and not adaptive.rate:
            yield (
                f"model.moe.adaptive.{key} = {getattr(adaptive, key)} does nothing: "
                "model.moe.adaptive.rate is 0"
            )


def _of_data(cfg: Config, asked: Asked) -> Iterator[str]:
    if asked("eval.sample_prompt") and not cfg.eval.sample_tokens:
        yield "eval.sample_prompt does nothing: eval.sample_tokens is 0"
    text = ["data.sources", "data.slice_bytes", "data.heldout_bytes", "eval.sample_prompt"]
    # 0 asks for nothing.
    if cfg.eval.sample_tokens:
        text.append("eval.sample_tokens")
    if not TASKS[cfg.task].is_language:
        yield from (
            f'{path} does nothing: it is for task "lm", not "{cfg.task}"'
            for path in text
            if asked(path)
        )
        return
    if asked("data.folder"):
        yield 'data.folder does nothing: the data of task "lm" are data.sources'
    # Text that a run packs itself is cut and split by these keys; prepared data had their own.
    packed_now = any(sources.packed_by_run(source) for source, _ in cfg.data.sources)
    for path in ("data.slice_bytes", "data.heldout_bytes", "data.heldout_every"):
        if asked(path) and not packed_now:
            yield f"{path} does nothing: it is for embedded text, and prepared data have their own"


def _scored(cfg: Config) -> bool:
    """Returns whether a checkpoint before the end has a score."""
    save_every, evaluate_every = cfg.checkpoint.every, cfg.eval.every
    if not (save_every and evaluate_every):
        return False
    # The end is left out: its checkpoint is the last one anyway.
    saved = range(save_every, cfg.train.steps, save_every)
    return any(step % evaluate_every == 0 for step in saved)


def _at(tree: Mapping[str, Any], path: str) -> Any:
    """Returns a value by its dotted key; None when it is not there."""
    value: Any = tree
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
