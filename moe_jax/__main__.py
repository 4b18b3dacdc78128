"""`python -m moe_jax NAME ...`: the table of commands.

Training is `python -m moe_jax.main --config ... --workdir ...`.
"""

import difflib
import importlib
import sys

from moe_jax import exit_codes
from moe_jax.errors import UserError
from moe_jax.parallel import device_memory
from moe_jax.runtime import memory, shell

COMMANDS = {
    "config": "print every key of a config, with its comment, and mark what was changed",
    "data": "make the files of a task's data set from what its publisher distributes",
    "prepare": "make a token dataset from text, once",
    "bench": "time training, decoding and the start, beside transformers if you like",
    "generate": "continue a prompt with a trained model",
    "plan": "memory, FLOPs, traffic and time of a run on hardware that is not there",
    "verify": "prove that a config computes the same on every mesh",
    "leak": "measure whether later tokens or other sequences change earlier outputs",
    "evaluate": "judge a trained language model by tasks of lm-evaluation-harness",
    "convert": "make another model of a trained one: exported, upcycled, with other experts",
    "fsck": "check the files of a run, and repair what can be",
    "probe": "what a trained model's routing and experts are worth",
    "report": "one HTML page of the curves and the routing of some runs",
}
TRAINING = "python -m moe_jax.main --config configs/quickstart.py --workdir runs/quickstart"
TRAINS = f"a model is trained by `{TRAINING}`"
GENERATES = "a trained model writes text by `python -m moe_jax generate --workdir DIR`"
EVALUATES = (
    "a run evaluates itself: `python -m moe_jax.main` with the flags of a finished run does so "
    "again, `python -m moe_jax evaluate --workdir DIR` judges it by tasks of others, and "
    "`python -m moe_jax probe --workdir DIR` looks into its routing"
)
# What other programs call it, and what it is here.
ELSEWHERE = {
    **dict.fromkeys(("train", "main", "run", "fit", "pretrain", "finetune", "resume"), TRAINS),
    **dict.fromkeys(("eval", "test", "validate"), EVALUATES),
    **dict.fromkeys(("sample", "predict", "infer", "inference", "decode", "chat"), GENERATES),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 64
    if argv[0] not in COMMANDS:
        print(f"error: {unknown(argv[0])}", file=sys.stderr)
        return 64
    try:
        return importlib.import_module(f"moe_jax.commands.{argv[0]}").main(argv[1:])
    except UserError as e:
        shell.tell(f"error: {e}", sys.stderr)
        return e.code
    except RuntimeError as error:
        reason = device_memory.exhausted(error)
        if not reason:
            raise
        shell.tell(f"error: {reason}", sys.stderr)
        return exit_codes.CONFIG


def usage() -> str:
    lines = [f"  {name:10} {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m moe_jax COMMAND ...\n", *lines, f"\n  {TRAINING}   trains a model"]
    )


def unknown(name: str) -> str:
    """Returns what to type instead of a command that there is not: what it is called here, or the
    nearest name.
    """
    if name.startswith("-"):
        return f"{name} comes before a command ({', '.join(COMMANDS)}); {TRAINS}"
    known = ELSEWHERE.get(name.lower())
    if known is None:
        near = difflib.get_close_matches(name.lower(), [*COMMANDS, *ELSEWHERE], 1)
        if near and near[0] in COMMANDS:
            return f"{name!r} is no command: did you mean `python -m moe_jax {near[0]}`?"
        known = ELSEWHERE[near[0]] if near else f"choose one of {', '.join(COMMANDS)}; {TRAINS}"
    return f"{name!r} is no command: {known}"


def console() -> int:
    """Runs the command that the shell gave, and returns its exit code: the script `moe_jax`."""
    # Before jax is imported, which has threads.
    memory.keep()
    return shell.run_command(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(console())
