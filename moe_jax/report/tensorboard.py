"""The figures of a run as TensorBoard shows them best: what one looks at first comes first.

TensorBoard puts scalars into groups by what stands before the first "/" of their names, and sorts
the groups. So the names of metrics.jsonl are given groups with numbers, with few cards in the first
ones.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from moe_jax.config.config_file import default_values
from moe_jax.report.event_file import outlast, without_torch

# What a name begins with, and the group that it goes to instead; the first that fits.
GROUPS = (
    (r"train/(?=(loss|nll|learning_rate|grad_norm)$)", "1_train/"),
    (r"eval/(?!domain/)", "2_eval/"),
    (r"eval/domain/", "3_domains/"),
    (r"moe/(?!layer_)", "4_experts/"),
    (r"perf/", "5_speed/"),
    (r"train/(?=\w+_loss$)", "6_losses/"),
    (r"train/", "7_more/"),
    (r"moe/", "8_layers/"),
    (r"interference/", "9_interference/"),
)
# The tab "Custom Scalars": curves that belong together in one chart, by regular expressions of the
# names above.
LAYOUT = {
    "training and held out": {
        "nats per prediction": ["Multiline", ["^1_train/nll$", "^2_eval/loss$"]],
        "held out, each domain": ["Multiline", ["^3_domains/.*(?<!/loss)$"]],
        "held out, each domain: loss": ["Multiline", ["^3_domains/.*/loss$"]],
    },
    "experts, each layer": {
        "load of the busiest expert over the mean": ["Multiline", ["^8_layers/.*/load_max$"]],
        "experts without a token": ["Multiline", ["^8_layers/.*/dead_experts$"]],
        "share of assignments that were dropped": ["Multiline", ["^8_layers/.*/drop_fraction$"]],
        "entropy of the router, nats": ["Multiline", ["^8_layers/.*/router_entropy$"]],
    },
    "auxiliary losses, unweighted": {"all": ["Multiline", ["^6_losses/"]]},
}


# Keys of the config that runs are told from each other by in the tab "HParams". All that was
# changed beside them is in one column more, for the columns must be the same in all runs.
HYPERPARAMETERS = (
    "task",
    "seed",
    "model.kind",
    "model.d_model",
    "model.repeats",
    "model.moe.num_experts",
    "model.moe.expert_hidden",
    "model.moe.router",
    "model.moe.dispatcher",
    "model.moe.losses.balance",
    "model.moe.losses.z",
    "optim.optimizer",
    "optim.learning_rate",
    "optim.schedule",
    "train.steps",
    "train.batch_size",
    "data.seq_len",
)


def hyperparameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a run, a nested dict of JSON values, as the columns of the tab
    "HParams".
    """
    flat, defaults = flatten_dict(raw, sep="."), flatten_dict(default_values(), sep=".")
    columns = {key: flat[key] for key in HYPERPARAMETERS}
    others = [key for key in sorted(flat) if key not in HYPERPARAMETERS]
    changed = [f"{key}={flat[key]}" for key in others if flat[key] != defaults.get(key)]
    return columns | {"other changes": ", ".join(changed)}


def tag(name: str) -> str:
    """Returns the name in TensorBoard of a figure of metrics.jsonl."""
    for pattern, group in GROUPS:
        if match := re.match(pattern, name):
            return group + name[match.end() :]
    return name


class Events:
    """Writes the event files of a run.

    Args:
      directory: where they go; one file more at each start.
      resume_step: events after this step are hidden. 0 = all earlier ones are.
    """

    def __init__(self, directory: Path, resume_step: int):
        # Imported here: it takes a while, and not every run wants events.
        with without_torch():
            from tensorboardX import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        # The name has the second of the start: two within it would share a file, and lose the
        # events of the first.
        number = len(list(directory.iterdir()))
        suffix = f".{number:06d}"
        # TensorBoard hides the events of older files from this step on.
        purge = resume_step + 1 if resume_step > 0 else 0
        writer = SummaryWriter(
            str(directory), purge_step=purge, flush_secs=10, filename_suffix=suffix
        )
        self._writer = outlast(writer)
        self._writer.add_custom_scalars(LAYOUT)
        self._hyperparameters: dict[str, Any] = {}

    def scalars(self, step: int, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(tag(name), value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def image(self, step: int, name: str, array: Any) -> None:
        """Writes an image [H, W] or [H, W, 3], uint8 or float in [0, 1]."""
        # A grey image has no dimension of colours.
        pixels = np.asarray(array)
        layout = "HW" if pixels.ndim == 2 else "HWC"
        self._writer.add_image(tag(name), pixels, step, dataformats=layout)

    def hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Writes the values of the tab "HParams" for the run itself.

        `SummaryWriter.add_hparams` would make a run of its own of them.
        """
        self._hyperparameters = dict(values)
        self._add_hparams(("session_start_info",), ())

    def finished(self, figures: Iterable[str]) -> None:
        """Says that the run is done, and by the last values of which figures it is compared."""
        self._add_hparams(("experiment", "session_end_info"), figures)

    def _add_hparams(self, parts: tuple[str, ...], figures: Iterable[str]) -> None:
        from tensorboardX.summary import hparams

        # The value 0 is not written: only the names of the figures are.
        summaries = hparams(self._hyperparameters, {tag(name): 0.0 for name in figures})
        names = ("experiment", "session_start_info", "session_end_info")
        # This writer always writes to files.
        file = self._writer.file_writer
        assert file is not None
        for name, summary in zip(names, summaries, strict=True):
            if name in parts:
                file.add_summary(summary)

    def close(self) -> None:
        self._writer.close()
