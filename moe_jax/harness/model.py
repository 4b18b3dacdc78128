"""A trained model as one of EleutherAI's lm-evaluation-harness (extra `eval`).

import lm_eval
from moe_jax.harness.model import HarnessModel

run = moe_jax.load_run("runs/books")
with jax.set_mesh(run.mesh):
    results = lm_eval.simple_evaluate(HarnessModel(run), tasks=["hellaswag"])
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval import utils
from lm_eval.api.model import TemplateLM

from moe_jax.decoding.draw import Settings
from moe_jax.decoding.sample import make_sampler
from moe_jax.harness.scoring import Request, Scorer
from moe_jax.run import Run

# The harness would fork processes for the errors of its figures. A fork of a process that runs
# the threads of JAX may hang.
os.environ.setdefault("DISABLE_MULTIPROC", "1")
# Tokens of an answer, where a task does not say how long it may be.
MOST_TOKENS = 256


class HarnessModel(TemplateLM):
    """A run as the harness sees a model.

    Every text begins with the boundary of the tokenizer, as documents do in training. The context
    is a training row. Works on one device; call it with the mesh of the run set.

    Args:
      run: of a language model that can be decoded.
      batch_size: texts that are judged at once.
    """

    def __init__(self, run: Run, batch_size: int = 8):
        super().__init__()
        self.run, self.batch_size = run, batch_size
        self.scorer = Scorer(run, batch_size)
        self._device = str(jax.devices()[0])
        self._sampler: Any = None

    @property
    def eot_token_id(self) -> int:
        return self.run.tokenizer.boundary_id

    @property
    def max_length(self) -> int:
        """Returns the tokens of a training row."""
        return self.scorer.context

    @property
    def tokenizer_name(self) -> str:
        # Requests that the harness keeps are of one tokenizer.
        return self.run.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text, behind the boundary unless `add_special_tokens` is False."""
        del kwargs
        ids = [int(i) for i in self.run.tokenizer.encode(string)]
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, whether it is the likeliest text) of each continuation."""
        del kwargs
        found = self.scorer([Request(context, ids) for _, context, ids in requests])
        for (key, _, _), score in zip(requests, found):
            # The harness keeps what it has a key for, and does not ask again.
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, tuple(score))
        return [tuple(score) for score in found]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts; one that is longer than a training row is
        judged in windows that do not overlap.
        """
        del disable_tqdm
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = utils.get_rolling_token_windows(ids, self.eot_token_id, self.max_length, 1)
            for pair in pairs:
                # No token is judged twice.
                context, judged = utils.make_disjoint_window(pair)
                windows.append(Request(context, judged))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, score in zip(owners, self.scorer(windows)):
            totals[i] += score.log_likelihood
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Returns what the model writes after each prompt, up to a stop string."""
        del disable_tqdm
        # Most tasks draw nothing, so it is made when it is first asked for.
        if self._sampler is None:
            self._sampler = make_sampler(self.run.config.model, self.run.tokenizer, self.max_length)
        # Prompts with the same settings are decoded together.
        groups: dict[Settings, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        for settings, members in groups.items():
            prompts = [requests[i].args[0] for i in members]
            weights = self.run.judged, self.run.router_state
            for i, text in zip(members, self._sampler(*weights, prompts, settings)):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts


def _settings(given: dict[str, Any]) -> Settings:
    """Returns how a task wants its answers drawn; greedy unless it says otherwise."""
    until = given.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    # A task may give a temperature and not mean it.
    draws = bool(given.get("do_sample", False)) and float(given.get("temperature", 0)) > 0
    return Settings(
        max_tokens=int(given.get("max_gen_toks", MOST_TOKENS)),
        temperature=float(given.get("temperature", 0)) if draws else 0.0,
        top_k=int(given.get("top_k", 0)) if draws else 0,
        top_p=float(given.get("top_p", 1)) if draws else 1.0,
        seed=0,
        stop=tuple(stop for stop in until if stop),
    )
