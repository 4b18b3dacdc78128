"""Tasks of EleutherAI's lm-evaluation-harness with a trained language model (extra `eval`).

    python -m moe_jax evaluate --workdir RUN --tasks text:FILE
    python -m moe_jax evaluate --workdir RUN --tasks mmlu:FOLDER --num_fewshot 5
    python -m moe_jax evaluate --workdir RUN --tasks hellaswag,arc_easy
    python -m moe_jax evaluate --workdir RUN --tasks NAME --include FOLDER

The first two read files of this machine. The third is of the harness, which downloads its data. The
last is a task in a YAML file of a folder. docs/evaluate.md tells more.
"""

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from moe_jax import extras
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.run import Run, open_run
from moe_jax.runtime import shell
from moe_jax.tasks import TASKS


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir", type=Path, required=True, help="of the run that trained the model"
    )
    parser.add_argument(
        "--tasks",
        action="append",
        required=True,
        help="names, with commas between them; may be repeated",
    )
    parser.add_argument("--include", type=Path, help="a folder of tasks in YAML files")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--num_fewshot", type=int, help="examples before each question")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--batch_size", type=int, default=8, help="texts at once (default 8)")
    parser.add_argument("--out", type=Path, help="a JSON file for all that the harness returns")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    flags = parse(argv)
    refuse_wrong_flags(flags)
    # Its own messages name what is missing less clearly.
    extras.require("python -m moe_jax evaluate", "lm_eval", "datasets")
    trained = open_run(flags.workdir, flags.step)
    cfg = trained.config
    if not TASKS[cfg.task].is_language:
        raise UserError(
            f'--workdir {flags.workdir} is a run of task = "{cfg.task}": the harness judges '
            "language models"
        )
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        results = evaluate(trained, flags)
    show(results)
    if flags.out:
        write(flags.out, results, trained)
        shell.tell(f"written: {flags.out}")
    return 0


def refuse_wrong_flags(flags: argparse.Namespace) -> None:
    """Raises UserError for a number that means nothing, and for a folder that is none."""
    numbers = {"--batch_size": (flags.batch_size, 1), "--num_fewshot": (flags.num_fewshot, 0)}
    numbers["--limit"] = (flags.limit, 1)
    for flag, (value, least) in numbers.items():
        if value is not None and value < least:
            raise UserError(f"{flag} {value} must be at least {least}")
    if flags.include and not flags.include.is_dir():
        raise UserError(f"--include {flags.include} is no directory")


def evaluate(trained: Run, flags: argparse.Namespace) -> dict[str, Any]:
    """Returns what the harness makes of the model. Raises UserError for an unknown task."""
    # Imported here: the harness comes with the extra [eval], and takes seconds.
    import lm_eval

    from moe_jax.harness import tasks
    from moe_jax.harness.manager import manager_for
    from moe_jax.harness.model import HarnessModel

    names = [name for given in flags.tasks for name in given.split(",") if name]
    # A name of the harness stays a text; what is read from files here becomes a task.
    wanted = tasks.made(names)
    manager = manager_for([task for task in wanted if isinstance(task, str)], flags.include)
    model = HarnessModel(trained, flags.batch_size)
    found = lm_eval.simple_evaluate(
        model,
        tasks=wanted,
        num_fewshot=flags.num_fewshot,
        limit=flags.limit,
        task_manager=manager,
        # Errors of perplexities would take a hundred thousand draws.
        bootstrap_iters=1000,
    )
    if found is None:
        raise UserError(f"--tasks {','.join(names)}: the harness found nothing to do")
    return dict(found)


def table(results: dict[str, Any], column: str = "results") -> str:
    """Returns the table of the harness, with all its digits."""
    from lm_eval.utils import make_table

    # The library that draws it forks a process for each core. A fork of a process that runs the
    # threads of JAX may hang.
    with mock.patch("multiprocessing.cpu_count", return_value=1):
        return make_table(results, column)


def show(results: dict[str, Any]) -> None:
    print(table(results))
    if results.get("groups"):
        print(table(results, "groups"))


def write(path: Path, results: dict[str, Any], trained: Run) -> None:
    """Writes the results, with the run and the step that they are of."""
    # The samples are every question with its answers: megabytes.
    kept = {key: value for key, value in results.items() if key != "samples"}
    kept |= {"workdir": str(trained.workdir), "step": trained.step}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")
