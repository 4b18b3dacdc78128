"""An evaluation of a run: its figures, a sample of text, pictures; written and shown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from moe_jax.data.contract import Data
from moe_jax.data.load import Dataset
from moe_jax.decoding.sample import Settings, make_sampler
from moe_jax.evaluate import make_evaluate
from moe_jax.instruments import picture
from moe_jax.instruments.load_over_time import LoadOverTime
from moe_jax.models.decodable import why_not_decoded
from moe_jax.models.functions import Model
from moe_jax.report import metrics
from moe_jax.runtime import stopping
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS
from moe_jax.tasks.contract import Trained
from moe_jax.terminal.progress import Progress
from moe_jax.train_step import State, judged


class Evaluation:
    """Evaluates a run, on the way and at its end. All processes call it; the first one writes.

    Args:
      load: the load of the experts in training so far, for its picture.
    """

    def __init__(
        self,
        cfg: Config,
        model: Model,
        data: Data,
        workdir: Path,
        writer: metrics.Writer,
        progress: Progress,
        load: LoadOverTime,
    ):
        self._cfg, self._model, self._data, self._workdir = cfg, model, data, workdir
        self._writer, self._progress, self._load = writer, progress, load
        self._task = TASKS[cfg.task]
        # Both compile when they are first called.
        self._evaluate = make_evaluate(cfg, data)
        self._sampler = _make_sampler(cfg, data, progress)
        # Of the last evaluation.
        self.figures: dict[str, Any] = {}
        self.sample = ""

    def __call__(self, state: State, final: bool) -> float:
        """Returns the held-out loss. At the end of a run, predictions and pictures are written."""
        cfg, progress = self._cfg, self._progress
        with progress.doing("evaluating", after=state.step):
            num_batches = cfg.eval.final_batches if final else cfg.eval.batches
            result = self._evaluate(state, num_batches)
        if final:
            # The task writes its predictions from it, or a translation.
            trained = Trained(self._model.bind, judged(state), state.router_state, result["rows"])
            with progress.doing("writing predictions"):
                result |= self._task.finish(cfg, trained, self._data, self._workdir)
        sample = self._draw(state)
        # One process writes; the others wait in their next collective.
        if jax.process_index() == 0:
            with progress.doing("writing what was evaluated"):
                self._write(int(state.step), result, sample, final)
        self.figures, self.sample = result, sample
        return result["loss"]

    def _draw(self, state: State) -> str:
        """Returns a sample of text; "" of a model that writes none."""
        if self._sampler is None:
            return ""
        evaluation = self._cfg.eval
        settings = Settings(
            evaluation.sample_tokens,
            temperature=0.8,
            top_k=0,
            top_p=0.95,
            seed=self._cfg.seed,
            stop=(),
        )
        prompt = evaluation.sample_prompt
        with self._progress.doing("drawing a sample"):
            # All processes draw, because the model may lie on all of them.
            texts = self._sampler(judged(state), state.router_state, [prompt], settings)
        return prompt + texts[0]

    def _write(self, step: int, result: Mapping[str, Any], sample: str, final: bool) -> None:
        writer = self._writer
        # Numbers alone: a translation's figures have the signature of its BLEU among them.
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
        figures = {f"eval/{name}": value for name, value in numbers.items()}
        if final:
            first_page = [name for name in figures if "/domain/" not in name]
            writer.write_final(step, figures, first_page)
        else:
            writer.write(step, figures)
        self._progress.message(f"step {step}: {self._task.headline(result)}")
        if writer.shows_images and self._load:
            writer.image(step, "moe/load", self._load.picture())
        if sample:
            # Four spaces: Markdown shows it as it is.
            writer.text(step, "sample", "    " + sample.replace("\n", "\n    "))
        # What follows takes long: a run that was told to end leaves here.
        stopping.check_alone()
        if final and result["routing"].size:
            rows = result["row_routing"]
            image = picture.routing(
                result["routing"],
                rows["experts"],
                rows["domain"],
                self._data.domains,
                self._workdir / "routing.png",
            )
            writer.image(step, "moe/routing", image)


def _make_sampler(cfg: Config, data: Data, progress: Progress) -> Any:
    """Returns the sampler of a language model that can be decoded, else None; says why."""
    if not isinstance(data, Dataset) or not cfg.eval.sample_tokens:
        return None
    if reason := why_not_decoded(cfg.model):
        progress.message(f"no samples will be drawn: {reason}")
        return None
    return make_sampler(cfg.model, data.tokenizer, cfg.data.seq_len)
